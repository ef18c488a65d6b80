"""NAEE's objective: the set of experts whose loss changes the routed output least, against slow loops."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from observed import routed_layer
from reference import reference_allowed_sets, reference_elimination, reference_route, reference_set_error, silu
from samples import assert_near

from optimum_dern.core.criteria import greedy as module
from optimum_dern.core.criteria.greedy import greedy
from optimum_dern.core.criteria.selection import Places
from optimum_dern.core.router.choice import choose_experts


SOFTMAX = {"phi": "exp", "over_all": False, "scale": 1.0}
EVERY_SOFTMAX = {"phi": "exp", "over_all": True, "scale": 1.5}
DEEPSEEK = {"phi": "sigmoid", "over_all": False, "scale": 2.5, "by": "sigmoid", "groups": 2, "topk_group": 1}
THREE_GROUPS = {**SOFTMAX, "by": "exp", "groups": 3, "topk_group": 2, "best": 1}
GROUPED_LOGITS = {**SOFTMAX, "groups": 3, "topk_group": 1}  # of two experts: without one, a group's sum can grow
BIAS = [0.3, -0.2, 0.1, 0.0, -0.3, 0.2]


def error_of(layer, logits, rules, tokens=None, top_k=2, bias=None):
    """`error(kept)` by the reference, over all tokens or some."""
    tokens = slice(None) if tokens is None else tokens
    route = partial(reference_route, top_k=top_k, bias=bias, **rules)
    arguments = (*layer.segments[:3], layer.routing.hidden[tokens], logits[tokens])
    return lambda kept: reference_set_error(*arguments, kept, silu, route)


@pytest.mark.parametrize("exhaustive", [True, False])
@pytest.mark.parametrize(
    ("rules", "bias", "places"),
    [
        (SOFTMAX, None, Places(3)),
        (SOFTMAX, None, Places(2, 1, (0, 4))),
        (EVERY_SOFTMAX, None, Places(3, 1, (2,))),
        ({**SOFTMAX, "by": "exp"}, BIAS, Places(4)),
        (DEEPSEEK, BIAS, Places(4, 2)),
        (DEEPSEEK, BIAS, Places(4, 2, (1, 2))),
    ],
)
def test_the_set_matches_the_reference(monkeypatch, rules, bias, places, exhaustive):
    """All sets tried, or experts eliminated one by one: the reference's set, and its errors of single experts."""
    if not exhaustive:
        monkeypatch.setattr(module, "MAX_SETS", 0)
    layer, logits = routed_layer(tokens=20, bias=bias, **rules)
    scores, retained = greedy(layer, places)
    error = error_of(layer, logits, rules, bias=bias)
    assert_near(scores, [error([j for j in range(6) if j != i]) for i in range(6)], 1e-4)
    if exhaustive:
        expected = min(reference_allowed_sets(6, *places), key=error)
    else:
        expected = reference_elimination(error, 6, *places)
    assert retained.tolist() == expected


@pytest.mark.parametrize(
    ("rules", "bias"),
    [
        (SOFTMAX, None),
        (EVERY_SOFTMAX, None),
        ({**SOFTMAX, "by": "exp"}, BIAS),
        (DEEPSEEK, BIAS),
        (THREE_GROUPS, None),
        (GROUPED_LOGITS, None),
    ],
)
def test_one_expert_less_is_the_set_without_it(rules, bias):
    """The error without a candidate, from the tokens that it changes, is that of the smaller set from all tokens."""
    layer, _ = routed_layer(bias=bias, **rules)
    trial, kept = module._prepare(layer), [0, 1, 3, 4, 5]
    sets = torch.tensor([[expert for expert in kept if expert != candidate] for candidate in kept])
    whole = trial.losses(sets)
    assert whole.min() > 1
    losses = trial.losses_without(torch.arange(6) == 2)
    assert_near(losses[kept], whole, 1e-6)
    assert losses[2] == torch.inf


@pytest.mark.parametrize(("rules", "most"), [(SOFTMAX, 1 + 2), (DEEPSEEK, 1 + 2 + 2 * 2)])
def test_work_of_one_elimination(monkeypatch, rules, most):
    """All tokens are routed once, and once for each place that decides: not once for each of the experts."""
    routed = []
    monkeypatch.setattr(
        module, "choose_experts", lambda logits, *rest: routed.append(len(logits)) or choose_experts(logits, *rest)
    )
    layer, _ = routed_layer(experts=24, **rules)
    trial = module._prepare(layer)
    routed.clear()
    trial.losses_without(torch.arange(24) == 2)
    assert sum(routed) == most * len(trial.logits)
    assert len(routed) == 2


@pytest.mark.parametrize("exhaustive", [True, False])
def test_of_equals_the_first_stay(monkeypatch, exhaustive):
    """Experts that no token chooses are missed equally little: those of higher index go."""
    if not exhaustive:
        monkeypatch.setattr(module, "MAX_SETS", 0)
    unused = torch.tensor([0.0, -60, -60, 0, -60, 0])
    layer, _ = routed_layer(logit_bias=unused, **SOFTMAX)
    assert greedy(layer, Places(4))[1].tolist() == [0, 1, 3, 5]


def test_groups_lose_equally_many():
    """Where the two experts that are missed least are in one group, each group still loses one."""
    places = Places(4, 2)
    layer, logits = routed_layer(tokens=20, bias=BIAS, seed=7, **DEEPSEEK)
    error = error_of(layer, logits, DEEPSEEK, bias=BIAS)
    assert sum(i < 3 for i in reference_elimination(error, 6, 4)) != 2
    kept = module._eliminate(module._prepare(layer), places)
    assert kept.tolist() == reference_elimination(error, 6, *places)


