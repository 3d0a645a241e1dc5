"""What self-supervised training is worth with ten minutes of labels: human speech, three seeds, intervals over them.

    SEEDLING_SPEECH=FOLDER python benchmarks/ssl_human.py --out runs/ssl_human [--quick] [STEP.key=value ...]

Writes OUT/inputs (a manifest of all training audio without its texts, one of ten minutes with them, and text for a
tiny LM), runs the pipeline ssl_human, and compares encoders as they were drawn, after iteration 1 and after iteration
2, each probed and fine-tuned for the same steps. Writes OUT/table.md and OUT/errors.svg. What is finished is not
repeated.

The encoder is tiny (4 x 96) and sees five hours for a minute: it says which way the errors go, not how low they get.
The LLM of sft is too small and too little trained to be listened through, so the error of sft is that of its CTC head.
Intervals are Student's t over the seeds, of a mean and of the difference of two runs with the same seed. A step down is
called real where the interval of the difference leaves out zero.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seedling.data.scoring.figure import Mark, svg_figure
from seedling.data.scoring.over_seeds import Estimate

SEEDS = (1, 2, 3)
ENCODERS = ("random", "iteration 1", "iteration 2")
UNLABELLED = {
    "fsdd": "fsdd/isolated_train.jsonl",
    "arabic_digits": "arabic_digits/isolated_train.jsonl",
    "kathleen_en": "kathleen_en/train.jsonl",
    "kerstin_de": "kerstin_de/train.jsonl",
    "librispeech_250": "librispeech_250/train.jsonl",
    "barista_unlabelled": "barista_unlabelled/train.jsonl",
}
LABELLED_SECONDS = {"kathleen_en": 360.0, "librispeech_250": 240.0}
LM_LINES, PIECE_WORDS = 4000, 10
QUICK_UTTERANCES = 40


class Measure(NamedTuple):
    """One column: the step whose manifest holds the metric; `layer` stands for the layer that the probe chose."""

    name: str
    step: str
    metric: str
    percent: bool


MEASURES = (
    Measure("probe CER, kathleen", "probe", "valid/kathleen/layer_{layer:02d}/cer", True),
    Measure("probe loss, kathleen", "probe", "valid/kathleen/layer_{layer:02d}/loss", False),
    Measure("probe CER, librispeech", "probe", "valid/librispeech/layer_{layer:02d}/cer", True),
    Measure("probe loss, librispeech", "probe", "valid/librispeech/layer_{layer:02d}/loss", False),
    Measure("SFT, CER of CTC, kathleen", "sft", "valid/kathleen/ctc_cer", True),
)
DRAWN = (0, 2, 4)  # measures in the figure


# --- inputs ----------------------------------------------------------------------------------------------------------


def read_manifest(speech: Path, name: str) -> list[dict]:
    """Return a set's rows with ids that are unique among sets, and absolute paths."""
    manifest = speech / UNLABELLED[name]
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        row["id"] = f"{name}/{Path(row['audio_filepath']).stem}"
        row["audio_filepath"] = str(manifest.parent / row["audio_filepath"])
    return rows


def few(rows: list[dict], *, seconds: float) -> Iterator[dict]:
    """Yield shuffled utterances, each sentence once, until they are so long together."""
    said: set[str] = set()
    for row in random.Random(0).sample(rows, len(rows)):
        if row["text"] not in said:
            said.add(row["text"])
            seconds -= row["duration"]
            yield row
        if seconds <= 0:
            return


def lm_text(speech: Path) -> Iterator[str]:
    """Yield pieces of LibriSpeech's sentences, which nobody in the dev sets says."""
    path = speech / "text/librispeech_train100_transcripts.txt"
    for line in path.read_text(encoding="utf-8").splitlines()[:LM_LINES]:
        words = line.split()
        yield from (" ".join(words[at : at + PIECE_WORDS]) for at in range(0, len(words), PIECE_WORDS))


def write_inputs(speech: Path, out: Path) -> None:
    """Write the manifests and the text: the same bytes for the same recordings, so that a rerun skips what is done."""
    sets = {name: read_manifest(speech, name) for name in UNLABELLED}
    unlabelled = [
        {"id": row["id"], "audio_filepath": row["audio_filepath"], "duration": row["duration"]}
        for rows in sets.values()
        for row in rows
    ]
    random.Random(0).shuffle(unlabelled)  # so that --quick takes some of each
    labelled = [
        {key: row[key] for key in ("id", "audio_filepath", "duration", "text")}
        for name, seconds in LABELLED_SECONDS.items()
        for row in few(sets[name], seconds=seconds)
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("unlabelled", unlabelled), ("labelled", labelled)):
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows):,} utterances, {sum(row['duration'] for row in rows) / 60:.1f} minutes")
    (out / "lm_text.txt").write_text("".join(f"{line}\n" for line in lm_text(speech)), encoding="utf-8")


