"""Detection of tensor names that a wrapper of the model, such as torch.compile or FSDP, has left in a checkpoint."""

from collections.abc import Iterable


__all__ = ["explain_wrapped"]

WRAPPERS = {  # part of a tensor's name -> the wrapper that adds it
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
}


def explain_wrapped(wanted: str, stored: Iterable[str]) -> str | None:
    """Explain why a tensor is not found, and what to do, where its stored name has the prefix of a wrapper.

    Args:
        wanted: name of the tensor in a plain checkpoint.
        stored: names that the checkpoint has.

    Returns:
        The end of an error message; None where no name has such a prefix.
    """
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
