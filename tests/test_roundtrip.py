"""A compressed checkpoint, loaded by plain transformers in a process without this package, is the model in memory."""

import json

import pytest
import torch
from elsewhere import run_elsewhere
from load_plainly import IMPLEMENTATIONS, observe
from safetensors import safe_open
from tiny import AUX_LOSS, EXPERTS, FAMILIES, FIRST_MOE, make_model, random_tokens

from optimum_dern import DernCompressor


KEPT = 4
COUNT_KEYS = {
    "mixtral": {"num_local_experts"},
    "qwen2_moe": {"num_experts"},
    "qwen3_moe": {"num_experts", "num_local_experts"},
    "olmoe": {"num_experts"},
    "deepseek_v3": {"n_routed_experts"},
}
EXPERT_NAMES = {"mixtral": ("block_sparse_moe", ("w1", "w2", "w3"))}
USUAL_NAMES = ("mlp", ("gate_proj", "up_proj", "down_proj"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Every family compressed and saved: compressor, model and folder by family."""
    results = {}
    for family in FAMILIES:
        model = make_model(family)
        compressor = DernCompressor(num_experts=KEPT, dataset=random_tokens(20), batch_size=4)
        compressor.compress_model(model)
        folder = tmp_path_factory.mktemp("checkpoints") / family
        compressor.save(model, folder)
        results[family] = (compressor, model, folder)
    return results


@pytest.fixture(scope="module")
def reloaded(compressed, tmp_path_factory):
    """What one process without this package sees of all the checkpoints."""
    folders = [folder for _, _, folder in compressed.values()]
    return run_elsewhere("load_plainly.py", tmp_path_factory.mktemp("reloaded") / "result.pt", *folders)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_loads(reloaded, family):
    """Plain transformers finds nothing missing, unexpected or of another shape."""
    assert reloaded[family]["problems"] == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_outputs(compressed, reloaded, family):
    """Logits of all experts implementations, router logits, auxiliary loss and generation are those in memory."""
    _, model, _ = compressed[family]
    expected, seen = observe(model), reloaded[family]["observed"]
    assert seen.keys() == expected.keys() >= {f"logits, {name}" for name in IMPLEMENTATIONS} | {"generated"}
    for name, value in expected.items():
        torch.testing.assert_close(
            seen[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    if family in AUX_LOSS:
        assert seen.keys() >= {"router logits", "aux loss"}
        assert seen["router logits"].numel() == 3 * 20 * KEPT * model.config.num_hidden_layers
        assert seen["aux loss"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_implementations_agree(reloaded, family):
    """The comparison covers three code paths that compute the same thing on the fewer experts."""
    seen = reloaded[family]["observed"]
    for name in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(seen[f"logits, {name}"], seen["logits, eager"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_on_disk(compressed, family):
    """Experts are stored one by one under the family's names, numbered from 0, in the source's dtype."""
    _, model, folder = compressed[family]
    block, projections = EXPERT_NAMES.get(family, USUAL_NAMES)
    layers = range(FIRST_MOE.get(family, 0), model.config.num_hidden_layers)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if ".experts." in name}  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    assert names == {
        f"model.layers.{layer}.{block}.experts.{expert}.{projection}.weight"
        for layer in layers
        for expert in range(KEPT)
        for projection in projections
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_config_on_disk(compressed, family):
    """The new count stands under every key that readers use, and nothing marks the checkpoint as quantised."""
    config = json.loads((compressed[family][2] / "config.json").read_text("utf-8"))
    counts = {key: value for key, value in config.items() if key in set.union(*COUNT_KEYS.values())}
    assert counts.keys() >= COUNT_KEYS[family]
    assert set(counts.values()) == {KEPT}
    assert not {"quantization_config", "dern_config"} & config.keys()
    assert config["architectures"] == [type(compressed[family][1]).__name__]


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_on_disk(compressed, family):
    """The router on disk is the one in memory, its entries those of the retained experts in their order."""
    compressor, model, folder = compressed[family]
    original = make_model(family)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for layer in compressor.report.layers:
            assert len(layer.retained) == KEPT < EXPERTS == len(layer.saliency)
            stored = layer.name.replace("mlp", EXPERT_NAMES.get(family, USUAL_NAMES)[0])
            for name, tensor in model.get_submodule(f"{layer.name}.gate").state_dict().items():
                assert torch.equal(file.get_tensor(f"{stored}.gate.{name}"), tensor)
                before = original.get_submodule(f"{layer.name}.gate").state_dict()[name][layer.retained]
                if name != "weight" or "router" not in layer.winner:
                    assert torch.equal(tensor, before)


def test_groups_keep_the_same_number(compressed):
    """A group-limited router keeps as many experts in each group, so that groups stay contiguous and equal."""
    compressor, model, _ = compressed["deepseek_v3"]
    groups = model.config.n_group
    for layer in compressor.report.layers:
        sizes = [sum(expert // (EXPERTS // groups) == group for expert in layer.retained) for group in range(groups)]
        assert sizes == [KEPT // groups] * groups
