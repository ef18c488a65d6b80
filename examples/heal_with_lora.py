"""Compress a model, fine-tune it with LoRA on the calibration text, merge and save it; measured on held-out text.

python examples/heal_with_lora.py    # after `pip install '.[heal]'` in a clone of the repository

Training on these domains would improve the uncompressed model, too: the last line shows the loss after compression and
training together, not the cost of compression alone.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from optimum_dern import DernCompressor
from optimum_dern.data.batches import load_samples
from optimum_dern.evaluation.loss.perplexity import evaluate_loss, load_texts


folder = Path(__file__).parent / "tiny_moe"
model = AutoModelForCausalLM.from_pretrained(folder / "upcycled", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder / "upcycled")
healing_text = str(folder / "text" / "calibration")  # shares no document with the evaluation text
texts = load_texts(folder / "text" / "evaluation", tokenizer, sequence_length=256)
held_out = [batch for batches in texts.values() for batch in batches[:2]]  # 16 sequences of every domain

losses = {"before compression": evaluate_loss(model, held_out)}
compressor = DernCompressor(num_experts=4, dataset=healing_text, num_samples=32, sequence_length=256)
compressor.compress_model(model, tokenizer)
losses["compressed"] = evaluate_loss(model, held_out)

# The experts of a layer are two fused parameters, not Linear modules, so PEFT takes them as parameters.
lora = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    task_type="CAUSAL_LM",
)
adapted = get_peft_model(model, lora)
samples = load_samples(healing_text, tokenizer, num_samples=200, sequence_length=256, seed=0)
trainer = Trainer(
    adapted,
    TrainingArguments(
        output_dir="build/healing",
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

merged = adapted.merge_and_unload().to(torch.bfloat16)  # the source's dtype
compressor.report.add_training(f"LoRA, {trainer.state.global_step} steps of 2,048 tokens")  # for the model card
compressor.save(merged, "build/healed", tokenizer=tokenizer)
healed = AutoModelForCausalLM.from_pretrained("build/healed", dtype=torch.float32)  # plain transformers, as saved
losses["healed"] = evaluate_loss(healed, held_out)

print(f"\n{'nats per token on held-out text':32} {'loss':>8} {'perplexity':>10}")
for name, result in losses.items():
    print(f"{name:32} {result.loss:8.4f} {result.perplexity:10.2f}")
