"""What few bits cost a recogniser, and which part of decoupleQ wins it back: an ablation.

    python benchmarks/quant_ablation.py demo --run runs/demo --out runs/quant_demo [--bits 2,3,4] [--groups 64,-1]
    python benchmarks/quant_ablation.py human --run runs/human_speech --out runs/quant_human [--whole] [--quick]

Quantises the encoder and the LLM of the finished recogniser in RUN for every number of bits and size of groups, by

    RTN, GPTQ         the baselines
    layer-wise        decoupleQ, module by module
    block-wise        and each block refined towards the full-precision one
    fine-tuned        and scales, zeros and norms trained on the task, the full-precision recogniser as their teacher

and, at the fewest bits and the first size of groups, the encoder alone and the LLM alone (not with --whole). Two rows
are not quantised: the recogniser as it is, and the control, which has had the same extra training on all its weights.
Each is scored as it is stored; intervals are a bootstrap over utterances. Writes OUT/table.md; what is finished is not
repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

START, CONTROL = "full precision", "full precision, trained on"
LAYER, BLOCK, TUNED = "layer-wise", "+ block-wise", "+ fine-tuned"
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn", "refine": None},
    "GPTQ": {"method": "gptq", "refine": None},
    LAYER: {"refine": None},
    BLOCK: {},
}
ROWS = (*METHODS, TUNED)
WHOLE = "encoder and LLM"
PARTS = {WHOLE: "", "encoder": "llm.*", "LLM": "encoder.*"}  # part -> what stays as it is


class Domain(NamedTuple):
    """Where things lie in RUN, and which stage and settings train its recogniser on."""

    acllm: str
    train: dict[str, str]  # folder of shards -> its contexts, "" where it has none
    tests: tuple[str, ...]
    calibration: dict[str, Any]
    control: str
    control_config: str
    control_settings: dict[str, Any]


GENTLY = {"train.max_steps": 150, "train.warmup_steps": 6, "train.save_every": 0}  # as quant_finetune_demo
DOMAINS = {
    "demo": Domain(
        acllm="context_sft/artifact",
        train={"shards_train": "contexts_train"},
        tests=("shards_test",),
        calibration={},
        control="context_sft",
        control_config="context_sft_demo",
        control_settings={
            **GENTLY,
            "encoder.dropout": 0.0,  # as in quant_finetune
            "train.lr": {"encoder": 5e-4, "converter": 7e-4, "ctc_head": 5e-4, "llm": 5e-4},
        },
    ),
    "human": Domain(
        acllm="sft/artifact",
        train={
            f"train_{name}": ""
            for name in (
                "kathleen_en",
                "librispeech_250",
                "fsdd_isolated",
                "fsdd_strings",
                "arabic_isolated",
                "arabic_strings",
            )
        },
        tests=("dev_kathleen_en", "dev_fsdd_strings", "dev_arabic_strings"),
        calibration={},
        control="sft",
        control_config="sft_human",
        control_settings={
            **GENTLY,
            "ctc_steps": 0,
            # As quant_finetune hears it: the extra training differs in what learns, not in the audio.
            "specaugment.num_time_masks": 0,
            "specaugment.num_freq_masks": 0,
            "data.augment.speed_probability": 0.0,
            "train.lr": {"encoder": 5e-4, "converter": 7e-4, "ctc_head": 5e-4, "llm": 5e-4},
        },
    ),
}


class Cell(NamedTuple):
    """One quantised recogniser."""

    method: str
    bits: int
    group_size: int
    part: str

    @property
    def step(self) -> str:
        method = self.method.strip("+ ").replace("-", "_").lower()
        group = "channel" if self.group_size < 0 else f"g{self.group_size}"
        part = "" if not PARTS[self.part] else f"_{self.part.lower()}"
        return f"{method}_{self.bits}_{group}{part}"


def cells(bits: Sequence[int], groups: Sequence[int], parts: Sequence[str]) -> Iterator[Cell]:
    """Yield every cell, each after the one that it goes on from."""
    for part in parts:
        left = PARTS[part]
        for count in [min(bits)] if left else bits:
            for group_size in groups[:1] if left else groups:
                yield from (Cell(method, count, group_size, part) for method in ROWS)


def pipeline(
    domain: Domain,
    run: Path,
    out: Path,
    *,
    bits: Sequence[int],
    groups: Sequence[int],
    parts: Sequence[str],
    more: dict[str, Any],
) -> dict[str, Any]:
    start, contexts = str(run / domain.acllm), [str(run / at) if at else "" for at in domain.train.values()]
    data: dict[str, Any] = {"data.train": [str(run / shards) for shards in domain.train]}
    if any(contexts):
        data["contexts"] = contexts
    steps = list(_evaluations(domain, run, "start", start))
    control = {"name": "control", "stage": domain.control, "config": domain.control_config, "inputs": {"acllm": start}}
    steps += [{**control, "set": {**data, **domain.control_settings, **more}}]
    steps += _evaluations(domain, run, "control", "${control}")
    for cell in cells(bits, groups, parts):
        step: dict[str, Any] = {"name": cell.step}
        if cell.method == TUNED:
            inputs = {"acllm": f"${{{cell._replace(method=BLOCK).step}}}", "teacher": start}
            step |= {"stage": "quant_finetune", "config": "quant_finetune_demo", "inputs": inputs}
            step["set"] = {**data, **more}
        else:
            left = PARTS[cell.part]
            rules = {"rules": [{"pattern": left, "bits": 16}]} if left else {}
            settings = {"bits": cell.bits, "group_size": cell.group_size, **rules, **METHODS[cell.method]}
            step |= {"stage": "quantize", "config": "quantize_demo", "inputs": {"acllm": start}}
            step["set"] = {**data, **domain.calibration, **settings}
        steps += [step, *_evaluations(domain, run, cell.step, f"${{{cell.step}}}")]
    return {"name": out.name, "run_dir": str(out), "nproc": 2, "steps": steps}


def _evaluations(domain: Domain, run: Path, name: str, acllm: str) -> Iterator[dict[str, Any]]:
    for test in domain.tests:
        scores = {"data": str(run / test), "worst": 5}
        yield {"name": f"{test}_{name}", "stage": "evaluate", "inputs": {"acllm": acllm}, "set": scores}


# --- the table -------------------------------------------------------------------------------------------------------


def table(out: Path, test: str, *, bits: Sequence[int], groups: Sequence[int], parts: Sequence[str]) -> str:
    """Return markdown: error rates with their intervals, a row per method, a column per bits and groups."""
    columns = [(count, size) for count in bits for size in groups]
    heads = [f"{count} bits, {'per channel' if size < 0 else f'g{size}'}" for count, size in columns]
    rows = [[test, *heads], ["---"] * (1 + len(heads))]
    for row, name in ((START, "start"), (CONTROL, "control")):
        rows.append([row, _shown(out, test, name), *[""] * (len(heads) - 1)])
    for part in parts:
        for method in ROWS:
            row = [f"{part}: {method}"]
            for count, size in columns:
                step = Cell(method, count, size, part).step
                row.append(_shown(out, test, step) if (out / step).is_dir() else "")
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(out: Path, test: str, name: str) -> str:
    metrics = _metrics(out, f"{test}_{name}")
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * metrics[key] for key in ("wer", "wer_low", "wer_high")))


def seconds(out: Path, *, bits: Sequence[int], groups: Sequence[int], parts: Sequence[str]) -> str:
    """Return how long each step took, and the bits that a packed weight takes."""
    took = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    times = {name: step["seconds"] for name, step in took["stages"].items()}
    lines = [f"control: {times['control']:.0f} s"]
    for cell in cells(bits, groups, parts):
        metrics = _metrics(out, cell.step)
        stored = metrics["quant/bits_per_weight" if cell.method == TUNED else "bits_per_weight"]
        lines.append(f"{cell.step}: {times[cell.step]:.0f} s, {stored:.2f} bits a weight")
    return "Seconds on two cores, start of the processes included: " + "; ".join(lines)


def _metrics(out: Path, step: str) -> dict[str, float]:
    return json.loads((out / step / "artifact" / "manifest.json").read_text(encoding="utf-8"))["metrics"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--run", type=Path, required=True, help="the folder of the demo, or of human_speech")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--groups", default="64,-1")
    parser.add_argument("--whole", action="store_true", help="encoder and LLM together only")
    parser.add_argument("--quick", action="store_true", help="two steps of training, 2 bits, g64: shows that it works")
    args = parser.parse_args()
    from seedling.launch.pipeline import run_pipeline
    from seedling.launch.pipeline_config import load_pipeline

    domain = DOMAINS[args.domain]
    bits = [2] if args.quick else [int(count) for count in args.bits.split(",")]
    groups = [64] if args.quick else [int(size) for size in args.groups.split(",")]
    parts = [WHOLE] if args.whole else [*PARTS]
    asked = {"bits": bits, "groups": groups, "parts": parts}
    if not (args.run / domain.acllm / "manifest.json").is_file():
        parser.error(f"--run {args.run}: no {domain.acllm} in it; finish that run first")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "pipeline.yaml"
    more = {"train.max_steps": 2} if args.quick else {}
    steps = pipeline(domain, args.run, args.out, **asked, more=more)
    file.write_text(yaml.safe_dump(steps, sort_keys=False), encoding="utf-8")
    code = run_pipeline(load_pipeline(str(file)))
    if code:
        return code
    tables = [table(args.out, test, **asked) for test in domain.tests]
    text = "\n\n".join([*tables, seconds(args.out, **asked)]) + "\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
