"""The refit of output biases against a dense least-squares problem."""

import pytest
import torch
from observed import in_processes
from samples import activation, assert_near, assert_unchanged, copies, in_chunks, make_routing, make_segments

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.refits.output_bias import fit_output_biases


@pytest.mark.parametrize("kind", ["biased", "plain biased"])
@pytest.mark.parametrize("chunk", [4, 4096])
def test_the_normal_equations(kind, chunk):
    """The columns are the experts' weights, (T, N); an expert without tokens keeps its bias."""
    segments, routing = in_chunks(make_segments(kind), chunk), make_routing(tokens=40, unused=(4,))
    target = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = torch.zeros(40, 6, dtype=torch.float64)
    for token in range(40):
        for slot in range(2):
            columns[token, routing.index[token, slot]] = routing.weight[token, slot]
    gram = columns.T @ columns
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(6, dtype=gram.dtype)
    residual = target - routed_output(segments, routing, activation)
    expected = segments.output_bias + torch.linalg.solve(gram + ridge, columns.T @ residual)
    before = copies(segments, routing)
    fitted = fit_output_biases(segments, routing, target, activation)
    assert_near(fitted.output_bias, expected, 1e-8)
    assert torch.equal(fitted.output_bias[4], segments.output_bias[4])
    assert_unchanged(before, segments, routing)
    assert (routed_output(fitted, routing, activation) - target).norm() < residual.norm()


def test_two_processes():
    segments, routing = make_segments("biased"), make_routing(tokens=40)
    target = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = fit_output_biases(segments, routing, target, activation)
    cut = [slice(0, 15), slice(15, 40)]
    parts = in_processes(
        2,
        lambda rank, reduce: fit_output_biases(
            segments, routing.select(cut[rank]), target[cut[rank]], activation, reduce
        ),
    )
    assert torch.equal(parts[0].output_bias, parts[1].output_bias)
    assert_near(parts[0].output_bias, whole.output_bias, 1e-8)
