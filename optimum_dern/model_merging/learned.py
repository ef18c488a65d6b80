"""Learn the coefficients of a merge without labels: match each fine-tuned model on text of its own (arXiv 2509.25712).

    L = sum over models k of [ CE(softmax(teacher_k), student) + MSE(hidden states of some layers) ]
        + 5 mean |sigmoid(c) - initial|

with the merged model as the student, which reads the text of model k as its teacher does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from ..checks.batches import check_batches
from ..evaluation.agreement.logits_cache import predicted_positions
from ..machine.progress import progress_bar
from ..machine.torch_state import evaluation_mode
from ..models.moe.structure import find_decoder
from .coefficients import Coefficients, chunks_by_importance, importance


__all__ = ["LearnedSettings", "descend", "learn_coefficients", "queue"]


@dataclass(frozen=True)
class LearnedSettings:
    """How coefficients are learned; the defaults but for the number of epochs are the paper's."""

    initial: float = 0.1
    rate: float = 0.5
    epochs: int = 4
    accumulate: int = 8  # batches a step
    hidden_weight: float = 1.0
    regulariser: float = 5.0
    clip: float = 1.0
    chunks: int = 1  # parts of the parameters in important layers; 1 for whole tensors

    def __post_init__(self) -> None:
        if not 0 < self.initial < 1:
            raise ValueError(f"initial={self.initial}, but a coefficient must be above 0 and below 1")
        if min(self.epochs, self.accumulate, self.chunks) < 1 or min(self.rate, self.clip) <= 0:
            raise ValueError(f"{self}: give epochs, accumulate and chunks of at least 1, rate and clip above 0")


def learn_coefficients(
    model: nn.Module,
    differences: Mapping[str, Tensor],
    texts: Sequence[Sequence[dict]],
    settings: LearnedSettings | None = None,
) -> Coefficients:
    """Learn by how much of each fine-tuned model every tensor of the base is changed.

    Args:
        model: the base; its weights stay as they are.
        differences: by parameter, (K, ...) what each fine-tuned model adds to the base.
        texts: token batches for each of the K models.
        settings: of the learning.

    Returns:
        The coefficients, with `merged` for the weights.
    """
    settings = settings or LearnedSettings()
    for batches in texts:
        check_batches(batches, model.get_input_embeddings().weight.shape[0], masked=True)
    coefficients = Coefficients(differences, settings.initial)
    with evaluation_mode(model):
        _learn(model, coefficients, texts, settings)
        if settings.chunks > 1:
            decoder, layers = find_decoder(model)
            sizes = [
                {name: tau[0].numel() for name, tau in differences.items() if name.startswith(f"{decoder}.{i}.")}
                for i in range(len(layers))
            ]
            values = [importance(coefficients, list(own)) for own in sizes]
            chunks = chunks_by_importance(values, sizes, settings.chunks)
            coefficients = Coefficients(differences, settings.initial, chunks, coefficients.raw)
            _learn(model, coefficients, texts, settings)
    return coefficients


def _learn(
    model: nn.Module, coefficients: Coefficients, texts: Sequence[Sequence[dict]], settings: LearnedSettings
) -> None:
    base = {name: parameter.detach() for name, parameter in model.named_parameters() if name in coefficients.raw}

    def loss(k: int, number: int) -> Tensor:
        batch = texts[k][number]
        with torch.no_grad():
            teacher_weights = {name: base[name] + coefficients.differences[name][k] for name in base}
            teacher = _run(model, teacher_weights, batch)
        student = _run(model, coefficients.merged(base), batch)
        return _matching_loss(student, teacher, batch["attention_mask"], settings.hidden_weight)

    turns = queue(texts, settings.epochs)
    descend(coefficients, progress_bar(turns, "Learning coefficients"), len(turns), loss, settings)


def queue(texts: Sequence[Sequence[dict]], epochs: int) -> list[tuple[int, int]]:
    """List source and number of the batches in the order of the learning: a batch of each source in turn."""
    shortest = min(map(len, texts))
    return [(k, number) for _ in range(epochs) for number in range(shortest) for k in range(len(texts))]


def descend(
    coefficients: Coefficients,
    turns: Iterable[tuple[int, int]],
    count: int,
    loss: Callable[[int, int], Tensor],
    settings: LearnedSettings,
) -> None:
    """Learn coefficients by gradient, in place.

    Args:
        coefficients: to be learned.
        turns: source and number of each batch.
        count: of them.
        loss: of a batch with the merged weights, without the regulariser.
        settings: of the learning.
    """
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=settings.rate)
    for turn, (k, number) in enumerate(turns, start=1):
        with torch.enable_grad():
            away = (coefficients.factors() - settings.initial).abs().mean()
            ((loss(k, number) + settings.regulariser * away) / settings.accumulate).backward()
        if turn % settings.accumulate == 0 or turn == count:
            nn.utils.clip_grad_norm_(coefficients.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad()


def _run(model: nn.Module, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Any:
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    options = {"use_cache": False, "output_hidden_states": True}
    return functional_call(model, dict(weights), kwargs=inputs | options, tie_weights=True)


def _matching_loss(student: Any, teacher: Any, mask: Tensor, hidden_weight: float) -> Tensor:
    """Compute the cross entropy to the teacher's predictions, and the distance of hidden states in middle layers."""
    predicted = predicted_positions(mask).to(student.logits.device)  # (B, S - 1)
    dtype = torch.promote_types(student.logits.dtype, torch.float32)
    target = teacher.logits[:, :-1][predicted].to(dtype).softmax(1)
    loss = cross_entropy(student.logits[:, :-1][predicted].to(dtype), target)
    real = mask.bool().to(student.logits.device)
    middle = list(zip(student.hidden_states, teacher.hidden_states, strict=True))[1:-1]
    distances = [mse_loss(own[real].to(dtype), other[real].to(dtype)) for own, other in middle]
    return loss + hidden_weight * torch.stack(distances).mean() if distances else loss
