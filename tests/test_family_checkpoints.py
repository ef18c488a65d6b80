"""Every Mixture-of-Experts family: what is written, and what plain transformers 5 and 4.57 make of it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import run_elsewhere, transformers_4
from families import FAMILIES, TRANSFORMERS_4, make_model, model_class, published_config, runnable
from load_families import IMPLEMENTATIONS, observe
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.config_json import ROPE_KEYS
from optimum_dern.models.moe.structure import COUNT_KEYS, find_moe_layers


KEPT = 4
MAY_CHANGE = re.compile(r"expert|gate|router|moe|e_score_correction_bias")  # in the names of tensors
IN_MEMORY_ONLY = {"diffusion_gemma": "two stacks share the experts"}
every_family = pytest.mark.parametrize("family", runnable(FAMILIES))
pytestmark = pytest.mark.slow


@dataclass
class Compressed:
    """One family before and after."""

    source: Path  # the checkpoint that was compressed
    before: dict[str, Any]  # what the model showed
    folder: Path  # what was written
    after: dict[str, Any]
    compressor: DernCompressor
    removed: int  # entries of all tensors that compression takes away
    streamed: Path | ValueError  # the same from disk to disk, or why not


@pytest.fixture(scope="module")
def compressed(request, tmp_path_factory):
    """Every family of this session loaded, compressed and saved; or the exception that came up."""
    root = tmp_path_factory.mktemp("families")
    chosen = {
        item.callspec.params["family"]: None
        for item in request.session.items
        if hasattr(item, "callspec") and item.module is request.module and not item.get_closest_marker("skip")
    }
    results = {}
    for family in chosen:
        try:
            results[family] = compress_family(family, root)
        except Exception as failure:  # one family must not hide the others
            results[family] = failure
    return results


def compress_family(family, root):
    """Publish a checkpoint as authors do, load it, compress it, save it."""
    source, folder = root / "source" / family, root / "compressed" / family
    publish(family, source)
    before = observe(model_class(family).from_pretrained(source).eval())
    model = model_class(family).from_pretrained(source).eval()  # anew: observing it has changed how experts run
    layers = find_moe_layers(model)
    counted = [
        *(p for layer in layers for p in layer.experts.parameters()),
        *(r.tensor for layer in layers for r in layer.routing),
    ]
    removed = sum(tensor.numel() for tensor in counted) * (EXPERTS - KEPT) // EXPERTS
    compressor = DernCompressor(num_experts=KEPT, dataset=random_tokens(5), batch_size=4)
    compressor.compress_model(model)
    compressor.save(model, folder)
    streamed = root / "streamed" / family
    try:
        DernCompressor(num_experts=KEPT, dataset=random_tokens(5), batch_size=4).compress_checkpoint(source, streamed)
    except ValueError as refusal:
        streamed = refusal
    return Compressed(source, before, folder, observe(model), compressor, removed, streamed)


def publish(family, folder):
    """A checkpoint of a family as its authors publish it."""
    make_model(family).save_pretrained(folder)
    if FAMILIES[family].transposed:
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: t.mT.contiguous() for name, t in tensors.items() if ".experts." in name}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if family in TRANSFORMERS_4:
        file = folder / "config.json"
        file.write_text(json.dumps(published_config(family, json.loads(file.read_text("utf-8")))), "utf-8")


def require(results, family):
    """A family's result, or its exception."""
    if isinstance(results[family], Exception):
        raise results[family]
    return results[family]


@pytest.fixture(scope="module")
def reloaded(compressed, tmp_path_factory):
    """All compressed checkpoints in one fresh process."""
    folders = [result.folder for result in compressed.values() if isinstance(result, Compressed)]
    return run_elsewhere("load_families.py", tmp_path_factory.mktemp("reloaded") / "result.pt", *folders)


