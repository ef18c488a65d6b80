"""Learn the coefficients of a merge without labels: match each fine-tuned model on text of its own (arXiv 2509.25712).

    L = sum over models k of [ CE(softmax(teacher_k), student) + MSE(hidden states of some layers) ]
        + 5 mean |sigmoid(c) - initial|

with the merged model as the student, which reads the text of model k as its teacher does.
"""

from collections.abc import Mapping, Sequence
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
from .coefficients import Coefficients, chunks_by_importance


__all__ = ["LearnedSettings", "learn_coefficients"]


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
        check_batches(batches, model.get_input_embeddings().weight.shape[0])
    coefficients = Coefficients(differences, settings.initial)
    with evaluation_mode(model):
        _learn(model, coefficients, texts, settings)
        if settings.chunks > 1:
            chunks = chunks_by_importance(coefficients, _layers_of(model, differences), settings.chunks)
            finer = Coefficients(differences, settings.initial, chunks)
            with torch.no_grad():
                for name, raw in finer.raw.items():
                    raw.copy_(coefficients.raw[name].expand_as(raw))  # goes on from the whole tensors'
            _learn(model, finer, texts, settings)
            coefficients = finer
    return coefficients


def _learn(
    model: nn.Module, coefficients: Coefficients, texts: Sequence[Sequence[dict]], settings: LearnedSettings
) -> None:
    base = {name: parameter.detach() for name, parameter in model.named_parameters() if name in coefficients.raw}
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=settings.rate)
    queue = [
        (k, batch)
        for _ in range(settings.epochs)
        for turn in zip(*texts, strict=False)
        for k, batch in enumerate(turn)
    ]
    for number, (k, batch) in enumerate(progress_bar(queue, "Learning coefficients"), start=1):
        with torch.no_grad():
            teacher_weights = {name: base[name] + coefficients.differences[name][k] for name in base}
            teacher = _run(model, teacher_weights, batch)
        with torch.enable_grad():
            student = _run(model, coefficients.merged(base), batch)
            loss = _matching_loss(student, teacher, batch["attention_mask"], settings.hidden_weight)
            away = (coefficients.factors() - settings.initial).abs().mean()
            ((loss + settings.regulariser * away) / settings.accumulate).backward()
        if number % settings.accumulate == 0 or number == len(queue):
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


def _layers_of(model: nn.Module, differences: Mapping[str, Tensor]) -> list[list[str]]:
    """List the names of the parameters in each decoder layer, the outermost list of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefix, decoder = min(lists, key=lambda entry: entry[0].count("."))
    return [
        [name for name in differences if name.startswith(f"{prefix}.{position}.")] for position in range(len(decoder))
    ]
