"""Several results out of one pass over the source and the calibration data, each as if it were alone."""

import copy
import functools
import hashlib

import families
import pytest
import torch
from layers_aside import LayersAside
from tiny import EXPERTS, make_model, random_tokens, same_state, state_of
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from optimum_dern import CompressionReport, DernCompressor, DernConfig
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.checkpoint.source.recorded import STATISTICS_NAME
from optimum_dern.data.batches import load_batches
from optimum_dern.engine.cost.memory import plan_memory
from optimum_dern.engine.layer import compression
from optimum_dern.engine.run import checkpoint
from optimum_dern.engine.walk.decoder import compress_layers_
from optimum_dern.engine.walk.recipe import Recipe
from optimum_dern.engine.walk.stream import HiddenStream
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.skeleton import build_skeleton


QUICK = {"batch_size": 4, "neuron_refit": False, "router_refit": False}
RUN_DEPENDENT = (
    "dern_report.json",
    "dern_report.html",
    "dern_report.png",
    "README.md",
    STATISTICS_NAME,
    "model.safetensors.index.json",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of every family, made when it is asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def source(family):
        if not (folder / family).exists():
            make_model(family).save_pretrained(folder / family)
        return folder / family

    return source


def content(folder):
    """Digests of all files that must not depend on how a run went; reports tell seconds."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in RUN_DEPENDENT]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def layers_of(report):
    """What a report says about its layers, seconds aside."""
    return [{**vars(layer), "seconds": None} for layer in report.layers]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("order", ["sequential", "oneshot"])
def test_each_is_that_of_a_run_of_its_own(family, order, sources, tmp_path):
    """Every file and every report equals that of the separate run, whatever came before it in the pass."""
    options = {**QUICK, "dataset": random_tokens(12), "calibration_order": order}
    counts = [6, 4] if family == "mixtral" else [4, 6]
    reports = DernCompressor(**options).compress_checkpoint(sources(family), tmp_path / "all", num_experts=counts)
    assert sorted(f.name for f in (tmp_path / "all").iterdir() if f.is_dir()) == ["4-experts", "6-experts"]
    for count, report in zip(counts, reports, strict=True):
        single = DernCompressor(**options, num_experts=count).compress_checkpoint(
            sources(family), tmp_path / f"{count}"
        )
        assert content(tmp_path / "all" / f"{count}-experts") == content(tmp_path / f"{count}")
        assert layers_of(report) == layers_of(single)
        assert (report.after, report.config, report.calibration) == (single.after, single.config, single.calibration)
        saved = CompressionReport.load(tmp_path / "all" / f"{count}-experts" / "dern_report.json")
        assert saved == report
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "all" / f"{count}-experts")
        assert find_moe_layers(model)[0].num_experts == count


def test_sparsities(sources, tmp_path):
    """Fractions name folders by the experts that stay; each config keeps the amount that it was asked for."""
    options = {**QUICK, "dataset": random_tokens(12), "num_experts": 3}
    reports = DernCompressor(**options).compress_checkpoint(sources("mixtral"), tmp_path, sparsity=[0.25, 0.5])
    assert [report.after.experts for report in reports] == [6, 4]
    assert [(report.config["sparsity"], report.config["num_experts"]) for report in reports] == [
        (0.25, None),
        (0.5, None),
    ]
    assert (tmp_path / "6-experts" / "config.json").exists() and (tmp_path / "4-experts" / "config.json").exists()


def test_one_amount_is_written_where_it_always_was(sources, tmp_path):
    """A list of one gives a list of one report, and a number gives a report; both checkpoints are OUTPUT itself."""
    compressor = DernCompressor(**QUICK, dataset=random_tokens(12))
    reports = compressor.compress_checkpoint(sources("mixtral"), tmp_path / "list", num_experts=[4])
    report = compressor.compress_checkpoint(sources("mixtral"), tmp_path / "number", num_experts=4)
    assert [layers_of(report)] == list(map(layers_of, reports))
    assert content(tmp_path / "list") == content(tmp_path / "number")
    assert (tmp_path / "number" / "model.safetensors").exists()


@pytest.mark.parametrize("order", ["sequential", "oneshot"])
def test_the_source_is_read_once(order, sources, tmp_path, monkeypatch):
    """Three results read no more of the source than one, and run the original layers no more often where they can."""
    readers, steps, init, step = [], [], CheckpointReader.__init__, HiddenStream.step
    monkeypatch.setattr(CheckpointReader, "__init__", lambda self, f: (init(self, f), readers.append(self))[0])
    monkeypatch.setattr(HiddenStream, "step", lambda *args: (steps.append(1), step(*args))[1])
    options = {**QUICK, "dataset": random_tokens(12), "calibration_order": order}
    DernCompressor(**options).compress_checkpoint(sources("qwen3_moe"), tmp_path, num_experts=[6, 4, 3])
    assert len(readers) == 1
    assert readers[0].bytes <= readers[0].bytes_read <= 1.05 * readers[0].bytes
    assert len(steps) == {"sequential": (3 + 1) * 2, "oneshot": 2}[order]  # of the results, and of the original


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at(monkeypatch, owner, name, number, before):
    """Let the `number`-th call of a method end the run, before or after it does its work."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(1)
        if before and len(calls) == number:
            raise Stop
        result = original(*args, **kwargs)
        if not before and len(calls) == number:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, method)


