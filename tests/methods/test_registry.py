"""Methods behind the registry: what they are given, and that what they return is written."""

import pytest
import torch
from tiny import EXPERTS, HIDDEN, WIDTH, compress, make_model, random_tokens

from optimum_dern.methods import METHODS, Candidate, get_method, register_method


@pytest.fixture
def zero_method(monkeypatch):
    """A registered method whose experts do nothing; the problems that it was given are kept."""
    monkeypatch.setitem(METHODS, "zero", None)

    @register_method("zero")
    class Zero:
        problems = []

        def compress_layer(self, problem, config):
            self.problems.append(problem)
            kept = problem.layer.segments.select(problem.retained)
            silent = kept._replace(down=torch.zeros_like(kept.down))
            rows = 2 * problem.layer.router_rows[problem.retained]
            return {"pruned": Candidate(kept), "zero": Candidate(silent, rows, {"moved_share": 0.25})}

    return Zero


def test_a_method_of_ones_own(zero_method):
    """It sees all experts, statistics and scores of a layer; without the guard its last candidate is written."""
    model, original = make_model("mixtral"), make_model("mixtral")
    report = compress(model, method="zero", guard=False, refit=False).report
    for layer, problem in zip(report.layers, zero_method.problems, strict=True):
        assert problem.layer.segments.gate.shape == (EXPERTS, WIDTH, HIDDEN)
        assert problem.layer.statistics.tokens == 5 * 24
        assert problem.scores.tolist() == layer.saliency
        assert problem.retained.tolist() == layer.retained
        gate = original.get_submodule(layer.name).gate.weight
        assert torch.equal(problem.layer.router_rows, gate)
        assert torch.equal(model.get_submodule(layer.name).gate.weight, 2 * gate[layer.retained])
        assert not model.get_submodule(layer.name).experts.down_proj.any()
        assert (layer.winner, layer.moved_share) == ("zero", 0.25)


def test_the_guard_judges_every_method(zero_method):
    """Experts that do nothing leave the whole output as error, and lose against pruning."""
    model, original = make_model("mixtral"), make_model("mixtral")
    for layer in compress(model, method="zero", refit=False, dataset=random_tokens(30)).report.layers:
        assert layer.errors["zero"] == pytest.approx(1.0)
        assert layer.errors["pruned"] < 1
        assert layer.winner == "pruned"
        gate = original.get_submodule(layer.name).gate.weight
        assert torch.equal(model.get_submodule(layer.name).gate.weight, gate[layer.retained])


def test_unknown_methods():
    """The message lists the known ones."""
    assert {"dern", "prune", "ream", "m_smoe", "hc_smoe", "mergemoe", "sub_moe"} <= METHODS.keys()
    with pytest.raises(
        ValueError,
        match=r"unknown method 'x'; choose one of camera_p, cd_moe, dern, hc_smoe, heapr, ",
    ):
        get_method("x")
