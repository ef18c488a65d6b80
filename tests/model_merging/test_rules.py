"""Rules of merging, written out entry by entry."""

import pytest
import torch

from optimum_dern.model_merging.rules import dare, task_arithmetic, ties


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    base, *taus = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    return base, taus


def test_task_arithmetic():
    base, taus = tensors()
    for i in range(5):
        for j in range(3):
            expected = base[i, j].item() + 0.3 * sum(tau[i, j].item() for tau in taus)
            assert task_arithmetic(base, taus, 0.3)[i, j].item() == pytest.approx(expected)


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ties(density, seed):
    base, taus = tensors(seed)
    count = max(1, round(density * 15))
    trimmed = []
    for tau in taus:
        values = tau.flatten().tolist()
        kept = sorted(range(15), key=lambda i: -abs(values[i]))[:count]
        trimmed.append([v if i in kept else 0.0 for i, v in enumerate(values)])
    merged = ties(base, taus, 0.7, density).flatten().tolist()
    for i, start in enumerate(base.flatten().tolist()):
        total = sum(values[i] for values in trimmed)
        sign = (total > 0) - (total < 0)
        agreeing = [values[i] for values in trimmed if values[i] * sign > 0]
        expected = start + 0.7 * (sum(agreeing) / len(agreeing) if agreeing else 0.0)
        assert merged[i] == pytest.approx(expected)


def test_dare_with_its_masks():
    base, taus = tensors()
    masks = torch.Generator().manual_seed(3)
    expected = base.clone()
    for tau in taus:
        kept = torch.rand(5, 3, generator=masks) < 0.4
        for i in range(5):
            for j in range(3):
                if kept[i, j]:
                    expected[i, j] += 0.5 * tau[i, j] / 0.4
    torch.testing.assert_close(dare(base, taus, 0.5, 0.4, torch.Generator().manual_seed(3)), expected)
    everything = dare(base, taus, 0.5, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(everything, task_arithmetic(base, taus, 0.5))