MOMENTS = [
    (Manifest, "finish_layer", 1, False),  # the first result has its first layer, the other one has not
    (Manifest, "finish_layer", 4, True),
    (Manifest, "finish_layer", 5, False),
    (Manifest, "complete", 2, True),  # one result is complete
    (checkpoint, "publish_shards", 2, True),  # one result is in its place
    (checkpoint, "publish_shards", 2, False),
]
PRUNE = {"method": "prune", "refit": False, "guard": False, "dataset": random_tokens(8), "batch_size": 4}


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    """What an undisturbed run writes, by calibration order."""

    @functools.cache
    def run(order):
        folder = tmp_path_factory.mktemp(order)
        compressor = DernCompressor(**PRUNE, calibration_order=order)
        compressor.compress_checkpoint(sources("deepseek_v3"), folder, num_experts=[6, 4])
        return content(folder)

    return run


@pytest.mark.parametrize(
    ("order", "moment"),
    [("sequential", moment) for moment in MOMENTS] + [("oneshot", moment) for moment in MOMENTS[::2]],
    ids=lambda value: value if isinstance(value, str) else f"{value[1]}-{value[2]}-{value[3]}",
)
def test_resume(order, moment, sources, undisturbed, tmp_path, monkeypatch):
    """Interrupted anywhere, the same call goes on and gives the files of an undisturbed run."""
    compressor, source = DernCompressor(**PRUNE, calibration_order=order), sources("deepseek_v3")
    with monkeypatch.context() as patch:
        stop_at(patch, *moment)
        with pytest.raises(Stop):
            compressor.compress_checkpoint(source, tmp_path, num_experts=[6, 4])
    assert (tmp_path / ".dern").is_dir()
    reports = compressor.compress_checkpoint(source, tmp_path, num_experts=[6, 4])
    assert content(tmp_path) == undisturbed(order)
    assert [len(report.layers) for report in reports] == [2, 2]
    assert not (tmp_path / ".dern").exists()


@pytest.mark.parametrize("counts", [[6], [4, 6], [6, 4, 5], 6])
def test_other_amounts_than_the_unfinished_run(counts, sources, tmp_path, monkeypatch):
    """What an interrupted run was to give is part of what it is."""
    compressor = DernCompressor(**PRUNE)
    with monkeypatch.context() as patch:
        stop_at(patch, Manifest, "finish_layer", 2, False)
        with pytest.raises(Stop):
            compressor.compress_checkpoint(sources("mixtral"), tmp_path, num_experts=[6, 4])
    before = content(tmp_path)
    with pytest.raises(ValueError, match="experts was.*--restart"):
        compressor.compress_checkpoint(sources("mixtral"), tmp_path, num_experts=counts)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("amounts", "match"),
    [
        ({"num_experts": [4, 1]}, "would leave 1 of 8"),
        ({"num_experts": [4, 9]}, "num_experts=9, but each layer has 8"),
        ({"num_experts": [4, 8]}, "nothing to compress"),
        ({"num_experts": [4, 6, 4]}, "same 4 experts"),
        ({"sparsity": [0.5, 0.55]}, "same 4 experts"),
        ({"sparsity": [0.5, 1.5]}, "sparsity=1.5"),
        ({"num_experts": []}, "empty list"),
        ({"num_experts": [4], "sparsity": [0.5]}, "give one of them"),
    ],
)
def test_impossible_amounts(amounts, match, sources, tmp_path, monkeypatch):
    """Every amount is checked before anything is read or written."""
    monkeypatch.setattr(CheckpointReader, "read", None)
    with pytest.raises(ValueError, match=match):
        DernCompressor(**PRUNE).compress_checkpoint(sources("mixtral"), tmp_path / "out", **amounts)
    assert not (tmp_path / "out").exists()


def test_memory(sources):
    """Sequential results have hidden states each, beside the original's, and all wait for the original layer."""
    skeleton = build_skeleton(sources("mixtral"))
    layers = find_moe_layers(skeleton)

    def plan(counts, order="sequential", bound=None):
        config = DernConfig(calibration_order=order, method="prune", neuron_refit=False)
        return plan_memory(skeleton, layers, 100, config, counts, bound)

    assert plan([4]) == plan(4)
    alone = plan([4, 3], "oneshot").hidden
    assert (plan([4, 3]).hidden, plan(4).hidden) == (3 * alone, 2 * alone)
    experts = sum(parameter.numel() * 4 for parameter in layers[0].experts.parameters())
    assert plan(4).working < plan([4, 3]).working <= plan(4).working + experts
    with pytest.raises(ValueError, match="needs at least"):
        plan([4, 3], bound=plan([4, 3]).peak - plan([4, 3]).hidden - 1)


