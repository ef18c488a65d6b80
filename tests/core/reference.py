"""Slow reference implementation of DERN (arXiv 2509.10377): float64, plain loops, no code shared with the package.

Arguments are tensors (or nested lists).  `gate` (E, f, d) is None for experts without a gate, `up` is (E, f, d) and
`down` (E, f, o) neuron-major: its row j is column j of the down projection.  Where rows carry a bias, their last
column is that bias and `biased` is true.
"""

import math
from fractions import Fraction
from itertools import combinations

import torch


def silu(v):
    return v / (1 + math.exp(-v))


def relu_squared(v):
    return max(v, 0.0) ** 2


def _lists(value):
    return value.double().tolist() if isinstance(value, torch.Tensor) else value


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def _norm(a):
    return math.sqrt(_dot(a, a))


def _cosine(a, b):
    length = _norm(a) * _norm(b)
    return _dot(a, b) / length if length > 0 else 0.0


def reference_neurons(gate, up, expert, x, act, biased=False):
    """Compute h(x), the neuron activations of one expert for one token, a list of f numbers."""
    gate, up, x = _lists(gate), _lists(up), _lists(x) + ([1.0] if biased else [])
    if gate is None:
        return [act(_dot(row, x)) for row in up[expert]]
    return [act(_dot(g, x)) * _dot(u, x) for g, u in zip(gate[expert], up[expert], strict=True)]


def reference_expert_output(gate, up, down, expert, x, act, output_bias=None, biased=False):
    """Compute e(x), the output of one expert for one token, a list of o numbers."""
    down, h = _lists(down), reference_neurons(gate, up, expert, x, act, biased)
    e = [sum(h[j] * down[expert][j][k] for j in range(len(h))) for k in range(len(down[expert][0]))]
    return e if output_bias is None else [a + b for a, b in zip(e, _lists(output_bias)[expert], strict=True)]


def reference_layer_output(gate, up, down, hidden, index, weight, act, output_bias=None, biased=False):
    """Compute y(x), the layer's output for every token, (T, o)."""
    rows, weight = [], _lists(weight)
    for t, x in enumerate(_lists(hidden)):
        y = [0.0] * len(_lists(down)[0][0])
        for slot, expert in enumerate(index[t].tolist()):
            e = reference_expert_output(gate, up, down, expert, x, act, output_bias, biased)
            y = [a + weight[t][slot] * b for a, b in zip(y, e, strict=True)]
        rows.append(y)
    return torch.tensor(rows, dtype=torch.float64)


def reference_statistics(gate, up, down, hidden, index, weight, act, output_bias=None, biased=False):
    """Compute all statistics of a layer, by the names of `ExpertStatistics`."""
    experts, width, weight = len(up), down.shape[-1], _lists(weight)
    names = ("count", "weight", "output_norm", "output_norm_squared", "weighted_output_norm")
    sums = {name: [0.0] * experts for name in names}
    sums["output_sum"] = [[0.0] * width for _ in range(experts)]
    sums["coactivation"] = [[0.0] * experts for _ in range(experts)]
    sums["together"] = [[0.0] * experts for _ in range(experts)]
    sums["output_max"] = [0.0] * experts
    for t, x in enumerate(_lists(hidden)):
        contribution = {}
        for slot, i in enumerate(index[t].tolist()):
            g, e = weight[t][slot], reference_expert_output(gate, up, down, i, x, act, output_bias, biased)
            for name, value in zip(names, (1.0, g, _norm(e), _norm(e) ** 2, g * _norm(e)), strict=True):
                sums[name][i] += value
            sums["output_sum"][i] = [a + b for a, b in zip(sums["output_sum"][i], e, strict=True)]
            sums["output_max"][i] = max(sums["output_max"][i], *map(abs, e))
            contribution[i] = g * _norm(e)
        for i, a in contribution.items():
            for j, b in contribution.items():
                sums["coactivation"][i][j] += a * b
                sums["together"][i][j] += 1
    return {"tokens": len(hidden)} | {name: torch.tensor(v, dtype=torch.float64) for name, v in sums.items()}


