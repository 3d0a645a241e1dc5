"""The command `pipeline`: several stages and commands, one after the other, what is unchanged skipped."""

import argparse

from ..placement import add_placement, placement_of


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `pipeline`."""
    parser = commands.add_parser("pipeline", help="run the steps of a pipeline; steps that are unchanged are skipped")
    parser.add_argument("file", metavar="PIPELINE", help="a YAML file, or the name of a packaged one such as demo")
    parser.add_argument("--from", dest="start", metavar="STEP", help="run this step and all after it anew")
    parser.add_argument("--only", metavar="STEP", help="run this step alone; what it reads must be there")
    add_placement(parser)
    parser.add_argument("overrides", nargs="*", metavar="STEP.key=value", help="also run_dir=DIR and nproc=N")
    parser.set_defaults(action=pipeline)


def pipeline(arguments: argparse.Namespace) -> int:
    """Load and check the whole pipeline, then run it."""
    from ..pipeline import run_pipeline
    from ..pipeline_config import load_pipeline

    loaded = load_pipeline(arguments.file, overrides=arguments.overrides)
    placement = placement_of(arguments, nproc=loaded.nproc)
    return run_pipeline(loaded, start=arguments.start, only=arguments.only, placement=placement)