def test_hidden_states_in_files(sources, tmp_path):
    """Each walk has a file of its own where memory is bounded, and the bits are the same."""
    skeleton = build_skeleton(sources("mixtral"))
    options = {**PRUNE, "dataset": random_tokens(40, 100), "calibration_order": "sequential"}
    compressor = DernCompressor(**options)
    bound = plan_memory(skeleton, find_moe_layers(skeleton), 4000, compressor.config, [6, 4]).peak - 1
    compressor.compress_checkpoint(sources("mixtral"), tmp_path / "free", num_experts=[6, 4])
    compressor.compress_checkpoint(sources("mixtral"), tmp_path / "bound", num_experts=[6, 4], max_memory=bound)
    assert content(tmp_path / "free") == content(tmp_path / "bound")


def test_in_memory():
    """Several whole configs out of one pass over a model, which stays as it is; each result as if it were alone."""
    data = random_tokens(12)
    common = {"dataset": data, "batch_size": 4, "router_refit": False, "neuron_refit": False}
    configs = [
        DernConfig(**common, num_experts=4, preset="paper"),
        DernConfig(**common, num_experts=6),
        DernConfig(**common, num_experts=4, method="prune", selection="reap", calibration_order="oneshot"),
    ]
    model = make_model("deepseek_v3")
    layers, before, config = find_moe_layers(model), state_of(model), model.config.to_dict()
    parameters = list(map(id, model.parameters()))
    recipes = [Recipe(config, config.num_experts, LayersAside(model, layers)) for config in configs]
    reports = compress_layers_(model, layers, load_batches(data, None, batch_size=4), recipes)
    assert same_state(state_of(model), before) and model.config.to_dict() == config
    assert list(map(id, model.parameters())) == parameters
    assert [layer.num_experts for layer in find_moe_layers(model)] == [EXPERTS, EXPERTS]
    for recipe, layer_reports in zip(recipes, reports, strict=True):
        result = copy.deepcopy(model)
        recipe.sink.write_(result, find_moe_layers(result))
        alone = make_model("deepseek_v3")
        compressor = DernCompressor(recipe.config)
        compressor.compress_model(alone)
        assert same_state(state_of(result), state_of(alone))
        assert result.config.n_routed_experts == recipe.num_experts
        assert [report.errors for report in layer_reports] == [report.errors for report in compressor.report.layers]
        with torch.no_grad():
            logits = [m(data[0]["input_ids"][None]).logits for m in (result, alone)]
        assert torch.equal(*logits)


def test_layers_that_leave_something_for_later_ones():
    """Gemma 4's last layers attend to keys and values of earlier ones: those of the same walk."""
    data = random_tokens(6, 16)
    common = {"dataset": data, "num_experts": 4, "batch_size": 3, "method": "prune", "refit": False, "guard": False}
    configs = [DernConfig(**common, selection="man", calibration_order=order) for order in ("oneshot", "sequential")]
    model = families.make_model("gemma4_text")
    layers = find_moe_layers(model)
    recipes = [Recipe(config, 4, LayersAside(model, layers)) for config in configs]
    reports = compress_layers_(model, layers, load_batches(data, None, batch_size=3), recipes)
    for config, found in zip(configs, reports, strict=True):
        compressor = DernCompressor(config)
        compressor.compress_model(families.make_model("gemma4_text"))
        assert [report.saliency for report in found] == [report.saliency for report in compressor.report.layers]


def test_one_result_aside():
    """A single result that is kept aside leaves the model as it is, too."""
    data, model = random_tokens(8), make_model("mixtral")
    layers, before = find_moe_layers(model), state_of(model)
    config = DernConfig(dataset=data, num_experts=4, preset="paper")
    recipe = Recipe(config, 4, LayersAside(model, layers))
    compress_layers_(model, layers, load_batches(data, None, batch_size=4), [recipe])
    assert same_state(state_of(model), before)
    recipe.sink.write_(model, layers)
    assert model.config.num_local_experts == 4 and not same_state(state_of(model), before)


@pytest.mark.parametrize(("counts", "kept"), [([4], False), ([6, 4], True)])
def test_who_keeps_the_original_layer(counts, kept, sources, tmp_path, monkeypatch):
    """A single result gives the original experts' memory back before the refits; several leave them to one another."""
    storages, found, release, choose = [], [], compression.release_experts_, compression.choose_variant

    def releasing(layer):
        storages.append(StorageWeakRef(layer.experts.down_proj.untyped_storage()))
        release(layer)

    def choosing(*args):
        found.append(not storages[-1].expired())
        return choose(*args)

    monkeypatch.setattr(compression, "release_experts_", releasing)
    monkeypatch.setattr(compression, "choose_variant", choosing)
    DernCompressor(**PRUNE).compress_checkpoint(sources("mixtral"), tmp_path, num_experts=counts)
    assert found == [kept] * 2 * len(counts)
