"""`optimum-dern`: dispatch to one file a command, errors on one line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from .. import versions
from . import compress, inspect


__all__ = ["COMMANDS", "add_command", "main", "run_safely"]

COMMANDS: dict[str, ModuleType] = {"compress": compress, "inspect": inspect}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 2 on an error of the user's or the data's."""
    parser = argparse.ArgumentParser(
        prog="optimum-dern", description="Make Mixture-of-Experts models smaller without training."
    )
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
    """Run a command; an expected error becomes one line on stderr and exit code 2."""
    try:
        run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if getattr(args, "traceback", False):
            raise
        print(f"optimum-dern: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("optimum-dern: interrupted", file=sys.stderr)
        sys.exit(130)
