"""A compressed model in `transformers.Trainer` as it is: evaluation, fine-tuning, checkpoints, LoRA through PEFT."""

import copy
import functools
import json

import pytest
import torch
from elsewhere import run_elsewhere
from tiny import (
    AUX_LOSS,
    FAMILIES,
    compress,
    make_model,
    random_tokens,
    same_state,
    sample_texts,
    state_of,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.metrics import trainer_metrics
from optimum_dern.evaluation.loss.perplexity import evaluate_loss


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = {"deepseek_v3": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]}
DEFAULT_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@functools.cache
def compressed_once(family, dtype, **overrides):
    """A compressed model in memory, not to be changed."""
    model = make_model(family, **overrides)
    for parameter in model.parameters():  # not `model.to`, which would cast the buffers of rotary embeddings too
        parameter.data = parameter.to(dtype)
    compress(model)
    return model


def compressed(family, dtype=torch.float32, **overrides):
    """A compressed model in memory, the test's own."""
    return copy.deepcopy(compressed_once(family, dtype, **overrides))


def text_rows():
    """Texts of different lengths, as token ids."""
    return [{"input_ids": ids} for ids in tiny_tokenizer()(sample_texts())["input_ids"]]


def make_trainer(model, folder, **arguments):
    """A Trainer that learns and evaluates the same few texts."""
    arguments = {"max_steps": 12, "learning_rate": 5e-3, "save_strategy": "no", "logging_strategy": "no", **arguments}
    return Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=6,
            per_device_eval_batch_size=6,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        **trainer_metrics(),
    )


@torch.no_grad()
def logits_of(model):
    """Logits of fixed tokens, in evaluation mode."""
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in random_tokens(3)])).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate(family, dtype, tmp_path):
    """The compressed model's loss by Trainer is the one by this package, and evaluating changes nothing."""
    model = compressed(family, dtype)
    before = state_of(model)
    result = make_trainer(model, tmp_path).evaluate()
    ours = evaluate_loss(model, load_batches(text_rows(), None, batch_size=1))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # padding changes the rounding of bfloat16
    assert result["eval_tokens"] == ours.tokens
    assert result["eval_token_loss"] == pytest.approx(ours.loss, rel=tolerance)
    assert result["eval_token_loss_stderr"] == pytest.approx(
        ours.standard_error, rel=0.2 if tolerance > 1e-5 else 1e-4
    )
    assert same_state(before, state_of(model))


def test_trainers_own_loss(tmp_path):
    """On sequences of one length `eval_loss` is our loss, before and after compression."""
    rows = random_tokens(12, 24)
    for model in (make_model("mixtral"), compressed("mixtral")):
        trainer = make_trainer(model, tmp_path)
        trainer.data_collator = lambda rows: dict.fromkeys(
            ("input_ids", "labels"), torch.stack([row["input_ids"] for row in rows])
        )
        ours = evaluate_loss(model, load_batches(rows, None, batch_size=4))
        result = trainer.evaluate(rows)
        assert result["eval_loss"] == pytest.approx(ours.loss, rel=1e-5)
        assert result["eval_token_loss"] == pytest.approx(ours.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("mixtral", torch.bfloat16)]
)
def test_full_fine_tuning(family, dtype, tmp_path):
    """A dozen steps lower the loss; attention, routers and retained experts all move, to finite values."""
    model = compressed(family, dtype)
    before = state_of(model)
    trainer = make_trainer(model, tmp_path)
    first = trainer.evaluate()["eval_token_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_token_loss"] < first - 0.5
    for name, tensor in model.named_parameters():
        assert tensor.isfinite().all(), name
        assert tensor.dtype == dtype
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_gets_a_gradient(family):
    """Of every retained expert and router row, as long as tokens are routed to it."""
    model = compressed(family)
    ids = torch.stack([row["input_ids"] for row in random_tokens(12, 100)])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name.endswith((".gate.weight", *EXPERTS)):
            assert len(parameter) == 4
            assert all(row.any() for row in parameter.grad), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family):
    """It changes memory, not gradients."""
    ids = torch.stack([row["input_ids"] for row in random_tokens(4)])

    def gradients(checkpointing):
        model = compressed(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


def test_training_with_gradient_checkpointing(tmp_path):
    """The same steps by Trainer end in the same weights."""
    results = []
    for checkpointing in (False, True):
        model = compressed("mixtral")
        make_trainer(model, tmp_path, gradient_checkpointing=checkpointing, max_steps=3).train()
        results.append(logits_of(model))
    assert torch.allclose(*results, atol=1e-4)


def auxiliary_loss(router_logits, top_k, experts):
    """Load balance by its definition: experts x sum over experts of (share of tokens x mean probability)."""
    probabilities = torch.cat([layer.detach() for layer in router_logits]).double().softmax(-1)
    assert probabilities.shape[1] == experts
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1)
    return experts * (chosen.mean(0) * probabilities.mean(0)).sum()


@pytest.mark.parametrize("family", AUX_LOSS)
def test_auxiliary_loss(family, tmp_path):
    """With `output_router_logits` the loss counts the retained experts, and training with it works."""
    model = compressed(family, output_router_logits=True, router_aux_loss_coef=0.1)
    ids = torch.stack([row["input_ids"] for row in random_tokens(4)])
    output, plain = model(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids, output_router_logits=False)
    expected = auxiliary_loss(output.router_logits, 2, 4)
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.1 * expected.item(), rel=1e-5)
    trainer = make_trainer(model, tmp_path)
    first = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_token_loss"] < first["eval_token_loss"] - 0.5


