"""How long sequences may be, under whatever name a family's config has it."""

import pytest
from tiny import make_config
from transformers import AutoConfig, PreTrainedConfig

from optimum_dern.models.context_length import bounded_length, context_length


@pytest.mark.parametrize("key", ["n_positions", "n_ctx", "max_seq_len", "seq_length", "model_max_length"])
def test_every_name(key):
    """Of configs that transformers does not know, too."""
    assert context_length(PreTrainedConfig(**{key: 48})) == 48
    assert context_length(PreTrainedConfig(text_config=PreTrainedConfig(**{key: 48}))) == 48


def test_families():
    """A key of its own (DBRX), a text model inside (Llama 4), and the plain case."""
    assert context_length(make_config("mixtral", max_position_embeddings=96)) == 96
    assert context_length(AutoConfig.for_model("dbrx", max_seq_len=96)) == 96
    nested = AutoConfig.for_model("llama4", text_config={"max_position_embeddings": 96})
    assert context_length(nested) == 96


def test_sliding_windows_do_not_count():
    """They limit what a layer sees, not the text."""
    assert context_length(make_config("mixtral", max_position_embeddings=96, sliding_window=16)) == 96
    assert context_length(PreTrainedConfig(sliding_window=16, attention_window=16)) is None


def test_bounds():
    """The shorter of the two; any length where the config says nothing."""
    config = make_config("mixtral", max_position_embeddings=96)
    assert (bounded_length(config, 2048), bounded_length(config, 32)) == (96, 32)
    assert bounded_length(PreTrainedConfig(), 5000) == 5000
    assert context_length(PreTrainedConfig(n_positions=None, max_seq_len=-1)) is None
