"""The DERN method as the engine runs it: every option arrives, and the report tells what moved."""

import pytest
from tiny import compress, make_model, same_state, state_of


def result(**fields):
    """The tensors after DERN as published, with some options changed."""
    model = make_model("qwen3_moe")
    compress(model, preset="paper", **fields)
    return state_of(model)


@pytest.mark.parametrize(
    ("common", "changed"),
    [
        ({}, {"selection": "frequency"}),
        ({}, {"similarity_threshold": 0.6}),
        ({}, {"similarity_weights": (1, 0, 0)}),
        ({}, {"router_update": "rows"}),
        ({}, {"cluster_init": "own"}),
        ({}, {"cluster_iterations": 1}),
        ({}, {"cluster_tolerance": 10.0}),
        ({}, {"importance_weighting": False}),
        *(({}, {"importance": name}) for name in ("heapr", "camera_p", "slim")),
        ({}, {"calibration_order": "sequential", "selection": "ean"}),
        ({}, {"refit": True}),
        ({"refit": True}, {"refit_ridge": 1.0}),
        ({"refit": True}, {"refit_sweeps": 1}),
        ({"refit": True}, {"router_refit": True}),
        ({"refit": True}, {"neuron_refit": True}),
        ({"cluster_init": "random"}, {"seed": 1}),
        ({"selection": "random"}, {"seed": 1}),
    ],
    ids=str,
)
def test_every_option_arrives(common, changed):
    """Changing an option changes the weights; not changing it does not."""
    assert same_state(result(**common), result(**common))
    assert not same_state(result(**common), result(**common, **changed))


def test_what_moved():
    """The share falls with the threshold, from all segments to none, and the quantiles are of the cosines."""
    thresholds = (-1, 0.5, 0.6, 1.01)
    fields = {"recombine": True, "neuron_refit": False}
    reports = [compress(make_model("qwen3_moe"), similarity_threshold=t, **fields).report.layers for t in thresholds]
    for layers in zip(*reports, strict=True):
        shares = [layer.moved_share for layer in layers]
        assert shares[0] == 1 > shares[1] > shares[2] > shares[3] == 0
        quantiles = layers[0].similarity_quantiles
        assert list(quantiles) == ["0.00", "0.10", "0.25", "0.50", "0.75", "0.90", "1.00"]
        values = list(quantiles.values())
        assert -1 <= values[0] < values[-1] <= 1 and values == sorted(values)
    assert all("recombined" not in layer.errors for layer in reports[-1])
