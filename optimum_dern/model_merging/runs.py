"""The two ways to run a merge: with all weights in memory, or with one decoder layer of all checkpoints at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.format.sidecars import copy_companions
from ..checkpoint.source.resolve import resolve_checkpoint
from ..machine.progress import progress_bar
from ..models.loading import load_model, parse_dtype
from .layerwise import learn_layerwise
from .learned import LearnedSettings, learn_coefficients
from .output import MergedCheckpoint, new_folder
from .parts import CheckpointParts


__all__ = ["merge_in_memory", "merge_layerwise"]

Rule = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def merge_in_memory(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    output: Path,
    rule: Rule | None,
    texts: Sequence[Sequence[dict]] | None,
    settings: LearnedSettings | None,
    device: torch.device,
    source: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Merge checkpoints with all of their weights in memory, and write the result.

    Args:
        base: folder or Hub id.
        checkpoints: fine-tuned from it.
        output: folder to write, which does not exist.
        rule: merges the base's parameters and the differences from them; None to learn coefficients.
        texts: without a rule, token batches for each checkpoint.
        settings: of the learning.
        device: to compute on.
        source: options of loading.

    Returns:
        Without a rule, the coefficients (K, chunks) by parameter, before the sigmoid.
    """
    model = load_model(base, str(device), **source)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    differences, found = _differences(own, checkpoints, device, source), {}
    if rule is None:
        coefficients = learn_coefficients(model, differences, texts, settings)
        found = coefficients.raw
        with torch.no_grad():
            merged = coefficients.merged(own)
    else:
        merged = rule(own, differences)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(merged[name])
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        where = {name: source[name] for name in ("revision", "token") if name in source}
        copy_companions(resolve_checkpoint(base, **where)[0], folder, keep=True)
    return found


def merge_layerwise(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    output: Path,
    rule: Rule | None,
    texts: Sequence[Sequence[dict]] | None,
    settings: LearnedSettings | None,
    device: torch.device,
    source: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Merge checkpoints with one decoder layer of each in memory, written when it is ready.

    Arguments and result are those of `merge_in_memory`; only decoder layers have coefficients.
    """
    parts = CheckpointParts(base, checkpoints, device, **source)
    with new_folder(output) as folder:
        written, found = MergedCheckpoint(parts.base, folder, parse_dtype(source.get("dtype"))), {}
        if rule is None:
            found = learn_layerwise(parts, texts, settings, written.write)
        else:
            written.write(rule(*parts.outside()))
            for position in progress_bar(range(len(parts)), "Merging layers"):
                written.write(rule(*parts.layer(position)))
        written.finish()
    return found


def _differences(
    own: Mapping[str, Tensor], checkpoints: Sequence[str | Path], device: torch.device, source: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return by parameter (K, ...) what each checkpoint adds to the base."""
    stacks = {name: own[name].new_empty(len(checkpoints), *tensor.shape) for name, tensor in own.items()}
    for number, checkpoint in enumerate(checkpoints):
        model = load_model(checkpoint, str(device), **source)
        for name, tensor in own.items():  # by the base's names: another model may tie parameters that are equal in it
            stacks[name][number] = model.get_parameter(name).detach().to(tensor) - tensor
    return stacks
