"""Experts of different widths: as many neurons as with one width, zero padding, the same in memory and from disk."""

import json
import re

import pytest
import torch
from families import make_model
from layers_aside import LayersAside
from safetensors.torch import load_file
from tiny import compress, random_tokens, same_state, state_of
from tiny import make_model as tiny_model

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.commands.main import main
from optimum_dern.engine.layer import narrowing
from optimum_dern.engine.run.checks import check_request
from optimum_dern.engine.walk.decoder import compress_layers_
from optimum_dern.engine.walk.recipe import Recipe
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import read_layer
from optimum_dern.reporting.verdict import verdict


OPTIONS = {"preset": "fast", "self_share": 0.0, "width": 8, "width_budget": "global"}


def segments_of(model):
    """The neurons of all MoE layers."""
    return [read_layer(layer).segments for layer in find_moe_layers(model)]


def assert_padded(model, report):
    """As wide as the report tells, and zeros behind."""
    for segments, layer in zip(segments_of(model), report.layers, strict=True):
        for expert, width in enumerate(layer.widths):
            assert all(not part[expert, width:].any() for part in segments.parts)
            assert segments.down[expert, :width].any(1).all()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"method": "heapr"}),
        ("deepseek_v3", {"method": "camera_p", "num_experts": 4}),
        ("gpt_oss", {"method": "slim", "preset": "recommended"}),
        ("llama4_text", {"method": "camera_p"}),  # whose config has no key for another width
    ],
)
def test_in_memory_from_disk_and_plainly_loaded(family, options, tmp_path, caplog):
    """The config stays, and so do the shapes: plain transformers computes the same."""
    model, options = make_model(family), {**OPTIONS, **options, "dataset": random_tokens(8)}
    model.save_pretrained(tmp_path / "source")
    compressor = DernCompressor(**options)
    compressor.compress_model(model)
    report = DernCompressor(**options).compress_checkpoint(tmp_path / "source", tmp_path / "out")
    assert caplog.text.count("so neither the checkpoint's size nor the memory it takes falls for it") == 2
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert same_state(model.state_dict(), loaded.state_dict())
    ids = torch.stack([row["input_ids"] for row in random_tokens(2)])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert [layer.widths for layer in report.layers] == [layer.widths for layer in compressor.report.layers]
    assert "with 8 of their 16 neurons on average, the others being zero" in verdict(report)
    assert report.kept_width == 8 and report.after.width == report.before.width == 16
    assert len({width for layer in report.layers for width in layer.widths}) > 2
    assert_padded(loaded, report)


def chosen(monkeypatch, model, **options):
    """The neurons that a compression chooses in every layer, and the scores that it has ranked them by."""
    kept, scores, narrow, score = [], {}, narrowing.narrow, narrowing.score_neurons

    def noting_neurons(segments, neurons):
        kept.append(neurons)
        return narrow(segments, neurons)

    def noting_scores(statistics, config):
        found = score(statistics, config)
        scores[id(statistics)] = found[0]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(narrowing, "narrow", noting_neurons)
        patch.setattr(narrowing, "score_neurons", noting_scores)
        compress(model, **{**OPTIONS, "preset": "paper", "num_experts": None, **options})
    return kept, list(scores.values())


def reference_widths(scores, count):
    """By sorting every neuron of every layer and expert: how many each expert keeps."""
    widths = [[0] * len(rows) for rows in scores]
    places = [
        (-score, layer, expert)
        for layer, rows in enumerate(scores)
        for expert, row in enumerate(rows.tolist())
        for score in row
    ]
    for _, layer, expert in sorted(places)[:count]:
        widths[layer][expert] += 1
    return widths


@pytest.mark.parametrize("method", ["heapr", "slim"])
def test_all_layers_together(method, monkeypatch):
    """Where a backward pass has come first, layers share one budget, which some use more of than others."""
    kept, scores = chosen(monkeypatch, make_model("qwen3_moe"), method=method)
    found = [(neurons >= 0).sum(1).tolist() for neurons in kept]
    assert found == reference_widths(scores, 2 * 8 * 8)
    assert sum(found[0]) != sum(found[1])


def test_all_layers_are_ranked_once(monkeypatch):
    """However many layers there are; each takes its part of what one ranking has chosen."""
    sizes, select = [], narrowing.select_together
    monkeypatch.setattr(
        narrowing, "select_together", lambda scores, *rest: (sizes.append(len(scores)), select(scores, *rest))[1]
    )
    compress(tiny_model("qwen3_moe", num_hidden_layers=5), **OPTIONS, num_experts=None, method="heapr")
    assert sizes == [5 * 8]
    compress(tiny_model("qwen3_moe", num_hidden_layers=3), **OPTIONS, num_experts=4, method="heapr")
    assert sizes[1:] and set(sizes[1:]) == {4}  # which experts stay in later layers is not known: each by itself


