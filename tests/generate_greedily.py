"""Script that generates tokens from checkpoints with plain transformers; importing this package is blocked.

python generate_greedily.py RESULT.pt COUNT PROMPT FOLDER...
"""

import sys

import torch


@torch.no_grad()
def main():
    """Write {folder: token ids after the prompt}, in float32, so that another order of sums changes no choice."""
    sys.modules["optimum_dern"] = None  # importing it fails from here on
    torch.set_num_threads(1)
    import transformers
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    result, count, prompt, *folders = sys.argv[1:]
    found = {"version": transformers.__version__}
    for folder in folders:
        # transformers 4 does not know the tokenizer's class, which transformers 5 has named.
        ids = torch.tensor([Tokenizer.from_file(f"{folder}/tokenizer.json").encode(prompt).ids])
        model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        tokens = model.generate(ids, max_new_tokens=int(count), min_new_tokens=int(count), do_sample=False)
        found[folder] = tokens[0, ids.shape[1] :]
    torch.save(found, result)


if __name__ == "__main__":
    main()
