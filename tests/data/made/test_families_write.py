"""Every family of models writes calibration text."""

import pytest
import torch
from families import FAMILIES, make_model, runnable

from optimum_dern.engine.run.own_text import write_own_text
from optimum_dern.models.refusals import WRITES_NOTHING


@pytest.mark.parametrize("family", runnable(FAMILIES))
def test_a_family_writes(family):
    """Whole sequences of ids in its vocabulary, or a refusal with the reason."""
    model = make_model(family)
    if model.config.model_type in WRITES_NOTHING:
        with pytest.raises(ValueError, match="does not write calibration text: .*; give a dataset"):
            write_own_text(model, None, 2, 6, 0)
        return
    written = torch.stack(write_own_text(model, None, 2, 6, 0))
    assert written.shape == (2, 6)
    assert 0 <= written.min() and written.max() < model.get_input_embeddings().weight.shape[0]
