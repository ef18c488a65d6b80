"""Prune a checkpoint by llm-compressor's REAP, for `rival.py`, in an environment that has it.

python rival_driver.py FOLDER BATCH_SIZE      # FOLDER with model/ and tokens.pt
"""

import json
import sys
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def resident(name: str) -> int:
    """Return a figure of this process's memory in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(folder: Path, batch_size: int) -> None:
    """Load, prune and write the model; print the CPU seconds and the peak of memory over that after the imports."""
    before, started = resident("VmRSS"), time.process_time()
    tokens = torch.load(folder / "tokens.pt")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # a processor is asked for, and not used
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>"),
        dataset=DataLoader(rows, batch_size=batch_size),
        recipe=REAPPruningModifier(sparsity=0.5),
        num_calibration_samples=len(rows),
        moe_calibrate_all_experts=False,
        pipeline="basic",
    )
    model.save_pretrained(folder / "rival")
    print(json.dumps({"cpu_seconds": time.process_time() - started, "peak_bytes": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
