"""The options `--data NAME=DATA ...` and those of how it is sampled, for commands that read texts of several kinds."""

import argparse
from typing import Any

from .arguments import check_numbers


__all__ = ["add_data_arguments", "load_named_batches", "named_data"]


def add_data_arguments(
    parser: argparse.ArgumentParser, option: str = "--data", samples: int = 128, required: bool = True
) -> None:
    """Add an option for data by name, and how much of it is read.

    Args:
        parser: of the command.
        option: its name.
        samples: default number of sequences of each name.
        required: whether the option must be given.
    """
    group = parser.add_argument_group("data", "anything that compress --dataset takes, each under a name")
    group.add_argument(
        option, dest="data", nargs="+", action="extend", required=required, metavar="NAME=DATA", help="text by name"
    )
    group.add_argument("--num-samples", type=int, default=samples, metavar="N", help="of each (default: %(default)s)")
    group.add_argument(
        "--sequence-length", type=int, default=2048, metavar="N", help="tokens, at most (default: %(default)s)"
    )
    group.add_argument("--text-column", default="text", metavar="NAME", help="of rows (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")


def named_data(args: argparse.Namespace) -> dict[str, str]:
    """Return the data by name, checked before anything long begins.

    Raises:
        ValueError: an entry without a name, a name given twice, or a number out of its range.
        FileNotFoundError: a path that does not exist.
    """
    from ...data.batches import check_source

    check_numbers(args, "num_samples", "sequence_length", "seed")
    found: dict[str, str] = {}
    for entry in args.data:
        name, equals, source = entry.partition("=")
        if not equals or not name or not source:
            raise ValueError(f"{entry!r} is not NAME=DATA; give a name and its data, such as code=code.txt")
        if name in found:
            raise ValueError(f"the data {name!r} is given twice; give every name once, and a folder for several files")
        check_source(source)
        found[name] = source
    return found


def load_named_batches(
    args: argparse.Namespace, config: Any, tokenizer: Any, batch_size: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Load the token batches of every name, sequences no longer than the model is made for.

    Args:
        args: with the options that `add_data_arguments` adds.
        config: of the model.
        tokenizer: its own.
        batch_size: sequences a batch; by default as many of like lengths as keep a processor busy.
    """
    from ...data.batches import load_batches
    from ...models.context_length import bounded_length

    drawn = {"num_samples": args.num_samples, "seed": args.seed, "text_column": args.text_column}
    drawn["batch_size"] = batch_size
    length = bounded_length(config, args.sequence_length)
    return {
        name: load_batches(source, tokenizer, sequence_length=length, **drawn)
        for name, source in named_data(args).items()
    }
