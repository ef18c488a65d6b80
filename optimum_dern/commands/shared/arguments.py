"""Every field of `DernConfig` as a command-line option of the same name, and back."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...options import CHOICES, GROUPS, DernOptions, without_retired


if TYPE_CHECKING:
    from ...config import DernConfig


__all__ = [
    "add_config_arguments",
    "add_model_arguments",
    "check_model_name",
    "check_numbers",
    "check_output_file",
    "check_revision",
    "check_sources",
    "config_from_arguments",
]

LARGEST, SEEDS = 2**31 - 1, 2**32  # numbers above which torch counts no longer
NUMBERS = {"sparsity": float, "num_experts": int}
AMOUNTS = {"sparsity": "X", "num_experts": "N"}


def add_config_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add an option for every field of `DernConfig`, in the argument groups that `options.GROUPS` names.

    An option that is not given leaves its field to `--config` or to its default.

    Args:
        parser: of the command.
        several: accept several values of `--sparsity` and `--num-experts`, and store them in `args.amounts`.
    """
    group = parser.add_argument_group("compression", "each option of the groups below is a field of DernConfig")
    group.add_argument("--config", type=Path, metavar="FILE", help="JSON file with any of these fields")
    for title, description in GROUPS.items():
        group = parser.add_argument_group(title, description)
        for field in dataclasses.fields(DernOptions):
            if field.metadata["group"] == title:
                _add_field(group, field, several)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the MODEL argument and the options for loading it."""
    parser.add_argument("model", metavar="MODEL", help="local checkpoint folder or Hub id")
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of a Hub model")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own model and tokenizer code"
    )
    group.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")


def check_model_name(name: str) -> None:
    """Raise FileNotFoundError at once for what can only be a path, instead of asking the Hub for it."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(
            f"there is no checkpoint folder {name!r}; give a local folder or a Hub id (owner/name)"
        )


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for an option that is given and out of range; a seed may be 0."""
    for name in names:
        value = getattr(args, name)
        least, most = (0, SEEDS - 1) if name == "seed" else (1, LARGEST)
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}; give a whole number of at least {least}, at most {most:,}"
            )


def check_revision(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for a revision of local folders, which have none."""
    if args.revision is not None and all(Path(name).expanduser().is_dir() for name in names):
        raise ValueError(
            f"--revision {args.revision} has no effect on {', '.join(names)}, a local folder; leave it out, or give a "
            "Hub id (owner/name)"
        )


def check_sources(*sources: Any) -> None:
    """Refuse missing text files before a model is loaded."""
    from ...data.batches import check_source

    for source in sources:
        for name in [] if source is None else source if isinstance(source, dict) else [source]:
            if isinstance(name, str | Path):
                check_source(name)


def check_output_file(file: Path | None) -> None:
    """Raise FileNotFoundError for an output file in a folder that does not exist."""
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} for the output {file.name}; make it first")


def config_from_arguments(args: argparse.Namespace) -> "DernConfig":
    """The config that the options and `--config` describe; options win.

    Raises:
        ValueError: a field outside its range, or a file that is not a JSON object of fields.
    """
    from ...config import DernConfig

    values = {} if args.config is None else _read_fields(args.config)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(DernOptions) if hasattr(args, f.name)}
    if "num_experts" in given and "sparsity" not in given:
        values.pop("sparsity", None)
    if "sparsity" in given and "num_experts" not in given:
        values.pop("num_experts", None)
    return DernConfig(**values | given)


def _read_fields(file: Path) -> dict[str, Any]:
    """The fields in a JSON file: its own, or those of the `config` in a dern_config.json or dern_report.json."""
    from ...data.files import parse_json, read_text

    if not file.is_file():
        raise FileNotFoundError(f"there is no config file {file}; give a JSON file of DernConfig fields")
    values = parse_json(read_text(file), file)
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; give a JSON object of DernConfig fields")
    values.pop("meta", None)
    values = without_retired(values)
    names = [field.name for field in dataclasses.fields(DernOptions)]
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{file} has {', '.join(unknown)}; the fields of a config are {', '.join(names)}")
    return values


def _add_field(group: argparse._ArgumentGroup, field: dataclasses.Field, several: bool) -> None:
    flag = f"--{field.name.replace('_', '-')}"
    options = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(field)}
    if several and field.name in NUMBERS:
        options["help"] += "; several give as many checkpoints out of one pass, in OUTPUT/N-experts"
        kind = _amount(NUMBERS[field.name])
        group.add_argument(flag, action=_AmountsAction, nargs="+", type=kind, metavar=AMOUNTS[field.name], **options)
    elif "bool" in str(field.type):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif field.name == "condensed_layers":
        options["help"] += "; several are layers, one is how many, and [3] is layer 3 alone"
        group.add_argument(flag, action=_LayersAction, nargs="+", type=_layers, metavar="N", **options)
    elif field.name == "dataset":
        group.add_argument(flag, action=_DatasetAction, nargs="+", metavar="SOURCE", **options)
    elif field.name == "similarity_weights":
        group.add_argument(flag, type=float, nargs=3, metavar=("GATE", "UP", "DOWN"), **options)
    elif field.name == "protect_experts":
        group.add_argument(flag, type=_json_object_or_path, metavar="JSON", **options)
    elif field.name in CHOICES:
        group.add_argument(flag, choices=CHOICES[field.name], **options)
    else:
        kind = next((kind for kind in (float, int) if kind.__name__ in str(field.type)), str)
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(flag, type=kind, metavar=metavar, **options)


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if field.name == "dataset":
        text += "; several sources are mixed, each SOURCE or SOURCE=WEIGHT"
    if field.default is None or "default:" in text:
        return text
    return f"{text} (default: {json.dumps(field.default)})"


class _AmountsAction(argparse.Action):
    """The first amount is the config's; several are also `namespace.amounts`, under the field's name."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0])
        namespace.amounts = {self.dest: values} if len(values) > 1 else {}


def _amount(kind: type) -> Callable[[str], float]:
    """A parser of numbers that says what to do where an option has taken MODEL for one."""

    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of its kind ({kind.__name__}); MODEL and OUTPUT come before this option"
            ) from None

    return parse


class _DatasetAction(argparse.Action):
    """One source stays a string; several, or one with a weight, become a mix."""

    def __call__(self, parser, namespace, values, option_string=None):
        mix = {}
        for value in values:
            name, _, weight = value.rpartition("=")
            try:
                mix[name or value] = float(weight) if name else 1.0
            except ValueError:
                mix[value] = 1.0  # the "=" belongs to the name
        setattr(namespace, self.dest, values[0] if list(mix) == values[:1] else mix)


class _LayersAction(argparse.Action):
    """One number stays a number; several, or a list, become one list."""

    def __call__(self, parser, namespace, values, option_string=None):
        flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
        setattr(namespace, self.dest, values[0] if len(values) == 1 else flat)


def _layers(text: str) -> int | list[int]:
    """Parse a whole number, or several of them in brackets."""
    several = text.startswith("[") and text.endswith("]")
    try:
        return [int(part) for part in text[1:-1].split(",")] if several else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a layer's number; MODEL and OUTPUT come before this option"
        ) from None


def _json_object_or_path(text: str) -> dict | str:
    if not text.lstrip().startswith(("{", "[")):
        return text
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value
