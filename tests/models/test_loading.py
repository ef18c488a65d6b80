"""Dtypes in every usual spelling mean the same wherever one is given; others are refused at once."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.source.find import find_checkpoint
from optimum_dern.models.loading import load_model, parse_dtype


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float32 checkpoint."""
    folder = tmp_path_factory.mktemp("source")
    make_model("mixtral").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("BF16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        (torch.half, torch.float16),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        (None, None),
        ("auto", None),
    ],
)
def test_spellings(dtype, expected):
    """Names of torch, short ones, and torch's own objects."""
    assert parse_dtype(dtype) is expected


@pytest.mark.parametrize("dtype", ["bf17", "int8", "load", "", torch.int8, 16])
def test_other_dtypes(dtype, source, tmp_path):
    """What is no dtype that a model computes in is refused with those that are, and nothing is written."""
    for use in (
        parse_dtype,
        lambda dtype: DernCompressor().compress_checkpoint(source, tmp_path / "out", dtype=dtype),
        lambda dtype: find_checkpoint(source, dtype=dtype),
        lambda dtype: load_model(source, "cpu", dtype),
    ):
        with pytest.raises(ValueError, match="but it must be one of float32, bfloat16, float16"):
            use(dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bf16", "torch.bfloat16", torch.bfloat16])
def test_the_output_has_the_dtype(dtype, source, tmp_path):
    """Compressed, found or loaded with it."""
    fields = {"method": "prune", "preset": "paper", "selection": "aimer", "num_experts": 4}
    DernCompressor(**fields).compress_checkpoint(source, tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert find_checkpoint(source, dtype=dtype).skeleton.dtype == torch.bfloat16
    assert load_model(source, "cpu", dtype).dtype == torch.bfloat16
