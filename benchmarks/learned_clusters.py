"""Method `learned clusters`: recombination as in DERN, with how much of every source is taken learned by gradient.

A dropped segment moves as in DERN, to the retained expert p and there to the own neuron that it is most similar to.
With m_ps the means of what comes from dropped expert s, and w_p the own neurons,

    w'_p = w_p + sum_s sigmoid(c_ps) (m_ps - w_p)        where anything has come, else w_p

and the coefficients c_ps minimise the layer's output error on a sample of the tokens that are not held out, with the
routing among the retained experts (as Expert Merging learns those of whole models, arXiv 2509.25712).
"""

import torch
from segment_rules import dropped_experts, experiment, join
from torch import Tensor
from torch.nn.functional import normalize

from optimum_dern import DernConfig
from optimum_dern.core.dern.clustering import equalised_means, nearest_direction
from optimum_dern.core.dern.recombination import recombine_layer
from optimum_dern.core.layer.mixture import Routing, routed_output
from optimum_dern.core.layer.segments import Segments
from optimum_dern.core.router.choice import choose_experts, recognise_choice
from optimum_dern.methods import LayerProblem


TOKENS, STEPS, RATE, START = 2048, 60, 0.3, 0.1


@experiment("learned clusters")
def learned_clusters(problem: LayerProblem, config: DernConfig) -> Segments:
    """Return the retained experts, with as much of the segments moved to them as lowers the layer's error."""
    segments, retained = problem.layer.segments, problem.retained
    own = torch.stack([segments.concatenated(expert) for expert in retained.tolist()])  # (N, f, D)
    differences = moved_means(problem, config, own) - own.unsqueeze(1)  # (N, E - N, f, D)
    routing, target = routed_sample(problem)
    raw = torch.full(differences.shape[:2], START).logit().requires_grad_()  # (N, E - N)
    optimizer = torch.optim.Adam([raw], lr=RATE)

    def merged() -> Segments:
        rows = own + torch.einsum("ns,nsfd->nfd", raw.sigmoid(), differences)
        return segments._replace(**dict(zip(("gate", "up", "down"), segments.split(rows), strict=True)))

    with torch.enable_grad():
        for _ in range(STEPS):
            error = (routed_output(merged(), routing, problem.layer.activation) - target).square().sum()
            (error / target.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Segments(*(part.detach() if isinstance(part, Tensor) else part for part in merged()))


def moved_means(problem: LayerProblem, config: DernConfig, own: Tensor) -> Tensor:
    """Average what moves from each dropped expert to each own neuron: (N, E - N, f, D), own neurons where nothing."""
    segments, retained = problem.layer.segments, problem.retained
    options = {"threshold": config.similarity_threshold, "iterations": 1}
    destination = recombine_layer(segments, retained, problem.scores, **options).destination  # (E - N, f)
    means = own.unsqueeze(1).repeat(1, len(destination), 1, 1)
    for number, source in enumerate(dropped_experts(segments, retained).tolist()):
        for position in range(len(own)):
            (neuron,) = torch.where(destination[number] == position)
            if not len(neuron):
                continue
            points = join(segments, torch.full_like(neuron, source), neuron)  # (m, D)
            directions = normalize(points, dim=1)
            labels = nearest_direction(directions, normalize(own[position], dim=1))
            weights = points.new_ones(len(points))
            means[position, number] = equalised_means(directions, points.norm(dim=1), weights, labels, own[position])
    return means


def routed_sample(problem: LayerProblem) -> tuple[Routing, Tensor]:
    """Route a sample of tokens among the retained experts; returns that, and the original layer's output."""
    layer, retained = problem.layer, problem.retained
    fitted = (~layer.held_out).nonzero().flatten()
    sample = fitted[:: max(1, len(fitted) // TOKENS)]
    routing = layer.routing.select(sample)
    choice, logits = recognise_choice(layer, routing)
    gone = torch.ones(logits.shape[1], dtype=torch.bool)
    gone[retained] = False
    index, weight = choose_experts(logits.masked_fill(gone, -torch.inf), choice, routing.index.shape[1])
    place = torch.full((logits.shape[1],), -1)
    place[retained] = torch.arange(len(retained))
    return routing._replace(index=place[index], weight=weight.to(routing.weight)), layer.target[sample]
