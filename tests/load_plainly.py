"""Script that loads checkpoints with plain transformers, without this package, and writes what they compute.

python load_plainly.py RESULT.pt FOLDER...
"""

import sys
from pathlib import Path

import torch


IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@torch.no_grad()
def observe(model):
    """Compute a model's logits with every experts implementation, its auxiliary loss, and a generated sequence."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(256, (3, 20), generator=generator)
    seen = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        seen[f"logits, {name}"] = model(ids).logits
    if hasattr(model.config, "output_router_logits"):
        output = model(ids, output_router_logits=True)
        seen["router logits"] = torch.cat([layer.flatten() for layer in output.router_logits])
        if getattr(output, "aux_loss", None) is not None:
            seen["aux loss"] = output.aux_loss
    seen["generated"] = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)
    return seen


def main():
    """Write the outputs and the loading problems of every checkpoint, by folder name."""
    sys.modules["optimum_dern"] = None  # importing it fails from here on
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    results = {}
    for folder in map(Path, sys.argv[2:]):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        problems = {key: [str(item) for item in value] for key, value in info.items() if value}
        results[folder.name] = {"observed": observe(model.eval()), "problems": problems}
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
