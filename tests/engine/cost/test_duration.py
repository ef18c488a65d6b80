"""The predicted time follows the work, and the measured rate is the machine's."""

import pytest
import torch
from tiny import make_model

from optimum_dern import DernConfig
from optimum_dern.engine.cost import duration
from optimum_dern.engine.cost.duration import measure_rate, predict_seconds
from optimum_dern.models.moe.structure import find_moe_layers


TOKENS = 600


def test_more_work_takes_longer():
    """Every step and every token add to the prediction."""
    model = make_model("mixtral")
    layers = find_moe_layers(model)
    rate = measure_rate(torch.device("cpu"), seconds=0.05)
    assert rate > 1e8

    def seconds(tokens=TOKENS, **fields):
        return predict_seconds(model, layers, tokens, DernConfig(**fields), 4, rate)

    assert seconds(method="prune", refit=False) < seconds(method="prune", neuron_refit=False) < seconds()
    assert seconds(tokens=2 * TOKENS, method="prune", refit=False) == pytest.approx(
        2 * seconds(method="prune", refit=False), rel=0.02
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
