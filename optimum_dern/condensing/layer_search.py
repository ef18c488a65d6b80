"""Greedy search of the layers whose condensation the model notices least (CD-MoE, arXiv 2412.00069).

Each time, of the layers that are left, the one is condensed with which, beside those condensed already,

    mean over tokens of JS( softmax h(x) || softmax h'(x) )

is least; h and h' are what the last decoder layer gives in the original and in the condensed model.

Every time is one pass through the decoder, in which each layer is loaded once: models that try another layer have the
same hidden states up to that, and from there on each has its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.merging.condense import jensen_shannon
from ..data.labels import first_drawn, model_inputs, real_tokens
from ..engine.measure.expert_run import chunked_experts
from ..engine.walk.calls import own_containers, record_layer_calls
from ..engine.walk.stream import HiddenStream
from ..engine.walk.walks import LayerProvider, LayersInMemory
from ..machine.processes import ALONE, Processes
from ..machine.progress import progress_bar
from ..machine.scratch import CopiesInFiles
from ..models.moe.structure import find_decoder_layers
from .dense_form import possible_layers
from .plan import CondensingPlan


__all__ = ["SEARCHED", "search_layers"]

SEARCHED = 4096  # tokens on which models are compared, in whole sequences

Networks = Callable[[int], AbstractContextManager[nn.Module]]  # loads the dense network of a position


@torch.no_grad()
def search_layers(
    model: nn.Module,
    plan: CondensingPlan,
    batches: Sequence[dict],
    networks: Networks,
    provider: LayerProvider | None = None,
    spill: Path | None = None,
    processes: Processes = ALONE,
) -> dict[int, float]:
    """Search layers to condense, each time the one of which the model's last hidden states change least.

    Args:
        model: in evaluation mode; as it was before, and is afterwards.
        plan: which layers may be chosen, and how many are.
        batches: calibration batches, of whose sequences those drawn first are used.
        networks: loads the dense network that takes the place of a layer's block while its context is open.
        provider: loads the decoder layers; by default the model has them in memory.
        spill: folder for files of hidden states; in memory by default.
        processes: that share the layers tried in a pass; each runs the model so far on all tokens.

    Returns:
        By position, in the order in which they were chosen, the divergence that the model has with each one more.
    """
    batches, provider = first_drawn(batches, SEARCHED), provider or LayersInMemory()
    masks = [batch["attention_mask"].bool() for batch in batches]
    _, decoder_layers = find_decoder_layers(model, plan.at[min(plan.at)])
    with provider.outside():
        keep = torch.detach if spill is None else CopiesInFiles(spill).copy
        calls = record_layer_calls(model, decoder_layers, [model_inputs(batch) for batch in batches], keep)
        device = model.get_input_embeddings().weight.device
    original: list[Tensor] | None = None
    found: dict[int, float] = {}
    for number in range(plan.num_layers):
        possible = [position for position in possible_layers(plan.at, found) if position in plan.networks]
        trials = possible[processes.rank :: processes.count]  # dealt as `processes.map` deals them
        stream = HiddenStream(own_containers(calls), spill, device)
        streams: dict[int | None, HiddenStream] = {None: stream}  # by the layer tried; of none, what they branch from
        for position in progress_bar(range(len(decoder_layers)), f"Searching layer {number + 1} of {plan.num_layers}"):
            network = networks(position) if position in found or position in trials else nullcontext()
            with provider.loaded(position), _run_like_others(plan, position), network as block:
                _pass(model, plan, position, decoder_layers[position], streams, block, position in found)
        if original is None:
            original = _real(streams[None], masks)
        sums = processes.map(partial(_divergence, original, streams, masks), possible)
        tried = {position: value.item() for position, (value,) in zip(possible, sums, strict=True)}
        best = min(tried, key=tried.get)  # of equals the first
        found[best] = tried[best]
    return found


def _pass(
    model: nn.Module,
    plan: CondensingPlan,
    position: int,
    decoder_layer: nn.Module,
    streams: dict[int | None, HiddenStream],
    network: nn.Module | None,
    chosen: bool,
) -> None:
    """Take all streams through one decoder layer; where its condensation is tried, one branches off."""
    others = [*streams.values()]
    if network is not None and not chosen:
        streams[position] = streams[None].fork()
    if network is not None:
        with replaced_block(model, plan.at[position].name, network):
            for stream in others if chosen else [streams[position]]:
                stream.step(position, decoder_layer)
    for stream in [] if chosen else others:
        stream.step(position, decoder_layer)


def _run_like_others(plan: CondensingPlan, position: int) -> AbstractContextManager:
    """Run the experts of a layer, where it has some, as all runs of this package do."""
    return chunked_experts(plan.at[position]) if position in plan.at else nullcontext()


@contextmanager
def replaced_block(model: nn.Module, name: str, network: nn.Module) -> Iterator[None]:
    """Put a network in the place of a named module of a model while the context is open."""
    own = model.get_submodule(name)
    model.set_submodule(name, network)
    try:
        yield
    finally:
        model.set_submodule(name, own)


def _real(stream: HiddenStream, masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states (n, d) of the real tokens of each micro-batch."""
    flat = (hidden.flatten(0, -2) for hidden in stream)  # (B S, d)
    return [hidden[real_tokens(mask, hidden.device)] for hidden, mask in zip(flat, masks, strict=True)]


def _divergence(
    original: Sequence[Tensor], streams: Mapping[int | None, HiddenStream], masks: Sequence[Tensor], position: int
) -> tuple[Tensor]:
    """Return the mean divergence () of a trial from the original model."""
    pairs = zip(original, _real(streams[position], masks), strict=True)
    sums = [jensen_shannon(*pair).sum(dtype=torch.float64) for pair in pairs]
    return (torch.stack(sums).sum() / sum(map(len, original)),)
