"""What is timed is what a user runs."""

import warnings

import pytest
import torch
from tiny import VOCABULARY, make_model

from optimum_dern.evaluation.compare import speed
from optimum_dern.evaluation.compare.speed import SpeedSettings, decode_seconds, prefill_seconds, random_prompt


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_decoding_hands_the_cache_on(family):
    """After the prompt, every step sees one token and all keys before it, and no argument is a deprecated one."""
    model, lengths = make_model(family), []

    def before(module, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        lengths.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))

    model.register_forward_pre_hook(before, with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        prompt = random_prompt(SpeedSettings(batch_size=2, prompt_length=6), VOCABULARY, "cpu")
        assert decode_seconds(model, prompt, 3) > 0
    assert lengths == [(6, 0), (1, 6), (1, 7), (1, 8)]


def test_all_devices_have_finished(monkeypatch):
    """Before each look at the clock, those of all layers are waited for, not that of the first alone."""
    devices, waited = [torch.device("cuda", 0), torch.device("cuda", 1)], []
    monkeypatch.setattr(speed, "devices_of", lambda model: devices)
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    model = make_model("mixtral")
    prompt = random_prompt(SpeedSettings(prompt_length=4), VOCABULARY, "cpu")
    prefill_seconds(model, prompt)
    decode_seconds(model, prompt, 1)
    assert waited == 4 * devices
