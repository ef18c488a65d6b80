"""Methods that recombine segments by other rules than the paper's, for `ablations.py`; registered on import.

A segment's function does not change with (u, d) -> (-u, -d), nor with (u, d) -> (a u, d / a); the paper's vectors do.

`kmeans, canonical`      the paper's clustering around the expert's own neurons, after scaling every segment to
                         |u| = |d| and flipping the sign of dropped ones towards their nearest retained one
`function space`         nearest by E[h_a h_b] / sqrt(E[h_a^2] E[h_b^2]) * cos(d_a, d_b), the cosine of two neurons'
                         outputs over the tokens; averaged with that neuron, weighted by energy
`choose`                 a retained expert keeps the f segments of most energy among its own and those moved to it
`choose, function space` the same, with segments moved by the cosine of their outputs
`choose, routed together`  the same among all segments, with the energy on the tokens routed to the retained expert

The energy of a segment is the sum of (g h)^2 |d|^2 over the tokens routed to its expert, except held-out tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from optimum_dern import DernConfig
from optimum_dern.core.dern.clustering import equalised_means
from optimum_dern.core.dern.recombination import recombine_layer
from optimum_dern.core.layer.mixture import expert_batches
from optimum_dern.core.layer.observation import ObservedLayer
from optimum_dern.core.layer.segments import Segments, similarity_vectors
from optimum_dern.core.merging.all_experts import activation_cosines, sample_tokens
from optimum_dern.methods import Candidate, LayerProblem, register_method


Rule = Callable[[LayerProblem, DernConfig], Segments]


def experiment(name: str) -> Callable[[Rule], Rule]:
    """Make a decorator that registers a rule as a method with two candidates: plain pruning, and the rule's result."""

    def register(rule: Rule) -> Rule:
        class Experiment:
            def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
                pruned = problem.layer.segments.select(problem.retained)
                return {"pruned": Candidate(pruned), "recombined": Candidate(rule(problem, config))}

        register_method(name)(Experiment)
        return rule

    return register


@experiment("kmeans, canonical")
def canonical(problem: LayerProblem, config: DernConfig) -> Segments:
    """Recombine as the package does, with the free scale and sign of every segment fixed first."""
    segments, retained = balanced(problem.layer.segments), problem.retained
    vectors = similarity_vectors(segments, (0, 1, 1))  # (E, f, D)
    cosine = vectors.flatten(0, 1) @ vectors[retained].flatten(0, 1).T  # (E f, N f)
    turned = (-cosine.amin(1) > cosine.amax(1)).view(segments.up.shape[:2])  # (E, f)
    turned[retained] = False
    sign = 1 - 2 * turned.to(segments.up).unsqueeze(-1)  # (E, f, 1)
    segments = segments._replace(up=segments.up * sign, down=segments.down * sign)
    options = {"threshold": config.similarity_threshold, "init": config.cluster_init, "seed": config.seed}
    return recombine_layer(segments, retained, problem.scores, **options).segments


