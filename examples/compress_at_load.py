"""Compress a model while transformers loads it, generate with it, and save it like any other model.

python examples/compress_at_load.py
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_dern


folder = Path(__file__).parent / "tiny_moe"
model = AutoModelForCausalLM.from_pretrained(
    folder / "upcycled",
    quantization_config=optimum_dern.DernConfig(
        num_experts=4,  # of 8; or sparsity=0.5
        dataset=str(folder / "text" / "calibration"),
        num_samples=32,
        sequence_length=256,
    ),
)
print(f"{type(model).__name__} with {model.config.num_local_experts} experts, {model.num_parameters():,} parameters")
print(f"{model.dern_report.ratio:.2f} of the bytes; chosen: {[layer.winner for layer in model.dern_report.layers]}")

tokenizer = AutoTokenizer.from_pretrained(folder / "upcycled")
tokens = model.generate(**tokenizer("The city of", return_tensors="pt"), max_new_tokens=16, do_sample=False)
print(repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))

model.save_pretrained("build/compress_at_load")  # also writes config.json with the new count, card and report
tokenizer.save_pretrained("build/compress_at_load")
