"""Script that quantises checkpoints to FP8 with llm-compressor, in memory, and runs them with transformers.

python run_fp8.py TASK.json RESULT.json
"""

from importlib.metadata import version

import torch
import transformers
from exchange import answer_task
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from run_transformers import run_model
from transformers import AutoModelForCausalLM


IGNORED = ["lm_head", "re:.*gate$"]  # routers stay as they are


def run(folder, task):
    """Quantise weights a channel and inputs a token at a time, which needs no data."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=IGNORED))
    return run_model(model, task)


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer_task(f"{version('llmcompressor')}, transformers {transformers.__version__}", run)
