"""Teach a small model two-digit sums by steps, and search its solutions over the number of active experts.

python examples/search_arithmetic.py                       # minutes of fine-tuning, then 20 problems by each strategy
python examples/search_arithmetic.py --steps 600 --problems 100 --seeds 3

The fine-tuned model is kept in --output, and not made again.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean, stdev

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern.search import expert_search, likelihood_scorer


folder = Path(__file__).parent / "tiny_moe" / "scratch"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=600, help="of fine-tuning, 64 sums each (default: %(default)s)")
parser.add_argument("--problems", type=int, default=20, help="(default: %(default)s)")
parser.add_argument("--rollouts", type=int, nargs="+", default=[4, 8], help="(default: %(default)s)")
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--output", type=Path, default=Path("build/search_arithmetic"))
args = parser.parse_args()


def problem(draw: random.Random) -> tuple[str, str]:
    """Make a sum and its solution, a step a line: units with their carry, tens, and the answer."""
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    steps = [f"{a % 10}+{b % 10}={units}", f"{a // 10}+{b // 10}+{units // 10}={tens}", f"answer {a + b}"]
    return f"{a}+{b}\n", "\n".join(steps) + "\n"


def fine_tuned() -> torch.nn.Module:
    """Fine-tune the model, or load what an earlier run has made."""
    if (args.output / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    model, draw = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps)
    for step in range(args.steps):
        pairs = [problem(draw) for _ in range(64)]
        rows = [tokenizer(p + s)["input_ids"] + [tokenizer.eos_token_id] for p, s in pairs]
        starts = [len(tokenizer(p)["input_ids"]) for p, _ in pairs]
        length = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
        labels = ids.clone()
        for row, (start, own) in enumerate(zip(starts, rows, strict=True)):
            labels[row, :start], labels[row, len(own) :] = -100, -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(args.output)
    return model


def answer(text: str) -> str:
    return text.rpartition("answer ")[2].split("\n")[0] if "answer " in text else ""


tokenizer = AutoTokenizer.from_pretrained(folder)
model = fine_tuned().eval()
draw = random.Random(12345)  # sums that training may have seen, too: there are 8,100
problems = [problem(draw) for _ in range(args.problems)]
scorer = likelihood_scorer(model, tokenizer)
print(
    f"\n{'strategy':12} {'rollouts':>8} {'right':>8} {'error':>7} {'cost':>7}   tokens times active experts, a problem"
)
for rollouts in args.rollouts:
    for strategy in ("best_of_n", "beam", "dvts", "des"):
        right, cost = [], []
        for seed in range(args.seeds):
            for number, (prompt, solution) in enumerate(problems):
                options = {"counts": [1, 2, 3, 4]} if strategy == "des" else {}
                found = expert_search(
                    model,
                    tokenizer,
                    prompt,
                    scorer,
                    strategy=strategy,
                    rollouts=rollouts,
                    rounds=4,
                    step_tokens=16,
                    seed=1000 * seed + number,
                    **options,
                )
                right.append(answer(found.text) == answer(solution))
                cost.append(found.cost)
        error = stdev(right) / len(right) ** 0.5 if len(right) > 1 else float("nan")
        print(f"{strategy:12} {rollouts:8} {fmean(right):8.1%} {error:7.1%} {fmean(cost):7.0f}", flush=True)
