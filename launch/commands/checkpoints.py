"""Commands about the checkpoints of a run that is still going, or that ended early."""

import argparse
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of this family."""
    export = commands.add_parser("export-checkpoint", help="write the fp32 weights of a checkpoint as safetensors")
    export.add_argument("run", metavar="RUN", help="the run's folder")
    export.add_argument("--step", type=int, help="the checkpoint after this step (default: the newest whole one)")
    export.add_argument("--out", required=True, metavar="PATH", help="a file x.safetensors, or a folder for 5 GB files")
    export.set_defaults(action=export_checkpoint)


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Write weights and say from where; what was frozen is not in a checkpoint."""
    from ...stages.runtime.exported_weights import choose_checkpoint, write_weights

    checkpoint = choose_checkpoint(Path(arguments.run), step=arguments.step)
    written = write_weights(checkpoint, Path(arguments.out))
    print(f"{checkpoint}: {written.parameters:,} numbers of {written.tensors} tensors in fp32 to {arguments.out}")
    print("what the stage froze is not in a checkpoint: it is in the run's inputs")
