"""Equal masks and positions of micro-batches are one tensor; unequal ones stay apart."""

import torch
from families import make_model as make_family
from tiny import padded_batch, random_tokens

from optimum_dern.engine.walk import sharing
from optimum_dern.engine.walk.calls import record_layer_calls
from optimum_dern.engine.walk.sharing import SharedTensors
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers


def masks_of(model, batches):
    """Per micro-batch, the attention mask that each layer gets."""
    calls = record_layer_calls(model, find_decoder_layers(model, find_moe_layers(model)[0])[1], batches)
    return [[layer[batch].kwargs["attention_mask"] for layer in calls] for batch in range(len(batches))]


def test_sequences_of_one_length_share_their_masks():
    """Eager attention makes a mask for every micro-batch: a sequence without padding needs no other than the first."""
    model = make_family("gpt_oss")  # which has no other attention than eager on a CPU
    model.set_attn_implementation("eager")
    whole = [
        {"input_ids": row["input_ids"][None], "attention_mask": torch.ones(1, 24).long()} for row in random_tokens(3)
    ]
    first, second, third = masks_of(model, whole)
    assert all(mask.shape[-2:] == (24, 24) for mask in first)
    assert [id(mask) for mask in first] == [id(mask) for mask in second] == [id(mask) for mask in third]


def test_padding_makes_a_mask_of_its_own():
    """What each micro-batch gets is equal to what it gets alone."""
    model = make_family("gpt_oss")
    model.set_attn_implementation("eager")
    batches = [
        padded_batch([5, 12, 9], "left", 0),
        padded_batch([12, 7, 3], "left", 1),
        padded_batch([5, 12, 9], "left", 2),
    ]
    together = masks_of(model, batches)
    for batch, masks in zip(batches, together, strict=True):
        (alone,) = masks_of(model, [batch])
        assert all(torch.equal(a, b) for a, b in zip(masks, alone, strict=True))
    assert together[0][0] is together[2][0] and together[0][0] is not together[1][0]


def test_what_differs_is_kept():
    """In value, in dtype, in shape; tensors in tuples are shared, and what is no tensor stays."""
    shared, first = SharedTensors(), torch.tensor([0.0, 1.0], dtype=torch.bfloat16)
    assert shared.share(first) is first
    assert shared.share((first.clone(), None, "text"))[0] is first
    for other in (first + 1, first.float(), first.reshape(1, 2)):
        assert shared.share(other) is other
    assert shared.share(torch.tensor([-0.0, 1.0], dtype=torch.bfloat16)) is not first
    shared.next_batch()
    assert shared.share(torch.tensor([0.0, 1.0], dtype=torch.bfloat16)) is first


def test_equal_digests_are_not_enough(monkeypatch):
    """Unequal tensors of one digest stay apart: what counts is what they hold."""
    monkeypatch.setattr(sharing, "hash", lambda content: 7, raising=False)
    shared = SharedTensors()
    first, second = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])
    assert shared.share(first) is first and shared.share(second) is second
    assert shared.share(second.clone()) is second and shared.share(first.clone()) is first
    nan = torch.tensor([torch.nan])
    assert shared.share(nan) is shared.share(nan.clone()) is nan
