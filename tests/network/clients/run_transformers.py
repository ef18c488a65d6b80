"""Script that runs checkpoints with plain transformers of any version, optionally in 8 bits of bitsandbytes.

python run_transformers.py TASK.json RESULT.json [--8-bit]
"""

import sys

import torch
import transformers
from exchange import answer_task
from transformers import AutoModelForCausalLM


def load(folder):
    """Load a checkpoint in float32, so that another order of sums changes no choice; or in 8 bits."""
    if "--8-bit" not in sys.argv:
        return AutoModelForCausalLM.from_pretrained(folder).float().eval()
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


@torch.inference_mode()
def run_model(model, task):
    """Generate and score; the end of text is a token like others."""
    model.generation_config.eos_token_id = None
    tokens = []
    for prompt in task["prompts"]:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=task["new_tokens"], do_sample=False)
        tokens.append(made[0, len(prompt) :].tolist())
    text = torch.tensor(task["text"])
    logs = model(text[None]).logits[0, :-1].double().log_softmax(-1)  # (positions, vocabulary)
    return {"tokens": tokens, "logs": logs.gather(-1, text[1:, None])[:, 0].tolist()}


def main():
    """Answer the task."""
    torch.set_num_threads(1)
    version = transformers.__version__
    if "--8-bit" in sys.argv:
        import bitsandbytes

        version = f"{bitsandbytes.__version__}, transformers {version}"
    answer_task(version, lambda folder, task: run_model(load(folder), task))


if __name__ == "__main__":
    main()
