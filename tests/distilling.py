"""Helpers for tests of router distillation: a few training steps on random tokens."""

import torch
from tiny import make_model, random_tokens
from transformers import TrainingArguments

from optimum_dern.integration.router_kd import RouterDistillationTrainer, router_parameters


def rows(n=16, length=24):
    """Make random sequences of token ids, all of one length."""
    return [{"input_ids": row["input_ids"]} for row in random_tokens(n, length)]


def collate(batch):
    """Collate sequences into a batch whose labels are its tokens."""
    ids = torch.stack([row["input_ids"] for row in batch])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def make_trainer(model, teacher, folder, temperature=1.0, **arguments):
    """Make a trainer with a few steps on random tokens, which it also evaluates on."""
    arguments = {"max_steps": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 8, **arguments}
    return RouterDistillationTrainer(
        model,
        TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            lr_scheduler_type="constant",
            **arguments,
        ),
        teacher=teacher,
        temperature=temperature,
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=collate,
    )


def with_noisy_routers(family):
    """Add noise to the routers of a model."""
    model, generator = make_model(family), torch.Generator().manual_seed(0)
    for router in router_parameters(model):
        router.data += 0.1 * torch.randn(router.shape, generator=generator)
    return model
