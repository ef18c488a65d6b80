"""Accuracy of Dynamic Experts Search and its baselines at equal cost, on sums that a small model writes step by step.

    python examples/search_arithmetic.py --output build/arithmetic
    python benchmarks/search.py --model build/arithmetic --output results.json

Every seed draws its own problems, the same for all methods.  Two scorers: the model's own likelihood, and a checker
that knows which steps are right, the upper bound of any scorer.  Resumable: what the output has is not run again.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from results_file import read_results, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_dern import active_experts, expert_search
from optimum_dern.search.scorers import likelihood, verifier


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from search_arithmetic import TERMS, answer_of, make_problem


METHODS = {
    "best-of-N": {"strategy": "best_of"},
    "best-of-N, several k": {"strategy": "best_of", "counts": (1, 2, 3)},
    "beam": {"strategy": "beam"},
    "DVTS": {"strategy": "dvts"},
    "DES": {"strategy": "des", "counts": (1, 2, 3)},
    "DES, k = 2 and 3": {"strategy": "des", "counts": (2, 3)},
}


def right_steps(solutions: dict[str, str]) -> Any:
    """Make the checker: the share of the steps that are right, up to the first that is not."""

    def check(prompt: str, text: str) -> float:
        steps, written = solutions[prompt].split("\n"), text.rstrip("\n").split("\n")
        agreeing = [step == own for step, own in zip(steps, written, strict=False)]
        return (*agreeing, False).index(False) / len(steps)

    return verifier(check)


def measure(model: Any, tokenizer: Any, options: dict[str, Any], scorer: Any, problems: Sequence, seed: int) -> dict:
    """Search for the answers of all problems."""
    right, costs = 0, {"written": 0, "written_experts": 0, "read_experts": 0}
    kept: dict[int, int] = {}
    for number, (prompt, steps) in enumerate(problems):
        found = expert_search(
            model, tokenizer, prompt, scorer=scorer, rounds=TERMS, step="\n", step_tokens=16, temperature=1.0,
            seed=1000 * seed + number, **options,
        )  # fmt: skip
        right += answer_of(found.text) == answer_of(steps)
        for count in (count for counts in found.kept for count in counts):
            kept[count] = kept.get(count, 0) + 1
        costs = {name: total + getattr(found.cost, name) for name, total in costs.items()}
    return {"right": right, "problems": len(problems), **costs, "kept": kept}


@torch.no_grad()
def measure_alone(model: Any, tokenizer: Any, count: int, temperature: float, problems: Sequence, seed: int) -> dict:
    """Write one answer to every problem with one number of experts."""
    inputs = tokenizer([prompt for prompt, _ in problems], padding=True, padding_side="left", return_tensors="pt")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    with active_experts(model, count):
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=16 * TERMS, **drawn
        )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer_of(text) == answer_of(steps) for text, (_, steps) in zip(texts, problems, strict=True))
    return {"right": right, "problems": len(problems)}


def draw_problems(seed: int, number: int) -> list[tuple[str, str]]:
    """Draw the problems of a seed."""
    draw = random.Random(f"benchmark {seed}")
    return [make_problem(draw) for _ in range(number)]


def run(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Run what the output lacks, one method and seed at a time."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    results = read_results(args.output)
    for seed in range(args.seeds):
        many = draw_problems(seed, 500)
        for count, temperature in ((k, t) for k in (1, 2, 3, 4) for t in (0.0, 1.0)):
            key = f"alone, k={count}, temperature {temperature}"
            if len(results.setdefault(key, [])) <= seed:
                results[key].append(measure_alone(model, tokenizer, count, temperature, many, seed))
        problems = many[: args.problems]
        scorers = {"likelihood": likelihood(model, tokenizer), "checker": right_steps(dict(problems))}
        for rollouts, (scorer, score), (method, options) in (
            (n, s, m) for n in args.rollouts for s in scorers.items() for m in METHODS.items()
        ):
            key = f"{scorer}, {rollouts} rollouts, {method}"
            if len(results.setdefault(key, [])) <= seed:
                rolled = options | {"rollouts": rollouts}
                results[key].append(measure(model, tokenizer, rolled, score, problems, seed))
                write_results(args.output, results)
    return results


def print_table(results: dict[str, list[dict]]) -> None:
    """Print accuracy in percent with its standard error over all problems, and costs per problem."""
    for key, rows in results.items():
        number = sum(row["problems"] for row in rows)
        share = sum(row["right"] for row in rows) / number
        names = ("written", "written_experts", "read_experts")
        costs = [f"{sum(row[name] for row in rows) / number:7.0f}" for name in names if name in rows[0]]
        by_seed = " ".join(f"{100 * row['right'] / row['problems']:.0f}" for row in rows)
        print(f"{key:48} {100 * share:5.1f} +- {100 * sqrt(share * (1 - share) / number):3.1f} ({by_seed})", *costs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder written by examples/search_arithmetic.py")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    parser.add_argument("--problems", type=int, default=30, help="problems a seed")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[6, 12], help="multiples of 6")
    parser.add_argument("--seeds", type=int, default=3)
    print_table(run(parser.parse_args()))
