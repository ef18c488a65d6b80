"""Compress a model, train only its routers on the original's predictions, measure it on held-out text, and save it.

python examples/distil_router.py

The original's predictions are cached on disk, so that it need not be in memory together with the compressed model.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from optimum_dern import DernCompressor
from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.agreement.logits_cache import cache_logits
from optimum_dern.evaluation.loss.perplexity import load_texts
from optimum_dern.integration.router_kd import RouterDistillationTrainer
from optimum_dern.integration.teacher import cached_rows
from optimum_dern.integration.trainer import DernEvaluationCallback


folder, output = Path(__file__).parent / "tiny_moe", Path("build/distil_router")
model = AutoModelForCausalLM.from_pretrained(folder / "scratch", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder / "scratch")
text = str(folder / "text" / "calibration")  # shares no document with the evaluation text
batches = load_batches(text, tokenizer, num_samples=400, sequence_length=256, batch_size=8)
texts = load_texts(folder / "text" / "evaluation", tokenizer, sequence_length=256)
texts = {name: batches[:6] for name, batches in texts.items()}  # 48 sequences of every domain

lessons = cache_logits(model, {"text": batches}, output / "lessons", overwrite=True)
held_out = cache_logits(model, texts, output / "held_out", overwrite=True)

compressor = DernCompressor(num_experts=8, dataset=text, num_samples=64, sequence_length=256)
compressor.compress_model(model, tokenizer)  # of 16; in place, the original is gone

trainer = RouterDistillationTrainer(
    model,
    TrainingArguments(
        output_dir=str(output / "run"),
        max_steps=50,  # every sequence once
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
    ),
    teacher=lessons,
    train_dataset=cached_rows(lessons),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
held_out_values = DernEvaluationCallback(trainer, held_out)  # trainer.add_callback(...) logs them in training
before = held_out_values.measure()
trainer.train()
after = held_out_values.measure()
compressor.report.add_training(f"router distillation, {trainer.state.global_step} steps of 2,048 tokens")
compressor.save(model.to(torch.bfloat16), output / "model", tokenizer=tokenizer)  # the source's dtype

print(f"\n{'on held-out text':24} {'compressed':>10} {'distilled':>10}")
for name in ("loss", "perplexity", "kl", "top1"):
    print(f"{name:24} {before[name]:10.4f} {after[name]:10.4f}")
