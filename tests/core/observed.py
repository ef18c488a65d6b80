"""Random observed layers for tests of criteria, with a router of known rules, and simulated processes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from reference import reference_route
from samples import activation, make_segments

from optimum_dern.core.layer.mixture import Routing
from optimum_dern.core.layer.observation import ObservedLayer
from optimum_dern.core.layer.statistics import measure_experts


def observe(segments, routing, rows=None, held_out=None, **fields):
    """Make an `ObservedLayer` from experts and routing, with measured statistics and output."""
    statistics, target = measure_experts(segments, routing, activation)
    held_out = torch.zeros(len(target), dtype=torch.bool) if held_out is None else held_out
    return ObservedLayer(segments, activation, routing, target, held_out, statistics, rows, **fields)


def routed_layer(experts=6, tokens=30, top_k=2, held_out=None, seed=5, bias=None, logit_bias=None, **rules):
    """Make a layer whose router follows the rules of `reference_route`; returns it and its logits (T, E)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(experts, 4, generator=generator, dtype=torch.float64)
    logits = hidden @ rows.T
    if logit_bias is not None:
        logits = logits + logit_bias
    routes = [reference_route(z, list(range(experts)), top_k, bias=bias, **rules) for z in logits.tolist()]
    index, weight = (torch.tensor(part) for part in zip(*routes, strict=True))
    segments = make_segments(experts=experts, seed=seed)
    layer = observe(
        segments,
        Routing(hidden, index, weight.double()),
        rows,
        held_out,
        router_bias=logit_bias,
        choice_bias=None if bias is None else torch.tensor(bias, dtype=torch.float64),
        num_groups=rules.get("groups", 1),
        topk_group=rules.get("topk_group", 1),
    )
    return layer, logits


def in_processes(count, function):
    """Run `function(rank, reduce)` in several threads that stand for processes; returns the result of each."""
    barrier, given = Barrier(count, timeout=60), [None] * count

    def run(rank):
        def reduce(local, operation="sum"):
            given[rank] = local.clone()
            barrier.wait()
            together = torch.stack(given)
            result = together.sum(0) if operation == "sum" else together.amax(0)
            barrier.wait()  # all must have read the tensors before the next reduce overwrites them
            return result

        return function(rank, reduce)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
