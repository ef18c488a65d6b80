"""The count of operations, against the counts of torch itself, and the measured rate."""

import pytest
import torch
from tiny import TOP_K, make_model
from torch.utils.flop_counter import FlopCounterMode

from optimum_dern import DernConfig
from optimum_dern.core.mixture import Routing
from optimum_dern.core.refit import refit_down
from optimum_dern.engine import duration
from optimum_dern.engine.duration import count_operations, measure_rate, predict_seconds
from optimum_dern.models.structure import find_moe_layers
from optimum_dern.models.view import layer_activation, read_layer


TOKENS = 600


def test_the_refit_of_the_down_projections():
    """What the refit adds to the count is within a factor of two of what torch counts."""
    model = make_model("mixtral")
    layer = find_moe_layers(model)[0]
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(TOKENS, 4, generator=generator).topk(TOP_K).indices
    routing = Routing(torch.randn(TOKENS, 32, generator=generator), index, torch.full((TOKENS, TOP_K), 0.5))
    segments = read_layer(layer).segments.select(torch.arange(4))
    with FlopCounterMode(display=False) as counter:
        refit_down(segments, routing, torch.randn(TOKENS, 32, generator=generator), layer_activation(layer), 1e-2)
    fields = {"method": "prune", "neuron_refit": False, "router_refit": False, "drift_correction": 0.0}
    counts = [count_operations(layer, TOKENS, DernConfig(refit=refit, **fields), 4) for refit in (True, False)]
    assert 0.5 < (counts[0] - counts[1]) / counter.get_total_flops() < 2


def test_more_work_takes_longer():
    """Every step and every token add to the prediction."""
    layers = find_moe_layers(make_model("mixtral"))
    rate = measure_rate(torch.device("cpu"), seconds=0.05)
    assert rate > 1e8

    def seconds(tokens=TOKENS, **fields):
        return predict_seconds(layers, tokens, DernConfig(**fields), 4, rate)

    assert seconds(method="prune", refit=False) < seconds(method="prune", neuron_refit=False) < seconds()
    assert seconds(tokens=2 * TOKENS, method="prune", refit=False) == pytest.approx(
        2 * seconds(method="prune", refit=False)
    )


def test_a_busy_machine(monkeypatch):
    """A product that had to wait for the processor says nothing about its speed."""
    products = iter([5.0, 0.5, 2.0, 1.0, 3.0])  # seconds, the last one after the end of the probe
    clock = [0.0]

    def busy(self, other):
        clock[0] += next(products, 1.0)
        return self

    monkeypatch.setattr(torch.Tensor, "__matmul__", busy)
    monkeypatch.setattr(duration.time, "perf_counter", lambda: clock[0])
    assert measure_rate(torch.device("cpu"), seconds=3.0) == 2 * duration.PROBE_SIZE**3 / 0.5
