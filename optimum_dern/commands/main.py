"""`optimum-dern`: dispatch to one file a command, errors on one line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from .. import versions
from ..errors import describe_error, is_deliberate
from ..machine.threads import choose_threads
from ..paths import check_utf8
from . import compare, compress, evaluate, inspect, report


__all__ = ["COMMANDS", "add_command", "fail", "main", "run_safely"]

COMMANDS: dict[str, ModuleType] = {
    "compress": compress,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "report": report,
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors look like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 2 on an error."""
    parser = OneLineParser(prog="optimum-dern", description="Make Mixture-of-Experts models smaller without training.")
    parser.add_argument("--version", action="version", version=f"optimum-dern {versions.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        add_command(commands.add_parser(name, help=module.HELP), module)
    args = parser.parse_args(arguments)
    run_safely(COMMANDS[args.command].run, args)


def add_command(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    """Fill a command's parser; shared by both spellings."""
    parser.description = module.DESCRIPTION
    parser.epilog = module.EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)


def run_safely(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a command; an error becomes one line on stderr and exit code 2 (`--traceback` shows the whole).

    What refuses the user's input or data is told as it is, anything else with its type and how to see more.
    """
    if "torch" not in sys.modules:  # else its threads are there
        choose_threads()
    try:
        check_utf8(*vars(args).values())
        run(args)
    except KeyboardInterrupt:
        print("optimum-dern: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # the outermost boundary
        if args.traceback:
            raise
        fail(describe_error(error) + ("" if is_deliberate(error) else " (--traceback shows where)"))


def fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    print(f"optimum-dern: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
