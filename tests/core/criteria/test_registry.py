"""The table of criteria: names, needs, and the one way to ask them."""

from dataclasses import replace

import pytest
import torch
from observed import routed_layer

from optimum_dern.core.criteria import saliency
from optimum_dern.core.criteria.registry import CRITERIA, NEEDS, select
from optimum_dern.core.criteria.selection import Places, select_experts


FIELDS = ["segments", "activation", "routing", "target", "held_out", "statistics", "router_rows", "residual"]
VISIBLE = {  # to a criterion, by what it says it needs
    "nothing": ["segments"],  # to count the experts
    "weights": ["segments"],
    "statistics": ["segments", "statistics"],
    "tokens": FIELDS[:-1],
    "residual": FIELDS,
}


def full_layer():
    """A layer with everything that any criterion could ask for."""
    layer, _ = routed_layer(phi="exp", over_all=False, scale=1.0)
    return replace(layer, residual=layer.target + 1)


def test_every_criterion_is_there():
    """The names that configs may give, and what each needs."""
    by_need = {need: sorted(name for name, entry in CRITERIA.items() if entry.needs == need) for need in NEEDS}
    assert by_need == {
        "nothing": ["random"],
        "weights": ["aimer"],
        "statistics": ["ean", "frequency", "hope", "man", "mone", "msan", "reap", "router"],
        "tokens": ["greedy"],
        "residual": ["easy_ep"],
    }


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_needs_what_it_says(name):
    """Everything else may be missing, and the result is the same."""
    layer = full_layer()
    missing = {field: None for field in FIELDS if field not in VISIBLE[CRITERIA[name].needs]}
    seen, blind = select(name, layer, Places(3), seed=1), select(name, replace(layer, **missing), Places(3), seed=1)
    assert all(map(torch.equal, seen, blind))


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("places", [Places(3), Places(4, 2), Places(2, 2, (0, 5)), Places(3, 1, [1, 2]), Places(6)])
def test_places_are_kept(name, places):
    """The number asked for stays, equal shares of groups, and protected experts; scores are finite."""
    scores, retained = select(name, full_layer(), places)
    assert scores.shape == (6,) and scores.dtype == torch.float64 and scores.isfinite().all()
    assert retained.dtype == torch.int64 and retained.tolist() == sorted(set(retained.tolist()))
    assert len(retained) == places.count and set(places.protected) <= set(retained.tolist())
    assert (retained // (6 // places.num_groups)).bincount(minlength=places.num_groups).unique().numel() == 1


@pytest.mark.parametrize("name", CRITERIA)
def test_places_that_cannot_be_filled(name):
    """Every criterion refuses them with the reason."""
    for places, message in [
        (Places(7), "cannot retain 7"),
        (Places(3, 2), "equally"),
        (Places(1, 1, (0, 1)), "share 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(name, full_layer(), places)


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if not entry.chooses_set])
def test_scores_decide(name):
    """A criterion that ranks experts keeps the best of its own scores."""
    layer = full_layer()
    scores, retained = select(name, layer, Places(3), seed=4)
    assert torch.equal(retained, select_experts(scores, 3))
    if name == "random":
        assert torch.equal(scores, saliency.random(6, seed=4))


def test_unknown_criterion():
    """An unknown name is refused, and the message lists what exists."""
    with pytest.raises(ValueError, match="unknown selection criterion 'norm'.*'greedy'.*'router'"):
        select("norm", full_layer(), Places(3))
