"""Slow reference implementations of the merging methods: numpy float64, plain loops, no code of the package.

An expert is one matrix, a row gate|up|down for each neuron; permutations are found by trying them all.
"""

from itertools import permutations

import numpy as np
from reference import reference_expert_output, reference_neurons
from samples import scalar_activation
from scipy.cluster.hierarchy import cut_tree, linkage


class Layer:
    """A layer's experts, with their activations and outputs on every token, and the router's logits."""

    def __init__(self, segments, hidden, rows=None):
        act, bias = scalar_activation(segments), segments.output_bias
        experts = range(len(segments.up))
        self.matrices = [
            np.concatenate([part[e].numpy() for part in segments[:3] if part is not None], 1) for e in experts
        ]
        self.inputs = [
            np.concatenate([part[e].numpy().ravel() for part in segments[:2] if part is not None]) for e in experts
        ]
        self.biases = [None if bias is None else bias[e].numpy() for e in experts]
        self.neurons = [
            np.array([reference_neurons(*segments[:2], e, x, act, segments.biased) for x in hidden]) for e in experts
        ]
        self.outputs = [
            np.array([reference_expert_output(*segments[:3], e, x, act, bias, segments.biased) for x in hidden])
            for e in experts
        ]
        self.logits = None if rows is None else hidden.numpy() @ rows.numpy().T

    def means(self):
        return np.array([output.mean(0) for output in self.outputs])


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def cheapest(cost):
    """Find the permutation of least cost by brute force."""
    return min(permutations(range(len(cost))), key=lambda p: sum(cost[i][j] for i, j in enumerate(p)))


def merged(layer, owner, weights, cost=None):
    """Average the matrices and output biases of each group with weights, sorted by representative."""
    result = {}
    for representative in sorted(set(owner)):
        members = [e for e, o in enumerate(owner) if o == representative]
        share = np.array([weights[e] for e in members], dtype=float)
        share = share / share.sum() if share.sum() > 0 else np.full(len(members), 1 / len(members))
        total, bias = 0.0, 0.0
        for member, w in zip(members, share, strict=True):
            aligned = cost is not None and member != representative
            order = list(cheapest(cost(representative, member))) if aligned else slice(None)
            total = total + w * layer.matrices[member][order]
            bias = None if layer.biases[member] is None else bias + w * layer.biases[member]
        result[representative] = total, bias
    return result


def ream(layer, retained, saliency, capacity):
    """Merge by REAM; returns the representative of each expert, and the merged experts."""
    least = min(0.5, min(s for s in saliency if s > 0))
    saliency = [s if s > 0 else least for s in saliency]
    experts = range(len(layer.outputs))
    probability = np.exp(layer.logits) / np.exp(layer.logits).sum(1, keepdims=True)
    v = [(probability[:, e, None] * layer.outputs[e]).mean(0) for e in experts]
    z = unit(layer.logits.T)
    distance = np.array([[np.linalg.norm(z[i] - z[j]) for j in experts] for i in experts])
    gate = 1 - distance / distance.max()
    similarity = [[((cosine(v[i], v[j]) + 1) / 2 + gate[i, j]) / 2 for j in experts] for i in experts]
    owner = {r: r for r in retained}
    for r in sorted(retained, key=lambda r: -saliency[r]):
        for e in sorted(experts, key=lambda e: -similarity[r][e]):
            if e not in owner and list(owner.values()).count(r) < capacity:
                owner[e] = r
    owner = [owner[e] for e in experts]

    def cost(a, b):
        pairs = [
            (unit(layer.neurons[a].T), unit(layer.neurons[b].T)),
            (unit(layer.matrices[a]), unit(layer.matrices[b])),
        ]
        return sum(np.linalg.norm(x[:, None] - y[None], axis=2) for x, y in pairs)

    return owner, merged(layer, owner, saliency, cost)


def m_smoe(layer, retained, frequency):
    """Merge by M-SMoE; returns the representative of each expert, and the merged experts."""
    z = layer.logits.T
    owner = [e if e in retained else max(retained, key=lambda r: cosine(z[e], z[r])) for e in range(len(z))]
    return owner, merged(layer, owner, frequency, lambda a, b: -(layer.matrices[a] @ layer.matrices[b].T))


def hc_smoe(layer, count, frequency, scores):
    """Merge by HC-SMoE; returns the representative of each expert, and the merged experts."""
    label = cut_tree(linkage(layer.means(), method="average"), n_clusters=count).ravel()
    owner = [max((e for e in range(len(label)) if label[e] == c), key=lambda e: scores[e]) for c in label]
    return owner, merged(layer, owner, frequency)


def mergemoe(layer, retained, frequency, segments, hidden, ridge):
    """Merge by MergeMoE; returns the representative of each expert, and the merged experts."""
    owner = [
        e if e in retained else max(retained, key=lambda r: cosine(layer.inputs[e], layer.inputs[r]))
        for e in range(len(layer.inputs))
    ]
    result = merged(layer, owner, frequency)
    inputs, gated = segments.up.shape[-1], segments.gate is not None
    for representative, (matrix, bias) in result.items():
        members = [e for e, o in enumerate(owner) if o == representative]
        if len(members) == 1:
            continue
        gate, up = (matrix[:, :inputs], matrix[:, inputs : 2 * inputs]) if gated else (None, matrix[:, :inputs])
        down = matrix[:, (1 + gated) * inputs :]
        arguments = None if gate is None else [gate.tolist()], [up.tolist()], 0
        act = scalar_activation(segments)
        p = np.array([reference_neurons(*arguments, x, act, segments.biased) for x in hidden])
        share = np.array([frequency[e] for e in members], dtype=float)
        share = share / share.sum() if share.sum() > 0 else np.full(len(members), 1 / len(members))
        q = sum(w * layer.outputs[e] for w, e in zip(share, members, strict=True)) - (0 if bias is None else bias)
        penalty = np.sqrt(ridge * (p**2).sum() / p.shape[1])
        rows, right = np.vstack([p, penalty * np.eye(p.shape[1])]), np.vstack([q, penalty * down])
        result[representative] = (
            np.concatenate([matrix[:, : -down.shape[1]], np.linalg.lstsq(rows, right)[0]], 1),
            bias,
        )
    return owner, result


def union_svd(matrices, weights):
    """Merge matrices by the equations of Sub-MoE: U S V^T with the V of the union decomposition averaged."""
    share = np.array(weights, dtype=float)
    share = share / share.sum() if share.sum() > 0 else np.full(len(matrices), 1 / len(matrices))
    u, s, vt = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    parts = np.split(vt, len(matrices), axis=1)
    return u @ np.diag(s) @ sum(w * part for w, part in zip(share, parts, strict=True))
