"""The two ways to run a merge: with all weights in memory, or with one decoder layer of all checkpoints at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.format.sidecars import copy_companions
from ..checkpoint.output.new_folder import new_folder
from ..checkpoint.source.resolve import resolve_checkpoint
from ..machine.progress import progress_bar
from ..models.loading import load_model, parse_dtype
from .layerwise import learn_layerwise
from .learned import LearnedSettings, learn_coefficients
from .output import MergedCheckpoint
from .parts import CheckpointParts


__all__ = ["Merge", "merge_in_memory", "merge_layerwise"]

Rule = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


class Merge(NamedTuple):
    """What is merged, how, and where the result goes."""

    base: str | Path  # folder or Hub id
    checkpoints: Sequence[str | Path]  # fine-tuned from it
    output: Path  # folder to write, which does not exist
    rule: Rule | None  # merges the base's parameters and the differences from them; None to learn coefficients
    texts: Sequence[Sequence[dict]] | None  # without a rule, token batches for each checkpoint
    settings: LearnedSettings | None  # of the learning
    device: torch.device  # to compute on
    source: Mapping[str, Any]  # options of loading


def merge_in_memory(merge: Merge) -> dict[str, Tensor]:
    """Merge checkpoints with all of their weights in memory, and write the result.

    Returns:
        Without a rule, the coefficients (K, chunks) by parameter, before the sigmoid.
    """
    source = merge.source
    model = load_model(merge.base, str(merge.device), **source)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    differences, found = _differences(own, merge), {}
    if merge.rule is None:
        coefficients = learn_coefficients(model, differences, merge.texts, merge.settings)
        found = coefficients.raw
        with torch.no_grad():
            merged = coefficients.merged(own)
    else:
        merged = merge.rule(own, differences)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(merged[name])
    with new_folder(merge.output) as folder:
        model.save_pretrained(folder)
        where = {name: source[name] for name in ("revision", "token") if name in source}
        copy_companions(resolve_checkpoint(merge.base, **where)[0], folder, keep=True)
    return found


def merge_layerwise(merge: Merge) -> dict[str, Tensor]:
    """Merge checkpoints with one decoder layer of each in memory, written when it is ready.

    Returns:
        Without a rule, the coefficients (K, chunks) by parameter of the decoder layers, before the sigmoid.
    """
    parts = CheckpointParts(merge.base, merge.checkpoints, merge.device, **merge.source)
    with new_folder(merge.output) as folder:
        written, found = MergedCheckpoint(parts.base, folder, parse_dtype(merge.source.get("dtype"))), {}
        if merge.rule is None:
            found = learn_layerwise(parts, merge.texts, merge.settings, written.write)
        else:
            written.write(merge.rule(*parts.outside()))
            for position in progress_bar(range(len(parts)), "Merging layers"):
                written.write(merge.rule(*parts.layer(position)))
        written.finish()
    return found


def _differences(own: Mapping[str, Tensor], merge: Merge) -> dict[str, Tensor]:
    """Return by parameter (K, ...) what each checkpoint adds to the base."""
    stacks = {name: own[name].new_empty(len(merge.checkpoints), *tensor.shape) for name, tensor in own.items()}
    for number, checkpoint in enumerate(merge.checkpoints):
        model = load_model(checkpoint, str(merge.device), **merge.source)
        for name, tensor in own.items():  # by the base's names: another model may tie parameters that are equal in it
            stacks[name][number] = model.get_parameter(name).detach().to(tensor) - tensor
    return stacks
