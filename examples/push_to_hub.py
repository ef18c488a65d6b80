"""Compress a small trained model in memory, and push it to a private repository on the Hub.

python examples/push_to_hub.py me/upcycled-DERN-4     (after `hf auth login`)
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor


repo_id = sys.argv[1]
folder = Path(__file__).parent / "tiny_moe"
model = AutoModelForCausalLM.from_pretrained(folder / "upcycled")
tokenizer = AutoTokenizer.from_pretrained(folder / "upcycled")

compressor = DernCompressor(
    num_experts=4,  # of 8; or sparsity=0.5
    dataset=str(folder / "text" / "calibration"),
    num_samples=16,  # quick, as the preset is; for a model that you mean to keep take hundreds, and the default
    sequence_length=256,
    preset="fast",
)
compressor.compress_model(model, tokenizer)
url = compressor.push_to_hub(model, repo_id, tokenizer, private=True)  # one commit; keeps an existing card
print(url)
