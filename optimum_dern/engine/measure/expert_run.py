"""Run a layer's experts chunk by chunk, in place of the model's own implementation, and measure them in the same run.

It computes the same output with less memory: nothing is as large as tokens times experts per token times width.
`models.moe.overrides` has the exceptions, whose experts run themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...core.layer.mixture import Activation, Routing, routed_output
from ...core.layer.statistics import ExpertStatistics, measure_experts
from ...models.forward import StopForward, replaced_forward
from ...models.moe.overrides import experts_routing, routing_hook, takes_routing
from ...models.moe.structure import MoELayer
from ...models.moe.view import layer_activation, read_layer


__all__ = ["ExpertRun", "all_finite", "chunked_experts", "experts_run_by", "measured_experts"]


class ExpertRun:
    """What one run of a layer's experts has measured, micro-batch by micro-batch.

    Args:
        layer: with its original experts.
        masks: per micro-batch, (batch, sequence) bool, True for a real token.
        keep: keep the tokens' routing and output; without, only the sums over them are left.
    """

    def __init__(self, layer: MoELayer, masks: Sequence[Tensor], keep: bool = True) -> None:
        self.weights = read_layer(layer)
        segments, activation = self.weights.segments, layer_activation(layer)
        self.statistics = ExpertStatistics.zeros(len(segments.up), segments.down.shape[-1], segments.down.device)
        # Whether inputs are not finite, outputs overflow in float16 (the model's own), and outputs are not finite.
        self.broken = torch.zeros(3, dtype=torch.bool, device=segments.down.device)
        self.tokens = 0  # real tokens so far
        self.keep = keep
        self.block_calls: list[tuple[tuple, dict]] = []  # arguments of the block, to route the tokens again
        self.first_output: Tensor | None = None  # (B S, o) for the first micro-batch
        self.routing: Routing | None = None  # of the T real tokens; None before the first micro-batch, or not kept
        self.target: Tensor | None = None  # (T, o) routed output of the real tokens
        self._masks = [mask.flatten() for mask in masks]
        self._waiting = iter(self._masks)
        self._unwatched = activation  # for padding, of which the model makes nothing
        self._activation = activation if segments.up.dtype != torch.float16 else self._watched(activation)

    def measure(self, routing: Routing, block_call: tuple[tuple, dict]) -> Tensor:
        """Compute the experts' output for one micro-batch, and add its real tokens to what is measured.

        Args:
            routing: of B S tokens, with padding.
            block_call: arguments of the block around the experts.

        Returns:
            (B S, o) routed output.
        """
        mask, segments = next(self._waiting), self.weights.segments
        if mask.all():
            target = self._add(routing)
            if self.keep:
                kept = self.routing.hidden[self.tokens - len(target) : self.tokens]
                block_call = _with_view(block_call, routing.hidden, kept)
        else:
            real, padding = (part.nonzero().flatten().to(routing.index.device) for part in (mask, ~mask))
            measured = self._add(routing.select(real))
            target = measured.new_empty(len(mask), measured.shape[1])
            target[real] = measured
            target[padding] = routed_output(segments, routing.select(padding), self._unwatched)
        if self.keep:
            self.block_calls.append(block_call)
            self.first_output = target if self.first_output is None else self.first_output
        return target

    def _add(self, routing: Routing) -> Tensor:
        """Measure real tokens (n,), and keep their routing where it is to be kept; returns their output (n, o)."""
        statistics, target = measure_experts(self.weights.segments, routing, self._activation)
        self.statistics = self.statistics.merge(statistics)
        self.broken[0] |= ~all_finite(routing.hidden)
        self.broken[2] |= ~all_finite(target)
        rows = slice(self.tokens, self.tokens + len(target))
        self.tokens = rows.stop
        if self.keep:
            self._keep(rows, routing, target)
        return target

    def _keep(self, rows: slice, routing: Routing, target: Tensor) -> None:
        """Copy the routing and the output of real tokens to their rows among all of them."""
        if self.routing is None:
            tokens = sum(int(mask.sum()) for mask in self._masks)
            *tensors, self.target = (part.new_empty(tokens, part.shape[1]) for part in (*routing[:3], target))
            self.routing = Routing(*tensors, routing.weighs_input)
        for whole, part in zip((*self.routing[:3], self.target), (*routing[:3], target), strict=True):
            whole[rows] = part

    def _watched(self, activation: Activation) -> Activation:
        """Wrap the activation so that it records whether it overflows in float16."""

        def watched(gate: Tensor | None, up: Tensor) -> Tensor:
            self.broken[1] |= ~torch.isfinite(activation(gate if gate is None else gate.half(), up.half())).all()
            return activation(gate, up)

        return watched


@contextmanager
def chunked_experts(layer: MoELayer) -> Iterator[None]:
    """Run a layer's experts, original or compressed, chunk by chunk while the context is open."""
    segments, activation = read_layer(layer).segments, layer_activation(layer)
    with ExitStack() as stack:
        if takes_routing(layer.experts):
            forward = _forward(lambda routing: routed_output(segments, routing, activation))
            stack.enter_context(replaced_forward(layer.experts, forward))
        yield


