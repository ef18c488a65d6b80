"""Router distillation: only the routers move, towards the original, and what is saved stays an ordinary checkpoint."""

import json

import pytest
import torch
from distilling import collate, make_trainer, rows, with_noisy_routers
from elsewhere import run_elsewhere
from tiny import FAMILIES, HIDDEN, compress, make_model, same_state, state_of
from transformers import AutoModelForCausalLM

from optimum_dern.integration.router_kd import only_routers_trainable, router_parameters


ROUTER = ".gate.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_routers_move_towards_the_original(family, tmp_path):
    """The divergence falls, routers change, not a bit of anything else does, and gradients are required as before."""
    teacher, model = make_model(family), with_noisy_routers(family)
    model.lm_head.weight.requires_grad_(False)
    before, required = state_of(model), {n: p.requires_grad for n, p in model.named_parameters()}
    untouched = state_of(teacher)
    trainer = make_trainer(model, teacher, tmp_path)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    limit = 0.85 if family == "deepseek_v3" else 0.5  # its random groups of experts flip
    assert trainer.evaluate()["eval_loss"] < limit * first
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(ROUTER)}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert same_state(state_of(teacher), untouched)


def test_the_original_itself_is_at_zero(tmp_path):
    """A model that equals its teacher has no divergence, and its routers stay where they are."""
    model = make_model("mixtral")
    trainer = make_trainer(model, make_model("mixtral"), tmp_path, max_steps=2, optim="sgd", learning_rate=1.0)
    before = torch.cat([router.detach().flatten() for router in router_parameters(model)])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-6)
    assert trainer.train().training_loss == pytest.approx(0, abs=1e-6)
    after = torch.cat([router.detach().flatten() for router in router_parameters(model)])
    assert torch.allclose(before, after, atol=1e-5)


def test_requirements_come_back_after_an_error(tmp_path):
    """An error in training leaves no parameter frozen."""
    model = make_model("mixtral")
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="300 tokens and its teacher 301"):
        make_trainer(model, make_model("mixtral", vocab_size=301), tmp_path).train()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"]


def test_padding_and_ignored_labels_do_not_count(tmp_path):
    """With padding on the right, and with ignored labels, the loss is that of the tokens that are left."""
    teacher, model = make_model("mixtral"), make_model("mixtral", seed=1)
    trainer = make_trainer(model, teacher, tmp_path)
    batch = collate(rows(2, 12))
    short = {name: value[:, :8] for name, value in batch.items()}
    expected = trainer.compute_loss(model, dict(short)).item()
    masked = {**batch, "labels": batch["labels"].clone()}
    masked["labels"][:, 8:] = -100
    assert trainer.compute_loss(model, masked).item() == pytest.approx(expected, rel=1e-5)
    padded = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][:, 8:] = 0
    assert trainer.compute_loss(model, padded).item() == pytest.approx(expected, rel=1e-5)
    assert trainer.compute_loss(model, {"input_ids": batch["input_ids"]}).item() != pytest.approx(expected, rel=1e-3)


def test_sixteen_bit_routers_learn_in_float32(tmp_path):
    """Steps far below a bfloat16 step add up, and the parameter stays bfloat16."""
    model = make_model("mixtral").to(torch.bfloat16)
    router = model.model.layers[0].mlp.gate.weight
    router.data.fill_(1.0)  # where bfloat16 goes down in steps of 0.0039
    trainer = make_trainer(model, make_model("mixtral"), tmp_path, learning_rate=1e-3, optim="sgd")
    with only_routers_trainable(model):
        optimizer = trainer.create_optimizer()
    for _ in range(20):
        router.grad = torch.ones_like(router)
        optimizer.step()
    assert router.dtype == torch.bfloat16
    assert torch.allclose(router.float(), torch.tensor(0.98), atol=2e-3)
    assert trainer.create_optimizer() is optimizer


def test_sixteen_bit_model_trains(tmp_path):
    """A bfloat16 model ends closer to its teacher, with bfloat16 routers."""
    model = with_noisy_routers("mixtral").to(torch.bfloat16)
    trainer = make_trainer(model, make_model("mixtral"), tmp_path)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * first
    trainer.args.max_steps = 1
    trainer.train()  # again, with the same optimizer
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """With frozen embeddings the routers still get their gradients."""
    results = []
    for checkpointing in (False, True):
        model, teacher = with_noisy_routers("mixtral"), make_model("mixtral")
        make_trainer(model, teacher, tmp_path, gradient_checkpointing=checkpointing, max_steps=2).train()
        results.append(torch.cat([router.detach().flatten() for router in router_parameters(model)]))
    assert torch.allclose(*results, atol=1e-5)


def test_accumulated_micro_batches_weigh_the_same(tmp_path):
    """Two micro-batches of half the size make the same step."""
    results = []
    for size, accumulation in ((8, 1), (4, 2)):
        model = with_noisy_routers("mixtral")
        make_trainer(
            model,
            make_model("mixtral"),
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        ).train()
        results.append(torch.cat([router.detach().flatten() for router in router_parameters(model)]))
    assert torch.allclose(*results, atol=1e-6)


def test_router_parameters_are_the_structural_ones():
    """One matrix a layer, and `only_routers_trainable` leaves these alone trainable while it is open."""
    model = make_model("deepseek_v3")
    routers = router_parameters(model)
    assert [router.shape for router in routers] == [(8, HIDDEN)] * 2
    with only_routers_trainable(model) as trainable:
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable}


def test_refusals(tmp_path):
    """A dense model and a temperature of zero are refused before any work."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="no router to train"):
        make_trainer(dense, dense, tmp_path)
    model = make_model("mixtral")
    for temperature in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            make_trainer(model, model, tmp_path, temperature=temperature)


@pytest.mark.slow
def test_saved_result_is_a_plain_checkpoint(tmp_path):
    """It loads in a fresh process without this package, computes the same, and brings report and card along."""
    model = make_model("qwen3_moe")
    compress(model)
    trainer = make_trainer(model, make_model("qwen3_moe"), tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "distilled")
    seen = run_elsewhere("load_plainly.py", tmp_path / "seen.pt", tmp_path / "distilled")["distilled"]
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(seen["observed"]["logits, grouped_mm"], model.eval()(ids).logits, atol=1e-4)
    assert not seen["problems"]
    files = {file.name for file in (tmp_path / "distilled").iterdir()}
    assert files >= {"README.md", "dern_report.json", "dern_config.json"}
    config = json.loads((tmp_path / "distilled" / "config.json").read_text("utf-8"))
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "distilled").config.num_experts == 4
