"""Attribution of experts and neurons against loops, masks against pruning, and what is written."""

import json
from functools import partial

import pytest
import torch
from families import FAMILIES, make_model, runnable
from safetensors.torch import load_file
from tiny import compress, random_tokens, same_state, state_of, tiny_tokenizer
from tiny import make_model as tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern.attribution import Attribution, attribute_experts, mask_checkpoint, masked_experts, masking
from optimum_dern.attribution.page import attribution_page
from optimum_dern.commands.main import main
from optimum_dern.models.moe.structure import find_moe_layers, layers_by_position
from optimum_dern.models.moe.view import layer_activation, read_layer


IDS = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))


def padded(seed, lengths):
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(200, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return [{"input_ids": ids, "attention_mask": mask}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribution") / "model"
    tiny_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


TEXTS = {"one": padded(1, [12, 7]), "two": padded(2, [9, 12, 12])}


@pytest.fixture(scope="module")
def found(checkpoint):
    return attribute_experts(checkpoint, TEXTS, tiny_tokenizer())


def test_against_loops(checkpoint, found):
    """Shares of a layer's total by domain, token by token, padding left out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    layers = find_moe_layers(model)
    for number, domain in enumerate(TEXTS):
        calls = []
        take = partial(lambda into, module, args: into.append(args), calls)
        handles = [layer.experts.register_forward_pre_hook(take) for layer in layers]
        (batch,) = TEXTS[domain]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        mask = batch["attention_mask"].flatten().bool().tolist()
        for position, (layer, (hidden, index, weight)) in enumerate(zip(layers, calls, strict=True)):
            segments, activation = read_layer(layer).segments, layer_activation(layer)
            sums = {name: torch.zeros(8, dtype=torch.float64) for name in found.measures}
            neurons = torch.zeros(8, 16, dtype=torch.float64)
            for token in (t for t, real in enumerate(mask) if real):
                x = hidden.flatten(0, -2)[token][None]
                for expert, g in zip(index[token].tolist(), weight[token].tolist(), strict=True):
                    h = activation(x @ segments.gate[expert].T, x @ segments.up[expert].T)[0]
                    size = (g * (h @ segments.down[expert])).norm().item()
                    for name, value in (("share", 1), ("gate", g), ("contribution", size), ("energy", size**2)):
                        sums[name][expert] += value
                    neurons[expert] += (g * h[:, None] * segments.down[expert]).double().square().sum(1)
            for name, values in sums.items():
                expected = values / values.sum()
                torch.testing.assert_close(found.measures[name][number, position], expected, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(found.neurons[number, position], neurons / neurons.sum(), rtol=1e-4, atol=1e-9)
    assert found.tokens == {"one": 19, "two": 33}


def test_examples(found):
    """The tokens of largest contribution, from the domains' texts, in falling order."""
    for layer in found.examples:
        for examples in layer:
            sizes = [example["size"] for example in examples]
            assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 8
            assert all(example["domain"] in TEXTS for example in examples)
    tokenizer = tiny_tokenizer()
    written = {d: tokenizer.batch_decode(TEXTS[d][0]["input_ids"]) for d in TEXTS}
    example = found.examples[0][0][0]
    text = example["before"] + example["token"] + example["after"]
    assert any(text in row for row in written[example["domain"]])


def test_skew(found):
    """Share in the domain less the largest share in any other."""
    shares = {"share": torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.6, 0.3]], [[0.4, 0.4, 0.2]]])}
    neurons = torch.rand(3, 1, 3, 2)
    toy = Attribution("toy", {"a": 1, "b": 1, "c": 1}, [4], shares, neurons, [[[]] * 3])
    torch.testing.assert_close(toy.skew()[0, 0], torch.tensor([0.1, -0.3, -0.1]))
    assert toy.most_skewed("b", 2) == {4: [1, 2]}
    own = toy.most_skewed_neurons("c", 1)[4][0]
    margin = neurons[2, 0] - neurons[:2, 0].amax(0)
    assert margin[own] == margin.max()
    with pytest.raises(ValueError, match="no domain 'x'; there are a, b, c"):
        toy.most_skewed("x", 1)
    with pytest.raises(ValueError, match="at least two"):
        Attribution("toy", {"a": 1}, [0], {"share": torch.ones(1, 1, 1)}, neurons, []).skew()