def _forward(run: Callable[[Routing], Tensor]) -> Callable[..., Tensor]:
    """Make the forward function of an experts module from a function of its routing."""

    def forward(*args, **kwargs) -> Tensor:
        hidden = next(iter((*args, *kwargs.values())))
        return run(experts_routing(args, kwargs)).to(hidden).view(*hidden.shape[:-1], -1)

    return forward


@contextmanager
def experts_run_by(layer: MoELayer, receive: Callable[[Routing], Tensor]) -> Iterator[None]:
    """Compute the experts' output of every forward pass with a function of their routing while the context is open.

    Args:
        layer: of a kind whose routing `models.moe.overrides` can read.
        receive: returns the routed output (B S, o) of B S tokens, with padding; where the experts do not take their
            routing, they run themselves, and what it returns is not used.
    """
    with ExitStack() as stack:
        if takes_routing(layer.experts):
            stack.enter_context(replaced_forward(layer.experts, _forward(receive)))
        else:
            stack.callback(routing_hook(layer.experts)(layer.block, layer.experts, receive).remove)
        yield


@contextmanager
def measured_experts(
    layer: MoELayer, masks: Sequence[Tensor], stop: bool = False, keep: bool = True
) -> Iterator[ExpertRun]:
    """Measure the experts of every forward pass of a layer while the context is open.

    Args:
        layer: with its original experts, of a kind whose routing `models.moe.overrides` can read.
        masks: per micro-batch that will be run, (batch, sequence) bool, True for a real token.
        stop: raise `StopForward` once a micro-batch is measured, instead of handing on its output.
        keep: keep the tokens' routing and output.
    """
    run, calls = ExpertRun(layer, masks, keep), []

    def before_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[:] = [(args, kwargs)]

    def receive(routing: Routing) -> Tensor:
        output = run.measure(routing, calls.pop())
        if stop:
            raise StopForward
        return output

    with ExitStack() as stack:
        stack.callback(layer.block.register_forward_pre_hook(before_block, with_kwargs=True).remove)
        stack.enter_context(experts_run_by(layer, receive))
        yield run


def all_finite(values: Tensor) -> Tensor:
    """Return whether all values are finite, from their smallest and largest: no array of booleans is made."""
    return torch.stack(values.aminmax()).isfinite().all() if values.numel() else values.isfinite().all()


def _with_view(call: tuple[tuple, dict], hidden: Tensor, kept: Tensor) -> tuple[tuple, dict]:
    """Let a call refer to the copy of the hidden states that is kept, so that they are not kept twice."""

    def view(value: object) -> object:
        same = isinstance(value, Tensor) and (value.data_ptr(), value.numel()) == (hidden.data_ptr(), hidden.numel())
        return kept.view(value.shape) if same else value

    return tuple(map(view, call[0])), {name: view(value) for name, value in call[1].items()}