def reference_saliency(criterion, sums):
    """Compute the experts' saliency as a list, from `reference_statistics`."""
    total, share_of = {
        "router": ("weight", "tokens"),
        "frequency": ("count", "tokens"),
        "ean": ("output_norm", None),
        "reap": ("weighted_output_norm", "count"),
        "man": ("output_norm", "count"),
        "msan": ("output_norm_squared", "count"),
    }[criterion]
    scores = []
    for i, n in enumerate(sums["count"].tolist()):
        divisor = {"tokens": sums["tokens"], "count": n, None: 1}[share_of]
        scores.append(sums[total][i].item() / divisor if n else 0.0)
    return scores


def reference_aimer(gate, up, down, biased=False):
    """Compute AIMER's score of every expert, 1 - mean |w| / root mean square w, without biases."""
    scores = []
    for expert in range(len(up)):
        rows = ([] if gate is None else _lists(gate[expert])) + _lists(up[expert])
        weights = [w for row in rows for w in (row[:-1] if biased else row)]
        weights += [w for row in _lists(down[expert]) for w in row]
        mean = sum(map(abs, weights)) / len(weights)
        scores.append(1 - mean / math.sqrt(_dot(weights, weights) / len(weights)))
    return scores


def reference_easy_ep(gate, up, down, hidden, index, weight, act, residual, output_bias=None, biased=False):
    """Compute EASY-EP's score of every expert, the sum over tokens of g |e| max(0, 1 - cos(h, h + y))."""
    scores, weight = [0.0] * len(up), _lists(weight)
    routed = reference_layer_output(gate, up, down, hidden, index, weight, act, output_bias, biased).tolist()
    for t, (x, h) in enumerate(zip(_lists(hidden), _lists(residual), strict=True)):
        turned = max(0.0, 1 - _cosine(h, [a + b for a, b in zip(h, routed[t], strict=True)]))
        for slot, i in enumerate(index[t].tolist()):
            e = reference_expert_output(gate, up, down, i, x, act, output_bias, biased)
            scores[i] += weight[t][slot] * _norm(e) * turned
    return scores


