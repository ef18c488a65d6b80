"""Measure what the experts of a checkpoint do for each domain of text, with one decoder layer in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source.find import find_checkpoint
from ..checks.arguments import check_argument
from ..checks.batches import check_batches
from ..core.layer.mixture import Routing
from ..engine.measure.expert_run import experts_run_by
from ..engine.walk.visit import visit_layers
from ..machine.torch_state import default_device, plain_torch
from ..models.moe.structure import find_moe_layers
from ..models.moe.view import layer_activation, read_layer
from ..models.refusals import check_model
from ..results.public_names import public_source
from .result import Attribution
from .sums import DomainSums, TopTokens


__all__ = ["attribute_experts"]

EXAMPLES = 8  # tokens shown for every expert
CONTEXT = 12  # tokens before and after one


@plain_torch()
def attribute_experts(
    model: str | Path,
    texts: Mapping[str, Sequence[dict]],
    tokenizer: Any = None,
    device: str | None = None,
    **source: Any,
) -> Attribution:
    """Measure every expert and neuron on some domains of text, in one pass over a checkpoint.

    Args:
        model: folder or Hub id.
        texts: token batches by domain, `input_ids` and `attention_mask`, each (batch, sequence).
        tokenizer: shows tokens as text; by default as numbers.
        device: to compute on; by default a GPU where there is one.
        **source: `revision`, `token` and `trust_remote_code`.

    Raises:
        ValueError: no domain, or a model that has no MoE layers.
    """
    check_argument("texts", texts, Mapping, "a dict of token batches by domain")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer={tokenizer!r:.80} is none; give one of transformers, or leave it out")
    if not texts:
        raise ValueError("there is no domain; give at least one, with its text")
    found = find_checkpoint(model, **source)
    layers = find_moe_layers(found.skeleton)
    check_model(found.skeleton, layers)
    for batches in texts.values():
        check_batches(batches, found.skeleton.get_input_embeddings().weight.shape[0], masked=True)
    loader = found.open_loader(default_device(device))
    batches = [(domain, batch) for domain, own in texts.items() for batch in own]
    sums: dict[int, dict[str, DomainSums]] = {}
    tops: dict[int, TopTokens] = {}

    @contextmanager
    def visit(position: int) -> Iterator[None]:
        layer, numbers = loader.positions.get(position), iter(range(len(batches)))
        if layer is None:
            yield
            return
        segments, activation = read_layer(layer).segments, layer_activation(layer)
        sums[position] = {domain: DomainSums.zeros(segments) for domain in texts}
        tops[position] = TopTokens(layer.num_experts, EXAMPLES)

        def receive(routing: Routing) -> Tensor:
            number = next(numbers)
            domain, batch = batches[number]
            real = batch["attention_mask"].bool().flatten().to(routing.hidden.device)
            routed, sizes = sums[position][domain].add_(segments, routing, activation, real)
            tops[position].add_(routing.index[real], sizes[real], number, real.nonzero().flatten())
            return routed

        with experts_run_by(layer, receive):
            yield

    visit_layers(found.skeleton, loader.decoder_layers, [b for _, b in batches], loader, visit, "Measuring experts")
    loader.reader.check_unchanged()
    tokens = {domain: sum(int(batch["attention_mask"].sum()) for batch in own) for domain, own in texts.items()}
    positions = sorted(sums)
    examples = [_examples(tops[position], batches, tokenizer) for position in positions]
    name = public_source(str(model))
    return Attribution(name, tokens, positions, *_shares(sums, positions, list(texts)), examples)


def _shares(
    sums: Mapping[int, Mapping[str, DomainSums]], positions: Sequence[int], domains: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Turn sums into shares of the layer's total, by measure and of the neurons."""

    def stacked(field: str) -> Tensor:
        return torch.stack([torch.stack([getattr(sums[p][d], field) for p in positions]) for d in domains])

    def share(values: Tensor) -> Tensor:
        total = values.flatten(2).sum(2)  # (D, L)
        return values / total.view(*total.shape, *[1] * (values.dim() - 2)).clamp(min=1e-300)

    fields = {"share": "count", "gate": "gate", "contribution": "contribution", "energy": "energy"}
    return {name: share(stacked(field)) for name, field in fields.items()}, share(stacked("neurons"))


def _examples(top: TopTokens, batches: Sequence[tuple[str, dict]], tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Describe the tokens of largest contribution of every expert, with their context."""

    def text(ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids)

    described = []
    for sizes, places in zip(top.size.tolist(), top.place.tolist(), strict=True):
        described.append([])
        for size, (number, position) in zip(sizes, places, strict=True):
            if number < 0:
                continue
            domain, batch = batches[number]
            row, column = divmod(position, batch["input_ids"].shape[1])
            ids, mask = batch["input_ids"][row], batch["attention_mask"][row].bool()
            first = int(mask.nonzero()[0])
            before, after = ids[max(first, column - CONTEXT) : column], ids[column + 1 : column + 1 + CONTEXT]
            described[-1].append(
                {
                    "domain": domain,
                    "before": text(before),
                    "token": text(ids[column : column + 1]),
                    "after": text(after[mask[column + 1 : column + 1 + CONTEXT]]),
                    "size": size,
                }
            )
    return described
