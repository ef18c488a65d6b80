"""Merge fine-tuned checkpoints of one base into a plain checkpoint."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.format.reader import stored_tensors
from ..checkpoint.format.tensor_file import TensorInfo
from ..checkpoint.output.new_folder import check_new, new_folder
from ..checkpoint.output.shards import check_space
from ..checkpoint.source.resolve import fetch_weights, resolve_checkpoint
from ..checks.arguments import check_argument, check_number
from ..engine.run.whole_model import bytes_needed
from ..machine.progress import total_memory
from ..machine.torch_state import check_device, plain_torch
from ..models.loading import parse_dtype
from ..paths import check_utf8
from .learned import LearnedSettings
from .rules import merge_by_rule
from .runs import Merge, merge_in_memory, merge_layerwise


__all__ = ["METHODS", "merge_checkpoints"]

METHODS = ("learned", "task_arithmetic", "ties", "dare")
COPIES = 4  # of the weights beside those of the sources: the base, the merged model, its gradient, a running teacher
STRENGTH, DENSITY = {"task_arithmetic": 0.3, "ties": 1.0, "dare": 0.3}, {"ties": 0.2, "dare": 0.5}


@plain_torch()
def merge_checkpoints(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    method: str = "learned",
    texts: Sequence[Sequence[dict]] | None = None,
    settings: LearnedSettings | None = None,
    strength: float | None = None,
    density: float | None = None,
    layerwise: bool | None = None,
    seed: int = 0,
    device: str = "cpu",
    **source: Any,
) -> dict[str, Any]:
    """Merge fine-tuned checkpoints of one base, and write the result as a plain checkpoint.

    Args:
        base: folder or Hub id of the model that all were fine-tuned from, dense or Mixture-of-Experts.
        checkpoints: folders or Hub ids, at least two.
        output: folder to write, which must not exist.
        method: one of `METHODS`.
        texts: with "learned", token batches for each checkpoint.
        settings: with "learned".
        strength: of the other methods; by default 0.3 for "task_arithmetic" and "dare", 1 for "ties".
        density: share of the entries that "ties" and "dare" keep; by default 0.2 and 0.5.
        layerwise: hold one decoder layer of all checkpoints in memory instead of all of each; "learned" then matches
            the hidden states behind every layer.  By default where memory does not hold the models.
        seed: of "dare".
        device: to compute on.
        **source: `revision`, `token`, `trust_remote_code` and `dtype`, of all.

    Returns:
        Facts of the merge: its method and settings; with "learned" the mean factor of each checkpoint.

    Raises:
        ValueError: an unknown method, options of another one, or checkpoints that differ in their tensors.
        FileExistsError: the output exists.
        OSError: there is no room for it, or its folder cannot be written to.
    """
    check_argument("output", output, str | Path, "a new folder")
    check_utf8(output)
    output = Path(output)
    check_device(device)
    check_number("seed", seed, 0)
    check_argument("layerwise", layerwise, bool | None, "True or False, or leave it out")
    _check(checkpoints, output, method, texts, settings, strength, density)
    headers = _headers((base, *checkpoints), source)
    _check_alike(headers)
    device = torch.device(device)
    weights = _bytes_in_memory(headers[str(base)], source.get("dtype"))
    check_space(output, weights)
    if layerwise is None:
        layerwise = bytes_needed((len(checkpoints) + COPIES) * weights, device) > total_memory(device)
    facts: dict[str, Any] = {"method": method, "base": str(base), "checkpoints": list(map(str, checkpoints))}
    facts |= {"layerwise": layerwise}
    rule = None
    if method == "learned":
        settings = settings or LearnedSettings()
        facts |= {"settings": vars(settings)}
    else:
        strength = STRENGTH[method] if strength is None else strength
        density = DENSITY.get(method) if density is None else density
        facts |= {"strength": strength, "density": density}
        rule = partial(merge_by_rule, method=method, strength=strength, density=density, seed=seed)
    run = merge_layerwise if layerwise else merge_in_memory
    with new_folder(output) as folder:
        found = run(Merge(base, checkpoints, folder, rule, texts, settings, device, source))
    if found:
        means = torch.stack([raw.detach().sigmoid().mean(1) for raw in found.values()]).mean(0)
        facts |= {"factors": means.tolist()}
    return facts


def _headers(models: Sequence[str | Path], source: Mapping[str, Any]) -> dict[str, dict[str, TensorInfo]]:
    """Read what tensors each model has, by its name; the weights of Hub models are downloaded first."""
    options, headers = {name: source[name] for name in ("revision", "token") if name in source}, {}
    for model in models:
        folder, commit = resolve_checkpoint(model, **options)
        if commit is not None:
            fetch_weights(str(model), commit, folder, source.get("token"))
        headers[str(model)] = stored_tensors(folder)
    return headers


def _check_alike(headers: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Refuse checkpoints whose tensors are not those of the base, which is the first."""
    (base, expected), *others = headers.items()
    for model, found in others:
        for name in sorted(expected.keys() | found.keys()):
            shapes = [infos[name].shape if name in infos else None for infos in (expected, found)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{model} was not fine-tuned from {base}: {name} is {shapes[1] or 'missing'}, not "
                    f"{shapes[0] or 'there'}"
                )


def _bytes_in_memory(infos: Mapping[str, TensorInfo], dtype: Any) -> int:
    """Compute the bytes of a model's weights in a dtype, by default as they are stored."""
    dtype = parse_dtype(dtype)
    return sum(math.prod(info.shape) * dtype.itemsize if dtype else info.size for info in infos.values())


def _check(checkpoints, output, method, texts, settings, strength, density) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}, but it must be one of {', '.join(METHODS)}")
    check_argument("checkpoints", checkpoints, list | tuple, "a list of folders or Hub ids")
    for name, value in (("strength", strength), ("density", density)):
        if value is not None:
            check_number(name, value, whole=False)
    if len(checkpoints) < 2:
        raise ValueError(f"{len(checkpoints)} checkpoint to merge; give at least two")
    check_new(output)
    if method == "learned":
        if texts is None or len(texts) != len(checkpoints):
            raise ValueError(f"method='learned' needs a text for each of the {len(checkpoints)} checkpoints")
        if strength is not None or density is not None:
            raise ValueError("strength and density have no effect with method='learned'; leave them out")
        if not all(texts):
            raise ValueError("the text of a checkpoint is empty; give token batches for each")
        return
    if texts is not None or settings is not None:
        raise ValueError(f"texts and settings have no effect with method={method!r}; leave them out")
    if density is not None and (method == "task_arithmetic" or not 0 < density <= 1):
        raise ValueError(f"density={density}: it is a share above 0, at most 1, of ties and dare alone")
