"""sft on two machines, which loses one of them ten times, against the run that lost none.

    python benchmarks/lost_nodes.py --losses 10 --seed 0                    a tiny recogniser of tones
    python benchmarks/lost_nodes.py --losses 10 --seed 0 --demo runs/demo   the demo's sft, on what `make demo` left

The machines are network namespaces: root and iproute2 are needed, no GPU. How one is lost, and what is checked, is in
tests/integration/lost_nodes.py.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/integration"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/stages"))

import lost_nodes
import tiny_runs
import two_nodes
import yaml

SFT_DEMO = Path(__file__).resolve().parents[1] / "configs/stages/sft_demo.yaml"


def demo_sft(folder: Path, demo: Path, *, steps: int) -> Path:
    """Write the config of the demo's sft for so many steps of four micro-batches; the LLM takes part after 20."""
    values = yaml.safe_load(SFT_DEMO.read_text())
    values["inputs"] = {
        name: str((demo / of / "artifact").resolve())
        for name, of in (("llm", "lm_pretrain"), ("encoder", "pretrain_2"))
    }
    values["data"] = {"train": [str((demo / "shards_train").resolve())]}
    values["ctc_steps"] = 20
    values["train"] |= {"max_steps": steps, "micro_batch_seconds": 12, "log_every": 1, "wandb": {"mode": "disabled"}}
    return tiny_runs.write_yaml(folder / "sft.yaml", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo", type=Path, help="run folder of `make demo`")
    arguments = parser.parse_args()
    if reason := two_nodes.missing():
        parser.error(reason)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {line}", flush=True)

    with tempfile.TemporaryDirectory() as name, two_nodes.two_nodes() as nodes:
        folder, steps = Path(name), 9 * arguments.losses
        config = (
            demo_sft(folder, arguments.demo, steps=steps)
            if arguments.demo
            else lost_nodes.tiny_sft(folder, steps=steps)
        )
        told = lost_nodes.lose_nodes(folder, config, nodes, losses=arguments.losses, seed=arguments.seed, say=say)
    print(
        f"{len(told.lost)} losses in {told.seconds:.0f} s, {told.restarts} crashes seen by launchers; ledger and "
        f"weights are those of the undisturbed run; steps trained again: at most {max(told.steps_again)}, "
        f"median {statistics.median(told.steps_again):g}"
    )


if __name__ == "__main__":
    main()
