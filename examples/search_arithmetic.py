"""Teach `tiny_moe/scratch` sums written step by step, then let it answer by searching over the numbers of experts.

    python examples/search_arithmetic.py --output build/arithmetic          # some three minutes on one CPU thread

A problem is four two-digit numbers to add and subtract, written units first with a token for each digit, and a line
for each partial result: 21 + 43 - 5 + 30 is `1 2 + 3 4 - 5 0 + 0 3 =`.  `benchmarks/search.py` measures searches on
what this script has trained.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import expert_search
from optimum_dern.search.scorers import likelihood


MODEL = Path(__file__).parent / "tiny_moe" / "scratch"
TERMS, BATCH, STEPS, PEAK, WARMUP = 4, 64, 320, 3e-3, 50


def digits(number: int) -> str:
    """Write a number of two digits, units first, so that a carry is known before it is needed."""
    return f"{number % 10} {number // 10}"


def make_problem(draw: random.Random, terms: int = TERMS) -> tuple[str, str]:
    """Draw a sum whose partial results are from 0 to 99: its prompt, and the steps that solve it."""
    total = draw.randint(0, 99)
    prompt, steps = digits(total), []
    for _ in range(terms - 1):
        sign = draw.choice("+-")
        term = draw.randint(0, 99 - total if sign == "+" else total)
        result = total + term if sign == "+" else total - term
        prompt += f" {sign} {digits(term)}"
        steps.append(f"{digits(total)} {sign} {digits(term)} = {digits(result)}")
        total = result
    return f"{prompt} =\n", "\n".join(steps)


def answer_of(solution: str) -> str:
    """Read the last result of written steps."""
    return solution.rpartition("=")[2].strip()


def make_batch(draw: random.Random, tokenizer: AutoTokenizer) -> dict[str, torch.Tensor]:
    """Draw problems with their solutions, padded on the right; only the solutions count in the loss."""
    rows = []
    for prompt, steps in (make_problem(draw) for _ in range(BATCH)):
        asked, written = tokenizer(prompt)["input_ids"], tokenizer(steps)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((asked, written))
    length = max(len(asked) + len(written) for asked, written in rows)
    ids = torch.full((BATCH, length), tokenizer.pad_token_id)
    labels = torch.full((BATCH, length), -100)
    for row, (asked, written) in enumerate(rows):
        ids[row, : len(asked) + len(written)] = torch.tensor(asked + written)
        labels[row, len(asked) : len(asked) + len(written)] = torch.tensor(written)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != tokenizer.pad_token_id).long()}


def train(output: Path, steps: int, seed: int) -> None:
    """Fine-tune the model on drawn problems and save it."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.05)
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, decay)
        loss = model(**make_batch(draw, tokenizer), output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Train where nothing is trained yet, then search."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/arithmetic"), help="folder of the trained model")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of 64 problems")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.output / "config.json").exists():
        train(args.output, args.steps, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = AutoModelForCausalLM.from_pretrained(args.output).eval()
    scorer = likelihood(model, tokenizer)
    draw = random.Random(f"test {args.seed}")
    for _ in range(3):
        prompt, steps = make_problem(draw)
        found = expert_search(
            model, tokenizer, prompt, counts=(1, 2, 3), rollouts=12, rounds=TERMS, scorer=scorer, step="\n",
            step_tokens=16, seed=args.seed,
        )  # fmt: skip
        print(f"{prompt.strip()}\n{found.text}\n{found.count} experts, right: {answer_of(steps)}\n{found.cost}\n")


if __name__ == "__main__":
    main()
