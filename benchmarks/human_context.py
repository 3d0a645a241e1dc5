"""Recorded human speech under lists of rare words: is what a list says heard, and is what nobody said left alone?

    SEEDLING_SPEECH=FOLDER python benchmarks/human_context.py --out runs/human_speech [--quick] [STEP.key=value ...]

Goes on from the run of benchmarks/human_speech.py in OUT. The pipeline human_context runs in OUT/context: contexts for
the training sets with sentences, context_sft, and each dev set decoded without a list, with the rare words that are
said among 20, 100 and 500 distractors (`right`) and with 21 rare words that are not (`wrong`), by joint and by plain
search. Prints a markdown table, also written to OUT/context/table.md. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SETS = ("kathleen_en", "kerstin_de", "librispeech_250")
SEARCHES = ("joint", "plain")
# Head of a column -> rate in context.json; `chance` is that of the hypotheses without a list.
COLUMNS = {
    "WER": ("wer", "rates"),
    "B-WER": ("b_wer", "rates"),
    "U-WER": ("u_wer", "rates"),
    "recall": ("recall", "rates"),
    "strict recall": ("strict_recall", "rates"),
    "echo": ("echo_rate", "rates"),
    "echo by chance": ("echo_rate", "chance"),
}
GERMAN = "kerstin_de"
QUICK = ("context_sft.train.max_steps=4", "context_sft.train.log_every=2")


def write_words(out: Path) -> None:
    """Write the German training transcripts, in which its words are counted; the English ones are in the recordings."""
    rows = map(json.loads, (out / "inputs" / f"{GERMAN}.jsonl").read_text(encoding="utf-8").splitlines())
    text = "".join(f"{row['text']}\n" for row in rows)
    path = out / "context" / "words_de.txt"
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def table(sets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return markdown from {set: {search: the conditions of its context.json}}: a row per condition and search."""
    head = ["set", "list", "search", *COLUMNS]
    rows = [head, ["---"] * len(head)]
    for name, searches in sets.items():
        rows += _rows(name, searches)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(name: str, searches: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    conditions = next(iter(searches.values()))
    yield [name, "none", "", *_cells(conditions["none"])]
    for condition in (condition for condition in conditions if condition != "none"):
        for search, found in searches.items():
            yield [name, condition.replace("_", " "), search, *_cells(found[condition])]


def _cells(entry: Mapping[str, Any]) -> Iterator[str]:
    for rate, source in COLUMNS.values():
        if rate == "wer":
            yield _cell(entry["wer"]["percent"], entry["wer"]["interval"]["percent"])
            continue
        found = entry[source][rate]
        means_something = found["fraction"] is not None and (entry["with_context"] or rate != "strict_recall")
        interval = found["interval"]["percent"] if means_something and found["interval"] else None
        yield _cell(100 * found["fraction"], interval) if means_something else ""


def _cell(percent: float, interval: list[float] | None) -> str:
    return f"{percent:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def facts(context: Path) -> str:
    """Return how many rare words each set says, and how long the parts of the run took."""
    said = []
    for name in SETS:
        entry = _conditions(context, name, "joint")["none"]
        said.append(f"{name} {entry['rates']['recall']['of']:,} in {entry['utterances']:,} utterances")
    stages = json.loads((context / "summary.json").read_text())["stages"]
    decoding = sum(stages[f"{name}_{search}"]["seconds"] for name in SETS for search in SEARCHES)
    return (
        f"rare words said: {', '.join(said)}; context_sft {stages['context_sft']['seconds']:.0f} s, decoding "
        f"{decoding:.0f} s; percent, 95 % bootstrap over utterances"
    )


def _conditions(context: Path, name: str, search: str) -> dict[str, Any]:
    file = context / f"{name}_{search}" / "artifact" / "context.json"
    return json.loads(file.read_text(encoding="utf-8"))["conditions"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of a run of benchmarks/human_speech.py")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows only that it works")
    parser.add_argument("overrides", nargs="*", metavar="STEP.key=value", help="as for `seedling pipeline`")
    args = parser.parse_intermixed_args()
    from seedling.launch.pipeline import run_pipeline
    from seedling.launch.pipeline_config import load_pipeline

    context = args.out / "context"
    if not (args.out / "sft/artifact/manifest.json").is_file():
        parser.error(f"--out {args.out}: no sft in it; first run benchmarks/human_speech.py --out {args.out}")
    write_words(args.out)
    overrides = [f"run_dir={context}", *(QUICK if args.quick else ()), *args.overrides]
    code = run_pipeline(load_pipeline("human_context", overrides=overrides))
    if code:
        return code
    text = table({name: {search: _conditions(context, name, search) for search in SEARCHES} for name in SETS})
    text = f"{text}\n\n{facts(context)}\n"
    (context / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
