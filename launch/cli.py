"""The command `seedling`: parse, then import what the command needs, then run it.

Each family of commands is a file in `commands/` that adds its parsers without importing anything heavy, so `--help`
answers at once. Exit codes: 0 done, 1 checked and found wanting, or crashed, 2 the user's mistake (one line on stderr),
75 stopped on request.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from .commands import artifacts, checkpoints, contextualize, data, doctor, launch, pipelines, plan, scaling, stages
from .errors import USER_ERROR, report_errors


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all errors of the user here."""

    def error(self, message: str) -> NoReturn:
        print(f"seedling: error: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `action`, a function of the parsed arguments."""
    parser = OneLineParser(prog="seedling", description="From raw speech to a deployed, context-aware recogniser.")
    parser.add_argument("--version", action="version", version=f"seedling {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)
    for family in (data, contextualize, stages, plan, doctor, pipelines, launch, scaling, artifacts, checkpoints):
        family.add_commands(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `key=value` may stand anywhere after the command, between options too."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives a `*` positional nothing once an option has come between; what is left over is the same list.
    if "overrides" in arguments and not any(text.startswith("-") for text in rest):
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = parse(argv)
    return report_errors(lambda: arguments.action(arguments))


if __name__ == "__main__":
    sys.exit(main())
