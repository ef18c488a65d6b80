"""Condense some MoE layers of a model into dense ones (CD-MoE, arXiv 2412.00069).

In a condensed layer every token gets the shared experts and a few routed ones with fixed weights; there is no router
any more, and the layer is an ordinary dense one of the model's family.  Both the experts of a layer and the layers are
found by greedy searches (`core.merging.condense`, `condensing.layer_search`).
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..checks.batches import check_masks
from ..core.layer.segments import Segments
from ..data.labels import label_tokens
from ..engine.measure.expert_run import chunked_experts, measured_experts
from ..engine.measure.measuring import measure_layer
from ..engine.walk.visit import visit_layers
from ..engine.walk.walks import LayerProvider, LayersInMemory
from ..machine.processes import ALONE, Processes
from ..machine.torch_state import evaluation_mode
from ..models.moe.structure import find_decoder_layers, find_moe_layers
from ..models.refusals import check_materialised, check_model
from ..results.report import LayerReport
from .dense_network import fill_
from .layer import Fit, condense_layer
from .layer_search import search_layers
from .plan import CondensingPlan, make_dense_, plan_condensing


__all__ = ["condense_each", "condense_in_memory_", "condense_layers"]

Keep = Callable[[int, Segments, LayerReport], None]  # what becomes of the layer at a position: neurons, and its report


def condense_layers(
    model: nn.Module, batches: Sequence[dict], layers: int | Sequence[int], num_experts: int, refit: bool = True
) -> list[LayerReport]:
    """Condense MoE layers of a model in memory into dense ones.

    Args:
        model: a causal language model of a family that has dense layers, too.
        batches: calibration batches, `input_ids` and `attention_mask`, as `data.batches.load_batches` makes them.
        layers: which layers, by the index of the decoder layer; or how many, of those that change the model least.
        num_experts: routed experts in each of them; 0 for the shared ones alone.
        refit: fit the down projections to the blocks' original outputs (ridge regression), where that lowers the
            error on held-out tokens.

    Returns:
        The condensed layers, in the order in which they were chosen.  The model's modules and config have changed;
        `save_pretrained` writes an ordinary checkpoint.

    Raises:
        ValueError: a model whose layers cannot be dense ones, or numbers out of range; before any work.
    """
    found = find_moe_layers(model)
    check_model(model, found)
    check_materialised(found)
    check_masks(batches)
    return condense_in_memory_(model, plan_condensing(model, found, layers, num_experts), batches, Fit(refit))


@torch.no_grad()
def condense_in_memory_(
    model: nn.Module, plan: CondensingPlan, batches: Sequence[dict], fit: Fit
) -> list[LayerReport]:
    """Condense layers of a model that is completely in memory; on an error or interrupt it stays as it was.

    Args:
        model: a causal language model.
        plan: which layers.
        batches: calibration batches.
        fit: whether and how the down projections are fitted.

    Returns:
        The condensed layers, in the order in which they were chosen.
    """
    found: dict[int, LayerReport] = {}

    def keep(position: int, neurons: Segments, report: LayerReport) -> None:
        fill_(plan.networks[position], neurons, plan.at[position])
        found[position] = report

    with evaluation_mode(model):
        condense_each(model, plan, batches, fit, keep)
        chosen = dict.fromkeys(plan.networks)
        if plan.searched:
            chosen = search_layers(model, plan, batches, lambda position: nullcontext(plan.networks[position]))
    make_dense_(model, plan, chosen)
    return [replace(found[position], divergence=divergence) for position, divergence in chosen.items()]


@torch.no_grad()
def condense_each(
    model: nn.Module,
    plan: CondensingPlan,
    batches: Sequence[dict],
    fit: Fit,
    keep: Keep,
    provider: LayerProvider | None = None,
    done: Collection[int] = (),
    spill: Path | None = None,
    processes: Processes = ALONE,
) -> None:
    """Condense every layer of a plan on what the original model gives it, in one pass; the model stays as it is.

    Args:
        model: a causal language model in evaluation mode.
        plan: which layers.
        batches: calibration batches.
        fit: whether and how the down projections are fitted.
        keep: called with each condensed layer, while the original one is in memory.
        provider: loads the decoder layers; by default the model has them in memory.
        done: positions of layers that an earlier run has condensed.
        spill: folder for files of hidden states; in memory by default.
        processes: that share the batches; each is given all of them, takes its part, and keeps the same neurons.
    """
    waiting = [position for position in plan.networks if position not in done]
    if not waiting:
        return
    labels, batches = label_tokens(batches, processes), processes.share(batches)
    masks = [batch["attention_mask"].bool() for batch in batches]

    @contextmanager
    def visit(position: int) -> Iterator[None]:
        layer, started = plan.at.get(position), time.perf_counter()
        if position not in plan.networks:
            with nullcontext() if layer is None else chunked_experts(layer):
                yield
            return
        keep_tokens = position in waiting  # the others run alike: a run that goes on computes the same bits
        with measured_experts(layer, masks, keep=keep_tokens) as run:
            yield
        if keep_tokens:
            measured = measure_layer(layer, position, run, masks, labels, processes)
            keep(position, *condense_layer(measured, plan.num_experts, fit, started))

    _, decoder_layers = find_decoder_layers(model, plan.at[min(plan.at)])
    provider, stop = provider or LayersInMemory(), max(waiting) + 1
    visit_layers(model, decoder_layers, batches, provider, visit, "Condensing layers", stop, spill)