@pytest.mark.slow
@pytest.mark.parametrize("family", runnable(FAMILIES))
def test_masked_experts_are_those_of_a_pruned_model(family):
    """To the bit, for one layer of every family; and the model comes back."""
    model, pruned = make_model(family).eval(), make_model(family).eval()
    position, layer = next(iter(layers_by_position(model, find_moe_layers(model)).items()))
    masked = [1, 6]  # one of each group of four
    kept = [e for e in range(layer.num_experts) if e not in masked]
    protected = dict.fromkeys(layers_by_position(pruned, find_moe_layers(pruned)), kept)
    options = {"num_experts": len(kept), "dataset": None, "protect_experts": protected}
    compress(pruned, method="prune", preset="paper", selection="random", **options)
    before = state_of(model)
    with masked_experts(model, dict.fromkeys(protected, masked)):
        assert same_state(state_of(model), state_of(pruned))
        with torch.no_grad():
            inside = model(input_ids=IDS).logits
    assert same_state(state_of(model), before)
    if family != "diffusion_gemma":  # what it predicts is drawn
        with torch.no_grad():
            assert torch.equal(inside, pruned(input_ids=IDS).logits)
    with pytest.raises(RuntimeError), masked_experts(model, {position: masked}):
        raise RuntimeError
    assert same_state(state_of(model), before)


@pytest.mark.parametrize(
    ("family", "experts", "message"),
    [
        ("mixtral", {9: [0]}, "layer 9 has no experts"),
        ("mixtral", {0: [8]}, r"no experts \[8\]"),
        ("mixtral", {0: [0, 1, 2, 3, 4, 5, 6]}, "leave at least 2"),
        ("deepseek_v3", {1: [0]}, "as many in each group"),
    ],
)
def test_masks_refused(family, experts, message):
    with pytest.raises(ValueError, match=message), masked_experts(tiny_model(family), experts):
        pass


def test_mask_checkpoint(checkpoint, found, tmp_path):
    """Without experts it is smaller, with zeroed neurons it is not; both load plainly."""
    mask_checkpoint(checkpoint, tmp_path / "experts", found, "one", experts=2)
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path / "experts")
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    gone = found.most_skewed("one", 2)
    for position, (layer, full) in enumerate(zip(find_moe_layers(fewer), find_moe_layers(whole), strict=True)):
        kept = [e for e in range(8) if e not in gone[position]]
        assert torch.equal(layer.experts.down_proj, full.experts.down_proj[kept])
    mask_checkpoint(checkpoint, tmp_path / "neurons", found, "one", neurons=3)
    zeroed = AutoModelForCausalLM.from_pretrained(tmp_path / "neurons")
    for position, (layer, full) in enumerate(zip(find_moe_layers(zeroed), find_moe_layers(whole), strict=True)):
        changed = (layer.experts.down_proj != full.experts.down_proj).any(1).nonzero().tolist()
        assert sorted(map(tuple, changed)) == sorted(found.most_skewed_neurons("one", 3)[position])
        assert not layer.experts.down_proj.transpose(1, 2)[tuple(zip(*changed, strict=True))].any()
    with pytest.raises(ValueError, match="give how many experts go, or how many neurons"):
        mask_checkpoint(checkpoint, tmp_path / "both", found, "one", experts=1, neurons=1)


def test_files(found, tmp_path):
    files = found.save(tmp_path)
    facts = json.loads(files[0].read_text())
    assert facts["tokens"] == found.tokens and facts["layers"] == [0, 1]
    assert facts["experts"]["share"][0]["one"] == found.measures["share"][0, 0].tolist()
    torch.testing.assert_close(load_file(files[1])["two"], found.neurons[1].float())
    assert files[2].read_text().startswith("<!doctype html>")


