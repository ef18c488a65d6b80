"""The predicted peak follows what is kept, and a bound is refused or kept."""

import pytest
from tiny import make_model

from optimum_dern import DernConfig
from optimum_dern.engine.memory import plan_memory
from optimum_dern.models.structure import find_moe_layers


@pytest.fixture(scope="module")
def model():
    """Its sizes are all that counts."""
    return make_model("mixtral")


def plan(model, tokens=1000, bound=None, count=4, **fields):
    """The plan for a config."""
    return plan_memory(model, find_moe_layers(model), tokens, DernConfig(**fields), count, bound)


def test_every_step_takes_its_part(model):
    """More tokens, experts and steps take more; the parts add up to the peak."""
    pruned = plan(model, method="prune", refit=False)
    refitted = plan(model, method="prune", neuron_refit=False)
    whole = plan(model, method="prune")
    assert pruned.working <= refitted.working < whole.working
    assert plan(model, method="dern").working >= whole.working
    assert plan(model, tokens=2000).hidden == 2 * plan(model).hidden
    assert plan(model, tokens=2000).working > plan(model).working
    assert whole.peak == whole.interpreter + whole.layer + whole.working + whole.hidden
    assert whole.layer == sum(p.numel() * 4 for p in model.model.layers[0].parameters())


def test_a_bound(model):
    """Hidden states go to a file only if that is needed, and what cannot be kept is refused with the least."""
    free = plan(model)
    assert not plan(model, bound=free.peak).spilled
    spilled = plan(model, bound=free.peak - 1)
    assert spilled.spilled and spilled.peak == free.peak - free.hidden
    with pytest.raises(ValueError, match=f"at least {spilled.peak / 2**30:.2f} GiB"):
        plan(model, bound=spilled.peak - 1)
