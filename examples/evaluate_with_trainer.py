"""Evaluate a model with `transformers.Trainer` before and after compression, on held-out text.

python examples/evaluate_with_trainer.py
"""

from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from optimum_dern import DernCompressor
from optimum_dern.data.batches import load_samples
from optimum_dern.evaluation.loss.metrics import trainer_metrics


folder = Path(__file__).parent / "tiny_moe"
model = AutoModelForCausalLM.from_pretrained(folder / "upcycled")
tokenizer = AutoTokenizer.from_pretrained(folder / "upcycled")

samples = load_samples(str(folder / "text" / "evaluation"), tokenizer, num_samples=128, sequence_length=256, seed=0)
trainer = Trainer(
    model,
    TrainingArguments(output_dir="build/trainer", per_device_eval_batch_size=16, report_to="none"),
    eval_dataset=[{"input_ids": ids} for ids, _, _ in samples],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    **trainer_metrics(),
)
before = trainer.evaluate()

compressor = DernCompressor(
    num_experts=4,  # of 8; or sparsity=0.5
    dataset=str(folder / "text" / "calibration"),
    num_samples=32,
    sequence_length=256,
)
compressor.compress_model(model, tokenizer)  # in place: the trainer holds the same model
after = trainer.evaluate()

report = compressor.report
print(f"{'':20} {'before':>10} {'after':>10}")
print(f"{'experts a layer':20} {report.before.experts:>10} {report.after.experts:>10}")
print(f"{'parameters':20} {report.before.parameters:>10,} {report.after.parameters:>10,}")
for name in ("tokens", "token_loss", "token_loss_stderr", "perplexity", "token_accuracy", "top5_accuracy"):
    digits = ",d" if name == "tokens" else ".4f"
    print(f"{name:20} {before[f'eval_{name}']:>10{digits}} {after[f'eval_{name}']:>10{digits}}")
