"""Merging one decoder layer at a time: against all in memory, and against loops over whole models."""

import json

import pytest
import torch
from families import make_model as family_model
from fine_tunes import changed, texts
from live_bytes import LiveBytes
from tiny import make_model, same_state, state_of
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from optimum_dern.checkpoint.format.reader import stored_tensors
from optimum_dern.commands.main import main
from optimum_dern.model_merging import LearnedSettings, merge, merge_checkpoints, runs
from optimum_dern.model_merging.layerwise import learn_layerwise
from optimum_dern.model_merging.parts import CheckpointParts


SETTINGS = LearnedSettings(epochs=2, accumulate=2, rate=0.3)


def pair(root):
    return [root / "one", root / "two"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
def test_rules_give_the_same_bits(folders, tmp_path, method):
    """As with all in memory, in the files of a base with several shards."""
    AutoModelForCausalLM.from_pretrained(folders / "base").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    states = []
    for by_layer in (False, True):  # the in-memory form has shards of its own
        output = tmp_path / f"layerwise-{by_layer}"
        options = {"method": method, "layerwise": by_layer}
        assert merge_checkpoints(tmp_path / "base", pair(folders), output, **options)["layerwise"] == by_layer
        states.append(state_of(AutoModelForCausalLM.from_pretrained(output)))
    assert same_state(*states)
    assert len(list(output.glob("*.safetensors"))) > 1
    assert stored_tensors(output).keys() == stored_tensors(tmp_path / "base").keys()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_other_layouts(family, tmp_path):
    """Fused experts with biases; a dense first layer, routing biases that are no parameters, shared experts."""
    for name, model in (("base", family_model(family)), *((n, changed(family_model(family), n)) for n in (1, 2))):
        model.save_pretrained(tmp_path / str(name))
    options = {"method": "task_arithmetic", "strength": 0.5}
    merge_checkpoints(tmp_path / "base", [tmp_path / "1", tmp_path / "2"], tmp_path / "all", **options)
    merge_checkpoints(tmp_path / "base", [tmp_path / "1", tmp_path / "2"], tmp_path / "by", layerwise=True, **options)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("all", "by")]
    assert same_state(*map(state_of, models))


def hidden_behind(model, weights, batch):
    """The output of every decoder layer in a pass of the whole model with other weights."""
    outputs = []
    take = lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handles = [layer.register_forward_hook(take) for layer in model.model.layers]
    functional_call(model, weights, kwargs=dict(batch), tie_weights=True)
    for handle in handles:
        handle.remove()
    return outputs


def learned_by_loops(base, sources, data, settings):
    """Merged weights, with every pass through whole models and every coefficient a tensor of its own."""
    own = {name: p.detach() for name, p in base.named_parameters()}
    taus = [{name: p.detach() - own[name] for name, p in source.named_parameters()} for source in sources]
    merged = {name: own[name] + settings.initial * sum(tau[name] for tau in taus) for name in own}
    start = torch.tensor(settings.initial).logit()
    for position in range(len(base.model.layers)):
        names = [name for name in own if name.startswith(f"model.layers.{position}.")]
        raw = {(name, k): start.clone().requires_grad_() for name in names for k in range(2)}

        def weights(of, names=names, known=merged):
            added = {n: own[n] + sum(of[n, k].sigmoid() * taus[k][n] for k in range(2)) for n in names}
            return known | added

        def error(k, batch, of, position=position, weights=weights):
            with torch.no_grad():
                target = hidden_behind(sources[k], {}, batch)[position]
            found = hidden_behind(base, weights(of), batch)[position]
            real = [(r, t) for r, row in enumerate(batch["attention_mask"].tolist()) for t, m in enumerate(row) if m]
            return torch.stack([(found[r, t] - target[r, t]).square().mean() for r, t in real]).mean()

        with torch.no_grad():
            untouched = dict.fromkeys(raw, start)
            scales = [sum(error(k, b, untouched) for b in data[k]) / len(data[k]) for k in range(2)]
        optimizer, turn = torch.optim.Adam(raw.values(), lr=settings.rate), 0
        for _ in range(settings.epochs):
            for batches in zip(*data, strict=True):
                for k, batch in enumerate(batches):
                    away = sum((one.sigmoid() - settings.initial).abs() for one in raw.values()) / len(raw)
                    loss = error(k, batch, raw) / scales[k] + settings.regulariser * away
                    (loss / settings.accumulate).backward()
                    turn += 1
                    if turn % settings.accumulate == 0:
                        torch.nn.utils.clip_grad_norm_(raw.values(), settings.clip)
                        optimizer.step()
                        optimizer.zero_grad()
        with torch.no_grad():
            merged = {name: tensor.detach() for name, tensor in weights(raw).items()}
    return merged