@every_family
def test_round_trip(compressed, reloaded, family):
    """Plain transformers loads every key, and computes and does what the model in memory and its original do."""
    result = require(compressed, family)
    loaded = reloaded[str(result.folder)]
    assert loaded["problems"] == {}
    assert loaded["failed"].keys() == result.before["failed"].keys()
    assert "logits, eager" in result.after["seen"].keys() == loaded["seen"].keys() == result.before["seen"].keys()
    for name, value in result.after["seen"].items():
        torch.testing.assert_close(
            loaded["seen"][name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in IMPLEMENTATIONS[1:]:
        other = loaded["seen"].get(f"logits, {name}", loaded["seen"]["logits, eager"])
        torch.testing.assert_close(other, loaded["seen"]["logits, eager"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(result.before["seen"]["logits"], loaded["seen"]["logits"], atol=1e-3)


@every_family
def test_files(compressed, family):
    """Names, types and layout are the source's, with fewer experts; everything outside the MoE blocks is untouched."""
    result = require(compressed, family)
    before, after = (load_file(folder / "model.safetensors") for folder in (result.source, result.folder))
    assert after.keys() <= before.keys()
    gone = before.keys() - after.keys()
    assert all(int(re.search(r"\.experts\.(\d+)\.", name)[1]) >= KEPT for name in gone)
    assert bool(gone) != FAMILIES[family].fused
    for name, tensor in after.items():
        source = before[name]
        assert tensor.dtype == source.dtype
        assert [s for s in zip(tensor.shape, source.shape, strict=True) if s[0] != s[1]] in ([], [(KEPT, EXPERTS)])
        assert MAY_CHANGE.search(name) or torch.equal(tensor, source)
    assert sum(t.numel() for t in before.values()) - sum(t.numel() for t in after.values()) == result.removed
    groups = find_moe_layers(make_model(family))[0].num_groups
    for layer in result.compressor.report.layers:
        group_sizes = torch.tensor(layer.retained).div(EXPERTS // groups, rounding_mode="floor").bincount()
        assert group_sizes.tolist() == [KEPT // groups] * groups


@every_family
def test_disk_to_disk(compressed, family):
    """A layer at a time, from the published checkpoint, the result has the bits of the one made in memory."""
    result = require(compressed, family)
    if family in IN_MEMORY_ONLY:
        assert IN_MEMORY_ONLY[family] in str(result.streamed)
        pytest.skip(IN_MEMORY_ONLY[family])
    assert isinstance(result.streamed, Path), result.streamed
    expected, found = (load_file(folder / "model.safetensors") for folder in (result.folder, result.streamed))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text("utf-8")) for folder in (result.folder, result.streamed)]
    assert configs[0] == configs[1]


@every_family
def test_config(compressed, family):
    """Only the expert counts differ from the source's config, under every name that the source uses.

    Where the source has no rotary embedding in the older form, that is written beside the newer one.
    """
    result = require(compressed, family)
    before, after = (
        flat(json.loads((folder / "config.json").read_text("utf-8"))) for folder in (result.source, result.folder)
    )
    counts = {path: value for path, value in before.items() if path[-1] in COUNT_KEYS and value == EXPERTS}
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    changed -= {path for path in changed if path[-1] in ("num_nextn_predict_layers", "transformers_version")}
    changed -= {path for path in after.keys() - before.keys() if ROPE_KEYS & set(path)}
    assert counts
    assert changed >= counts.keys()
    assert {path[-1] for path in changed} <= set(COUNT_KEYS)
    assert {after[path] for path in changed} == {KEPT}


def flat(values, path=()):
    """Nested dicts as {path: value}."""
    if not isinstance(values, dict):
        return {path: values}
    return {p: v for key, value in values.items() for p, v in flat(value, (*path, key)).items()}


@pytest.fixture(scope="module")
def reloaded_by_4(compressed, tmp_path_factory):
    """All sources and compressed checkpoints in one fresh process with transformers 4."""
    path = transformers_4()
    done = [r for family, r in compressed.items() if isinstance(r, Compressed) and family in TRANSFORMERS_4]
    folders = [folder for result in done for folder in (result.source, result.folder)]
    results = run_elsewhere("load_families.py", tmp_path_factory.mktemp("by_4") / "result.pt", *folders, path=path)
    assert results["version"].startswith("4.57")
    return results


@every_family
def test_transformers_4(compressed, request, family):
    """The checkpoint gives the same logits in transformers 4.57, where the source does too."""
    if family not in TRANSFORMERS_4:
        pytest.skip("not in transformers 4.57")
    reloaded = request.getfixturevalue("reloaded_by_4")
    result = require(compressed, family)
    original, loaded = reloaded[str(result.source)], reloaded[str(result.folder)]
    assert original["problems"] == loaded["problems"] == {}
    assert same(original["seen"]["logits"], result.before["seen"]["logits"])
    assert same(loaded["seen"]["logits"], result.after["seen"]["logits"])


def same(first, second):
    """Equal up to another order of sums."""
    return torch.allclose(first, second, atol=1e-4, rtol=1e-4)