def test_auxiliary_loss_balances(tmp_path):
    """Trained mostly on the auxiliary loss, the compressed model's routers come to share the load."""
    model = make_model("mixtral", output_router_logits=True, router_aux_loss_coef=100.0)
    compress(model, dataset=random_tokens(12))
    trainer = make_trainer(model, tmp_path)
    batch = next(iter(trainer.get_eval_dataloader()))
    before = model(**batch).aux_loss.item()
    trainer.train()
    assert before > 2.2
    assert 2 <= model.eval()(**batch).aux_loss.item() < 2.1  # top_k is the least there is


def test_checkpoints_of_trainer(tmp_path):
    """What Trainer saves in training loads in plain transformers without this package, and computes the same."""
    expected, folders = {}, []
    for family in ("mixtral", "deepseek_v3"):
        model = compressed(family)
        trainer = make_trainer(model, tmp_path / family, max_steps=2, save_strategy="steps", save_steps=2)
        trainer.train()
        folders.append((tmp_path / family / "checkpoint-2").rename(tmp_path / f"{family}-checkpoint"))
        trainer.save_model(tmp_path / f"{family}-final")
        folders.append(tmp_path / f"{family}-final")
        ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            expected[family] = model.eval()(ids).logits
    seen = run_elsewhere("load_plainly.py", tmp_path / "seen.pt", *folders)
    for folder in folders:
        assert not seen[folder.name]["problems"]
        logits = seen[folder.name]["observed"]["logits, grouped_mm"]
        assert torch.allclose(logits, expected[folder.name.split("-")[0]], atol=1e-4)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        assert {config[name] for name in config if name in ("num_local_experts", "n_routed_experts")} == {4}
        assert (folder / "dern_report.json").exists()


def test_training_goes_on(tmp_path):
    """An interrupted training resumes to the same weights, on the model that its checkpoint holds.

    The model has to be loaded from the checkpoint: Trainer reads only tensors that are named in memory as they are on
    disk, and transformers 5 fuses experts, compressed or not, while it loads.
    """
    model = compressed("mixtral")
    make_trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.allclose(logits_of(again), logits_of(model), atol=1e-2)
    make_trainer(again, tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert torch.allclose(logits_of(again), logits_of(model), atol=1e-4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A saved compressed model of every family."""
    folder = tmp_path_factory.mktemp("compressed")
    for family in FAMILIES:
        compressed(family).save_pretrained(folder / family)
    return folder


def lora(model, family, targets):
    """LoRA on attention, on the fused experts, or on both and the router."""
    peft = pytest.importorskip("peft")
    fields = {
        "attention": {"target_modules": ATTENTION.get(family, DEFAULT_ATTENTION)},
        "experts": {"target_modules": [], "target_parameters": EXPERTS},
        "all": {
            "target_modules": ATTENTION.get(family, DEFAULT_ATTENTION),
            "target_parameters": [*EXPERTS, "gate.weight"],
        },
    }[targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **fields))


@pytest.mark.parametrize("targets", ["attention", "experts", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, targets, checkpoints, tmp_path):
    """Train, save the adapter, reload it on the compressed checkpoint, merge, save, load: the same model all along."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(checkpoints / family)
    before = state_of(base)
    model = lora(base, family, targets)
    trainer = make_trainer(model, tmp_path / "run", learning_rate=2e-2)
    first = trainer.evaluate()["eval_token_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_token_loss"] < first - 0.3
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert any(".experts." in name for name in trained) == (targets != "attention")
    assert any(".gate." in name for name in trained) == (targets == "all")
    trainer.save_model(tmp_path / "adapter")
    expected = logits_of(model)

    fresh = AutoModelForCausalLM.from_pretrained(checkpoints / family)
    assert same_state(before, state_of(fresh))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.allclose(logits_of(again), expected, atol=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert state_of(plain).keys() == before.keys()
    for model in (merged, plain):
        assert torch.allclose(logits_of(model), expected, atol=1e-3)


def test_lora_adapter_finds_its_base(checkpoints, tmp_path):
    """Trained on a loaded compressed checkpoint, the adapter names it and loads by itself."""
    peft = pytest.importorskip("peft")
    model = lora(AutoModelForCausalLM.from_pretrained(checkpoints / "mixtral"), "mixtral", "all")
    make_trainer(model, tmp_path / "run", max_steps=2).train()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.base_model.model.config.num_local_experts == 4
    assert torch.allclose(logits_of(again), logits_of(model), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_model_in_memory(dtype, tmp_path):
    """Compress, heal, merge and save without a checkpoint in between; the report goes along."""
    model = compressed("mixtral", dtype)
    original = logits_of(model)
    healed = lora(model, "mixtral", "all")
    make_trainer(healed, tmp_path / "run").train()
    expected = logits_of(healed)
    merged = healed.merge_and_unload()
    assert merged is model
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "dern_report.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == dtype and plain.config.num_local_experts == 4
    assert torch.equal(logits_of(plain), logits_of(merged))
    gap, moved = (logits_of(plain) - expected).abs().mean(), (original - expected).abs().mean()
    assert gap < (1e-4 if dtype == torch.float32 else 0.1 * moved)


def test_lora_with_auxiliary_loss_and_checkpointing(tmp_path):
    """All of it at once, as a user who heals a large model would have it."""
    model = lora(compressed("qwen3_moe", output_router_logits=True), "qwen3_moe", "all")
    trainer = make_trainer(model, tmp_path, gradient_checkpointing=True, learning_rate=2e-2)
    first = trainer.evaluate()["eval_token_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_token_loss"] < first - 0.3