def test_several_rankings_in_one_pass():
    """Each configuration keeps the neurons of its own importance and width."""
    model, data = tiny_model("qwen3_moe"), random_tokens(8)
    layers = find_moe_layers(model)
    asked = {(method, width): {"method": method, "width": width} for method in ("heapr", "slim") for width in (4, 8)}
    configs = {key: DernConfig(**{**OPTIONS, "preset": "paper", **options}) for key, options in asked.items()}
    sinks = {key: LayersAside(model, layers) for key in configs}
    recipes = [Recipe(config, check_request(config, model, layers), sinks[key]) for key, config in configs.items()]
    batches = [
        {"input_ids": row["input_ids"][None], "attention_mask": torch.ones(1, 24, dtype=torch.long)} for row in data
    ]
    compress_layers_(model, layers, batches, recipes)
    for key, options in asked.items():
        alone = compress(
            tiny_model("qwen3_moe"), **{**OPTIONS, "preset": "paper", "num_experts": None, **options}, dataset=data
        )
        assert [report.widths for report in sinks[key].finished.values()] == [r.widths for r in alone.report.layers]


@pytest.mark.parametrize("options", [{"method": "camera_p"}, {"method": "heapr", "num_experts": 4}])
def test_each_layer_by_itself(options, monkeypatch):
    """Where later layers are not known: as many neurons in every layer."""
    kept, _ = chosen(monkeypatch, make_model("qwen3_moe"), **options)
    totals = [int((neurons >= 0).sum()) for neurons in kept]
    assert totals == [options.get("num_experts", 8) * 8] * 2


@pytest.mark.parametrize("method", ["heapr", "camera_p"])
def test_super_neurons_stay(method, monkeypatch):
    """Whatever the scores say: here, that the neurons of the largest columns are worth least."""
    model = make_model("qwen3_moe")
    places = [int(segments.down.double().square().sum(-1).argmax()) for segments in segments_of(model)]

    def score(statistics, config):
        return -statistics.columns, statistics.columns == statistics.columns.max()

    monkeypatch.setattr(narrowing, "score_neurons", score)
    kept, _ = chosen(monkeypatch, model, method=method, width=4)
    for neurons, place in zip(kept, places, strict=True):
        assert place % 16 in neurons[place // 16]


def test_a_resumed_run(tmp_path, monkeypatch):
    """Ranks all layers again from the original ones, and ends with the same bytes."""
    make_model("qwen3_moe").save_pretrained(tmp_path / "source")
    options, note = {**OPTIONS, "method": "heapr", "dataset": random_tokens(8)}, Manifest.finish_layer
    DernCompressor(**options).compress_checkpoint(tmp_path / "source", tmp_path / "whole")

    def interrupted(self, position, value):
        note(self, position, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "finish_layer", interrupted)
        DernCompressor(**options).compress_checkpoint(tmp_path / "source", tmp_path / "part")
    DernCompressor(**options).compress_checkpoint(tmp_path / "source", tmp_path / "part")
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert same_state(whole, part)


def test_importance_in_dern_from_disk(tmp_path):
    """Recombination that weighs neurons, refitted and guarded: in memory and from disk."""
    model = make_model("qwen3_moe")
    options = {"importance": "heapr", "num_experts": 4, "similarity_threshold": 0.1}
    options |= {"preset": "fast", "self_share": 0.0, "dataset": random_tokens(8)}
    model.save_pretrained(tmp_path / "source")
    DernCompressor(**options).compress_model(model)
    report = DernCompressor(**options).compress_checkpoint(tmp_path / "source", tmp_path / "out")
    assert same_state(state_of(model), type(model).from_pretrained(tmp_path / "out").state_dict())
    assert all("recombined" in layer.errors and layer.moved_share for layer in report.layers)


def test_said_by_the_commands(tmp_path, capsys):
    """`inspect` tells it before, in text and as JSON, and `compress` what it has become."""
    make_model("mixtral").save_pretrained(tmp_path / "source")
    wanted = ["--method", "camera_p", "--width", "4", "--width-budget", "global"]
    main(["inspect", str(tmp_path / "source"), *wanted])
    assert "experts keep 4 of 16 neurons on average" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "source"), *wanted, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["width"] == [16, 16] and facts["bytes"][0] == facts["bytes"][1]
    assert facts["padding"]
    main(["inspect", str(tmp_path / "source"), *wanted[:-2], "--json"])
    assert json.loads(capsys.readouterr().out)["padding"] is None
    torch.save([row["input_ids"] for row in random_tokens(2)], tmp_path / "data.pt")
    data = ["--dataset", str(tmp_path / "data.pt"), "--preset", "paper", "--device", "cpu"]
    main(["compress", str(tmp_path / "source"), str(tmp_path / "out"), *wanted, *data])
    assert re.search(r"not zero, on average +4\b", capsys.readouterr().out)


def test_importance_without_gradients():
    """Experts that mix their outputs themselves give no gradient to weigh neurons by."""
    with pytest.raises(ValueError, match="importance='heapr' needs the gradient .* choose camera_p"):
        compress(make_model("llama4_text"), importance="heapr")
