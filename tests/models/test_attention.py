"""What attention demands of sequences that run together."""

import pytest
import torch
from families import FAMILIES, make_model, runnable
from tiny import random_tokens
from transformers import AutoModelForCausalLM, MixtralConfig

from optimum_dern.data.batches import load_batches
from optimum_dern.models.attention import attention_scores, heeds_padding
from optimum_dern.models.refusals import WRITES_NOTHING


ROWS = [random_tokens(1, length, seed)[0]["input_ids"] for seed, length in enumerate((4, 15, 15, 21))]


@torch.no_grad()
def deviation(model, rows):
    """The largest relative change of a sequence's logits by those that run with it."""
    (batch,) = load_batches(rows, None, batch_size=len(rows))
    together = model(**batch, use_cache=False).logits
    changes = []
    for ids, logits, mask in zip(rows, together, batch["attention_mask"].bool(), strict=True):
        alone = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        changes.append(((logits[mask] - alone).norm() / alone.norm()).item())
    return max(changes)


@pytest.mark.parametrize("family", runnable(name for name in FAMILIES if name not in WRITES_NOTHING))
def test_sequences_do_not_heed_those_beside_them(family):
    """In batches of one length nowhere, and among padding only where `heeds_padding` says so."""
    model = make_model(family)
    assert deviation(model, ROWS[1:3]) <= 1e-5
    assert heeds_padding(model.config) or deviation(model, ROWS) <= 1e-5


@pytest.mark.parametrize("family", ["glm_moe_dsa", "glm5_next", "axk2", "hy_v4"])
def test_sparse_attention_heeds_padding(family):
    """These change by percents."""
    model = make_model(family)
    assert heeds_padding(model.config) and deviation(model, ROWS) > 1e-3


@pytest.mark.parametrize(("implementation", "expected"), [("eager", 8 * 100), ("sdpa", 0)])
def test_attention_scores(implementation, expected):
    """Eager attention has one for each head and token; others never hold them."""
    config = MixtralConfig(num_attention_heads=8, hidden_size=64, num_hidden_layers=1, intermediate_size=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    assert attention_scores(model.config, 100) == expected
