"""Make the patterns of tasks for a checkpoint, with one decoder layer in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source.find import Source, find_checkpoint
from ..checkpoint.source.recorded import identify_model
from ..checks.arguments import check_argument, check_number
from ..checks.batches import check_batches
from ..core.layer.mixture import Routing
from ..data.labels import real_tokens
from ..engine.walk.visit import visit_layers
from ..machine.torch_state import default_device, plain_torch
from ..models.moe.overrides import routing_hook
from ..models.moe.structure import MoELayer, find_moe_layers, layers_by_position
from ..models.refusals import check_model, check_router_logits
from ..results.public_names import public_source
from .library import PatternLibrary
from .scores import selection_scores


__all__ = ["build_patterns", "first_layer_scores", "open_source"]


@plain_torch()
def build_patterns(
    model: str | Path,
    tasks: Mapping[str, Sequence[dict]],
    *,
    top: int = 1,
    confidence: float | None = None,
    device: str | None = None,
    **source: Any,
) -> PatternLibrary:
    """Score the experts of every layer for some tasks, in one pass over a checkpoint.

    Args:
        model: folder or Hub id.
        tasks: token batches by name of the task, `input_ids` and `attention_mask`, each (batch, sequence).
        top: experts per token whose router logits count.
        confidence: smallest probability of the first of them, for a token to count.
        device: to compute on; by default a GPU where there is one.
        **source: `revision`, `token` and `trust_remote_code`.

    Returns:
        The library, to be saved.

    Raises:
        ValueError: no task, a model without router logits, or numbers out of range.
    """
    check_argument("tasks", tasks, Mapping, "a dict of token batches by name")
    check_number("top", top, 1)
    if confidence is not None:
        check_number("confidence", confidence, whole=False)
    found = open_source(model, **source)
    layers = find_moe_layers(found.skeleton)
    _check(layers, tasks, top, confidence)
    for batches in tasks.values():
        check_batches(batches, found.skeleton.get_input_embeddings().weight.shape[0], masked=True)
    settings = {"top": top, "confidence": confidence}
    sums, tokens = _run(found, tasks, settings, device)
    return PatternLibrary(
        model={**identify_model(found.open_weights(), None), "name": public_source(str(model))},
        layers=sorted(layers_by_position(found.skeleton, layers)),
        tasks={name: {"tokens": tokens[name]} for name in tasks},
        scores={name: torch.stack([sums[p][name] for p in sorted(sums)]).cpu() / tokens[name] for name in tasks},
        settings=settings,
    )


def open_source(model: str | Path, **source: Any) -> Source:
    """Find a checkpoint, and refuse one whose router logits cannot be computed."""
    found = find_checkpoint(model, **source)
    layers = find_moe_layers(found.skeleton)
    check_model(found.skeleton, layers)
    check_router_logits("patterns", layers)
    return found


def first_layer_scores(
    found: Source, batches: Sequence[dict], settings: Mapping[str, Any], device: str | None = None
) -> Tensor:
    """Score the experts of the first MoE layer alone for some text: (E,), the key by which a task is found."""
    layers = layers_by_position(found.skeleton, find_moe_layers(found.skeleton))
    sums, tokens = _run(found, {"text": batches}, settings, device, stop=min(layers) + 1)
    return sums[min(layers)]["text"].cpu() / tokens["text"]


def _check(layers: Sequence[MoELayer], tasks: Mapping[str, Any], top: int, confidence: float | None) -> None:
    if not tasks:
        raise ValueError("there is no task; give at least one, with its text")
    if not 1 <= top <= layers[0].num_experts:
        raise ValueError(f"top={top}, but layers have {layers[0].num_experts} experts; give 1 to that many")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}, but it is a probability; give a number above 0 and below 1")


def _run(
    found: Source,
    tasks: Mapping[str, Sequence[dict]],
    settings: Mapping[str, Any],
    device: str | None,
    stop: int | None = None,
) -> tuple[dict[int, dict[str, Tensor]], dict[str, int]]:
    """Sum the scores by position and task, and count the tokens of the tasks."""
    loader = found.open_loader(default_device(device))
    batches = [(name, batch) for name, own in tasks.items() for batch in own]
    sums: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def visit(position: int) -> Iterator[None]:
        layer, number = loader.positions.get(position), iter(batches)
        if layer is None:
            yield
            return
        sums[position] = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name in tasks}

        def receive(routing: Routing) -> None:
            name, batch = next(number)
            real = real_tokens(batch["attention_mask"].bool(), routing.hidden.device)
            logits = _logits(layer, routing.hidden[real])
            sums[position][name] += selection_scores(logits, settings["top"], settings["confidence"]).cpu()

        handle = routing_hook(layer.experts)(layer.block, layer.experts, receive)
        try:
            yield
        finally:
            handle.remove()

    text = [batch for _, batch in batches]
    visit_layers(found.skeleton, loader.decoder_layers, text, loader, visit, "Scoring experts", stop)
    loader.reader.check_unchanged()
    tokens = {name: sum(int(batch["attention_mask"].sum()) for batch in own) for name, own in tasks.items()}
    return sums, tokens


def _logits(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Compute the router's raw logits (T, E) in float32."""
    logits = hidden.float() @ layer.router_weight.tensor.float().T
    bias = layer.router_bias
    return logits if bias is None else logits + bias.tensor.float()
