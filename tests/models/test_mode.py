"""Evaluation mode for a while."""

import pytest
import torch

from optimum_dern.models.mode import evaluation_mode


@pytest.mark.parametrize("fails", [True, False])
def test_every_module_gets_its_own_mode_back(fails):
    """A frozen part of a model in training stays frozen, also after an error."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [module.training for module in model.modules()] == before == [True, True, False, False, False]
