"""Faults in tiny runs, by the hundred: killed, stopped, hung, out of disk, torn, and each time started again.

    python benchmarks/faults.py --count 1000 --seed 0

It runs on one CPU core and two ranks at most; what is checked is in tests/stages/runtime/fault_drill.py. The first
thing that goes wrong ends it, with what the ranks wrote; the same seed does the same again.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/stages/runtime"))

from fault_drill import drill, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which a start counts as hung")
    arguments = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        report = drill(Path(folder), seed=arguments.seed, count=arguments.count, patience=arguments.patience, say=say)
    print(show(report))


if __name__ == "__main__":
    main()
