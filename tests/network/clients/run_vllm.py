"""Script that runs checkpoints with vLLM on the CPU.

python run_vllm.py TASK.json RESULT.json
"""

import os


# One process, one core, a small cache: set before vLLM is imported.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")

import vllm  # noqa: E402
from exchange import answer_task  # noqa: E402


def run(folder, task):
    """Generate greedily, and score the text as a prompt, in float32 and without compiling."""
    model = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True)
    made = model.generate([{"prompt_token_ids": prompt} for prompt in task["prompts"]], greedy, use_tqdm=False)
    score = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = model.generate([{"prompt_token_ids": task["text"]}], score, use_tqdm=False)[0].prompt_logprobs
    logs = [entry[token].logprob for entry, token in zip(scored[1:], task["text"][1:], strict=True)]
    return {"tokens": [list(output.outputs[0].token_ids) for output in made], "logs": logs}


if __name__ == "__main__":
    answer_task(vllm.__version__, run)
