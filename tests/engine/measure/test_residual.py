"""The residual stream before the experts, found by what the experts receive."""

from contextlib import ExitStack

import pytest
import torch
from families import FAMILIES, make_model
from tiny import padded_batch

from optimum_dern.engine.measure.residual import record_residual
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers, layers_by_position


PLAIN = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "jamba"]  # a layer adds its block's output
SUBSTITUTED = ["flex_olmo", "nemotron_h"]  # experts that read the stream itself, or a projection of it


def recorded(model, batches):
    """By position: the recorded stream of the real tokens, the block's outputs and the decoder layer's."""
    layers = find_moe_layers(model)
    _, decoder_layers = find_decoder_layers(model, layers[0])
    masks = [batch["attention_mask"].bool() for batch in batches]
    found = {}
    for position, layer in layers_by_position(model, layers).items():
        outputs, blocks = [], []
        decoder_layer = decoder_layers[position]
        with record_residual(decoder_layer, layer) as record, ExitStack() as stack:
            for module, to in ((decoder_layer, outputs), (layer.block, blocks)):
                handle = module.register_forward_hook(lambda module, args, output, to=to: to.append(output))
                stack.callback(handle.remove)
            with torch.no_grad():
                for batch in batches:
                    model(**batch, use_cache=False)
        found[position] = record.without_padding(masks), real(blocks, masks), real(outputs, masks)
        assert not decoder_layer._forward_pre_hooks and not layer.experts._forward_pre_hooks
        assert not any(part._forward_hooks for part in decoder_layer.children())
    return found


def real(outputs, masks):
    """The real tokens of outputs that may be tuples: (T, d)."""
    tensors = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return torch.cat([t.reshape(-1, t.shape[-1])[mask.flatten()] for t, mask in zip(tensors, masks, strict=True)])


@pytest.mark.parametrize("family", PLAIN)
def test_the_stream_plus_the_block_is_the_layer(family):
    """Real tokens only: what is recorded and what the block returns add up to what the layer returns."""
    batches = [padded_batch([24, 9, 17], side) for side in ("left", "right")]
    found = recorded(make_model(family), batches)
    assert found
    for stream, block, output in found.values():
        assert stream.shape == output.shape == (100, 32)
        torch.testing.assert_close(stream + block, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SUBSTITUTED)
def test_other_experts_are_refused(family):
    """Where no norm's output goes to the experts as it is, the layer is named, and no hook stays."""
    assert family in FAMILIES
    model = make_model(family)
    with pytest.raises(ValueError, match="easy_ep.*residual stream.*layers.*another selection"):
        recorded(model, [padded_batch([9], "left")])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
