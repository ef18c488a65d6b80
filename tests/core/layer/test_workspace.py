"""Tensors that a workspace makes are laid out as torch would lay them out, wherever they are."""

import pytest
import torch
from samples import make_segments

from optimum_dern.core.layer.segments import ExpertLayout, parameters_from_segments, segments_from_parameters
from optimum_dern.core.layer.workspace import Workspace


FORMS = {
    "plain": torch.randn(6, 5, 4),
    "transposed": torch.randn(6, 4, 5).transpose(1, 2),
    "half": torch.randn(6, 10, 4).chunk(2, dim=1)[1],
    "interleaved": torch.randn(6, 10, 4)[:, ::2],
    "interleaved and transposed": torch.randn(6, 4, 10).transpose(1, 2)[:, ::2],
    "vectors": torch.randn(6, 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_layout_of_torch(form):
    """Copies have torch's own strides, on which the bits of products may depend."""
    tensor, experts = FORMS[form], torch.tensor([4, 0, 5])
    for found, expected in (
        (Workspace().select(tensor, experts), tensor[experts]),
        (Workspace().copy(tensor, torch.float64), tensor.to(torch.float64, copy=True)),
    ):
        assert found.stride() == expected.stride() and torch.equal(found, expected)
        assert found.dtype == expected.dtype and found.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("kind", ["gated", "biased", "plain biased"])
def test_whatever_holds_all_experts_is_made_by_the_workspace(kind):
    """Joining biases and selecting experts ask it for each tensor, and what comes out keeps it."""
    made = []
    workspace = Workspace(lambda *args, **kwargs: made.append(torch.empty(*args, **kwargs)) or made[-1])
    plain = make_segments(kind)
    layout = ExpertLayout(gated=plain.gate is not None, biased=plain.biased)
    segments = segments_from_parameters(parameters_from_segments(plain, layout), layout, workspace)
    assert len(made) == plain.biased  # rows with their bias are new, all else are views
    chosen = segments.select(torch.tensor([2, 1]))
    assert chosen.workspace is workspace
    storages = {part.untyped_storage().data_ptr() for part in chosen if isinstance(part, torch.Tensor)}
    assert storages <= {tensor.untyped_storage().data_ptr() for tensor in made}
    for part, expected in zip(chosen[:4], plain.select(torch.tensor([2, 1]))[:4], strict=True):
        assert part is expected is None or torch.equal(part, expected)
