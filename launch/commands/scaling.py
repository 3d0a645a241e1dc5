"""The command `scaling`: encoders of several sizes, one after the other, and the line through their losses."""

import argparse


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `scaling`."""
    parser = commands.add_parser("scaling", help="train a ladder of encoder sizes and fit loss = a * log2(N) + b")
    parser.add_argument("file", metavar="STUDY", help="a YAML file, or the name of a packaged one such as demo")
    parser.add_argument("--from", dest="start", metavar="STEP", help="run this step and all after it anew")
    parser.add_argument("overrides", nargs="*", metavar="STEP.key=value", help="also run_dir=DIR and nproc=N")
    parser.set_defaults(action=scaling)


def scaling(arguments: argparse.Namespace) -> int:
    """Load and check the whole study, train what is missing, then fit and draw."""
    from ..pipeline import run_pipeline
    from ..scaling import load_ladder, print_study, write_study

    cfg, pipeline = load_ladder(arguments.file, overrides=arguments.overrides)
    code = run_pipeline(pipeline, start=arguments.start)
    if code == 0:
        print_study(write_study(cfg, pipeline), pipeline.run_dir)
    return code
