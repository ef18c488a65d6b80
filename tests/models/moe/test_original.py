"""Original tensors come back as the very same objects: an optimiser that holds them is not left behind."""

import pytest
import torch
from families import make_model as make_family
from tiny import compress, make_model, state_of

from optimum_dern.engine.layer import compression
from optimum_dern.models.moe.original import original_kept
from optimum_dern.models.moe.structure import find_moe_layers


def interrupt_the_second(monkeypatch):
    """The user stops the compression of the second layer."""
    choose, calls = compression.choose_variant, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return choose(*args)

    monkeypatch.setattr(compression, "choose_variant", stop)


@pytest.mark.parametrize("make", [lambda: make_model("mixtral"), lambda: make_family("gpt_oss")])
def test_an_interrupted_model_is_the_one_before(make, monkeypatch):
    """Parameters, values and expert counts, also where experts are stored with biases and interleaved."""
    model = make()
    parameters, state = dict(model.named_parameters()), {name: t.clone() for name, t in state_of(model).items()}
    counts = [layer.num_experts for layer in find_moe_layers(model)]
    interrupt_the_second(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compress(model, refit=False)
    after = dict(model.named_parameters())
    assert parameters.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(model).items())
    assert [layer.num_experts for layer in find_moe_layers(model)] == counts


def test_nothing_is_copied():
    """What is kept are the parameters, not their values."""
    layer = find_moe_layers(make_model("mixtral"))[0]
    down = layer.experts.down_proj
    with original_kept(layer):
        layer.experts._parameters["down_proj"] = torch.nn.Parameter(torch.zeros_like(down))
    assert layer.experts.down_proj is down
