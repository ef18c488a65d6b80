"""`ModelSession`: the requests that a process with one model answers, on its size, quality, speed and memory."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file, logging

from ...checkpoint.format.weight_files import weight_names
from ...checkpoint.source.provenance import load_tokenizer
from ...machine.progress import peak_memory_bytes, resident_bytes
from ...machine.torch_state import devices_of
from ...models.loading import load_model, model_class
from ...models.moe.structure import find_moe_layers
from ...models.size import measure_model
from ..agreement.logits_cache import LogitsCache, cache_logits
from ..agreement.measure import agreement
from ..loss.perplexity import evaluate_texts, load_texts
from ..tasks.accuracy import evaluate_tasks
from ..tasks.load import load_tasks
from .speed import SpeedSettings, decode_seconds, prefill_seconds, random_prompt


__all__ = ["ModelSession"]


class ModelSession:
    """One loaded model, whose methods measure it and return JSON-able values.

    Args:
        path: checkpoint folder or Hub id.
        device: to compute on.
        loading: `dtype` and `trust_remote_code`.
    """

    def __init__(self, path: str, device: str, loading: dict[str, Any]) -> None:
        self.path, self.device, self.loading = path, device, loading
        self._source = {name: value for name, value in loading.items() if name != "dtype"}
        logging.disable_progress_bar()  # the client has its own

    @cached_property
    def model(self) -> Any:
        """The model, loaded on first use."""
        return load_model(self.path, self.device, **self.loading)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return load_tokenizer(self.path, **self._source)

    def size(self) -> dict[str, Any]:
        """Count parameters, active parameters per token, experts per layer, and the weights' bytes on disk."""
        layers = find_moe_layers(self.model)
        size = measure_model(self.model, layers)
        folder = Path(self.path)
        if not folder.is_dir():
            folder = Path(cached_file(self.path, "config.json")).parent
        files = [folder / name for name in weight_names(folder)]
        facts = {"experts": size.experts, "experts_per_token": layers[0].top_k if layers else 0}
        facts |= {"parameters": size.parameters, "active_parameters": size.active_parameters}
        return facts | {"disk_bytes": sum(file.stat().st_size for file in files)}

    def texts(self, data: str, sequence_length: int, limit: int | None, cache: str, record: bool) -> dict[str, Any]:
        """Measure the loss by text, and cache the predictions (`record`) or compare them with the cached ones."""
        texts = load_texts(data, self.tokenizer, sequence_length, limit=limit)
        losses = evaluate_texts(self.model, texts)
        figures: dict[str, Any] = {"losses": {name: loss.to_dict() for name, loss in losses.items()}}
        if record:
            cache_logits(self.model, texts, Path(cache))
        else:
            found = agreement(self.model, LogitsCache.load(Path(cache)))
            figures["agreement"] = {name: result.to_dict() for name, result in found.items()}
        return figures

    def tasks(self, names: list[str], folder: str | None, limit: int | None) -> dict[str, Any]:
        """Measure the accuracy by task, with the value of every item for paired comparisons."""
        results = evaluate_tasks(self.model, self.tokenizer, load_tasks(names, folder and Path(folder), limit))
        return {name: {**result.to_dict(), "values": result.values()} for name, result in results.items()}

    def warm_up(self, **settings: int) -> int:
        """Run everything that is timed once, and return its peak memory in bytes, weights included."""
        model_class(self.path, **self._source)  # imports the model's code first, whose memory does not count
        before = resident_bytes([torch.device(self.device)])
        self.prefill(**settings)
        self.decode(**settings)
        return peak_memory_bytes(devices_of(self.model)) - before

    def prefill(self, **settings: int) -> float:
        """Measure the seconds of a prompt's forward pass."""
        return prefill_seconds(self.model, self._prompt(SpeedSettings(**settings)))

    def decode(self, **settings: int) -> float:
        """Measure the seconds of token-by-token decoding."""
        speed = SpeedSettings(**settings)
        return decode_seconds(self.model, self._prompt(speed), speed.new_tokens)

    def _prompt(self, speed: SpeedSettings) -> torch.Tensor:
        return random_prompt(speed, self.model.config.get_text_config().vocab_size, self.model.device)
