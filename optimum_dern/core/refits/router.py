"""Refit of the retained experts' router rows by Gauss-Newton steps.

Tokens of dropped experts are now routed among the retained ones, which the router was not trained to rank for them.
One Gauss-Newton step updates the rows of the retained experts so that the routed output comes closer to the original
layer's, with the experts themselves fixed:

    min  sum_x | y(x) - y'(x) - J(x) dW x |^2  +  lambda |dW|^2

J is the derivative of the routed output y' by the router's logits z.  For a router whose rule is known
(`router.rule`), with pi = g / scale and u = phi'/phi,

    dy' = sum over chosen s of g_s u_s dz_s e_s(x)  -  y'(x) sum over R of pi_r u_r dz_r

The normal equations are solved by conjugate gradients; per token they need only the (k + 1) x (k + 1) Gram matrix of
the chosen experts' outputs and y', so nothing larger than tokens x experts is ever held.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, Routing, expert_batches, expert_output
from ..layer.reduction import Reduce, alone, any_process
from ..layer.segments import Segments
from ..router.rule import RouterRule, weight_shares


__all__ = ["conjugate_gradients", "refit_router", "refit_router_cost"]

ASK_CPU, ASK_GPU = 1, 8  # iterations between two questions whether the solution is found: a GPU's answer takes long


def refit_router(
    rows: Tensor,
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    rule: RouterRule,
    ridge: float,
    iterations: int = 50,
    tolerance: float = 1e-4,
    bias: Tensor | None = None,
    reduce: Reduce = alone,
) -> Tensor:
    """Update the router weight by one Gauss-Newton step that fits the routed output to a target.

    Args:
        rows: (N, d) router weight.
        segments: N experts.
        routing: T tokens as routed by this router.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons.
        rule: by which the router computes gate weights.
        ridge: relative to the mean diagonal of the normal equations.
        iterations: maximum of conjugate gradient iterations.
        tolerance: relative residual at which they stop.
        bias: (N,) added to the logits, where the router has one; not refitted.
        reduce: over the processes that share the tokens.

    Returns:
        (N, d) new rows in the dtype of `rows`.
    """
    hidden = routing.hidden.to(target.dtype)
    logits = torch.nn.functional.linear(hidden, rows.to(hidden), None if bias is None else bias.to(hidden))  # (T, N)
    share = weight_shares(logits, routing.index, rule.phi, rule.over_all)  # (T, N)
    slope = 1 - logits.sigmoid() if rule.phi == "sigmoid" else torch.ones_like(logits)  # d log phi / dz
    share = share * slope
    weight = routing.weight.to(hidden) * slope.gather(1, routing.index)  # (T, k)
    gram, residual = _token_grams(segments, routing, target, activation)  # (T, k + 1, k + 1), (T, k + 1)

    def transposed(moments: Tensor) -> Tensor:
        """Apply J^T to per-token moments (T, k + 1): (N, d)."""
        by_logit = torch.zeros_like(share).scatter_(1, routing.index, weight * moments[:, :-1])
        return reduce((by_logit - share * moments[:, -1:]).T @ hidden)

    def normal(step: Tensor) -> Tensor:
        """Apply J^T J to a step (N, d)."""
        change = hidden @ step.T  # (T, N)
        chosen = weight * change.gather(1, routing.index)  # (T, k)
        moments = torch.cat([chosen, -(share * change).sum(1, keepdim=True)], dim=1)  # (T, k + 1)
        return transposed((gram @ moments.unsqueeze(-1)).squeeze(-1))

    by_logit = torch.zeros_like(share).scatter_(1, routing.index, weight**2 * gram.diagonal(dim1=1, dim2=2)[:, :-1])
    trace = (by_logit.sum(1) * hidden.square().sum(1)).sum()  # of J^T J, its cross terms with y' left out
    penalty = ridge * reduce(trace) / rows.numel()
    if not penalty > 0:
        return rows
    right = transposed(residual)
    step = conjugate_gradients(lambda v: normal(v) + penalty * v, right, iterations, tolerance, reduce)
    return (rows.to(step) + step).to(rows.dtype)


def _token_grams(
    segments: Segments, routing: Routing, target: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Compute the Gram matrix of [e_1 .. e_k, y'] per token, and its vectors' products with the residual y - y'."""
    top_k, grams, products = routing.index.shape[1], [], []
    chunk = 2 * segments.workspace.chunk_tokens
    for part, wanted in zip(routing.chunks(chunk, len(segments.up)), target.split(chunk), strict=True):
        outputs = target.new_zeros(len(part.index), top_k + 1, target.shape[1])  # (n, k + 1, o)
        for batch in expert_batches(segments, part, activation):
            outputs[batch.token, batch.slot] = expert_output(segments, batch)
        outputs[:, -1] = (part.weight.to(outputs).unsqueeze(1) @ outputs[:, :-1]).squeeze(1)
        residual = wanted - outputs[:, -1]
        grams.append(outputs @ outputs.mT)
        products.append((outputs @ residual.unsqueeze(-1)).squeeze(-1))
    return torch.cat(grams), torch.cat(products)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    iterations: int,
    tolerance: float,
    reduce: Reduce = alone,
) -> Tensor:
    """Solve operator(x) = right by conjugate gradients.

    Args:
        operator: symmetric, positive definite, on tensors of any shape.
        right: right-hand side.
        iterations: at most this many.
        tolerance: stop once |residual| <= tolerance * |right|.
        reduce: over the processes, if the operator is reduced over them; all hold the whole x and stop together.

    Returns:
        x, of the shape of `right`.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction, energy = residual.clone(), residual.square().sum()
    goal = energy * tolerance**2
    asks = ASK_CPU if right.device.type == "cpu" else ASK_GPU
    for number in range(iterations):
        found = energy <= goal  # the solution stays from then on, whether or not the host knows
        if number % asks == 0 and not any_process(~found, reduce):
            break
        image = operator(direction)
        length = energy / (direction * image).sum()
        solution = torch.where(found, solution, solution + length * direction)
        residual = torch.where(found, residual, residual - length * image)
        energy, before = residual.square().sum(), energy
        direction = residual + (energy / before) * direction
    return solution


def refit_router_cost(shape: LayerShape, iterations: int = 50) -> Cost:
    """Cost of `recognise_rule` and `refit_router` on the tokens of a shape."""
    tokens, slots = min(2 * shape.chunk_tokens, shape.tokens), shape.top_k + 1
    held = shape.tokens * (4 * shape.retained + 2 * slots**2) + tokens * (slots + 2) * shape.outputs
    held += shape.tokens * shape.inputs * (shape.itemsize < shape.number)
    products = 4.0 * shape.tokens * shape.retained * shape.inputs * (iterations + 1)
    operations = experts_operations(shape) + 2.0 * shape.tokens * slots**2 * shape.outputs + products
    return Cost(shape.number * held + held_by_chunk(shape), 0, operations)
