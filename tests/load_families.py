"""Script that loads checkpoints with plain transformers, without this package, and writes what users would see.

python load_families.py RESULT.pt FOLDER...
"""

import contextlib
import inspect
import json
import sys
from pathlib import Path

import torch


IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
NOT_THERE = "this transformers has no {}"


@torch.no_grad()
def observe(model):
    """Compute a model's outputs in every way a user would: {name: tensor}, and {name: reason} of what fails."""
    seen, failed = {}, {}

    @contextlib.contextmanager
    def attempt(name):
        try:
            yield
        except Exception as error:  # compared with what the uncompressed model can do
            failed[name] = f"{type(error).__name__}: {error}"

    inputs = _inputs(model)
    with attempt("logits"):
        seen["logits"] = model(**inputs).logits
    for name in IMPLEMENTATIONS if hasattr(model, "set_experts_implementation") else ():
        with attempt(f"logits, {name}"):
            model.set_experts_implementation(name)
            seen[f"logits, {name}"] = model(**inputs).logits
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        with attempt("auxiliary loss"):
            seen["auxiliary loss"] = model(**inputs, output_router_logits=True).aux_loss + 0.0
    with attempt("generated"):
        torch.manual_seed(0)  # DiffusionGemma starts from noise
        seen["generated"] = model.generate(inputs["input_ids"][:1, :8], max_new_tokens=6, do_sample=False)
    return {"seen": {name: value for name, value in seen.items() if torch.is_tensor(value)}, "failed": failed}


def _inputs(model):
    generator = torch.Generator().manual_seed(7)
    inputs = {"input_ids": torch.randint(256, (3, 16), generator=generator)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = torch.randint(256, (3, 8), generator=generator)
    return inputs


def load(folder):
    """Load a checkpoint in the class that its config names; returns it and its loading problems, or None."""
    import transformers

    name = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        return None, {"architecture": [NOT_THERE.format(name)]}
    model, info = architecture.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {key: [str(item) for item in value] for key, value in info.items() if value}


def main():
    """Write the outputs and the loading problems of every checkpoint, by folder."""
    sys.modules["optimum_dern"] = None  # importing it fails from here on
    torch.set_num_threads(1)
    import transformers

    results = {"version": transformers.__version__}
    for folder in sys.argv[2:]:
        try:
            model, problems = load(Path(folder))
            observed = {} if model is None else observe(model)
        except Exception as error:  # one family must not hide the others
            observed, problems = {}, {"loading": [f"{type(error).__name__}: {error}"]}
        results[folder] = {"problems": problems, **observed}
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