def test_against_loops_over_whole_models(folders, tmp_path):
    """Padding left out; every layer learned on what the merged layers before it give."""
    data = texts()
    for batches in data:
        batches[0]["attention_mask"][0, :4] = 0
    facts = merge_checkpoints(
        folders / "base", pair(folders), tmp_path / "out", texts=data, settings=SETTINGS, layerwise=True
    )
    models = [AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("base", "one", "two")]
    expected = learned_by_loops(models[0], models[1:], data, SETTINGS)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    moved = 0
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=2e-5)
        moved += name.startswith("model.layers") and (parameter - models[0].get_parameter(name)).abs().max() > 1e-3
    assert moved and facts["factors"] != [SETTINGS.initial] * 2


def test_more_coefficients_for_important_layers(folders, tmp_path):
    """The second pass goes on from the first; only parameters of layers above the average have parts."""
    parts = CheckpointParts(folders / "base", pair(folders), torch.device("cpu"))
    settings = LearnedSettings(epochs=1, accumulate=1, chunks=3)
    raw = learn_layerwise(parts, texts(), settings, lambda weights: None)
    counts = {}
    for name, factors in raw.items():
        counts.setdefault(name.split(".")[2], set()).add(factors.shape[1])
    assert sorted(counts.values(), key=max) == [{1}, {3}]


def test_layers_in_memory(tmp_path):
    """Base, sources, merged layer, its gradient, and what the layer copies for it, however many layers there are."""
    peaks = {}
    for count in (2, 6):
        torch.manual_seed(0)
        options = {"num_hidden_layers": count, "vocab_size": 260, "hidden_size": 64, "intermediate_size": 256}
        root = tmp_path / str(count)
        for name in ("base", "one", "two"):
            model = make_model("mixtral", **options)
            (model if name == "base" else changed(model, len(name))).save_pretrained(root / name)
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        parts = CheckpointParts(root / "base", pair(root), torch.device("cpu"))
        with LiveBytes() as live:
            learn_layerwise(parts, texts(), LearnedSettings(epochs=1), lambda weights: None)
        peaks[count] = live.peak / layer
    assert peaks[6] < 1.05 * peaks[2] and peaks[6] < 2 + 3 + 0.8


def test_nothing_stays_of_an_interrupted_merge(folders, tmp_path, monkeypatch):
    def interrupted(parts, texts, settings, finish):
        finish(parts.outside().own)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "learn_layerwise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(folders / "base", pair(folders), tmp_path / "out", texts=texts(), layerwise=True)
    assert not list(tmp_path.iterdir())


def test_by_itself_where_memory_is_short(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "total_memory", lambda device: 600 << 20)
    facts = merge_checkpoints(folders / "base", pair(folders), tmp_path / "out", method="ties")
    assert facts["layerwise"] and (tmp_path / "out" / "config.json").is_file()


def test_the_command(folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some words of a text " * 60)
    data = ["--data", *(f"{name}={tmp_path / 'text.txt'}" for name in ("one", "two"))]
    models = [str(folders / name) for name in ("base", "one", "two")]
    options = ["--num-samples", "2", "--sequence-length", "16", "--epochs", "1", "--layerwise", "--json"]
    main(["merge", *models, str(tmp_path / "out"), *data, *options])
    facts = json.loads(capsys.readouterr().out)
    assert facts["layerwise"] and len(facts["factors"]) == 2
    assert (tmp_path / "out" / "tokenizer.json").is_file()
