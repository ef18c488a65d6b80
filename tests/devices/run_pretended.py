"""Compress tiny models on the CPU and on a pretended device, and print how they compare: run by `test_devices.py`.

python run_pretended.py CONFIG_JSON...
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))
from devices.pretended import NAME, count_waits, install  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import compress, make_model, random_tokens, same_state, state_of  # noqa: E402

from optimum_dern import DernCompressor  # noqa: E402
from optimum_dern.core.refits import neurons  # noqa: E402
from optimum_dern.engine.cost import memory  # noqa: E402
from optimum_dern.engine.run import prepare  # noqa: E402


LAYERS = 4
DATA = {"self_share": 0.0, "random_share": 0.0}


def in_memory(family: str, fields: dict) -> dict:
    """Compress a model that is on the device."""
    minibatches, gradients = [], neurons._gradients

    def counted(*args):
        minibatches.append(1)
        return gradients(*args)

    rows = random_tokens(24)
    here, there = (make_model(family, num_hidden_layers=LAYERS) for _ in range(2))
    compress(here, dataset=rows, batch_size=8, **DATA, **fields)
    there.to(NAME)
    with count_waits() as waits, patch.object(neurons, "_gradients", counted):
        report = compress(there, dataset=rows, batch_size=8, **DATA, **fields).report
    kinds = {kind: sum(count for (k, _), count in waits.items() if k == kind) for kind in ("read", "down", "up")}
    state = {name: tensor.cpu() for name, tensor in state_of(there).items()}
    return {
        "same": same_state(state_of(here), state),
        "devices": sorted({parameter.device.type for parameter in there.parameters()}),
        "winners": [layer.winner for layer in report.layers],
        "waits": kinds,
        "minibatches": len(minibatches),
        "lines": [[kind, line, count] for (kind, line), count in waits.most_common(8)],
    }


def from_disk(family: str, fields: dict) -> dict:
    """Compress a checkpoint layer by layer on the device, with one of the plans of what is in files."""
    rows, found, number = random_tokens(12), [], fields.pop("plan")

    def plan(*args):
        return list(memory._plans(*args[:5]))[number]

    with tempfile.TemporaryDirectory() as folder:
        make_model(family).save_pretrained(f"{folder}/model")
        for device in ("cpu", NAME):
            compressor = DernCompressor(num_experts=4, dataset=rows, **DATA, **fields)
            with patch.object(prepare, "plan_memory", plan):
                compressor.compress_checkpoint(f"{folder}/model", f"{folder}/{device}", device=device)
            found.append(load_file(f"{folder}/{device}/model.safetensors"))
    return {"same": same_state(*found)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    results = {}
    for argument in sys.argv[1:]:
        name, family, fields = json.loads(argument)
        results[name] = (from_disk if name.startswith("disk") else in_memory)(family, fields)
    print(json.dumps(results))
