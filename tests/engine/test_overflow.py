"""Numbers that a layer's dtype does not hold: refused by the layer's name, whatever chooses the experts."""

import pytest
import torch
from tiny import compress, make_model, random_tokens, same_state, state_of
from transformers import AutoModelForCausalLM

from optimum_dern import DernCompressor


PRUNE = {"method": "prune", "preset": "paper"}
WEIGHTS = {"selection": "aimer", "dataset": None}
CRITERIA = [{"selection": name} for name in ("router", "reap", "hope", "greedy", "easy_ep", "aimer")]
OVERFLOW = r"experts of model\.layers\.1\.mlp overflow float16 .*bfloat16 or float32 \(dtype='bfloat16', --dtype bfl"


@torch.no_grad()
def overflowing(part):
    """A float32 model; an expert's outputs, or only its neurons on the way there, are beyond float16."""
    model = make_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    if part == "outputs":
        experts.down_proj[3] *= 1e5 if experts.down_proj[3].abs().max() < 0.5 else 3e4
    else:
        experts.gate_up_proj[3] *= 1e3
        experts.down_proj[3] *= 1e-4
    return model


@pytest.mark.parametrize("part", ["outputs", "neurons"])
@pytest.mark.parametrize("fields", [*CRITERIA, {"selection": "reap", "calibration_order": "sequential"}])
def test_overflow(part, fields):
    """The last layer's, too, which no later one would notice; and the model stays as it was."""
    model = overflowing(part).half()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    with torch.no_grad():
        assert not model(torch.stack([row["input_ids"] for row in random_tokens(20)])).logits.isfinite().all()
    before = state_of(model)
    with pytest.raises(ValueError, match=OVERFLOW):
        compress(model, dataset=random_tokens(20), **PRUNE, **fields)
    assert same_state(state_of(model), before)


@pytest.mark.parametrize("part", ["outputs", "neurons"])
def test_the_mend(part):
    """In bfloat16 and float32 the same model is compressed."""
    for dtype in (torch.bfloat16, torch.float32):
        assert compress(overflowing(part).to(dtype), **PRUNE, selection="reap").report.after.experts == 4


@pytest.mark.parametrize("fields", [WEIGHTS, {"selection": "random", "dataset": None}, {"selection": "reap"}])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights(fields, value):
    """Weights that are not finite, where no token is needed or none reaches them: the experts are named."""
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 0, 0] = value
    with pytest.raises(ValueError, match=r"weights of experts \[5\] of model\.layers\.1\.mlp contain NaN or infinity"):
        compress(model, **PRUNE, **fields)


def test_a_checkpoint_that_float16_does_not_hold(tmp_path):
    """On disk with `dtype`, by the weights alone."""
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 0, 0] = 1e6
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    compressor = DernCompressor(num_experts=4, **PRUNE, **WEIGHTS)
    with pytest.raises(ValueError, match=r"experts \[2\] of model\.layers\.0\.mlp .* give bfloat16 or float32"):
        compressor.compress_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert compressor.compress_checkpoint(tmp_path / "source", tmp_path / "again").after.experts == 4


def test_recorded_statistics(tmp_path):
    """Sums that a run in float16 has recorded beyond its range are refused as that run is now."""
    from optimum_dern.core.layer.statistics import ExpertStatistics
    from optimum_dern.engine.measure.measuring import unseen_layer
    from optimum_dern.models.moe.structure import find_moe_layers

    model = make_model("mixtral").half()
    layer = find_moe_layers(model)[1]
    statistics = ExpertStatistics.zeros(8, 32)
    assert unseen_layer(layer, 1, statistics).statistics.tokens == 0
    for value, match in ((7e4, OVERFLOW), (torch.inf, r"outputs of model\.layers\.1\.mlp contain NaN or infinity")):
        statistics.output_max[3] = value
        with pytest.raises(ValueError, match=match):
            unseen_layer(layer, 1, statistics)


def test_inside_its_range(tmp_path):
    """An ordinary float16 checkpoint is compressed to what `from_pretrained` loads, finite all over."""
    make_model("mixtral").half().save_pretrained(tmp_path / "source")
    compressor = DernCompressor(num_experts=4, dataset=random_tokens(), batch_size=4, **PRUNE)
    compressor.compress_checkpoint(tmp_path / "source", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16 and all(t.isfinite().all() for t in model.state_dict().values())
