"""A real GPU, where there is one: what it gives is what the CPU gives, but for rounding."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny import compress, make_checkpoint, make_model, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.core.criteria.registry import CRITERIA
from optimum_dern.evaluation.loss.perplexity import evaluate_loss
from optimum_dern.methods import METHODS


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DATA = {"self_share": 0.0, "random_share": 0.0, "dataset": random_tokens(24), "batch_size": 8}
RUNS = {
    "recommended": {},
    "fast": {"preset": "fast"},
    "paper": {"preset": "paper"},
    **{f"method {name}": {"preset": "paper", "method": name} for name in METHODS if name != "mone"},
    **{f"selection {name}": {"preset": "paper", "method": "prune", "selection": name} for name in CRITERIA},
}
NEEDED = {("method cd_moe", "mixtral"): {"num_experts": 2}}  # as many as a token uses
NARROW = {f"method {name}": {"num_experts": None, "width": 8} for name in ("camera_p", "heapr", "slim")}
MOST_WAITS = {"recommended": 55, "fast": 30, "paper": 25}  # a layer, as on the pretended device


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products in float32, on both devices."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in RUNS for family in ("mixtral", "deepseek_v3") if name != "method cd_moe"]
    + [("method cd_moe", "mixtral")],  # the other's groups do not allow as few experts as a token uses
)
def test_near_the_cpu(name, family):
    """The same experts are retained, and weights and losses differ by rounding alone."""
    options = {**DATA, **RUNS[name], **NEEDED.get((name, family), {}), **NARROW.get(name, {})}
    here, there = make_model(family), make_model(family).to("cuda")
    first, second = compress(here, **options).report, compress(there, **options).report
    assert [layer.retained for layer in first.layers] == [layer.retained for layer in second.layers]
    assert {parameter.device.type for parameter in there.parameters()} == {"cuda"}
    held_out = [{"input_ids": torch.stack([row["input_ids"] for row in random_tokens(4, seed=1)])}]
    held_out[0]["attention_mask"] = torch.ones_like(held_out[0]["input_ids"])
    found = [evaluate_loss(model, held_out).loss for model in (here, there)]
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_from_disk(tmp_path):
    """A checkpoint compressed a layer at a time on a GPU, against the CPU."""
    make_checkpoint(tmp_path / "model")
    for device in ("cpu", "cuda"):
        DernCompressor(num_experts=4, preset="paper", **DATA).compress_checkpoint(
            tmp_path / "model", tmp_path / device, device=device
        )
    here, there = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.allclose(tensor, there[name], atol=1e-3), name


@pytest.mark.parametrize("name", MOST_WAITS)
def test_waits(name):
    """torch's own count of the moments at which the host waits for the device."""
    model = make_model("qwen3_moe", num_hidden_layers=4).to("cuda")
    compress(make_model("qwen3_moe").to("cuda"), **DATA, **RUNS[name])  # what is made once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compress(model, **DATA, **RUNS[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    waits = [f"{w.filename}:{w.lineno}" for w in found if "optimum_dern" in w.filename]  # not those of transformers
    counts = {place: waits.count(place) for place in waits}
    assert 0 < len(waits) <= MOST_WAITS[name] * 4, sorted(counts.items(), key=lambda item: -item[1])[:20]


def test_sixteen_bits():
    """A bfloat16 model, whose experts run in TF32 on the GPU: errors as on the CPU but for rounding."""
    here, there = (make_model("qwen3_moe").to(torch.bfloat16).to(device) for device in ("cpu", "cuda"))
    first, second = (compress(model, **DATA, preset="fast").report for model in (here, there))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.errors == pytest.approx(other.errors, rel=0.02)
