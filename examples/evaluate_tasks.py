"""Score a model on tasks with the package's own scorer and with lm-eval, and compare the two item by item.

pip install '.[eval]'    # in a clone of the repository
python examples/evaluate_tasks.py MODEL TASKS_FOLDER [LIMIT]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks
from optimum_dern.evaluation.tasks.load import load_tasks
from optimum_dern.integration.lm_eval import evaluate_with_lm_eval


path, folder, *limit = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path)
tasks = load_tasks(["all"], folder, limit=int(limit[0]) if limit else None)

ours = evaluate_tasks(model, tokenizer, tasks)
theirs = evaluate_with_lm_eval(model, tokenizer, tasks, batch_size=16)

print(f"{'task':20} {'items':>6} {'metric':>8} {'ours':>8} {'lm-eval':>8} {'differing':>9} {'log-likelihood':>15}")
for name, result in theirs.items():
    pairs = list(zip(ours[name].outcomes, result.outcomes, strict=True))
    differing = sum(
        any(one.metrics[metric] != value for metric, value in other.metrics.items()) for one, other in pairs
    )
    gaps = [
        abs(a - b) for one, other in pairs for a, b in zip(one.log_likelihoods, other.log_likelihoods, strict=True)
    ]
    metric = result.main_metric
    values = f"{ours[name].metrics[metric].value:8.4f} {result.main.value:8.4f}"
    print(f"{name:20} {len(pairs):6} {metric:>8} {values} {differing:9} {max(gaps):15.1e}")
