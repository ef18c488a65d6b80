"""FP8 and MXFP4 checkpoints quantised by slow loops, each with the equivalent bfloat16 checkpoint."""

import json
import math
from itertools import product

import torch
from safetensors.torch import load_file, save_file
from tiny import COMMON, EXPERTS, make_model


FP8_MAX = 448.0
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def save_fp8(folder, block, scales="float32", fused=False):
    """Save a tiny DeepSeek-V3 to FOLDER/packed in FP8, except some tensors, and to FOLDER/plain in bfloat16.

    Args:
        folder: for both.
        block: rows and columns of a block; None for one factor a matrix.
        scales: dtype of the factors; "uint8" and "float8_e8m0fnu" hold powers of two.
        fused: all experts of a layer in one tensor.
    """
    save_plain(make_model("deepseek_v3").to(torch.bfloat16), folder / "plain")
    plain, packed = load_file(folder / "plain" / "model.safetensors"), {}
    if fused:
        fuse(plain)
    for name, tensor in plain.items():
        if tensor.dim() < 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.", "layers.1.self_attn")):
            packed[name] = tensor
        elif tensor.dim() == 3:
            parts = [quantise_fp8(matrix, block, scales) for matrix in tensor]
            packed[name], packed[f"{name}_scale_inv"] = (torch.stack([p[i] for p in parts]) for i in (0, 1))
            plain[name] = torch.stack([p[2] for p in parts])
        else:
            packed[name], packed[f"{name}_scale_inv"], plain[name] = quantise_fp8(tensor, block, scales)
            if block is None:
                packed[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
    method = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    return save_both(folder, plain, packed, method)


def save_mxfp4(folder):
    """Save a tiny gpt-oss to FOLDER/packed with experts in MXFP4, and to FOLDER/plain in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 32, "num_local_experts": EXPERTS}
    config = AutoConfig.for_model("gpt_oss", **COMMON | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_plain(model, folder / "plain")
    plain, packed = load_file(folder / "plain" / "model.safetensors"), {}
    for name, tensor in plain.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"], plain[name] = quantise_mxfp4(tensor)
        else:
            packed[name] = tensor
    return save_both(folder, plain, packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def save_plain(model, folder):
    """Save a checkpoint whose config names bfloat16."""
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def save_both(folder, plain, packed, method):
    """Save both checkpoints of a folder, whose configs differ only in the quantisation."""
    save_file(plain, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    (folder / "packed").mkdir()
    save_file(packed, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text("utf-8"))
    (folder / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": method}), "utf-8")
    return folder


def fuse(tensors):
    """Fuse the experts of each layer into two tensors, as transformers computes with them."""
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{stem}.{e}.{kind}_proj.weight") for e in range(EXPERTS)])
            for kind in ("gate", "up", "down")
        )
        tensors |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}


def quantise_fp8(weight, block, scales):
    """Quantise a weight to FP8; returns the 8-bit weight, its scales, and the dequantised weight in bfloat16."""
    rows, columns = weight.shape
    height, width = block or (rows, columns)
    grid = [[0.0] * math.ceil(columns / width) for _ in range(math.ceil(rows / height))]
    for r, c in product(range(rows), range(columns)):
        value = abs(weight[r, c].item()) / FP8_MAX
        grid[r // height][c // width] = max(grid[r // height][c // width], value)
    if scales in ("uint8", "float8_e8m0fnu"):
        exponents = [[math.ceil(math.log2(value)) for value in row] for row in grid]
        grid = [[2.0**exponent for exponent in row] for row in exponents]
        factors = torch.tensor(exponents, dtype=torch.int32).add(127).to(torch.uint8).view(getattr(torch, scales))
    else:
        factors = torch.tensor(grid, dtype=getattr(torch, scales))
        grid = factors.double().tolist()
    divided = [[weight[r, c].item() / grid[r // height][c // width] for c in range(columns)] for r in range(rows)]
    packed = torch.tensor(divided).to(torch.float8_e4m3fn)
    values = packed.double().tolist()
    exact = [[values[r][c] * grid[r // height][c // width] for c in range(columns)] for r in range(rows)]
    return packed, factors, torch.tensor(exact, dtype=torch.float64).float().bfloat16()


def quantise_mxfp4(weight):
    """Quantise (experts, in, out) to MXFP4; returns blocks, scales, and the dequantised values in bfloat16."""
    experts, inner, out = weight.shape
    blocks = torch.zeros(experts, out, inner // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(experts, out, inner // 32, dtype=torch.uint8)
    plain = torch.zeros(weight.shape, dtype=torch.float64)
    for e, o, g in product(range(experts), range(out), range(inner // 32)):
        values = weight[e, 32 * g : 32 * g + 32, o].double().tolist()
        exponent = math.floor(math.log2(max(map(abs, values)))) - 2
        scales[e, o, g] = exponent + 127
        for i, value in enumerate(values):
            code = min(range(8), key=lambda k: abs(abs(value) / 2.0**exponent - FP4[k]))  # noqa: B023
            plain[e, 32 * g + i, o] = math.copysign(FP4[code], value) * 2.0**exponent
            blocks[e, o, g, i // 2] += (code + 8 * (value < 0)) << 4 * (i % 2)
    return blocks, scales, plain.bfloat16()
