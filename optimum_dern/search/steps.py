"""Write the next step of many partial answers, in one batch for each number of active experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .active import active_experts
from .candidates import Candidate, Cost


__all__ = ["Sampling", "extend", "prompt_tokens"]


@dataclass(frozen=True)
class Sampling:
    """How a step is drawn, and where it ends."""

    step: str | None  # text that ends it; None for steps of `tokens` tokens
    tokens: int  # at most
    temperature: float  # 0 takes the most probable token
    correct_scale: bool = True


def prompt_tokens(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Encode a prompt; one that a chat template has begun with the BOS token gets no second one."""
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    return tuple(tokenizer(prompt, add_special_tokens=not begun)["input_ids"])


def extend(
    model: Any, tokenizer: Any, prompt: Sequence[int], candidates: Sequence[Candidate], sampling: Sampling, cost: Cost
) -> list[Candidate]:
    """Write one step of every candidate, with its own number of experts.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: of the model.
        prompt: its token ids.
        candidates: none of them done.
        sampling: of the steps.
        cost: what is run is added to it.

    Returns:
        The longer candidates, in the same order, without scores.
    """
    written: dict[int, Candidate] = {}
    for count in dict.fromkeys(candidate.count for candidate in candidates):
        places = [place for place, candidate in enumerate(candidates) if candidate.count == count]
        rows = [[*prompt, *candidates[place].tokens] for place in places]
        with active_experts(model, count, correct_scale=sampling.correct_scale):
            steps = _write(model, tokenizer, rows, sampling)
        cost.add(count, sum(map(len, steps)), sum(map(len, rows)))
        for place, step in zip(places, steps, strict=True):
            tokens = (*candidates[place].tokens, *step)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            written[place] = replace(
                candidates[place], tokens=tokens, text=text, done=step[-1] in _ends(model, tokenizer)
            )
    return [written[place] for place in range(len(candidates))]


def _write(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Generate one step after every row of token ids, padded on the left."""
    from transformers import StoppingCriteriaList

    device, longest = model.get_input_embeddings().weight.device, max(map(len, rows))
    pad, ends = tokenizer.pad_token_id, _ends(model, tokenizer)
    pad = next(iter(ends), 0) if pad is None else pad  # masked, so any id does
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    lengths: dict[int, int] = {}  # by row: tokens up to its end; an end cannot be told from padding afterwards

    def ended(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, tokens in enumerate(ids[:, longest:].tolist()):
            if row not in lengths and (tokens[-1] in ends or _has(tokenizer, tokens, sampling.step)):
                lengths[row] = len(tokens)
        return torch.tensor([row in lengths for row in range(len(ids))], device=ids.device)

    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=sampling.tokens,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([ended]),
        **(drawn if sampling.temperature > 0 else {"do_sample": False}),
    )
    return [tokens[: lengths.get(row, len(tokens))] for row, tokens in enumerate(output[:, longest:].tolist())]


def _has(tokenizer: Any, tokens: list[int], step: str | None) -> bool:
    """Return whether new tokens hold the text that ends a step."""
    return step is not None and step in tokenizer.decode(tokens)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {token for token in (*own, tokenizer.eos_token_id) if token is not None}
