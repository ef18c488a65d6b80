"""A model on a GPU is compressed there, and comes out as on the CPU."""

import pytest
import torch
from tiny import compress, make_model

from optimum_dern.data.batches import load_batches


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_compressed_on_the_gpu(preset):
    """Weights stay on the device that they came from; both devices keep the same experts and agree on the logits."""
    models = {device: make_model("qwen3_moe").to(device) for device in ("cpu", "cuda")}
    reports = {device: compress(model, preset=preset).report for device, model in models.items()}
    assert {parameter.device.type for parameter in models["cuda"].parameters()} == {"cuda"}
    assert [layer.retained for layer in reports["cuda"].layers] == [layer.retained for layer in reports["cpu"].layers]
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        logits = [models[device](tokens.to(device)).logits.cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*logits, atol=1e-2, rtol=1e-2)


def test_token_rows_on_the_gpu():
    """They are calibration data like any others."""
    rows = [{"input_ids": torch.tensor([1, 2, 3], device="cuda"), "attention_mask": torch.ones(3, device="cuda")}] * 2
    (batch,) = load_batches(rows, None, batch_size=2)
    assert batch["input_ids"].device.type == "cpu" and batch["input_ids"].tolist() == [[1, 2, 3]] * 2
