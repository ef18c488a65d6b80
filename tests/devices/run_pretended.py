"""Compress tiny models on the CPU and on pretended devices, and print how they compare: run by `test_devices.py`.

python run_pretended.py RUN_JSON...         each [name, family, options]
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model


sys.path.insert(0, str(Path(__file__).parent.parent))
from devices.backend import install  # noqa: E402
from devices.pretended import NAME  # noqa: E402
from devices.waits import count_waits  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import compress, make_model, random_tokens, same_state, state_of  # noqa: E402

from optimum_dern import DernCompressor  # noqa: E402
from optimum_dern.core.refits import neurons  # noqa: E402
from optimum_dern.engine.cost import memory  # noqa: E402
from optimum_dern.engine.run import prepare  # noqa: E402
from optimum_dern.evaluation.loss.perplexity import evaluate_loss  # noqa: E402


DATA = {"self_share": 0.0, "random_share": 0.0}


def placed(model: Any, place: str | None) -> Any:
    """Move a model to a device, or its halves to both, as a `device_map` does."""
    if place is not None:
        return model.to(place)
    half = len(model.model.layers) // 2
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), f"{NAME}:0")
    places |= {f"model.layers.{i}": f"{NAME}:{int(i >= half)}" for i in range(2 * half)}
    places |= dict.fromkeys(("model.norm", "lm_head"), f"{NAME}:1")
    return dispatch_model(model, device_map=places, force_hooks=True)


def devices_of(model: Any) -> dict[str, str]:
    return {name: str(parameter.device) for name, parameter in model.named_parameters()}


def in_memory(family: str, options: dict) -> dict:
    """Compress a model that is on a device or split over two, where the tokens are on one, too, and evaluate it."""
    place, minibatches, gradients = options.pop("place", NAME), [], neurons._gradients

    def counted(*args):
        minibatches.append(1)
        return gradients(*args)

    rows = random_tokens(24)
    shape = {"num_hidden_layers": 4, **options.pop("model", {})}
    here, there = make_model(family, **shape), placed(make_model(family, **shape), place)
    first = compress(here, dataset=rows, batch_size=8, **DATA, **options).report
    before = devices_of(there)
    on_device = place is None
    rows_there = [{name: value.to(NAME) if on_device else value for name, value in row.items()} for row in rows]
    with count_waits() as waits, patch.object(neurons, "_gradients", counted):
        report = compress(there, dataset=rows_there, batch_size=8, **DATA, **options).report
    state = {name: tensor.cpu() for name, tensor in state_of(there).items()}
    held_out = [{"input_ids": torch.stack([row["input_ids"] for row in random_tokens(4, seed=1)])}]
    held_out[0]["attention_mask"] = torch.ones_like(held_out[0]["input_ids"])
    return {
        "same": same_state(state_of(here), state),
        "same errors": [layer.errors for layer in first.layers] == [layer.errors for layer in report.layers],
        "same loss": evaluate_loss(here, held_out) == evaluate_loss(there, held_out),
        "stayed": devices_of(there) == before,
        "devices": sorted(set(before.values())),
        "layers": len(report.layers),
        "minibatches": len(minibatches),
        "waits": [[kind, line, count] for (kind, line), count in waits.most_common()],
    }


def from_disk(family: str, options: dict) -> dict:
    """Compress a checkpoint layer by layer on the second device, with one of the plans of what is in files."""
    rows, found, number = random_tokens(12), [], options.pop("plan")
    limits = {"max_elements": options.pop("max_elements", memory.MAX_ELEMENTS)}

    def plan(*args):
        return replace(list(memory._plans(*args[:5]))[number], **limits)

    with tempfile.TemporaryDirectory() as folder:
        make_model(family).save_pretrained(f"{folder}/model")
        for device in ("cpu", f"{NAME}:1"):
            compressor = DernCompressor(num_experts=4, dataset=rows, **DATA, **options)
            with patch.object(prepare, "plan_memory", plan), count_waits() as waits:
                compressor.compress_checkpoint(f"{folder}/model", f"{folder}/{device[:3]}", device=device)
            found.append(load_file(f"{folder}/{device[:3]}/model.safetensors"))
    lines = [[kind, line, count] for (kind, line), count in waits.most_common()]
    return {"same": same_state(*found), "layers": 2, "waits": lines}


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    results = {}
    for argument in sys.argv[1:]:
        name, family, options = json.loads(argument)
        results[name] = (from_disk if "plan" in options else in_memory)(family, options)
    print(json.dumps(results))
