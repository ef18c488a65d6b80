"""Script that compresses models by Hub id, in a process of its own since huggingface_hub reads variables on import.

python hub_download.py OUTPUT: one job a line of stdin, [name, model, options]; results go to OUTPUT/NAME, and what
came of each job to stdout.
"""

import json
import sys
import time
from pathlib import Path

import torch
from tiny import sample_texts

from optimum_dern import DernCompressor


OPTIONS = {"num_experts": 4, "batch_size": 4, "neuron_refit": False, "router_refit": False}


def main(output):
    """Print {name: revision of the source, or the error}."""
    torch.set_num_threads(1)
    time.sleep = lambda seconds: None  # between its retries the client would wait for half a minute
    results = {}
    for line in sys.stdin:
        name, model, options = json.loads(line)
        try:
            report = compress(model, output / name, **options)
            results[name] = {"revision": report.revision}
        except (OSError, ValueError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}", "written": (output / name).exists()}
    print(json.dumps(results))


def compress(model, output, **options):
    """Compress quickly with texts as calibration data, which need the model's tokenizer."""
    return DernCompressor(dataset=sample_texts(), self_share=0.0, **OPTIONS).compress_checkpoint(
        model, output, **options
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
