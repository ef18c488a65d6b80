"""Generate text with a compressed checkpoint in plain transformers, without importing optimum-dern.

python examples/generate.py build/demo/upcycled "The city of"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


logging.disable_progress_bar()
folder, prompt = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "The president of the"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=24, do_sample=False)
print(f"{model.config.num_local_experts} experts: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
