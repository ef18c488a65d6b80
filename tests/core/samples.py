"""Small random experts and routings, comparison helpers, and shared settings of the property tests."""

import torch
from hypothesis import settings
from reference import relu_squared, silu

from optimum_dern.core.layer.mixture import Routing
from optimum_dern.core.layer.segments import Segments


KINDS = {"gated": (True, False), "plain": (False, False), "biased": (True, True), "plain biased": (False, True)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def activation(gate, up):
    """Apply SwiGLU, or squared ReLU where there is no gate."""
    return torch.relu(up) ** 2 if gate is None else torch.nn.functional.silu(gate) * up


def scalar_activation(segments):
    """Return the reference implementation's activation for these segments."""
    return relu_squared if segments.gate is None else silu


def make_segments(kind="gated", experts=6, width=5, hidden=4, output=3, dtype=torch.float64, seed=0):
    """Make random experts of one of `KINDS`."""
    gated, biased = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = hidden + biased
    gate = normal(experts, width, rows) if gated else None
    up, down = normal(experts, width, rows), normal(experts, width, output)
    return Segments(gate, up, down, normal(experts, output) if biased else None, biased)


def in_chunks(segments, tokens):
    """Return the same experts with a workspace that takes so many tokens at a time."""
    return segments._replace(workspace=segments.workspace._replace(chunk_tokens=tokens))


def make_routing(experts=6, tokens=12, top_k=2, hidden=4, dtype=torch.float64, seed=1, unused=()):
    """Make random tokens and their routing, in which unused experts are never chosen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    scores[:, list(unused)] = -1.0
    weight, index = scores.topk(top_k, dim=1)
    return Routing(x, index, weight.to(dtype))


def scores_for(experts=6, seed=2):
    """Make random positive saliency scores, (E,) float64."""
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def reference_arguments(segments, routing):
    """Return the arguments that the reference's per-token functions share."""
    return (
        (*segments[:3], *routing[:3], scalar_activation(segments)),
        {"output_bias": segments.output_bias, "biased": segments.biased},
    )


def copies(*tuples):
    """Copy the tensors of named tuples, for `assert_unchanged`."""
    return [part.clone() for parts in tuples for part in parts if isinstance(part, torch.Tensor)]


def assert_unchanged(before, *tuples):
    """Assert that every tensor is bitwise equal to its copy by `copies`."""
    after = [part for parts in tuples for part in parts if isinstance(part, torch.Tensor)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def assert_near(actual, expected, tolerance=1e-10):
    """Assert equal shapes, and values within the tolerance (absolute and relative), in any dtype."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
