"""Learn the coefficients of a merge one decoder layer at a time, for models that memory does not hold.

With the text of source k, H_k its hidden states and H'_k those of the merged model, per decoder layer:

    H_k   <-  layer with the weights of source k (H_k)
    L      =  sum over k of MSE(layer with base + sum_j sigmoid(c_j) tau_j (H'_k), H_k) / MSE with the initial factors
              + 5 mean |sigmoid(c) - initial|
    H'_k  <-  layer with the coefficients that minimise L (H'_k)

The merged layer thus reads what the merged layers before it give, and is to mend their error.  What is outside the
decoder layers has no target of its own, and is merged with the initial factor.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

from ..checks.batches import check_batches
from ..data.labels import model_inputs
from ..engine.walk.calls import own_containers, record_layer_calls
from ..engine.walk.stream import HiddenStream
from ..evaluation.loss.streamed import StreamedCheckpoint
from ..machine.progress import progress_bar
from .coefficients import Coefficients, chunks_by_importance, importance
from .learned import LearnedSettings, descend, queue
from .parts import CheckpointParts, holding


__all__ = ["learn_layerwise"]

TINY = 1e-12  # error of a layer that differs in no source
Finish = Callable[[Mapping[str, Tensor]], None]


def learn_layerwise(
    parts: CheckpointParts, texts: Sequence[Sequence[dict]], settings: LearnedSettings, finish: Finish
) -> dict[str, Tensor]:
    """Learn the coefficients of every decoder layer, one layer of all checkpoints in memory at a time.

    Args:
        parts: the checkpoints.
        texts: token batches for each of the K fine-tuned ones.
        settings: of the learning; with `chunks` all layers are learned twice.
        finish: takes the merged weights of every part, in the names of the model's parameters.

    Returns:
        Raw coefficients (K, chunks) of the decoder layers' parameters, before the sigmoid.
    """
    for batches in texts:
        check_batches(batches, parts.base.skeleton.get_input_embeddings().weight.shape[0], masked=True)
    if settings.chunks == 1:
        return _Pass(parts, texts, settings).run(finish)
    first = _Pass(parts, texts, settings)
    learned = first.run(lambda weights: None)
    chunks = chunks_by_importance(first.importances, first.sizes, settings.chunks)
    return _Pass(parts, texts, settings, chunks, learned).run(finish)


class _Pass:
    """One pass through the decoder layers of all checkpoints."""

    def __init__(
        self,
        parts: CheckpointParts,
        texts: Sequence[Sequence[dict]],
        settings: LearnedSettings,
        chunks: Mapping[str, int] | None = None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parts, self.settings, self.chunks, self.learned = parts, settings, chunks, learned
        self.texts = [[model_inputs(batch) for batch in batches] for batches in texts]
        self.importances: list[float] = []  # of each layer so far
        self.sizes: list[dict[str, int]] = []  # and the entries of its parameters
        self.teachers: list[HiddenStream] = []  # for each source: its own hidden states on its text
        self.students: list[HiddenStream] = []  # and the merged model's

    def run(self, finish: Finish) -> dict[str, Tensor]:
        parts, found = self.parts, {}
        outside = parts.outside(lambda k: self.teachers.append(_enter(parts.sources[k], self.texts[k])))
        with torch.no_grad():
            merged = Coefficients(outside.differences, self.settings.initial).merged(outside.own)
        del outside
        with holding(parts.base.skeleton, merged):
            self.students += [_enter(parts.base, batches) for batches in self.texts]
        finish(merged)
        for position in progress_bar(range(len(parts)), "Merging layers"):
            coefficients, merged = self._layer(position)
            found |= {name: raw.detach() for name, raw in coefficients.raw.items()}
            del coefficients
            with holding(parts.base.skeleton, merged):
                for student in self.students:
                    student.step(position, parts.base.loader.decoder_layers[position])
            finish(merged)
        return found

    def _layer(self, position: int) -> tuple[Coefficients, dict[str, Tensor]]:
        """Learn the coefficients of a layer; returns them, and its merged weights."""

        def step(k: int) -> None:
            self.teachers[k].step(position, self.parts.sources[k].loader.decoder_layers[position])

        own, differences = self.parts.layer(position, step)
        coefficients = Coefficients(differences, self.settings.initial, self.chunks, self.learned)
        scales = self._errors_at_start(position, own, differences)

        def loss(k: int, number: int) -> Tensor:
            error = self._error(position, coefficients.merged(own), k, number)
            return self.settings.hidden_weight * error / scales[k]

        turns = queue(self.texts, self.settings.epochs)
        descend(coefficients, turns, len(turns), loss, self.settings)
        self.importances.append(importance(coefficients, list(own)))
        self.sizes.append({name: tensor.numel() for name, tensor in own.items()})
        with torch.no_grad():
            return coefficients, coefficients.merged(own)

    @torch.no_grad()
    def _errors_at_start(
        self, position: int, own: Mapping[str, Tensor], differences: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Compute the mean error of each source behind a layer that is merged with the initial factor."""
        weights = Coefficients(differences, self.settings.initial).merged(own)
        errors = [
            torch.stack([self._error(position, weights, k, number) for number in range(len(batches))])
            for k, batches in enumerate(self.texts)
        ]
        return [error.mean().clamp(min=TINY) for error in errors]

    def _error(self, position: int, weights: Mapping[str, Tensor], k: int, number: int) -> Tensor:
        """Compute the mean squared error of a batch of source k behind a layer with some weights."""
        loader, student = self.parts.base.loader, self.students[k]
        layer, prefix = loader.decoder_layers[position], f"{loader.decoder}.{position}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        output = student.call(
            position, lambda *args, **kwargs: functional_call(layer, own, args, kwargs), number, student.hidden[number]
        )
        output = output[0] if isinstance(output, tuple) else output  # (B, S, d)
        real = self.texts[k][number]["attention_mask"].bool().to(output.device)
        dtype = torch.promote_types(output.dtype, torch.float32)
        return mse_loss(output[real].to(dtype), self.teachers[k].hidden[number][real].to(dtype))


def _enter(checkpoint: StreamedCheckpoint, batches: Sequence[dict]) -> HiddenStream:
    """Return the hidden states that enter a model's first decoder layer."""
    calls = record_layer_calls(checkpoint.skeleton, checkpoint.loader.decoder_layers, batches)
    return HiddenStream(own_containers(calls))