def test_hostile_text_stays_text(found):
    """Nothing of a model's text or a domain's name can end the data, or become markup."""
    evil = "</script><img src=x onerror=alert(1)>"
    example = {"domain": evil, "before": evil, "token": "<b>", "after": "&amp;", "size": 1.0}
    shares = {name: torch.ones(1, 1, 1) for name in found.measures}
    page = attribution_page(Attribution(evil, {evil: 1}, [0], shares, torch.ones(1, 1, 1, 1), [[[example]]]))
    assert "<img" not in page and page.count("</script>") == 2


def test_the_command(checkpoint, tmp_path, capsys):
    for name, text in (("digits", "0123456789 " * 200), ("letters", "abcdefghij " * 200)):
        (tmp_path / f"{name}.txt").write_text(text)
    data = ["--data", *(f"{name}={tmp_path / f'{name}.txt'}" for name in ("digits", "letters"))]
    command = [
        "attribute",
        str(checkpoint),
        str(tmp_path / "out"),
        *data,
        "--sequence-length",
        "64",
        "--num-samples",
        "4",
    ]
    mask = ["--mask-domain", "digits", "--mask-experts", "1"]
    main([*command, *mask, "--json"])
    assert len(json.loads(capsys.readouterr().out)["files"]) == 4
    assert find_moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "masked"))[0].num_experts == 7
    for wrong, message in (
        (["--mask-experts", "1"], "with --mask-domain NAME"),
        (["--mask-domain", "prose", "--mask-experts", "1"], "none of the data"),
        (["--mask-domain", "digits"], "needs --mask-experts N"),
        (mask, "masked exists"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert message in capsys.readouterr().err


def test_a_masked_model_is_whole_or_not_there(checkpoint, found, tmp_path, monkeypatch):
    """What is there stays, also where it is a part of another run; an error leaves nothing."""
    options = (tmp_path / "masked", found, "one")
    monkeypatch.setattr(masking, "copy_companions", lambda *args, **kwargs: (tmp_path / "none").read_bytes())
    with pytest.raises(FileNotFoundError, match="none"):
        mask_checkpoint(checkpoint, *options, neurons=1)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "masked.partial").mkdir()
    with pytest.raises(FileExistsError, match="masked.partial exists, .*; remove it if none runs"):
        mask_checkpoint(checkpoint, *options, neurons=1)
    (tmp_path / "masked.partial").rmdir()
    mask_checkpoint(checkpoint, *options, neurons=1)
    AutoTokenizer.from_pretrained(tmp_path / "masked")
    with pytest.raises(FileExistsError, match="masked exists"):
        mask_checkpoint(checkpoint, *options, neurons=1)


def test_no_domain(checkpoint):
    with pytest.raises(ValueError, match="there is no domain"):
        attribute_experts(checkpoint, {})


def test_without_a_tokenizer_tokens_are_numbers(checkpoint):
    """Every example is a piece of its domain's token ids, and every expert that is used has one."""
    rows = {domain: row["input_ids"] for domain, row in zip(("a", "b"), random_tokens(2), strict=True)}
    batches = {d: [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}] for d, ids in rows.items()}
    found = attribute_experts(checkpoint, batches)
    for layer, share in zip(found.examples, found.measures["share"].sum(0), strict=True):
        assert [bool(examples) for examples in layer] == (share > 0).tolist()
        for example in (example for examples in layer for example in examples):
            ids = rows[example["domain"]].tolist()
            shown = [*map(int, f"{example['before']} {example['token']} {example['after']}".split())]
            assert any(shown == ids[start : start + len(shown)] for start in range(len(ids)))


def test_every_expert_runs_once(checkpoint, monkeypatch):
    """The activation sees each token, padding included, once for each of its experts."""
    rows, silu = [], torch.nn.functional.silu
    counted = lambda x, *args, **kwargs: rows.append(len(x)) or silu(x, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "silu", counted)
    attribute_experts(checkpoint, TEXTS, tiny_tokenizer())
    tokens = sum(batch["input_ids"].numel() for own in TEXTS.values() for batch in own)
    assert sum(rows) == tokens * 2 * 2  # layers, experts a token