def test_a_router_with_a_bias_on_its_logits():
    """A bias that is part of the logits (GPT-OSS) is part of the rule."""
    bias = torch.tensor([1.0, -1, 0.5, 0, -0.5, 1])
    layer, logits = routed_layer(tokens=20, logit_bias=bias, **SOFTMAX)
    _, retained = greedy(layer, Places(3))
    assert retained.tolist() == min(reference_allowed_sets(6, 3), key=error_of(layer, logits, SOFTMAX))


def test_the_best_set_is_not_the_best_scores():
    """Of two equal experts one stays, although dropping either alone costs nothing."""
    layer, _ = routed_layer(experts=4, top_k=1, **SOFTMAX)
    double = [part.clone() for part in layer.segments[:3]]
    for part in double:
        part[1] = part[0]
    rows = layer.router_rows.clone()
    rows[1] = rows[0] * 0.999  # whoever loses expert 0 goes to expert 1
    index = (layer.routing.hidden @ rows.T).topk(1, dim=1).indices
    segments = layer.segments._replace(gate=double[0], up=double[1], down=double[2])
    routing = layer.routing._replace(index=index, weight=torch.ones(len(index), 1).double())
    target = torch.cat([_output(segments, routing, t) for t in range(len(index))])
    layer = replace(layer, segments=segments, routing=routing, target=target, router_rows=rows)
    scores, retained = greedy(layer, Places(3))
    assert scores[:2].max() < 0.2 * scores[2:].min()
    assert retained.tolist() in ([0, 2, 3], [1, 2, 3])
    _, retained = greedy(layer, Places(2))
    assert len({0, 1} & set(retained.tolist())) == 1


def _output(segments, routing, token):
    from optimum_dern.core.layer.mixture import routed_output

    return routed_output(
        segments, routing.select(slice(token, token + 1)), lambda g, u: torch.nn.functional.silu(g) * u
    )


def test_held_out_tokens_are_not_looked_at():
    """The set is the best for the other tokens, whatever it does to those that judge it."""
    held_out = torch.arange(30) % 3 == 0
    layer, logits = routed_layer(held_out=held_out, **SOFTMAX)
    scores, retained = greedy(layer, Places(3))
    error = error_of(layer, logits, SOFTMAX, ~held_out)
    assert_near(scores, [error([j for j in range(6) if j != i]) for i in range(6)], 1e-4)
    assert retained.tolist() == min(reference_allowed_sets(6, 3), key=error)


@pytest.mark.parametrize("limit", ["MAX_TOKENS", "MAX_ELEMENTS"])
def test_tokens_are_capped(monkeypatch, limit):
    """Beyond the cap every n-th token counts: of 30 tokens and room for 10, every third."""
    monkeypatch.setattr(module, limit, 10 if limit == "MAX_TOKENS" else 10 * 36)
    layer, logits = routed_layer(**SOFTMAX)
    scores, _ = greedy(layer, Places(3))
    error = error_of(layer, logits, SOFTMAX, slice(None, None, 3))
    assert_near(scores, [error([j for j in range(6) if j != i]) for i in range(6)], 1e-4)


def test_the_cap_is_for_all_processes_together(monkeypatch):
    """Of two processes with 30 tokens each and room for 10, each takes every sixth of its own."""
    monkeypatch.setattr(module, "MAX_TOKENS", 10)
    layer, _ = routed_layer(**SOFTMAX)
    twice = replace(layer, reduce=lambda local, operation="sum": 2 * local if operation == "sum" else local)
    assert torch.equal(module._prepare(twice).energy, layer.target[::6].square().sum(1))


@pytest.mark.parametrize(("rules", "bias", "places"), [(SOFTMAX, None, Places(3)), (DEEPSEEK, BIAS, Places(4, 2))])
@pytest.mark.parametrize("limit", [2048, 10])
def test_processes_agree_with_one(monkeypatch, limit, rules, bias, places):
    """Two processes, each with half of the tokens, decide what one decides that has all, also from a sample."""
    import threading

    monkeypatch.setattr(module, "MAX_TOKENS", limit)
    layer, _ = routed_layer(bias=bias, **rules)
    expected, barrier, shared, results = greedy(layer, places), threading.Barrier(2), [None, None], [None, None]

    def run(rank):
        def reduce(local, operation="sum"):
            shared[rank] = local
            barrier.wait()
            total = shared[0] + shared[1] if operation == "sum" else torch.maximum(shared[0], shared[1])
            barrier.wait()
            return total

        part = slice(rank, None, 2)
        own = replace(
            layer,
            routing=layer.routing.select(part),
            target=layer.target[part],
            held_out=layer.held_out[part],
            order=torch.arange(30)[part],
            reduce=reduce,
        )
        results[rank] = greedy(own, places)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for scores, retained in results:
        assert_near(scores, expected[0], 1e-4)
        assert torch.equal(scores, results[0][0]) and torch.equal(retained, expected[1])


@pytest.mark.parametrize("rules", [SOFTMAX, DEEPSEEK])
def test_a_process_without_tokens(rules):
    """It adds nothing to the errors that the others find."""
    trial = module._prepare(routed_layer(**rules)[0])
    none = {name: getattr(trial, name)[:0] for name in ("logits", "gram", "products", "energy")}
    losses = replace(trial, **none).losses_without(torch.arange(6) == 2)
    assert losses.tolist() == [0, 0, torch.inf, 0, 0, 0]
