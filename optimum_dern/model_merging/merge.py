"""Merge fine-tuned checkpoints of one base into a plain checkpoint."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.format.reader import stored_tensors
from ..checkpoint.source.provenance import load_tokenizer
from ..checkpoint.source.resolve import resolve_checkpoint
from ..checks.arguments import check_argument, check_number
from ..machine.torch_state import check_device, plain_torch
from ..models.loading import load_model
from ..paths import check_utf8
from .learned import LearnedSettings, learn_coefficients
from .rules import dare, task_arithmetic, ties


__all__ = ["METHODS", "check_alike", "merge_checkpoints"]

METHODS = ("learned", "task_arithmetic", "ties", "dare")
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
    seed: int = 0,
    device: str = "cpu",
    **source: Any,
) -> dict[str, Any]:
    """Merge fine-tuned checkpoints of one base, and write the result as a plain checkpoint.

    The base and the differences of all checkpoints from it are in memory together.

    Args:
        base: folder or Hub id of the model that all were fine-tuned from, dense or Mixture-of-Experts.
        checkpoints: folders or Hub ids, at least two.
        output: folder to write, which must not exist.
        method: one of `METHODS`.
        texts: with "learned", token batches for each checkpoint.
        settings: with "learned".
        strength: of the other methods; by default 0.3 for "task_arithmetic" and "dare", 1 for "ties".
        density: share of the entries that "ties" and "dare" keep; by default 0.2 and 0.5.
        seed: of "dare".
        device: to compute on.
        **source: `revision`, `token` and `trust_remote_code`, of all.

    Returns:
        Facts of the merge: its method and settings; with "learned" the mean factor of each checkpoint.

    Raises:
        ValueError: an unknown method, options of another one, or checkpoints that differ in their tensors.
        FileExistsError: the output exists.
    """
    check_argument("output", output, str | Path, "a new folder")
    check_utf8(output)
    output = Path(output)
    check_device(device)
    check_number("seed", seed, 0)
    _check(checkpoints, output, method, texts, settings, strength, density)
    check_alike(base, checkpoints, **source)
    model = load_model(base, device, **source)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    differences = _differences(own, checkpoints, device, source)
    facts: dict[str, Any] = {"method": method, "base": str(base), "checkpoints": list(map(str, checkpoints))}
    if method == "learned":
        found = learn_coefficients(model, differences, texts, settings)
        with torch.no_grad():
            merged = found.merged(own)
        means = torch.stack([raw.detach().sigmoid().mean(1) for raw in found.raw.values()]).mean(0)
        facts |= {"settings": vars(settings or LearnedSettings()), "factors": means.tolist()}
    else:
        strength = STRENGTH[method] if strength is None else strength
        density = DENSITY.get(method) if density is None else density
        merged = _by_rule(own, differences, method, strength, density, seed)
        facts |= {"strength": strength, "density": density}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(merged[name])
    _write(model, base, output, source)
    return facts


def check_alike(base: str | Path, checkpoints: Sequence[str | Path], **source: Any) -> None:
    """Refuse checkpoints whose tensors are not those of the base, by their headers.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    options = {name: source[name] for name in ("revision", "token") if name in source}
    shapes = {}
    for model in (base, *checkpoints):
        folder, _ = resolve_checkpoint(model, **options)
        shapes[str(model)] = {name: info.shape for name, info in stored_tensors(folder).items()}
    expected = shapes[str(base)]
    for model in map(str, checkpoints):
        for name in sorted(expected.keys() | shapes[model].keys()):
            if expected.get(name) != shapes[model].get(name):
                raise ValueError(
                    f"{model} was not fine-tuned from {base}: {name} is {shapes[model].get(name, 'missing')}, not "
                    f"{expected.get(name, 'there')}"
                )


def _check(checkpoints, output, method, texts, settings, strength, density) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}, but it must be one of {', '.join(METHODS)}")
    check_argument("checkpoints", checkpoints, list | tuple, "a list of folders or Hub ids")
    for name, value in (("strength", strength), ("density", density)):
        if value is not None:
            check_number(name, value, whole=False)
    if len(checkpoints) < 2:
        raise ValueError(f"{len(checkpoints)} checkpoint to merge; give at least two")
    if output.exists():
        raise FileExistsError(f"{output} exists; give a new folder")
    if method == "learned":
        if texts is None or len(texts) != len(checkpoints):
            raise ValueError(f"method='learned' needs a text for each of the {len(checkpoints)} checkpoints")
        if strength is not None or density is not None:
            raise ValueError("strength and density have no effect with method='learned'; leave them out")
        return
    if texts is not None or settings is not None:
        raise ValueError(f"texts and settings have no effect with method={method!r}; leave them out")
    if density is not None and (method == "task_arithmetic" or not 0 < density <= 1):
        raise ValueError(f"density={density}: it is a share above 0, at most 1, of ties and dare alone")


def _differences(
    own: Mapping[str, Tensor], checkpoints: Sequence[str | Path], device: str, source: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return by parameter (K, ...) what each checkpoint adds to the base."""
    stacks = {name: own[name].new_empty(len(checkpoints), *tensor.shape) for name, tensor in own.items()}
    for number, checkpoint in enumerate(checkpoints):
        for name, parameter in load_model(checkpoint, device, **source).named_parameters():
            stacks[name][number] = parameter.detach().to(own[name]) - own[name]
    return stacks


def _by_rule(
    own: Mapping[str, Tensor],
    differences: Mapping[str, Tensor],
    method: str,
    strength: float,
    density: float | None,
    seed: int,
) -> dict[str, Tensor]:
    generator, merged = torch.Generator().manual_seed(seed), {}
    for name, tensor in own.items():
        base, taus = tensor.float(), list(differences[name].float())
        if method == "ties":
            result = ties(base, taus, strength, density)
        elif method == "dare":
            result = dare(base, taus, strength, density, generator)
        else:
            result = task_arithmetic(base, taus, strength)
        merged[name] = result.to(tensor)
    return merged


def _write(model: Any, base: str | Path, output: Path, source: Mapping[str, Any]) -> None:
    """Write the model and the base's tokenizer, under the final name only when all is there."""
    part = output.with_name(f"{output.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if (tokenizer := load_tokenizer(str(base), **source)) is not None:
        tokenizer.save_pretrained(part)
    part.replace(output)