def quick_overrides() -> list[str]:
    """A run of minutes that shows that everything works and nothing else."""
    overrides = [f"{name}.limit={QUICK_UTTERANCES}" for name in ("unlabelled", "labelled")]
    overrides += [f"dev_{name}.limit=8" for name in ("kathleen", "librispeech")]
    overrides += ["lm.train.max_steps=4"]
    for seed in SEEDS:
        steps = [f"pretrain_{n}_{seed}" for n in (1, 2)]
        steps += [f"{kind}_{n}_{seed}" for kind in ("probe", "sft") for n in range(len(ENCODERS))]
        overrides += [f"{step}.train.max_steps=4" for step in steps]
        overrides += [f"labels_{seed}.clusters=10", f"labels_{seed}.sample_frames=500"]
    return overrides


# --- the table -------------------------------------------------------------------------------------------------------


def read_values(out: Path, measure: Measure) -> list[list[float]]:
    """Return the measured values, [encoder][seed]."""

    def value(number: int, seed: int) -> float:
        manifest = out / f"{measure.step}_{number}_{seed}" / "artifact" / "manifest.json"
        metrics = json.loads(manifest.read_text(encoding="utf-8"))["metrics"]
        return metrics[measure.metric.format(layer=metrics.get("layer", 0))]

    return [[value(number, seed) for seed in SEEDS] for number in range(len(ENCODERS))]


def verdict(difference: Estimate) -> str:
    if abs(difference.mean) <= difference.half_width:
        return "not shown"
    return "real" if difference.mean < 0 else "worse"


def table(values: dict[Measure, list[list[float]]]) -> str:
    """Return markdown: a row per measure, a column per encoder and one per step between two."""
    arrows = [f"{a} to {b}" for a, b in itertools.pairwise(ENCODERS)]
    rows = [["", *ENCODERS, *arrows], ["---"] * (1 + len(ENCODERS) + len(arrows))]
    for measure, by_encoder in values.items():
        cells = [measure.name + (" (%)" if measure.percent else " (nats a byte)")]
        cells += [Estimate.of(of_seeds).shown(percent=measure.percent) for of_seeds in by_encoder]
        for before, after in itertools.pairwise(by_encoder):
            difference = Estimate.of([b - a for a, b in zip(before, after)])
            cells.append(f"{difference.shown(percent=measure.percent, signed=True)}: {verdict(difference)}")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figure(values: dict[Measure, list[list[float]]]) -> str:
    """Return the SVG of the error rates: a line through the means, a dot for each seed."""
    marks = []
    for colour, measure in enumerate(MEASURES[number] for number in DRAWN):
        by_encoder = values[measure]
        places = list(range(len(ENCODERS)))
        means = [statistics.fmean(of_seeds) for of_seeds in by_encoder]
        marks.append(Mark(measure.name, places, means, "line", colour=colour))
        dots = [(place, value) for place in places for value in by_encoder[place]]
        marks.append(Mark("", [x for x, _ in dots], [y for _, y in dots], "dots", colour=colour))
    ticks = dict(enumerate(ENCODERS))
    title = f"Ten minutes of labels, {len(SEEDS)} seeds"
    return svg_figure(marks, title=title, x_label="encoder", y_label="error rate", percent=True, x_ticks=ticks)


def facts(out: Path) -> str:
    """Return one line about the run: masked accuracy beside always guessing, use of the codes, seconds of all steps."""
    stages = json.loads((out / "summary.json").read_text(encoding="utf-8"))["stages"]
    parts = []
    for number in (1, 2):
        runs = [stages[f"pretrain_{number}_{seed}"] for seed in SEEDS]
        means = {
            name: statistics.fmean(run[f"valid/dev/{name}"] for run in runs)
            for name in ("mask_acc", "unigram_acc", "target_perplexity")
        }
        parts.append(
            f"iteration {number}: masked accuracy {means['mask_acc']:.1%} on dev, most frequent code "
            f"{means['unigram_acc']:.1%}, perplexity of the codes {means['target_perplexity']:.0f}"
        )
    layers = ", ".join(
        f"{name} {[stages[f'probe_{number}_{seed}']['layer'] for seed in SEEDS]}"
        for number, name in enumerate(ENCODERS)
    )
    minutes = sum(stage["seconds"] for stage in stages.values()) / 60
    return f"{'; '.join(parts)}; chosen layers: {layers}; all steps took {minutes:.0f} minutes"


def write_results(out: Path) -> str:
    """Write OUT/table.md and OUT/errors.svg; return the text of the former."""
    values = {measure: read_values(out, measure) for measure in MEASURES}
    text = f"{table(values)}\n\n{facts(out)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "errors.svg").write_text(figure(values), encoding="utf-8")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--quick", action="store_true", help="a few utterances and steps: shows only that it works")
    parser.add_argument("overrides", nargs="*", metavar="STEP.key=value", help="as for `seedling pipeline`")
    args = parser.parse_args()
    from seedling.launch.pipeline import run_pipeline
    from seedling.launch.pipeline_config import load_pipeline

    speech = Path(os.environ.get("SEEDLING_SPEECH", ""))
    if not (speech / UNLABELLED["barista_unlabelled"]).is_file():
        parser.error("SEEDLING_SPEECH must name the folder of recordings, with kathleen_en/, barista_unlabelled/, ...")
    write_inputs(speech.resolve(), args.out / "inputs")
    overrides = [f"run_dir={args.out}", *(quick_overrides() if args.quick else []), *args.overrides]
    code = run_pipeline(load_pipeline("ssl_human", overrides=overrides))
    if code:
        return code
    print(f"\n{write_results(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
