"""Tied weights of a model: those that its config ties, unless the checkpoint stores them with different values.

transformers decides this when it loads a model.  For a model without weights it is decided from the headers, and from
the values of those tensors that are stored although the config ties them.
"""

from typing import Any

import torch
from torch import nn

from ..format.conversion import NameMap
from ..format.reader import CheckpointReader
from ..format.tensor_file import equal_values


__all__ = ["match_ties_", "record_untied_"]


def match_ties_(model: Any, reader: CheckpointReader, names: NameMap) -> None:
    """Tie the parameters of a model without weights as transformers would on loading.

    Args:
        model: without weights; its parameters are tied as its config says.
        reader: of its checkpoint.
        names: mapping from the checkpoint's tensors to the model's parameters.
    """
    groups: dict[str, list[str]] = {}
    for name, usual in model.all_tied_weights_keys.items():
        groups.setdefault(usual, [usual]).append(name)
    ties = {}
    for members in groups.values():
        stored = [name for name in members if name in names.filled]
        first = (stored or members)[0]  # the others are tied to it
        for name in members:
            if name == first:
                continue
            if name in stored and not _equal(model, reader, names, first, name):
                _untie_(model, name)
            else:
                ties[name] = first
    model.all_tied_weights_keys = ties
    model.tie_weights(recompute_mapping=False)
    record_untied_(model)


def record_untied_(model: Any) -> None:
    """Set `tie_word_embeddings` to False in a model's config where its output head is not tied.

    Readers other than transformers 5 rely on the config, nested ones too, and would ignore the stored head.

    Args:
        model: with or without weights.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    if head is None or head.weight is embeddings.weight or tied.intersection(names):
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _equal(model: Any, reader: CheckpointReader, names: NameMap, first: str, second: str) -> bool:
    """Whether two stored parameters have the same values, in the dtype in which they are loaded."""
    stored = [[source for source, target in names.target.items() if target == name] for name in (first, second)]
    if len(stored[0]) != len(stored[1]):
        return False
    for pair in zip(*stored, strict=True):
        infos = [reader.infos[name] for name in pair]
        if any(info != reader.stored.get(name) for name, info in zip(pair, infos, strict=True)):  # dequantised
            if not torch.equal(*map(reader.read, pair)):
                return False
        elif not equal_values(*infos, model.get_parameter_or_buffer(first).dtype):
            return False
    return True


def _untie_(model: Any, name: str) -> None:
    """Replace a tied parameter of a model without weights by one of its own."""
    module, _, attribute = name.rpartition(".")
    parameters = model.get_submodule(module)._parameters
    parameters[attribute] = nn.Parameter(torch.empty_like(parameters[attribute]), requires_grad=False)
