"""The two ways to run a merge: with all weights in memory, or with one decoder layer of all checkpoints at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.format.changes import unchanged
from ..checkpoint.format.sidecars import copy_companions
from ..checkpoint.source.resolve import resolve_checkpoint
from ..errors import naming
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
    output: Path  # folder to write to, which is empty
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
    where = {name: merge.source[name] for name in ("revision", "token") if name in merge.source}
    folders = [resolve_checkpoint(model, **where)[0] for model in (merge.base, *merge.checkpoints)]
    with unchanged(*folders):  # to the end: loaded weights may be mapped from the files
        model, found = _merged_model(merge)
        with naming(merge.output):
            model.save_pretrained(merge.output)
    copy_companions(folders[0], merge.output, keep=True)
    return found


def _merged_model(merge: Merge) -> tuple[Any, dict[str, Tensor]]:
    """Return the base with merged weights, and the coefficients."""
    model = load_model(merge.base, str(merge.device), **merge.source)
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
    return model, found


def merge_layerwise(merge: Merge) -> dict[str, Tensor]:
    """Merge checkpoints with one decoder layer of each in memory, written when it is ready.

    Returns:
        Without a rule, the coefficients (K, chunks) by parameter of the decoder layers, before the sigmoid.
    """
    parts = CheckpointParts(merge.base, merge.checkpoints, merge.device, **merge.source)
    written, found = MergedCheckpoint(parts.base, merge.output, parse_dtype(merge.source.get("dtype"))), {}
    if merge.rule is None:
        found = learn_layerwise(parts, merge.texts, merge.settings, written.write)
    else:
        written.write(merge.rule(*parts.outside()))
        for position in progress_bar(range(len(parts)), "Merging layers"):
            written.write(merge.rule(*parts.layer(position)))
    parts.check_unchanged()
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
