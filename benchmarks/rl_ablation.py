"""What learning from one's own errors is worth, and what it costs: mwer on finished recognisers, an ablation.

    python benchmarks/rl_ablation.py demo --run runs/demo --out runs/rl_demo [--seeds 1,2,3] [--quick]
    python benchmarks/rl_ablation.py human --run runs/human_speech --out runs/rl_human [--seeds 1,2,3] [--quick]

Goes on from the recogniser of context_sft in RUN, of the demo or of benchmarks/human_context.py, for the same steps
with each aim and seed:

    cross-entropy      the control: as many more steps of what it was trained with, on triples and pairs
    WER                MWER, every error costs 1, on pairs without contexts
    weighted WER       errors on keywords cost five, on pairs
    weighted, triples  the same on triples and pairs, as context_sft had them

and scores each without a context, with the right list and with a wrong one. Intervals are Student's over the seeds; the
recogniser that all go on from is one, so what is left of the choice of its test utterances is not in them: OUT/table.md
names the paired bootstrap of each run as well. Writes OUT/table.md; what is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from seedling.data.scoring.over_seeds import Estimate

START = "after context SFT"
COLUMNS = {
    "WER": "wer",
    "WER, right list": "right/wer",
    "WER, wrong list": "wrong/wer",
    "keyword F1, right": "right/f1",
    "strict recall, right": "right/strict_recall_fixed",
    "echo, wrong": "wrong/echo_rate",
}
MARGIN = {"strict recall, right": "right/strict_recall"}  # of the recogniser that all go on from: its own measure


class Domain(NamedTuple):
    """Where things lie in RUN, and which settings of mwer suit the recogniser."""

    config: str
    acllm: str
    train: dict[str, str]  # folder of shards -> its contexts, "" where it has none
    test: dict[str, dict[str, str]]  # folder of shards -> condition -> its contexts
    settings: dict[str, Any]


DOMAINS = {
    "demo": Domain(
        config="mwer_demo",
        acllm="context_sft/artifact",
        train={"shards_rl": "contexts_rl"},
        test={"shards_test": {"right": "contexts_right", "wrong": "contexts_wrong"}},
        settings={},
    ),
    "human": Domain(
        config="mwer_demo",
        acllm="context/context_sft/artifact",
        train={
            "train_kathleen_en": "context/contexts_kathleen_en",
            "train_librispeech_250": "context/contexts_librispeech_250",
            **{f"train_{name}": "" for name in ("fsdd_isolated", "fsdd_strings", "arabic_isolated", "arabic_strings")},
        },
        test={
            "dev_kathleen_en": {"right": "context/right_20_kathleen_en", "wrong": "context/wrong_20_kathleen_en"},
            "dev_fsdd_strings": {},
            "dev_arabic_strings": {},
        },
        # These corpora name no keywords. On pairs, too, they are the words that the training transcripts hardly have.
        settings={"context.max_tokens": 4096, "risk.keywords": ["rare"], "risk.rare_max_count": 3},
    ),
}
PAIRS: dict[str, Any] = {"contexts": []}
AIMS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"nbest.size": 1, "ce_weight": 1.0},
    "WER": {"risk.keyword_weight": 1, **PAIRS},
    "weighted WER": {"risk.keyword_weight": 5, **PAIRS},
    "weighted, triples": {"risk.keyword_weight": 5},
}


def step_name(aim: str, seed: int) -> str:
    return f"{aim.replace(', ', '_').replace(' ', '_')}_{seed}"


def pipeline(domain: Domain, run: Path, out: Path, *, seeds: Sequence[int], more: dict[str, Any]) -> dict[str, Any]:
    """Return the pipeline: the recogniser as it is on each test set, then each aim and seed trained and scored."""
    trains = {
        "data.train": [str(run / shards) for shards in domain.train],
        "contexts": [str(run / folder) if folder else "" for folder in domain.train.values()],
        **domain.settings,
        **more,
    }
    steps: list[dict[str, Any]] = []
    for test, contexts in domain.test.items():
        scores = {"data": str(run / test), "contexts": {name: str(run / at) for name, at in contexts.items()}}
        steps.append(_evaluation(f"{test}_start", str(run / domain.acllm), scores))
    for seed in seeds:
        for aim, settings in AIMS.items():
            name = step_name(aim, seed)
            step = {
                "name": name,
                "stage": "mwer",
                "config": domain.config,
                "inputs": {"acllm": str(run / domain.acllm)},
            }
            steps.append({**step, "set": {**trains, **settings, "seed": seed}})
            for test, contexts in domain.test.items():
                scores = {"data": str(run / test), "contexts": {at: str(run / path) for at, path in contexts.items()}}
                steps.append(_evaluation(f"{test}_{name}", f"${{{name}}}", scores, baseline=f"${{{test}_start}}"))
    return {"name": out.name, "run_dir": str(out), "nproc": 2, "steps": steps}


def _evaluation(name: str, acllm: str, scores: dict[str, Any], *, baseline: str = "") -> dict[str, Any]:
    inputs = {"acllm": acllm} | ({"baseline": baseline} if baseline else {})
    return {"name": name, "stage": "evaluate", "inputs": inputs, "set": {**scores, "worst": 5}}


# --- the table -------------------------------------------------------------------------------------------------------


def table(out: Path, test: str, *, seeds: Sequence[int]) -> str:
    """Return markdown: a row per aim, the mean over seeds with its interval."""
    start = _metrics(out, f"{test}_start")
    columns = {head: name for head, name in COLUMNS.items() if name in start or MARGIN.get(head) in start}
    rows = [[test, *columns], ["---"] * (1 + len(columns))]
    first = [f"{100 * start[MARGIN.get(head, name)]:.1f}" for head, name in columns.items()]
    rows.append([START, *first])
    for aim in AIMS:
        runs = [_metrics(out, f"{test}_{step_name(aim, seed)}") for seed in seeds]
        cells = [Estimate.of([run[name] for run in runs]).shown(percent=True) for name in columns.values()]
        rows.append([aim, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def changes(out: Path, test: str, *, seeds: Sequence[int]) -> str:
    """Return each run's change of the error rate from the start, with its paired bootstrap interval over utterances."""
    lines = []
    for aim in AIMS:
        shown = []
        for seed in seeds:
            run = _metrics(out, f"{test}_{step_name(aim, seed)}")
            values = [100 * run[f"wer_change{end}"] for end in ("", "_low", "_high")]
            shown.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*values))
        lines.append(f"{aim}: {'; '.join(shown)}")
    return f"Change of WER on {test}, by seed: " + ". ".join(lines)


def _metrics(out: Path, step: str) -> dict[str, float]:
    return json.loads((out / step / "artifact" / "manifest.json").read_text(encoding="utf-8"))["metrics"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--run", type=Path, required=True, help="the folder of the demo, or of human_speech")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--quick", action="store_true", help="two steps, one seed: shows only that it works")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of mwer, the same for all aims")
    args = parser.parse_intermixed_args()
    from seedling.launch.pipeline import run_pipeline
    from seedling.launch.pipeline_config import load_pipeline

    domain, seeds = DOMAINS[args.domain], [1] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    if not (args.run / domain.acllm / "manifest.json").is_file():
        parser.error(f"--run {args.run}: no {domain.acllm} in it; finish that run first")
    more = {"train.max_steps": 2} if args.quick else {}
    more |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.overrides)}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "pipeline.yaml"
    steps = pipeline(domain, args.run, args.out, seeds=seeds, more=more)
    file.write_text(yaml.safe_dump(steps, sort_keys=False), encoding="utf-8")
    code = run_pipeline(load_pipeline(str(file)))
    if code:
        return code
    parts = [part(args.out, test, seeds=seeds) for test in domain.test for part in (table, changes)]
    text = "\n\n".join(parts) + "\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