@experiment("function space")
def in_function_space(problem: LayerProblem, config: DernConfig) -> Segments:
    """Average dropped segments into the retained neuron with the most similar output."""
    layer, retained = problem.layer, problem.retained
    segments, result = balanced(layer.segments), balanced(layer.segments.select(retained))
    energy, width = energies(layer), segments.up.shape[1]
    source, neuron, cosine, place, sign = nearest_outputs(layer, retained)
    for position, expert in enumerate(retained.tolist()):
        moved = (place // width == position) & (cosine > config.similarity_threshold)
        own = segments.concatenated(expert)  # (f, D)
        received = join(segments, source[moved], neuron[moved], sign[moved])  # (m, D)
        pool = torch.cat([own, received])
        labels = torch.cat([torch.arange(width), place[moved] % width])
        weights = torch.cat([energy[expert], energy[source[moved], neuron[moved]]])
        write(result, position, equalised_means(normalize(pool, dim=1), pool.norm(dim=1), weights, labels, own))
    return result


@experiment("choose")
def choose(problem: LayerProblem, config: DernConfig) -> Segments:
    """Keep the f segments of most energy among a retained expert's own and those that DERN moves to it."""
    segments, retained = problem.layer.segments, problem.retained
    options = {"threshold": config.similarity_threshold, "iterations": 1}
    destination = recombine_layer(segments, retained, problem.scores, **options).destination  # (E - N, f)
    position, neuron = torch.where(destination >= 0)
    source = dropped_experts(segments, retained)[position]
    return best_of_pools(problem, source, neuron, destination[position, neuron])


@experiment("choose, function space")
def choose_in_function_space(problem: LayerProblem, config: DernConfig) -> Segments:
    """Keep segments as `choose` does, with segments moved by the cosine of their outputs."""
    source, neuron, cosine, place, _ = nearest_outputs(problem.layer, problem.retained)
    moved, width = cosine > config.similarity_threshold, problem.layer.segments.up.shape[1]
    return best_of_pools(problem, source[moved], neuron[moved], place[moved] // width)


@experiment("choose, routed together")
def choose_routed_together(problem: LayerProblem, config: DernConfig) -> Segments:
    """Keep, for each retained expert, the f of all segments with most energy on the tokens routed to it."""
    layer, width = problem.layer, problem.layer.segments.up.shape[1]
    result = layer.segments.select(problem.retained)
    for position, expert in enumerate(problem.retained.tolist()):
        energy = energies(layer, (layer.routing.index == expert).any(1))
        source, neuron = torch.where(torch.ones_like(energy, dtype=torch.bool))
        chosen = energy[source, neuron].topk(width).indices
        write(result, position, join(layer.segments, source[chosen], neuron[chosen]))
    return result


def best_of_pools(problem: LayerProblem, source: Tensor, neuron: Tensor, destination: Tensor) -> Segments:
    """Build each retained expert from the f segments of most energy among its own and those moved to it."""
    segments, energy = problem.layer.segments, energies(problem.layer)
    result, width = segments.select(problem.retained), segments.up.shape[1]
    for position, expert in enumerate(problem.retained.tolist()):
        moved = destination == position
        sources = torch.cat([source.new_full((width,), expert), source[moved]])
        neurons = torch.cat([torch.arange(width), neuron[moved]])
        chosen = energy[sources, neurons].topk(width).indices
        write(result, position, join(segments, sources[chosen], neurons[chosen]))
    return result


def energies(layer: ObservedLayer, among: Tensor | None = None) -> Tensor:
    """Compute every segment's energy (E, f): sum of (g h)^2 |d|^2 over its expert's tokens, or those marked (T,)."""
    fitted = ~layer.held_out if among is None else among & ~layer.held_out
    total = layer.segments.up.new_zeros(layer.segments.up.shape[:2], dtype=torch.float64)
    for batch in expert_batches(layer.segments, layer.routing.select(fitted), layer.activation):
        total[batch.expert] += (batch.weight * batch.neurons).square().sum(0).double()
    return (total * layer.segments.down.double().square().sum(-1)).to(layer.segments.compute_dtype)


def nearest_outputs(layer: ObservedLayer, retained: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find each dropped segment's nearest retained one; returns expert, neuron, cosine, position (of N f) and sign."""
    hidden, directions = sample_tokens(layer), normalize(layer.segments.down.double(), dim=-1)
    found = []
    for expert in dropped_experts(layer.segments, retained).tolist():
        neurons = torch.cat([activation_cosines(layer, hidden, expert, other) for other in retained.tolist()], 1)
        cosine = neurons * (directions[expert] @ directions[retained].flatten(0, 1).T)  # (f, N f)
        best, place = cosine.max(1)
        sign = neurons.gather(1, place.unsqueeze(1)).squeeze(1).sign()
        numbers = torch.arange(len(best))
        found.append((torch.full_like(numbers, expert), numbers, best, place, sign.to(hidden)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def dropped_experts(segments: Segments, retained: Tensor) -> Tensor:
    """Return the indices of the dropped experts, (E - N,), ascending."""
    dropped = torch.ones(len(segments.up), dtype=torch.bool)
    dropped[retained] = False
    return dropped.nonzero().squeeze(1)


def balanced(segments: Segments) -> Segments:
    """Rescale every segment to |u| = |d| without changing its function."""
    scale = (segments.down.norm(dim=-1, keepdim=True) / segments.up.norm(dim=-1, keepdim=True)).sqrt()
    return segments._replace(up=segments.up * scale, down=segments.down / scale)


def join(segments: Segments, source: Tensor, neuron: Tensor, sign: Tensor | None = None) -> Tensor:
    """Join segments into rows gate|up|down, (n, D), with up and down multiplied by a sign (n,)."""
    sign = 1 if sign is None else sign.unsqueeze(1)
    gate, up, down = (part[source, neuron] for part in segments[:3])
    return torch.cat([gate, up * sign, down * sign], dim=1)


def write(segments: Segments, position: int, rows: Tensor) -> None:
    """Write rows gate|up|down (f, D) into the expert at a position."""
    for part, value in zip(segments[:3], segments.split(rows), strict=True):
        part[position] = value
