"""Sequences of random token ids."""

import torch

from optimum_dern.data.made.random_tokens import random_sequences


def test_every_other_id_is_as_likely():
    """Counts of 20,000 draws from eight ids are within five standard deviations of the mean; the rest is not drawn."""
    drawn = torch.stack(random_sequences(100, 200, 10, {3, 7, 99}, seed=0))
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert counts[[3, 7]].tolist() == [0, 0]
    others = counts[[0, 1, 2, 4, 5, 6, 8, 9]].double()
    assert (others - 2500).abs().max() < 5 * (20_000 / 8 * 7 / 8) ** 0.5


def test_the_seed_decides_and_the_global_state_stays():
    """The same seed gives the same, another one something else."""
    state = torch.get_rng_state()
    first, again, other = (torch.stack(random_sequences(3, 20, 50, (), seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_bos_comes_first():
    """Once, where there is one."""
    for ids in random_sequences(4, 30, 50, {5}, seed=0, bos=5):
        assert len(ids) == 30 and (ids == 5).nonzero().tolist() == [[0]]