def reference_allowed_sets(experts, count, groups=1, protected=()):
    """List, by brute force, all sets of experts with equal numbers per group and all protected experts."""
    size = experts // groups
    for kept in combinations(range(experts), count):
        shares = [sum(i // size == group for i in kept) for group in range(groups)]
        if len(set(shares)) == 1 and set(protected) <= set(kept):
            yield list(kept)


def reference_hope_cost(sums, kept):
    """Compute HOPE's cost p^T F p of the experts that are not kept, from `reference_statistics`."""
    pruned = [i for i in range(len(sums["count"])) if i not in kept]
    cost = 0.0
    for i in pruned:
        for j in pruned:
            n = sums["together"][i][j].item()
            cost += sums["coactivation"][i][j].item() / n if n else 0.0
    return cost


def reference_route(
    logits, allowed, top_k, phi, over_all, scale, by="logit", bias=None, groups=1, topk_group=1, best=2
):
    """Route one token when only some experts may be chosen; returns the lists of experts and weights."""
    total = sum(math.exp(logits[i]) for i in allowed)
    compared = {
        "logit": lambda i: logits[i],
        "exp": lambda i: math.exp(logits[i]) / total,
        "sigmoid": lambda i: 1 / (1 + math.exp(-logits[i])),
    }[by]
    value = {i: compared(i) + (0 if bias is None else bias[i]) for i in allowed}
    size = len(logits) // groups
    judged = []
    for group in range(groups):
        members = sorted((value[i] for i in allowed if i // size == group), reverse=True)
        judged.append(sum(members[:best]))
    chosen_groups = sorted(range(groups), key=lambda group: -judged[group])[:topk_group]
    open_ = [i for i in allowed if i // size in chosen_groups]
    chosen = sorted(open_, key=lambda i: -value[i])[:top_k]
    mass = {i: math.exp(logits[i]) if phi == "exp" else 1 / (1 + math.exp(-logits[i])) for i in allowed}
    divisor = sum(mass[i] for i in (allowed if over_all else chosen))
    return chosen, [scale * mass[i] / divisor for i in chosen]


def reference_set_error(gate, up, down, hidden, logits, kept, act, route):
    """Compute |F - F_S| over all tokens, with F_S the output when the router may only choose experts of the set S."""
    total, everyone = 0.0, list(range(len(up)))
    for x, z in zip(_lists(hidden), _lists(logits), strict=True):
        difference = [0.0] * down.shape[-1]
        for sign, allowed in ((1.0, everyone), (-1.0, kept)):
            for i, g in zip(*route(z, allowed), strict=True):
                e = reference_expert_output(gate, up, down, i, x, act)
                difference = [a + sign * g * b for a, b in zip(difference, e, strict=True)]
        total += _dot(difference, difference)
    return math.sqrt(total)


def reference_elimination(error, experts, count, groups=1, protected=()):
    """Drop experts one by one, each time the one without which `error(kept)` is lowest, equally many per group."""
    kept, size = list(range(experts)), experts // groups
    while len(kept) > count:
        open_ = [i for i in kept if i not in protected and sum(j // size == i // size for j in kept) > count // groups]
        kept.remove(min(open_, key=lambda i: error([j for j in kept if j != i])))
    return kept


def reference_retained_count(experts, sparsity, groups=1, multiple_of=1):
    """Compute the smallest allowed count that drops at most the fraction `sparsity`, read as an exact decimal."""
    step = math.lcm(groups, multiple_of)
    needed = experts * (1 - Fraction(str(sparsity)))
    return min([c for c in range(step, experts + 1, step) if c >= needed] + [experts])


def reference_selection(scores, count, groups=1, protected=()):
    """Select the experts to keep, ascending."""
    chosen, size = [], len(scores) // groups
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        best_first = sorted(members, key=lambda i: (i not in protected, -scores[i], i))
        chosen += best_first[: count // groups]
    return sorted(chosen)


def reference_similarity(a, b, weights):
    """Compute the weighted mean of the cosines of two segments (gate, up, down); a missing gate does not count."""
    terms = [(w, _cosine(x, y)) for x, y, w in zip(a, b, weights, strict=True) if x is not None]
    return sum(w * c for w, c in terms) / sum(w for w, _ in terms)


def reference_assignment(gate, up, down, retained, alpha, weights=(0, 1, 1)):
    """Assign dropped segments: position in `retained` (or -1) and best similarity of each, two lists of lists."""
    gate, up, down = _lists(gate), _lists(up), _lists(down)

    def segment(expert, j):
        return None if gate is None else gate[expert][j], up[expert][j], down[expert][j]

    destination, similarity = [], []
    for dropped in (i for i in range(len(up)) if i not in retained):
        destination.append([])
        similarity.append([])
        for j in range(len(up[0])):
            best, where = -math.inf, -1
            for position, expert in enumerate(retained):
                for k in range(len(up[0])):
                    value = reference_similarity(segment(dropped, j), segment(expert, k), weights)
                    if value > best:
                        best, where = value, position
            destination[-1].append(where if best > alpha else -1)
            similarity[-1].append(best)
    return destination, similarity


def reference_kmeans(points, weights, centroids, iterations=30, tolerance=1e-4):
    """Run weighted spherical k-means with equalised norms; returns centroids and labels as lists."""
    labels = [0] * len(points)
    for _ in range(iterations):
        for p, point in enumerate(points):
            cosines = [_cosine(point, c) for c in centroids]
            labels[p] = cosines.index(max(cosines))
        updated = []
        for c, old in enumerate(centroids):
            members = [p for p, label in enumerate(labels) if label == c]
            if not members:
                updated.append(old)
                continue
            mean_norm = sum(_norm(points[p]) for p in members) / len(members)
            w = [weights[p] for p in members] if sum(weights[p] for p in members) > 0 else [1.0] * len(members)
            scaled = [[v * mean_norm / (_norm(points[p]) or 1.0) for v in points[p]] for p in members]
            columns = zip(*scaled, strict=True)
            updated.append([_dot(w, column) / sum(w) for column in columns])
        flat, before = [v for c in updated for v in c], [v for c in centroids for v in c]
        shift = _norm([a - b for a, b in zip(flat, before, strict=True)])
        centroids = updated
        if shift <= tolerance * _norm(before):
            break
    return centroids, labels


def reference_dern_layer(
    gate,
    up,
    down,
    retained,
    saliency,
    alpha,
    weights=(0, 1, 1),
    init="gate",
    iterations=30,
    tolerance=1e-4,
    importance_weighting=True,
    neurons=None,
):
    """Recombine one layer; returns gate (or None), up and down of the retained experts, and segments' destinations.

    `down` is neuron-major (E, f, o).  The destination (E - N, f) is a position in `retained`, or -1.
    """
    retained, saliency = list(map(int, retained)), _lists(saliency)
    destination, _ = reference_assignment(gate, up, down, retained, alpha, weights)
    gate, up, down = _lists(gate), _lists(up), _lists(down)
    dropped = [i for i in range(len(up)) if i not in retained]
    f, d = len(up[0]), len(up[0][0])
    cut = 0 if gate is None else d
    result = []
    for position, expert in enumerate(retained):
        members = [(expert, j) for j in range(f)]
        members += [
            (o, j) for o, row in zip(dropped, destination, strict=True) for j in range(f) if row[j] == position
        ]
        pool = [([] if gate is None else gate[i][j]) + up[i][j] + down[i][j] for i, j in members]
        if len(members) > f:
            response = [max(abs(v) for v in point[:d]) for point in pool]
            by_response = sorted(range(len(pool)), key=lambda p: (-response[p], p))
            start = [pool[p] for p in (by_response[:f] if init == "gate" else range(f))]
            weigh = (lambda i, j: saliency[i]) if neurons is None else (lambda i, j: neurons[i][j].item())
            mass = [weigh(i, j) if importance_weighting else 1.0 for i, j in members]
            pool, _ = reference_kmeans(pool, mass, start, iterations, tolerance)
        result.append(pool)
    table = torch.tensor(result, dtype=torch.float64)  # (N, f, D)
    new_gate = None if gate is None else table[..., :d]
    return (
        new_gate,
        table[..., cut : cut + d],
        table[..., cut + d :],
        torch.tensor(destination, dtype=torch.int64).reshape(-1, f),
    )


def reference_router_rows(rows, retained, destination):
    """Compute router rows: G_r plus n / f times the row of every dropped expert with n of f segments moved to r."""
    rows, retained, destination = _lists(rows), list(map(int, retained)), [list(map(int, d)) for d in destination]
    dropped = [i for i in range(len(rows)) if i not in retained]
    result = []
    for position, r in enumerate(retained):
        row = list(rows[r])
        for o, targets in zip(dropped, destination, strict=True):
            row = [a + targets.count(position) / len(targets) * b for a, b in zip(row, rows[o], strict=True)]
        result.append(row)
    return torch.tensor(result, dtype=torch.float64)


def reference_features(gate, up, hidden, index, weight, act, biased=False):
    """Compute the weighted activations g h of every token and expert, zero where it was not chosen: (T, N, f)."""
    features = torch.zeros(len(hidden), len(up), up.shape[1], dtype=torch.float64)
    for t, x in enumerate(_lists(hidden)):
        for slot, i in enumerate(index[t].tolist()):
            h = torch.tensor(reference_neurons(gate, up, i, x, act, biased), dtype=torch.float64)
            features[t, i] += weight[t, slot].double() * h
    return features


def reference_penalties(features, ridge):
    """Compute the ridge penalty lambda of every expert, ridge tr(A) / f."""
    return [ridge * sum(_dot(h, h) for h in column.tolist()) / features.shape[2] for column in features.unbind(1)]


def reference_refit(features, down, target, ridge, sweeps):
    """Refit `down` (N, f, o) by block-coordinate ridge regression to `target` (T, o) without output biases."""
    new, lam = down.clone(), reference_penalties(features, ridge)
    for _ in range(sweeps):
        for i in range(len(down)):
            if lam[i] == 0:
                continue
            gram = lam[i] * torch.eye(down.shape[1], dtype=torch.float64)
            gradient = -lam[i] * (new[i] - down[i])
            for t in range(len(target)):
                r = target[t] - sum(features[t, k] @ new[k] for k in range(len(down)))
                gram += torch.outer(features[t, i], features[t, i])
                gradient += torch.outer(features[t, i], r)
            new[i] += torch.linalg.inv(gram) @ gradient
    return new


def reference_joint_refit(features, down, target, ridge):
    """Refit all experts at once, by one linear system of N f unknowns per output column."""
    flat, start = features.flatten(1), down.flatten(0, 1)  # (T, N f), (N f, o)
    penalty = torch.tensor(reference_penalties(features, ridge), dtype=torch.float64).repeat_interleave(down.shape[1])
    system = flat.T @ flat + torch.diag(penalty)
    return torch.linalg.solve(system, flat.T @ target + penalty[:, None] * start).view_as(down)


def reference_objective(features, down, start, target, ridge):
    """Compute the penalised squared error that the refit minimises."""
    error = (target - torch.einsum("tnf,nfo->to", features, down)).square().sum()
    lam = reference_penalties(features, ridge)
    return (error + sum(p * (a - b).square().sum() for p, a, b in zip(lam, down, start, strict=True))).item()
