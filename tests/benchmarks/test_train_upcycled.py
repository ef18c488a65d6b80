"""`benchmarks/train_upcycled.py` from a tiny Llama to a checkpoint that transformers loads."""

import json
import shlex

import pytest
import torch
from tiny import EOS, PAD, VOCABULARY, sample_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model of two layers, and text in two domains, of whose splits each holds words of its own."""
    folder = tmp_path_factory.mktemp("upcycled")
    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, **shape, **ids)
        LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    for domain in ("prose", "verse"):
        for split, times in (("train", 3), ("valid", 1), ("test", 1)):
            file = folder / "data" / "text" / domain / f"{split}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{domain} {split} ".join(sample_texts() * times), "utf-8")
    return folder


@pytest.fixture(scope="module")
def upcycled(script):
    return script("train_upcycled")


@pytest.fixture
def train(upcycled, folder, monkeypatch, capsys):
    """Runs the script; gives the printed lines: those of training, those of the models, and the last."""

    def train(*options, output="model"):
        words = ["--base", folder / "dense", "--output", folder / output, "--experts", 4, "--sequence-length", LENGTH]
        words += ["--batch-size", 4, "--windows", 3, "--learning-rate", 1e-2, "--device", "cpu", *options]
        monkeypatch.setattr("sys.argv", ["train_upcycled.py", *map(str, words)])
        upcycled.main()
        printed = capsys.readouterr().out.splitlines()
        lines = [json.loads(line) for line in printed if line.startswith("{")]
        return [x for x in lines if "step" in x], {x.pop("model"): x for x in lines if "model" in x}, printed[-1]

    return train


def test_train_and_load(train, folder):
    """A few steps on a folder of domains; the checkpoint is a Mixtral, and the command to go on with is complete."""
    tasks = folder / "tasks"
    tasks.mkdir()
    for name in ("piqa", "blimp", "mmlu"):
        (tasks / f"{name}.jsonl").touch()
    steps, models, command = train("--data", folder / "data", "--steps", 3, "--tasks-folder", tasks)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert list(models) == ["dense", "upcycled", "trained"]
    assert all(losses.keys() == {"prose", "verse"} for losses in models.values())
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values())
    assert (model.dtype, model.config.num_local_experts) == (torch.bfloat16, 4)
    data = f"--data {folder / 'data'} --evaluation {folder / 'data'} --tasks piqa blimp --tasks-folder {tasks}"
    output = "--output benchmarks/results/quality_model.json"
    assert command == (
        f"python benchmarks/quality.py {folder / 'model'} {data} --sparsity 0.25 0.5 0.75 --at-once 8 {output}"
    )


def test_the_command_is_understood(script, train, folder, monkeypatch):
    """`quality.py` takes the command for several texts and one held-out file; no task where no folder is given."""
    valid = folder / "data" / "text" / "verse" / "valid.txt"
    prose = folder / "data" / "text" / "prose"
    (folder / "more.txt").write_text("".join(sample_texts()), "utf-8")
    _, models, command = train("--data", prose, folder / "more.txt", "--held-out", valid, "--steps", 1)
    assert models["trained"].keys() == {"valid"}
    monkeypatch.setattr("sys.argv", shlex.split(command)[1:])
    args = script("quality").parse_arguments()
    assert args.calibration == [prose / "train.txt", folder / "more.txt"]  # and neither valid.txt nor test.txt
    assert (args.evaluation, args.tasks, args.sparsity) == (valid, [], [0.25, 0.5, 0.75])


def test_the_best_weights_are_kept(train, folder, monkeypatch, upcycled):
    """With a rate that ruins the model, the weights of the best held-out loss are measured and saved."""
    seen = []
    evaluate = upcycled.evaluate_texts

    def recording(model, texts):
        result = evaluate(model, texts)
        seen.append((sum(x.loss for x in result.values()), model.lm_head.weight.detach().clone()))
        return result

    monkeypatch.setattr(upcycled, "evaluate_texts", recording)
    options = ["--data", folder / "data", "--steps", 6, "--evaluate-every", 2, "--learning-rate", 0.6]
    steps, _, _ = train(*options, output="best")
    assert [line["step"] for line in steps] == [2, 4, 6]
    (_, best), (_, measured) = min(seen[2:5], key=lambda pair: pair[0]), seen[5]
    assert steps[-1]["held_out"] > min(line["held_out"] for line in steps)
    assert torch.equal(measured, best)
    saved = AutoModelForCausalLM.from_pretrained(folder / "best").lm_head.weight
    assert torch.equal(saved, best.bfloat16())


def test_no_time_left(train, folder):
    """Training ends with the time, after at least a step, and is saved."""
    steps, models, _ = train("--data", folder / "data", "--steps", 500, "--max-seconds", 0, output="late")
    assert [line["step"] for line in steps] == [1] and "trained" in models
    assert (folder / "late" / "config.json").exists()


def test_bfloat16_reaches_the_experts(upcycled, folder):
    """A pass in bfloat16 leaves float32 weights with float32 gradients, close to those of a float32 pass."""
    dense, _ = upcycled.load_base(folder / "dense")
    model, seen = upcycled.build_model(dense, 4, 2, 0.25, seed=0), []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda experts, _: seen.append(experts.down_proj.dtype)
    )
    batch, gradients = torch.arange(2 * LENGTH).view(2, LENGTH), []
    for dtype in (torch.float32, torch.bfloat16):
        upcycled.run(model, dtype, input_ids=batch, labels=batch, output_router_logits=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert seen == [torch.float32, torch.bfloat16]
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        if "experts" in name or "embed" in name:
            assert torch.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0) > 0.98
    embeddings = [part["model.embed_tokens.weight"] for part in gradients]
    assert not torch.equal(*embeddings)


def test_weights_are_not_chosen_by_the_test_text(upcycled, folder, monkeypatch):
    """`valid.txt` is to choose by, `test.txt` to measure on."""
    words = ["--base", "B", "--output", "O", "--data", folder / "data", "--sequence-length", LENGTH, "--windows", 99]
    monkeypatch.setattr("sys.argv", ["train_upcycled.py", *map(str, words)])
    tokenizer = tiny_tokenizer()
    for texts, split in zip(
        upcycled.load_held_out_texts(upcycled.parse_arguments(), tokenizer), ("valid", "test"), strict=True
    ):
        for domain, batches in texts.items():
            found = "".join(tokenizer.decode(row) for batch in batches for row in batch["input_ids"])
            assert {word for word in ("train", "valid", "test") if f"{domain} {word}" in found} == {split}


def test_every_row_comes_once_a_pass(upcycled):
    """2.5 passes over ten rows in batches of four: every row twice or three times, in another order each time."""
    rows = torch.arange(10).view(10, 1)
    order = torch.cat(list(upcycled.batches_of(rows, 4, 6, seed=0))).flatten()
    assert len(order) == 24
    first, second = order[:10].tolist(), order[10:20].tolist()
    assert first != second and sorted(first) == sorted(second) == list(range(10))


def test_data_without_held_out_text(train, folder):
    """A file alone has nothing to measure on."""
    with pytest.raises(SystemExit, match="give --held-out, too"):
        train("--data", folder / "data" / "text" / "prose" / "train.txt", "--steps", 1)
