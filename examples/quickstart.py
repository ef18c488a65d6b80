"""Compress a small trained model in memory, print the report of every layer, and save the model.

python examples/quickstart.py
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor


folder = Path(__file__).parent / "tiny_moe"
model = AutoModelForCausalLM.from_pretrained(folder / "upcycled")
tokenizer = AutoTokenizer.from_pretrained(folder / "upcycled")

compressor = DernCompressor(
    num_experts=4,  # of 8; or sparsity=0.5
    dataset=str(folder / "text" / "calibration"),
    num_samples=32,  # quick; hundreds for a model that you mean to keep
    sequence_length=256,
)
compressor.compress_model(model, tokenizer)
for layer in compressor.report.layers:
    print(f"{layer.name}: kept {layer.retained}, {layer.winner}, relative error {layer.errors[layer.winner]:.4f}")
print(f"{compressor.report.ratio:.2f} of the bytes")

compressor.save(model, "build/quickstart", tokenizer=tokenizer)
