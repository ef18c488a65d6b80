"""Check, from safetensors headers, that a checkpoint has all weights of its model.

transformers initialises missing weights at random, and would do so for a checkpoint compressed from such a source.
"""

import re
from collections.abc import Iterable
from logging import getLogger
from typing import Any

from ...models.moe.structure import find_decoder_layers, find_moe_layers
from ..format.conversion import NameMap
from ..format.reader import CheckpointReader
from ..format.tensor_file import DTYPES


__all__ = ["check_complete"]

logger = getLogger(__name__)

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
WRAPPERS = {  # part of a tensor's name -> the wrapper that adds it
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
}


def check_complete(model: Any, reader: CheckpointReader, names: NameMap) -> None:
    """Refuse a checkpoint that lacks weights of its model.

    Weights may be missing that transformers allows to be: those tied to stored ones, and those that the model's class
    lists.  A module that text does not use, such as a vision tower, may be missing as a whole, with a warning.

    Args:
        model: without weights, its parameters tied as in the checkpoint.
        reader: of the checkpoint.
        names: mapping from its tensors to the model's parameters.

    Raises:
        ValueError: weights are missing, or of another shape or kind; the message names them.
    """
    _check_forms(model, reader, names)
    missing = _missing(model, names)
    for part in _absent_parts(model, names) if missing else ():
        logger.warning("%s has no weights for %s, which text does not go through", reader.folder, part)
        missing = [name for name in missing if not name.startswith(f"{part}.")]
    if missing and (reason := _explain_wrapped(missing[0], reader.infos)):
        raise ValueError(f"{reader.folder} has no weights for {missing[0]}: {reason}")
    if missing:
        more = f" and {len(missing) - 1} others" if missing[1:] else ""
        head = model.get_output_embeddings()
        is_head = model.get_submodule(missing[0].rpartition(".")[0]) is head
        mend = "; where the embeddings are its head, set tie_word_embeddings in config.json" if is_head else ""
        raise ValueError(
            f"{reader.folder} has no weights for {missing[0]}{more}, which would be initialised anew: the checkpoint "
            f"is incomplete{_beside(reader)}; download it again, or save its model once more{mend}"
        )


def _check_forms(model: Any, reader: CheckpointReader, names: NameMap) -> None:
    """Refuse tensors whose numbers are no weights, or whose shape is not what the config makes of it."""
    parameters = model.state_dict()
    for name, target in names.target.items():
        info, parameter = reader.infos[name], parameters[target]
        if parameter.is_floating_point() and info.dtype not in FLOATS:
            raise ValueError(
                f"{reader.folder} has {name} as {info.dtype}, and weights are {', '.join(FLOATS)}; where they are "
                "quantised, compress the checkpoint that they were made from"
            )
        if name in names.whole and info.shape != tuple(parameter.shape):
            raise ValueError(
                f"{reader.folder} has {name} with the shape {info.shape}, but its config.json describes "
                f"{tuple(parameter.shape)}; download both again"
            )


def _missing(model: Any, names: NameMap) -> list[str]:
    """List the parameters that the checkpoint has no tensor for under any of their names."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    return [
        own[0]
        for own in same.values()
        if not names.filled.intersection(own) and not any(p.search(name) for p in ignored for name in own)
    ]


def _absent_parts(model: Any, names: NameMap) -> list[str]:
    """List the outermost modules beside the language model that the checkpoint has no tensor for at all."""
    layers = find_moe_layers(model)
    if not layers or not model.config.sub_configs:
        return []
    decoder = find_decoder_layers(model, layers[0])[0].split(".")
    above = [".".join(decoder[:end]) for end in range(len(decoder))]  # the last one is the language model
    head, parts = model.get_output_embeddings(), []
    for name in above[:-1]:
        for child, module in model.get_submodule(name).named_children():
            path = f"{name}.{child}" if name else child
            if path not in above and module is not head and not any(n.startswith(f"{path}.") for n in names.filled):
                parts.append(path)
    return parts


def _beside(reader: CheckpointReader) -> str:
    """Name the other safetensors files in the folder, as a part of an error message."""
    read = {info.path.name for info in reader.stored.values()}
    others = sorted(path.name for path in reader.folder.glob("*.safetensors") if path.name not in read)
    return f" (beside it, and no part of it: {', '.join(others)})" if others else ""


def _explain_wrapped(wanted: str, stored: Iterable[str]) -> str | None:
    """Explain why a tensor is not found where its stored name has the prefix of a wrapper; else return None."""
    for name in stored:
        parts = [part for part in WRAPPERS if f".{part}" in f".{name}"]
        if parts and (_stripped(name, parts) == wanted or parts != ["module."]):
            origin = " and ".join(dict.fromkeys(WRAPPERS[part] for part in parts))
            return _message(name, parts, f"as {origin} leaves it")
        if name.endswith(f".{wanted}"):
            return _message(name, [name.removesuffix(wanted)], "which no model of transformers has")
    return None


def _stripped(name: str, parts: list[str]) -> str:
    for part in parts:
        name = f".{name}".replace(f".{part}", ".")[1:]
    return name


def _message(name: str, parts: list[str], origin: str) -> str:
    if any(WRAPPERS.get(part) == "PEFT" for part in parts):
        mend = "load the model with its adapter, and save what model.merge_and_unload() returns"
    else:
        replaced = "".join(f".replace({part!r}, '')" for part in parts)
        mend = (
            "save the model that is inside the wrapper, or rename the tensors of every file (and those of an index): "
            f"save_file({{name{replaced}: tensor for name, tensor in load_file(FILE).items()}}, FILE, "
            "metadata={'format': 'pt'}), of safetensors.torch"
        )
    return (
        f"the checkpoint has {name}, with {' and '.join(map(repr, parts))} in its name, {origin}. Loading it with "
        f"transformers would leave weights random; {mend}"
    )
