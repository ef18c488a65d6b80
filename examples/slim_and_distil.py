"""Make experts narrower with distillation, in one stage and in two of as many steps together, and compare the losses.

python examples/slim_and_distil.py                      # half as wide, 300 steps
python examples/slim_and_distil.py --width 32 --steps 600 --seeds 3 --output build/slim_and_distil

Interrupted, the same command goes on where it was.
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.agreement.logits_cache import LogitsCache, cache_logits
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts
from optimum_dern.integration.slim_stages import SlimStages
from optimum_dern.integration.teacher import cached_rows


folder = Path(__file__).parent / "tiny_moe"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--width", type=int, default=64, help="of 128 neurons (default: %(default)s)")
parser.add_argument("--steps", type=int, default=300, help="of 2,048 tokens, in all (default: %(default)s)")
parser.add_argument("--seeds", type=int, default=1, help="runs of each (default: %(default)s)")
parser.add_argument("--output", type=Path, default=Path("build/slim_and_distil"))
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(folder / "scratch")
model = AutoModelForCausalLM.from_pretrained(folder / "scratch", dtype=torch.float32)
calibration = str(folder / "text" / "calibration")  # shares no document with the evaluation text
texts = load_texts(folder / "text" / "evaluation", tokenizer, sequence_length=256)
texts = {name: batches[:3] for name, batches in texts.items()}
if (args.output / "lessons" / "cache.json").is_file():
    lessons = LogitsCache.load(args.output / "lessons")
else:  # the teacher's predictions, on disk
    batches = load_batches(calibration, tokenizer, num_samples=1200, sequence_length=256, batch_size=8)
    lessons = cache_logits(model, {"text": batches}, args.output / "lessons", top_k=8)  # as in the paper


def loss(model: torch.nn.Module) -> float:
    return fmean(value.loss for value in evaluate_texts(model, texts).values())


def slim(stages: list[tuple[int, int]], seed: int) -> float:
    """Prune and distil the original in these stages, and return its loss on held-out text."""
    name = "-".join(f"{width}x{steps}" for width, steps in stages)
    arguments = TrainingArguments(
        output_dir=str(args.output / name / str(seed)),
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        save_steps=100,
        save_total_limit=1,
        seed=seed,
        report_to="none",
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "scratch", dtype=torch.float32)
    student = SlimStages(stages).run(
        student,
        arguments,
        teacher=lessons,
        train_dataset=cached_rows(lessons),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        tokenizer=tokenizer,
        dataset=calibration,
        num_samples=128,
        sequence_length=256,
        seed=seed,
    )
    return loss(student)


full, half = loss(model), args.steps // 2
between = round((args.width * model.config.moe_intermediate_size) ** 0.5 / 8) * 8
plans = {
    "pruned, not trained": [(args.width, 0)],
    "one stage": [(args.width, args.steps)],
    f"two stages, by way of {between}": [(between, half), (args.width, args.steps - half)],
}
print(f"\n{'loss on held-out text':32} {'mean':>8}   of each seed\n{'the original':32} {full:8.4f}")
for name, stages in plans.items():
    found = [slim(stages, seed) for seed in range(args.seeds)]
    print(f"{name:32} {fmean(found):8.4f}   {' '.join(f'{value:.4f}' for value in found)}", flush=True)
