"""Load a model with only some of its experts, of which alone the bytes are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.format.conversion import NameMap, load_tensors_
from ..checkpoint.format.reader import CheckpointReader, LazyTensor
from ..checkpoint.output.plan import layer_parameters
from ..checkpoint.output.tensors import shrink_
from ..checkpoint.source.find import Source
from ..checkpoint.source.provenance import load_tokenizer
from ..checkpoint.source.recorded import identify_model
from ..core.criteria.selection import select_experts
from ..data.batches import load_batches
from ..machine.torch_state import default_device, plain_torch
from ..models.moe.structure import MoELayer, find_moe_layers, layers_by_position
from ..models.moe.view import write_counts_
from ..models.refusals import resolve_count
from .build import first_layer_scores, open_source
from .library import PatternLibrary


__all__ = ["load_experts", "load_for", "match_prompt"]


@plain_torch()
def load_for(
    model: str | Path,
    library: PatternLibrary | str | Path,
    *,
    num_experts: int,
    task: str | None = None,
    prompt: str | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: Any = None,
    **source: Any,
) -> nn.Module:
    """Load a model with the experts that a task uses most, reading no others.

    Args:
        model: folder or Hub id of the full checkpoint.
        library: of this model, or its folder.
        num_experts: how many experts every layer keeps.
        task: name in the library.
        prompt: text whose nearest task is taken instead; the first layers are read for it once more.
        tokenizer: for the prompt; by default the checkpoint's own.
        device: to load to; by default a GPU where there is one.
        dtype: of the model; by default as stored.
        **source: `revision`, `token` and `trust_remote_code`.

    Returns:
        The plain transformers model, with fewer experts: to the bit what pruning to these experts and loading the
        result gives.  `model.task` names the task, and `model.bytes_read` how much was read.

    Raises:
        ValueError: a library of another model, an unknown task, or a number of experts that cannot work.
    """
    if (task is None) == (prompt is None):
        raise ValueError("give either a task of the library or a prompt")
    library = library if isinstance(library, PatternLibrary) else PatternLibrary.load(library)
    found = open_source(model, dtype=dtype, **source)
    reader, layers = found.open_weights(), find_moe_layers(found.skeleton)
    library.check_model(identify_model(reader, None), str(model))
    count = resolve_count(layers[0], 0.0, num_experts, 1)
    if prompt is not None:
        tokenizer = load_tokenizer(str(model), **source) if tokenizer is None else tokenizer
        task = match_prompt(found, library, prompt, tokenizer, device)[0][0]
    scores = library.task_scores(task)
    places = layers_by_position(found.skeleton, layers)
    retained = {
        position: select_experts(own, count, places[position].num_groups)
        for position, own in zip(library.layers, scores, strict=True)
    }
    loaded = load_experts(found, retained, default_device(device))
    loaded.task, loaded.bytes_read = task, reader.bytes_read
    return loaded


def match_prompt(
    found: Source, library: PatternLibrary, prompt: str, tokenizer: Any, device: str | None = None
) -> list[tuple[str, float]]:
    """Order a library's tasks by how near they are to a prompt in the first MoE layer's scores, nearest first."""
    batches = load_batches([prompt], tokenizer, sequence_length=2048)
    return library.nearest(first_layer_scores(found, batches, library.settings, device))


def load_experts(found: Source, retained: Mapping[int, Tensor], device: torch.device) -> nn.Module:
    """Load a checkpoint with only some of its experts.

    Args:
        found: the checkpoint; its skeleton becomes the model.
        retained: (N,) experts to keep, ascending, by the position of each MoE layer.
        device: to load to.
    """
    model, reader = found.skeleton, found.open_weights()
    layers = find_moe_layers(model)
    names = NameMap(model, list(reader.infos))
    tensors = {name: reader.lazy(name) for name in names.target}
    if layers[0].twins:
        raise ValueError(f"two stacks share the experts of {layers[0].name}; load this model whole, and compress it")
    for position, layer in layers_by_position(model, layers).items():
        tensors |= _retained_tensors(model, layer, reader, names, retained[position])
    for position, layer in layers_by_position(model, layers).items():
        shrink_(layer, len(retained[position]), layer.width)
    tensors = {name: lazy for name, lazy in tensors.items() if lazy is not None}
    write_counts_(model, layers, len(next(iter(retained.values()))))
    load_tensors_(model, tensors, device)
    reader.close()
    model.tie_weights(recompute_mapping=False)
    return model.to(device).eval()


def _retained_tensors(
    model: Any, layer: MoELayer, reader: CheckpointReader, names: NameMap, retained: Tensor
) -> dict[str, LazyTensor | None]:
    """Map a layer's tensors, by the names that they have with N experts, to parts of those stored; None for no use."""
    tensors: dict[str, LazyTensor | None] = {}
    before, after = layer_parameters(layer, layer.num_experts), layer_parameters(layer, len(retained))
    for parameter, meta in before.items():
        groups = names.by_expert(model, parameter, meta.shape) if parameter.startswith(layer.experts_name) else None
        if groups is not None:
            tensors |= {name: None for group in groups for name in group}
            own = names.by_expert(model, parameter, after[parameter].shape)
            for group, expert in zip(own, retained.tolist(), strict=True):
                tensors |= {name: reader.lazy(old) for name, old in zip(group, groups[expert], strict=True)}
            continue
        stored, smaller = (names.original(model, {parameter: one}) for one in (meta, after[parameter]))
        for name, piece in stored.items():
            dims = [d for d, (a, b) in enumerate(zip(piece.shape, smaller[name].shape, strict=True)) if a != b]
            tensors[name] = reader.part(name, retained, dims[0]) if dims else reader.lazy(name)
    return tensors
