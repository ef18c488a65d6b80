"""Which layers a config can make dense, and in what form."""

from types import SimpleNamespace

import pytest
from families import make_model

from optimum_dern.condensing.dense_form import dense_form, possible_layers, which_dense
from optimum_dern.models.moe.structure import find_moe_layers, layers_by_position


@pytest.mark.parametrize(
    ("config", "positions", "expected"),
    [
        ({"mlp_layer_types": ["dense", "sparse", "sparse"]}, [2], {"mlp_layer_types": ["dense", "sparse", "dense"]}),
        ({"mlp_only_layers": [3]}, [2, 0], {"mlp_only_layers": [0, 2, 3]}),
        ({"first_k_dense_replace": 1}, [2, 1], {"first_k_dense_replace": 3}),
        ({"first_k_dense_replace": 1}, [2], None),
        ({"num_dense_layers": 0}, [0], {"num_dense_layers": 1}),
        ({"mlp_layer_types": None, "moe_layer_start_index": 2}, [2], {"moe_layer_start_index": 3}),
        ({"mlp_only_layers": None}, [0], None),
    ],
)
def test_which_dense(config, positions, expected):
    assert which_dense(SimpleNamespace(**config), positions) == expected


@pytest.mark.parametrize(
    ("family", "first", "then"), [("qwen3_moe", [0, 1], [1]), ("deepseek_v3", [1], [1]), ("mixtral", [], [])]
)
def test_possible_layers(family, first, then):
    """Any, or the next after those that are dense."""
    model = make_model(family)
    at = layers_by_position(model, find_moe_layers(model))
    assert possible_layers(at) == first
    assert possible_layers(at, [0]) == (then if family == "qwen3_moe" else [])
    assert family != "deepseek_v3" or possible_layers(at, [1]) == [2]


def test_the_width_of_other_layers_stays():
    """Where a model has dense layers, theirs is taken; else the width is what is needed."""
    for family, position, width in (("hy_v3", 2, 48), ("qwen3_moe", 1, 20)):
        model = make_model(family)
        before = model.config.to_dict()
        at = layers_by_position(model, find_moe_layers(model))
        settings, networks = dense_form(model, at, [position], 20)
        assert networks[position].gate_proj.weight.shape == (width, 32)
        assert settings.get("intermediate_size", 48) == width and model.config.to_dict() == before
    with pytest.raises(ValueError, match="layers .1. cannot become dense ones of 49 neurons: .* have 48 neurons"):
        model = make_model("deepseek_v3")
        dense_form(model, layers_by_position(model, find_moe_layers(model)), [1], 49)
