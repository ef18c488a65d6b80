"""Condense half of a model's layers into dense ones, fine-tune these alone on calibration text, and save the model.

python examples/finetune_condensed.py

The other layers stay as they are, router and experts.  Training on these domains would improve the original model,
too: the last line shows the loss after condensing and training together.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from optimum_dern.condensing import condense_layers
from optimum_dern.data.batches import load_batches, load_samples
from optimum_dern.evaluation.loss.perplexity import evaluate_loss, load_texts


folder = Path(__file__).parent / "tiny_moe"
model = AutoModelForCausalLM.from_pretrained(folder / "scratch", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder / "scratch")
text = str(folder / "text" / "calibration")  # shares no document with the evaluation text
texts = load_texts(folder / "text" / "evaluation", tokenizer, sequence_length=256)
held_out = [batch for batches in texts.values() for batch in batches[:3]]  # 24 sequences of every domain

losses = {"original": evaluate_loss(model, held_out)}
size = model.num_parameters()
batches = load_batches(text, tokenizer, num_samples=64, sequence_length=256, seed=0)
condensed = condense_layers(model, batches, layers=2, num_experts=2)  # of 4 layers with 16 experts
losses["condensed"] = evaluate_loss(model, held_out)

model.requires_grad_(False)
for layer in condensed:
    model.model.layers[layer.layer].mlp.requires_grad_(True)
samples = load_samples(text, tokenizer, num_samples=200, sequence_length=256, seed=0)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="build/condensing",
        max_steps=25,  # every sample once
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=[{"input_ids": ids} for ids, _, _ in samples],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()

model.to(torch.bfloat16).save_pretrained("build/condensed")  # the source's dtype
tokenizer.save_pretrained("build/condensed")
tuned = AutoModelForCausalLM.from_pretrained("build/condensed", dtype=torch.float32)  # plain transformers, as saved
losses["fine-tuned"] = evaluate_loss(tuned, held_out)

for layer in condensed:
    error = layer.errors[layer.winner]
    print(f"layer {layer.layer}: divergence {layer.divergence:.5f}, error {error:.3f}, experts {layer.retained}")
print(f"{tuned.num_parameters() / size:.2f} of the parameters")
print(f"\n{'nats per token on held-out text':32} {'loss':>8} {'perplexity':>10}")
for name, result in losses.items():
    print(f"{name:32} {result.loss:8.4f} {result.perplexity:10.2f}")
