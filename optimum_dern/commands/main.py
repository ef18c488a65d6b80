"""Entry point of `optimum-dern`: parses the command line, runs a command, and prints errors on one line."""

import argparse
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .. import versions
from ..checkpoint.output.folder import WORK_NAME
from ..errors import describe_error, is_deliberate
from ..machine.signals import Terminated, ending_cleanly
from ..machine.threads import choose_threads
from ..paths import check_utf8
from . import compress, merge, patterns, sample
from .look import attribute, compare, evaluate, inspect, report


__all__ = ["COMMANDS", "WANTS", "add_command", "fail", "main", "run_safely"]

WANTS: dict[str, dict[str, ModuleType]] = {  # what people want, and the commands that do it, as `--help` lists them
    "make smaller": {"compress": compress, "sample": sample},
    "look": {"inspect": inspect, "attribute": attribute, "report": report},
    "measure": {"evaluate": evaluate, "compare": compare},
    "load": {"patterns": patterns},
    "merge": {"merge": merge},
}
COMMANDS: dict[str, ModuleType] = {name: module for group in WANTS.values() for name, module in group.items()}
WIDTH = 12  # of the column of names in `--help`


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that prints errors like the commands do: on one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console script; exits with code 2 on an error."""
    parser = OneLineParser(
        prog="optimum-dern",
        usage="optimum-dern COMMAND ...",
        description="Make Mixture-of-Experts models smaller without training.",
        epilog=_list_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"optimum-dern {versions.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for name, module in COMMANDS.items():
        add_command(commands.add_parser(name, prog=f"{parser.prog} {name}"), module)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if empty := next((i for i, text in enumerate(given) if not text or re.fullmatch("--[a-z-]+=", text)), None):
        parser.error(
            f"the value of {given[empty].rstrip('=') or given[empty - 1]} is empty; give one, or leave it out"
        )
    args = parser.parse_args(given)
    run_safely(COMMANDS[args.command].run, args)


def _list_commands() -> str:
    """List the commands by what people want, each with its help."""
    lines = []
    for want, commands in WANTS.items():
        lines += [f"{want}:", *(f"  {name:{WIDTH}}{module.HELP}" for name, module in commands.items()), ""]
    return "\n".join([*lines, "optimum-dern COMMAND --help has the options and examples of a command."])


def add_command(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    """Fill a command's parser, for `optimum-dern` and for `optimum-cli dern`."""
    parser.description = module.DESCRIPTION
    parser.epilog = module.EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)


def run_safely(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a command; an error becomes one line on stderr and exit code 2, unless `--traceback` is given.

    Refusals of the user's input or data are printed as they are, any other error with its type and a hint.
    """
    if "torch" not in sys.modules:  # else torch has started its threads already
        choose_threads()
    try:
        with ending_cleanly():
            check_utf8(*vars(args).values())
            run(args)
    except KeyboardInterrupt as error:
        print(f"optimum-dern: {_describe_interrupt(error, args)}", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    except Exception as error:  # the outermost boundary
        if args.traceback:
            raise
        fail(describe_error(error) + ("" if is_deliberate(error) else " (--traceback shows where)"))


def _describe_interrupt(error: KeyboardInterrupt, args: argparse.Namespace) -> str:
    """Say what has ended a command and, where it has left a part of its work, that this part is not lost."""
    what = f"ended by {error}" if isinstance(error, Terminated) else "interrupted"
    output = getattr(args, "output", None)
    begun = isinstance(output, Path) and (output / WORK_NAME).is_dir()
    return f"{what}; what is finished stays, the same command goes on from there" if begun else what


def fail(message: str) -> NoReturn:
    """Print an error on one line of stderr, and exit with code 2."""
    print(f"optimum-dern: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
