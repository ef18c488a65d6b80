"""Task-conditioned expected selection, written out token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dern.patterns.scores import selection_scores


@given(st.integers(0, 50), st.integers(1, 4), st.sampled_from([None, 0.3, 0.6]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_against_a_loop(seed, top, confidence):
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = [0.0] * 5
    for row in logits.tolist():
        total = sum(math.exp(z) for z in row)
        if confidence is not None and max(math.exp(z) / total for z in row) < confidence:
            continue
        for expert in sorted(range(5), key=lambda e: -row[e])[:top]:
            expected[expert] += row[expert]
    assert selection_scores(logits, top, confidence).tolist() == pytest.approx(expected)
