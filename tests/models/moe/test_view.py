"""A MoE layer read as segments."""

from contextlib import nullcontext

import pytest
import torch
from tiny import make_model

from optimum_dern.machine.precision import products_in_tf32
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import read_layer


@pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.float32, nullcontext), (torch.bfloat16, products_in_tf32), (torch.float16, products_in_tf32)],
)
def test_precision_of_the_runs_of_experts(dtype, products):
    """In TF32 where it rounds no weight; a model of 32 bits is run as its user runs it."""
    layer = find_moe_layers(make_model("mixtral", num_hidden_layers=1).to(dtype))[0]
    assert read_layer(layer).segments.workspace.products is products
