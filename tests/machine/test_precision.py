"""Products in TF32 while a fit computes, and only then."""

import pytest
import torch

from optimum_dern.machine.precision import drawn_in_tf32, products_in_tf32


def setting():
    """How float32 products on CUDA are computed: the newer name of the setting where torch has it."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def test_set_for_cuda_alone_and_restored():
    """Also where the computation fails; between two results of an iterator it is as before."""
    before, rounded = setting(), "tf32" if isinstance(setting(), str) else True
    with products_in_tf32(torch.device("cpu")):
        assert setting() == before != rounded
    with pytest.raises(RuntimeError, match="fails"), products_in_tf32(torch.device("cuda")):
        assert setting() == rounded
        raise RuntimeError("fails")
    assert setting() == before
    results = drawn_in_tf32((setting() for _ in range(2)), torch.device("cuda"))
    assert [(found, setting()) for found in results] == [(rounded, before)] * 2
