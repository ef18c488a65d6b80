"""Slots of each expert in several batches of tokens, against a loop over them."""

import torch
from samples import activation, make_routing, make_segments

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.layer.slots import slots_by_expert


def test_slots_of_every_batch_and_expert():
    """All of them, ascending, also of batches without tokens and experts that none of them chooses."""
    index = torch.tensor([[3, 0], [0, 1], [3, 1], [1, 0], [0, 3]])
    batches = [index[:3], index[:0], index[3:]]
    for batch, found in zip(batches, slots_by_expert(batches, 5), strict=True):
        flat = batch.flatten().tolist()
        assert [slots.tolist() for slots in found] == [[i for i, e in enumerate(flat) if e == n] for n in range(5)]


def test_chunks_are_the_tokens_in_order_with_their_slots():
    """Experts compute of each chunk what they do of its tokens; slots of other tokens are not handed on."""
    segments, routing = make_segments("gated"), make_routing(tokens=11)
    chunks = [*routing.chunks(4, len(segments.up))]
    assert [len(chunk.index) for chunk in chunks] == [4, 4, 3] and all(chunk.slots for chunk in chunks)
    for chunk, rows in zip(chunks, torch.arange(11).split(4), strict=True):
        found, expected = (routed_output(segments, part, activation) for part in (chunk, routing.select(rows)))
        assert torch.equal(found, expected)
    assert chunks[0].select(slice(2)).slots is None
    assert [*routing.chunks(11, len(segments.up))] == [routing]
