"""Merged checkpoints: learned coefficients, their limits, what is refused, and the command."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from fine_tunes import texts
from tiny import make_model, same_state, state_of
from transformers import AutoModelForCausalLM

from optimum_dern.commands import merge
from optimum_dern.commands.main import main
from optimum_dern.model_merging import LearnedSettings, learn_coefficients, merge_checkpoints, runs
from optimum_dern.model_merging.coefficients import Coefficients, chunks_by_importance, importance


def parts(folders):
    """The base, its weights, and what the others add to them."""
    base, *others = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("base", "one", "two"))
    own = {name: p.detach() for name, p in base.named_parameters()}
    state = [dict(other.named_parameters()) for other in others]
    return base, own, {name: torch.stack([s[name].detach() - own[name] for s in state]) for name in own}


def test_merged_weights_and_their_limits(folders):
    """base + sum sigmoid(c) tau, part by part; at factors of 1 and 0 it is one of the models."""
    _, own, differences = parts(folders)
    found = Coefficients(differences, 0.1, dict.fromkeys(list(own)[:5], 3))
    for raw in found.parameters():
        torch.nn.init.normal_(raw, generator=torch.Generator().manual_seed(raw.numel()))
    with torch.no_grad():
        for name, merged in found.merged(own).items():
            factor, expected = found.raw[name].sigmoid(), own[name].flatten().clone()
            size = -(-expected.numel() // factor.shape[1])
            for i in range(expected.numel()):
                if i % 7 == 0:  # every entry would take long
                    for k in range(2):
                        expected[i] += factor[k, i // size] * differences[name][k].flatten()[i]
                    assert merged.flatten()[i] == pytest.approx(expected[i].item(), abs=1e-6)
        for raw in found.parameters():
            raw[0], raw[1] = 200.0, -200.0
        one = dict(AutoModelForCausalLM.from_pretrained(folders / "one").named_parameters())
        for name, merged in found.merged(own).items():
            torch.testing.assert_close(merged, one[name], rtol=0, atol=1e-6)


def test_learning_moves_towards_the_teachers(folders):
    """With text of the first model alone standing for both, its coefficients grow; the base stays as it is."""
    base, own, differences = parts(folders)
    differences = {name: torch.stack([tau[0], -tau[0]]) for name, tau in differences.items()}
    before = state_of(base)
    (text, _) = texts(rows=4)
    settings = LearnedSettings(epochs=6, accumulate=1, regulariser=0.0)
    found = learn_coefficients(base, {n: t[:1] for n, t in differences.items()}, [text], settings)
    assert found.factors().mean() > 0.3
    assert same_state(state_of(base), before)
    assert all(p.grad is None for p in base.parameters())


def test_gradients_of_coefficients(folders):
    """By autograd, against finite differences of the whole loss."""
    from optimum_dern.model_merging.learned import _matching_loss, _run

    base, own, differences = parts(folders)
    base, own = base.double().eval(), {name: p.double() for name, p in own.items()}
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")
    found = Coefficients({name: tau.double() for name, tau in differences.items()}, 0.2)
    name = next(name for name in own if "down_proj" in name)
    (batch, *_), _ = texts()

    def loss():
        with torch.no_grad():
            teacher = _run(base, {n: own[n] + differences[n][1].double() for n in own}, batch)
        return _matching_loss(_run(base, found.merged(own), batch), teacher, batch["attention_mask"], 1.0)

    found.raw = {n: raw.detach().double().requires_grad_() for n, raw in found.raw.items()}
    (gradient,) = torch.autograd.grad(loss(), found.raw[name])
    step = 1e-2  # some of a model is computed in float32
    with torch.no_grad():
        for k in range(2):
            found.raw[name][k, 0] += step
            up = loss()
            found.raw[name][k, 0] -= 2 * step
            down = loss()
            found.raw[name][k, 0] += step
            assert gradient[k, 0].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-2, abs=1e-9)


def test_gradients_of_parts():
    """Of the parts of a tensor, entry by entry: sum of weight times tau, times the slope of the sigmoid."""
    generator = torch.Generator().manual_seed(0)
    base, tau, weight = (torch.randn(shape, generator=generator) for shape in ((3, 4), (2, 3, 4), (3, 4)))
    found = Coefficients({"a": tau}, 0.2, {"a": 4})
    (found.merged({"a": base})["a"] * weight).sum().backward()
    for k in range(2):
        for part in range(4):
            entries = [divmod(i, 4) for i in range(3 * part, 3 * part + 3)]
            expected = 0.2 * 0.8 * sum(weight[place].item() * tau[k][place].item() for place in entries)
            assert found.raw["a"].grad[k, part].item() == pytest.approx(expected, rel=1e-5)


def test_important_layers_have_more_coefficients():
    differences = {"a": torch.ones(2, 6), "b": 5 * torch.ones(2, 2, 3), "c": torch.ones(2, 2)}
    values = [importance(Coefficients(differences), [name]) for name in "ab"]
    assert values == pytest.approx([0.1 * 2 * 6, 0.1 * 2 * 6 * 5])
    found = chunks_by_importance(values, [{"a": 6}, {"b": 6}], 4)
    assert found == {"b": 3}  # six entries in four parts are three of two


@pytest.mark.parametrize("method", ["learned", "task_arithmetic", "ties", "dare"])
def test_a_plain_checkpoint(folders, tmp_path, method):
    """Loads plainly, is reproducible, and lies between its parents."""
    options = {"texts": texts(), "settings": LearnedSettings(chunks=2)} if method == "learned" else {}
    models = []
    for name in ("first", "again"):
        facts = merge_checkpoints(
            folders / "base", [folders / "one", folders / "two"], tmp_path / name, method=method, **options
        )
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    assert same_state(*map(state_of, models))
    assert not same_state(state_of(models[0]), state_of(AutoModelForCausalLM.from_pretrained(folders / "base")))
    assert (tmp_path / "first" / "tokenizer.json").is_file() and facts["method"] == method
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first"]
    if method == "learned":
        assert len(facts["factors"]) == 2 and all(0 < factor < 1 for factor in facts["factors"])


def test_rules_take_their_options(folders, tmp_path):
    """Strength 0 is the base; all of one difference alone is that model."""
    pair = [folders / "one", folders / "base"]
    merge_checkpoints(folders / "base", pair, tmp_path / "none", method="task_arithmetic", strength=0.0)
    merge_checkpoints(folders / "base", pair, tmp_path / "all", method="task_arithmetic", strength=1.0)
    found, expected = (
        [AutoModelForCausalLM.from_pretrained(folder) for folder in pair]
        for pair in ((tmp_path / "none", tmp_path / "all"), (folders / "base", folders / "one"))
    )
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "slerp"}, ValueError, "must be one of learned, task_arithmetic, ties, dare"),
        ({"checkpoints": ["one"]}, ValueError, "1 checkpoint to merge"),
        ({"output": "one"}, FileExistsError, "exists"),
        ({"method": "learned"}, ValueError, "a text for each of the 2"),
        ({"method": "learned", "texts": [[], []], "strength": 1.0}, ValueError, "no effect with method='learned'"),
        ({"texts": [[], []]}, ValueError, "no effect with method='ties'"),
        ({"layerwise": "yes"}, TypeError, "True or False"),
        ({"method": "learned", "texts": [[], []]}, ValueError, "text of a checkpoint is empty"),
        ({"density": 0.0}, ValueError, "a share above 0"),
        ({"method": "task_arithmetic", "density": 0.5}, ValueError, "of ties and dare alone"),
    ],
)
def test_refused(folders, tmp_path, options, error, message):
    options = {"checkpoints": ["one", "two"], "output": tmp_path / "out", "method": "ties"} | options
    checkpoints = [folders / name for name in options.pop("checkpoints")]
    output = folders / options.pop("output")
    with pytest.raises(error, match=message):
        merge_checkpoints(folders / "base", checkpoints, output, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(folders, tmp_path):
    """A folder under the name that a merge has until it is whole may be of another merge, or somebody's own."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out.partial exists.* remove it if none runs"):
        merge_checkpoints(folders / "base", [folders / "one", folders / "two"], tmp_path / "out", method="ties")
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_a_model_that_changes(folders, tmp_path, monkeypatch):
    """What was read of two models is no merge, in memory either: nothing is written."""
    shutil.copytree(folders, models := tmp_path / "models")
    load = runs.load_model

    def load_and_touch(name, *args, **kwargs):
        model = load(name, *args, **kwargs)
        os.utime(models / "one" / "model.safetensors", (0, 0))
        return model

    monkeypatch.setattr(runs, "load_model", load_and_touch)
    with pytest.raises(ValueError, match="one/model.safetensors was changed during the run"):
        merge_checkpoints(models / "base", [models / "one", models / "two"], tmp_path / "out", method="ties")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_no_room(folders, tmp_path, monkeypatch):
    """It is refused before anything is loaded."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    monkeypatch.delattr(runs, "load_model")
    with pytest.raises(OSError, match="are free"):
        merge_checkpoints(folders / "base", [folders / "one", folders / "two"], tmp_path / "out", method="ties")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_found_before_text_is_read(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(merge, "load_named_batches")
    (tmp_path / "a.txt").write_text("some words " * 50)
    (tmp_path / "out").mkdir()
    models = [str(folders / name) for name in ("base", "one", "two")]
    with pytest.raises(SystemExit):
        main(["merge", *models, str(tmp_path / "out"), "--data", f"one={tmp_path}/a.txt", f"two={tmp_path}/a.txt"])
    assert "out exists; give a new folder" in capsys.readouterr().err


def test_other_models_are_refused(folders, tmp_path):
    make_model("qwen3_moe").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other was not fine-tuned from .*base: .* is "):
        merge_checkpoints(folders / "base", [folders / "one", tmp_path / "other"], tmp_path / "out", method="ties")


@pytest.mark.parametrize("wrong", [{"initial": 1.0}, {"epochs": 0}, {"rate": 0.0}])
def test_settings(wrong):
    with pytest.raises(ValueError, match="coefficient must be above 0|at least 1"):
        LearnedSettings(**wrong)


def test_the_command(folders, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name} " * 60)
    data = ["--data", *(f"{name}={tmp_path / f'{name}.txt'}" for name in ("two", "one"))]  # in any order
    models = [str(folders / name) for name in ("base", "one", "two")]
    main(["merge", *models, str(tmp_path / "out"), *data, "--num-samples", "2", "--sequence-length", "32", "--json"])
    assert len(json.loads(capsys.readouterr().out)["factors"]) == 2
    for options, message in (
        ([], "needs --data NAME=DATA for each"),
        ([*data[:2]], "1 texts for 2 checkpoints"),
        ([*data, "--method", "ties"], "of --method learned alone"),
    ):
        with pytest.raises(SystemExit):
            main(["merge", *models, str(tmp_path / "other"), *options])
        assert message in capsys.readouterr().err
