"""Several results out of one pass: hidden states on their way through the layers, and whom each layer serves.

Targets with oneshot calibration share one walk through the original model and what is measured on it.  One with
sequential calibration has a walk of its own, through the layers that it has compressed itself.
"""

import copy
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..calibration.recording import Call, record_routing
from ..calibration.residual import record_residual
from ..core.criteria import CRITERIA
from ..core.statistics import ExpertStatistics
from ..models.original import original_kept
from ..models.structure import MoELayer
from .compression import compress_layer_
from .distributed import Processes
from .drift import measure_drift
from .measuring import measure_layer
from .rewriting import LayerData
from .stream import HiddenStream
from .targets import Target


__all__ = ["LayerProvider", "Pass", "Walk", "compress_for", "open_walks", "pass_layer"]


class LayerProvider(Protocol):
    """Where the original decoder layers come from."""

    def outside(self) -> AbstractContextManager:
        """What surrounds the decoder layers is in memory while the context is open."""

    def loaded(self, position: int) -> AbstractContextManager:
        """The layer is in memory while the context is open."""


@dataclass(frozen=True, eq=False)
class Walk:
    """Hidden states on their way through the layers, and the targets that they are for."""

    stream: HiddenStream
    targets: Sequence[Target]
    sequential: bool  # through compressed layers, those of its one target
    original: HiddenStream | None = None  # through the original model, where a target makes up for its drift from it

    def waiting(self, position: int) -> list[Target]:
        """The targets that have not done a layer."""
        return [target for target in self.targets if position not in target.sink.finished]


@dataclass(frozen=True)
class Pass:
    """What all walks have in common."""

    masks: Sequence[Tensor]  # per micro-batch of this process, which tokens are real
    held_out: Tensor  # (T,) bool over the real tokens
    processes: Processes
    shared: bool  # the original layers, by several targets or with whoever has the model
    keep_statistics: Callable[[int, ExpertStatistics], None] | None


def open_walks(calls: list[list[Call]], targets: Sequence[Target], spill: Path | None) -> list[Walk]:
    """One walk through the original model for all that see it, and one for each of the others, behind it."""
    oneshot = [target for target in targets if target.config.calibration_order == "oneshot"]
    walks = []
    if oneshot or any(target.config.corrects_drift for target in targets):
        walks.append(Walk(HiddenStream(_own_containers(calls), spill), oneshot, sequential=False))
    for target in (target for target in targets if target not in oneshot):
        original = walks[0].stream if target.config.corrects_drift else None
        walks.append(Walk(HiddenStream(_own_containers(calls), spill), [target], True, original))
    return walks


def _own_containers(calls: list[list[Call]]) -> list[list[Call]]:
    """The same calls with containers of their own: in some, layers leave things for later ones (Gemma 4)."""
    copies: dict[int, object] = {}

    def own(value: object) -> object:
        return copies.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping | list) else value

    return [
        [call._replace(kwargs={name: own(value) for name, value in call.kwargs.items()}) for call in layer]
        for layer in calls
    ]


def pass_layer(
    position: int,
    decoder_layer: nn.Module,
    layer: MoELayer | None,
    walks: Sequence[Walk],
    provider: LayerProvider,
    common: Pass,
) -> None:
    """Every walk through one decoder layer."""
    ahead = [walk for walk in walks if walk.sequential and layer is not None and not walk.waiting(position)]
    for walk in ahead:
        with walk.targets[0].sink.loaded(position):
            walk.stream.step(position, decoder_layer)
    if len(ahead) == len(walks):
        return
    with provider.loaded(position):
        for walk in walks:
            if walk in ahead:
                continue
            if layer is not None and walk.waiting(position):
                _measure_and_compress(walk, position, decoder_layer, layer, common)
                continue
            walk.stream.step(position, decoder_layer)
            for target in walk.waiting(position):
                target.sink.finish(position, None)


def _measure_and_compress(walk: Walk, position: int, decoder_layer: nn.Module, layer: MoELayer, common: Pass) -> None:
    started, targets = time.perf_counter(), walk.waiting(position)
    needs_residual = any(CRITERIA[target.config.selection].needs == "residual" for target in targets)
    with ExitStack() as stack:  # of hooks, the last of which may end the pass
        residual = stack.enter_context(record_residual(decoder_layer, layer)) if needs_residual else None
        record = stack.enter_context(record_routing(layer.block, layer.experts, stop=walk.sequential))
        (walk.stream.probe if walk.sequential else walk.stream.step)(position, decoder_layer)
    data = measure_layer(layer, record, common.masks, common.held_out, common.processes)
    if walk.original is not None and not data.routing.weighs_input:  # else there is no weight of an output
        streams = walk.stream, walk.original
        drift = measure_drift(position, decoder_layer, layer, *streams, common.masks, common.processes)
        data = data.making_up_for(drift, targets[0].config.drift_correction)
    if residual is not None:
        data = replace(data, residual=residual.without_padding(common.masks))
    del record, residual
    if common.keep_statistics is not None and not walk.sequential:
        common.keep_statistics(position, data.statistics)
    seconds = time.perf_counter() - started
    for target in targets:
        after = (lambda: walk.stream.step(position, decoder_layer)) if walk.sequential else None
        compress_for(position, data, target, common.processes, common.shared, after, seconds)


def compress_for(
    position: int,
    data: LayerData,
    target: Target,
    processes: Processes,
    shared: bool,
    after: Callable[[], None] | None = None,
    measuring: float = 0.0,
) -> None:
    """One layer for one target; `after` runs on the compressed layer, before it goes to the target's sink."""
    started = time.perf_counter() - measuring
    with original_kept(data.layer) if shared else nullcontext():
        earlier = [report for at, report in sorted(target.sink.finished.items()) if at < position and report]
        report = compress_layer_(data, target.config, target.count(position), position, started, processes, earlier)
        if after is not None:
            after()
        target.sink.finish(position, report)
