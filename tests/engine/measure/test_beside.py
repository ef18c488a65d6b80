"""What a block adds to its routed experts' output, measured by silencing them."""

import pytest
import torch
from families import make_model
from tiny import HIDDEN, padded_batch

from optimum_dern.data.labels import label_tokens
from optimum_dern.engine.measure.beside import output_beside
from optimum_dern.engine.measure.expert_run import measured_experts
from optimum_dern.engine.measure.measuring import measure_layer
from optimum_dern.models.moe.structure import find_moe_layers


def measure(model, batches):
    """The first MoE layer on some batches, and its block's outputs without padding."""
    layer, masks, outputs = find_moe_layers(model)[0], [batch["attention_mask"].bool() for batch in batches], []
    handle = layer.block.register_forward_hook(
        lambda module, args, output: outputs.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad(), measured_experts(layer, masks) as run:
        for batch in batches:
            model(**batch)
    handle.remove()
    outputs = [output.view(*mask.shape, HIDDEN)[mask] for output, mask in zip(outputs, masks, strict=True)]
    return measure_layer(layer, 0, run, masks, label_tokens(batches)), torch.cat(outputs)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "ernie4_5_moe"])
def test_the_block_is_the_sum_of_both(family):
    """Gated and plain shared experts, or none: with the routed output it is what the block returned."""
    batches = [padded_batch([7, 12], "right"), padded_batch([9, 5], "left", seed=4), padded_batch([6, 6], "left")]
    measured, outputs = measure(make_model(family), batches)
    beside = output_beside(measured)
    assert beside.any() == (family != "mixtral")
    torch.testing.assert_close(measured.target + beside, outputs, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(measured.layer.experts)


def test_blocks_that_are_more_than_experts():
    """Of a decoder layer, or of experts that are not called with their routing, nothing is run."""
    for family in ("gemma4_text", "llama4_text"):
        assert output_beside(measure(make_model(family), [padded_batch([6, 6], "left")])[0]) is None
