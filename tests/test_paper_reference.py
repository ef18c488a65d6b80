"""`preset="paper"` on the trained models of the repository, against DERN written out in numpy from the paper alone."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor


TINY = Path(__file__).parent.parent / "examples" / "tiny_moe"


def routing_weights(model, batches):
    """Per layer, the mean over all tokens of the renormalised top-k router weights: (layers, E)."""
    sums, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch, output_router_logits=True).router_logits
        layers = []
        for layer in logits:
            probability, index = layer.double().softmax(-1).topk(model.config.num_experts_per_tok)
            weight = probability / probability.sum(-1, keepdim=True)
            layers.append(torch.zeros_like(layer, dtype=torch.float64).scatter(1, index, weight).sum(0).numpy())
        sums, tokens = sums + np.stack(layers), tokens + batch["input_ids"].numel()
    return sums / tokens


def unit(rows):
    """Rows divided by their lengths."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def dern_layer(gate, up, down, score, keep, alpha):
    """One layer of DERN in float64, from gate, up (E, f, d) and down (E, f, o) to (N, f, gate|up|down)."""
    experts, width, _ = up.shape
    retained = sorted(sorted(range(experts), key=lambda i: (-score[i], i))[:keep])
    received = {r: [] for r in retained}
    ups, downs = unit(up), unit(down)
    for o in (i for i in range(experts) if i not in retained):
        for j in range(width):
            best = [np.max((ups[r] @ ups[o, j] + downs[r] @ downs[o, j]) / 2) for r in retained]
            if max(best) > alpha:
                received[retained[int(np.argmax(best))]].append((o, j))
    result = []
    for r in retained:
        own = [(r, j) for j in range(width)]
        pool = own + received[r]
        points = np.stack([np.concatenate([gate[i, j], up[i, j], down[i, j]]) for i, j in pool])
        if received[r]:
            weights = np.array([score[i] for i, _ in pool])
            response = np.array([np.abs(gate[i, j]).max() for i, j in pool])
            points = kmeans(points, weights, points[np.argsort(-response, kind="stable")[:width]])
        result.append(points)
    return retained, np.stack(result), sum(map(len, received.values()))


def kmeans(points, weights, centroids):
    """Weighted spherical k-means with norm equalisation (eq. 11)."""
    norms = np.linalg.norm(points, axis=1)
    for _ in range(30):
        labels = np.argmax(unit(points) @ unit(centroids).T, axis=1)
        new = centroids.copy()
        for c in range(len(centroids)):
            members = np.flatnonzero(labels == c)
            if len(members):
                equalised = points[members] * (norms[members].mean() / norms[members])[:, None]
                new[c] = weights[members] @ equalised / weights[members].sum()
        shift, before = np.linalg.norm(new - centroids), np.linalg.norm(centroids)
        centroids = new
        if shift <= 1e-4 * before:
            break
    return centroids


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 0.3])
@pytest.mark.parametrize("name", ["scratch", "upcycled"])
def test_paper_preset_equals_the_reference(name, alpha):
    """Retained experts, and every weight of every layer to 1e-5."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    model = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)
    text = (TINY / "text" / "calibration" / "news_wikinews_en.txt").read_text("utf-8")[:60_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    batches = [{"input_ids": row.unsqueeze(0)} for row in ids[: len(ids) // 256 * 256].view(-1, 256)[:32]]
    scores = routing_weights(model, batches)
    original = copy.deepcopy(model)

    compressor = DernCompressor(
        preset="paper", similarity_threshold=alpha, dataset=[b["input_ids"][0] for b in batches]
    )
    compressor.compress_model(model)

    moved = 0
    for layer, (before, after) in enumerate(zip(original.model.layers, model.model.layers, strict=True)):
        experts = before.mlp.experts
        fused = experts.gate_up_proj.detach().double().numpy()
        width = fused.shape[1] // 2
        gate, up = fused[:, :width], fused[:, width:]
        down = experts.down_proj.detach().double().numpy().transpose(0, 2, 1)
        retained, expected, count = dern_layer(gate, up, down, scores[layer], len(fused) // 2, alpha)
        moved += count

        assert compressor.report.layers[layer].retained == retained
        new = after.mlp.experts
        found = np.concatenate(
            [
                *np.split(new.gate_up_proj.detach().double().numpy(), 2, axis=1),
                new.down_proj.detach().double().numpy().transpose(0, 2, 1),
            ],
            axis=2,
        )
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(after.mlp.gate.weight, before.mlp.gate.weight[retained], rtol=0, atol=0)
    assert moved > 0
