"""The picture of a layer's experts: true cosines, bounded work, and counts of what moved."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from optimum_dern.core.layer.segments import Segments
from optimum_dern.core.pictures import segment_flow as flow_module
from optimum_dern.core.pictures import similarity_map as map_module
from optimum_dern.core.pictures.segment_flow import segment_flow
from optimum_dern.core.pictures.similarity_map import similarity_map


WEIGHTS = (0.0, 1.0, 1.0)


def random_segments(experts=5, width=12, size=8, gated=True, seed=0):
    """Experts that are noisy copies of one another, unevenly so."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.linspace(0.2, 2, experts)[:, None, None]

    def part():
        common = torch.randn(1, width, size, generator=generator)
        return common + noise * torch.randn(experts, width, size, generator=generator)

    return Segments(part() if gated else None, part(), part())


def percent(value):
    return pytest.approx(100 * float(value), abs=0.51)


@pytest.mark.parametrize("gated", [True, False])
def test_cosines_of_whole_experts(gated):
    """Of all weights of two experts as one vector, in the order of the pairs."""
    segments = random_segments(gated=gated)
    found = similarity_map(segments, WEIGHTS)
    flat = torch.cat([part.flatten(1) for part in segments[:3] if part is not None], dim=1)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    assert found["experts"] == list(range(5))
    assert found["cosines"] == [percent(cosine_similarity(flat[i], flat[j], dim=0)) for i, j in pairs]


def test_best_matches_of_neurons():
    """In the expert that is most alike as a whole; quantiles and histogram by a slow count."""
    segments = random_segments()
    found = similarity_map(segments, WEIGHTS)
    flat = torch.cat([part.flatten(1) for part in segments[:3]], dim=1)
    histogram = [0] * 20
    for i, (other, whole, *quantiles) in enumerate(found["nearest"]):
        cosines = {j: cosine_similarity(flat[i], flat[j], dim=0) for j in range(5) if j != i}
        assert other == max(cosines, key=cosines.get)
        assert whole == percent(cosines[other])
        best = []
        for neuron in range(12):
            both = [
                [cosine_similarity(part[i, neuron], part[other, match], dim=0) for match in range(12)]
                for part in (segments.up, segments.down)
            ]
            best.append(max((float(up) + float(down)) / 2 for up, down in zip(*both, strict=True)))
        assert quantiles == [percent(sorted(best)[rank]) for rank in (1, 6, 10)]
        for cosine in best:
            histogram[max(0, min(19, int(20 * cosine)))] += 1
    assert (found["histogram"], found["neurons"]) == (histogram, 12)


def test_twins():
    """Two experts that are one the other with its neurons shuffled: unlike as wholes, alike neuron by neuron."""
    first = random_segments(2, 16, seed=3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    twins = Segments(*(torch.stack([part[0], part[0][order]]) for part in first[:3]))
    found = similarity_map(twins, WEIGHTS)
    assert found["cosines"][0] < 50
    assert [row[2:] for row in found["nearest"]] == [[100] * 3] * 2


def test_large_layers_are_sampled(monkeypatch):
    """Bounds on experts, weights and products hold, and the same seed draws the same."""
    monkeypatch.setattr(map_module, "MAX_EXPERTS", 4)
    monkeypatch.setattr(map_module, "MAX_PRODUCTS", 4 * 12 * 24 * 3)
    monkeypatch.setattr(map_module, "MAX_ELEMENTS", 4 * 24 * 6)
    segments = random_segments(9)
    found = similarity_map(segments, WEIGHTS, seed=1)
    assert len(found["experts"]) == len(found["nearest"]) == 4 and len(found["cosines"]) == 6
    assert found["experts"] == sorted(set(found["experts"])) and {row[0] for row in found["nearest"]} <= set(
        found["experts"]
    )
    assert found["neurons"] == 3 and sum(found["histogram"]) == 12
    assert similarity_map(segments, WEIGHTS, seed=1) == found
    assert similarity_map(segments, WEIGHTS, seed=2)["experts"] != found["experts"]


def test_blocks_do_not_matter(monkeypatch):
    """However little is in memory at once, the map is the same."""
    segments = random_segments()
    expected = similarity_map(segments, WEIGHTS)
    monkeypatch.setattr(map_module, "BLOCK", 1)
    assert similarity_map(segments, WEIGHTS) == expected


def test_the_global_random_state_stays(monkeypatch):
    """Sampling has a generator of its own."""
    monkeypatch.setattr(map_module, "MAX_EXPERTS", 2)
    state = torch.get_rng_state()
    similarity_map(random_segments(), WEIGHTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_odd_layers():
    """An expert of zeros is like none; a single expert has nobody to be compared with; bfloat16 is as good."""
    segments = random_segments()
    segments.up[1], segments.down[1], segments.gate[1] = 0, 0, 0
    found = similarity_map(segments.to(torch.bfloat16), WEIGHTS)
    assert found["cosines"][0] == 0 and found["nearest"][1][1:] == [0, 0, 0, 0]
    assert similarity_map(segments.select(slice(0, 1)), WEIGHTS) is None


def test_flow():
    """Counts by expert: what left, what arrived, and between whom."""
    destination = torch.tensor([[0, 0, -1, 2], [-1, -1, -1, -1], [2, 2, 2, 0]])  # of experts 1, 2, 4
    found = segment_flow(destination, torch.tensor([0, 3, 5]))
    assert found == {
        "width": 4,
        "moved": [3, 0, 4],
        "received": [3, 0, 4],
        "links": [[1, 0, 2], [1, 5, 1], [4, 0, 1], [4, 5, 3]],
    }


def test_flow_is_bounded(monkeypatch):
    """Of many streams the largest are listed; the sums stay whole."""
    monkeypatch.setattr(flow_module, "MAX_LINKS", 2)
    found = segment_flow(torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([0, 1]))
    assert found["links"] == [[2, 1, 2], [3, 1, 3]]
    assert (found["moved"], found["received"]) == ([3, 3], [1, 5])


def test_nothing_dropped():
    """All experts stay: there is nobody to move from."""
    found = segment_flow(torch.empty(0, 4, dtype=torch.long), torch.tensor([0, 1]))
    assert (found["moved"], found["received"], found["links"]) == ([], [0, 0], [])
