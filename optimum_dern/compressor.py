"""`DernCompressor`: the Optimum-style entry point, from a model and some text to a smaller model and a report."""

import time
from pathlib import Path
from typing import Any

from .config import DernConfig
from .reporting.report import CompressionReport


__all__ = ["DernCompressor"]


class DernCompressor:
    """Compress Mixture-of-Experts models without training.

    Args:
        config: a `DernConfig`; or leave it out and give its fields as keyword arguments.
        **fields: fields of `DernConfig`.

    Raises:
        ValueError: both a config and fields, or a field outside its range.
    """

    def __init__(self, config: DernConfig | None = None, **fields: Any) -> None:
        if config is not None and fields:
            raise ValueError(f"give either a DernConfig or its fields, not both (got {', '.join(sorted(fields))})")
        self.config = config if config is not None else DernConfig(**fields)
        self.report: CompressionReport | None = None

    def compress_model(self, model: Any, tokenizer: Any = None) -> Any:
        """Compress a model in memory, in place.

        Whatever can be refused is refused before any work, and an error or interrupt later puts the model back as it
        was: the original experts stay in memory until the last layer is done.

        Args:
            model: a transformers causal language model with MoE layers.
            tokenizer: object, Hub id or path; needed where the calibration data is text.

        Returns:
            The same model: fewer experts, its config updated.  `self.report` tells what was done.

        Raises:
            ValueError: a model, count or dataset that cannot work.
        """
        from .calibration.description import describe_calibration, recordable_dataset
        from .engine.layers import compress_layers_
        from .engine.progress import peak_memory_bytes
        from .models.mode import evaluation_mode
        from .models.size import measure_model
        from .models.structure import find_moe_layers
        from .models.view import restored_on_error, write_counts_
        from .versions import tool_versions

        started = time.perf_counter()
        layers = find_moe_layers(model)
        num_experts = self.check(model, layers)
        before = measure_model(model, layers)
        batches = self._load_batches(model, tokenizer)
        reports = []
        if num_experts < before.experts:
            with evaluation_mode(model), restored_on_error(layers):
                reports = compress_layers_(model, layers, batches, self.config, num_experts)
            write_counts_(model, layers, num_experts)
        self.report = CompressionReport(
            source=model.config._name_or_path or None,
            revision=getattr(model.config, "_commit_hash", None),
            model_type=model.config.model_type,
            method=self.config.method,
            config={**self.config.to_dict(), "dataset": recordable_dataset(self.config.dataset)},
            calibration=describe_calibration(self.config.dataset, batches),
            before=before,
            after=measure_model(model, find_moe_layers(model)),
            layers=reports,
            versions=tool_versions(),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(model.device),
        )
        return model

    def check(self, model: Any, layers: list | None = None) -> int:
        """Refuse whatever cannot work before any long work begins.

        Args:
            model: to be compressed.
            layers: its MoE layers, where they are known already.

        Returns:
            How many experts every layer would keep.

        Raises:
            ValueError: what was found, what is allowed, and the mend.
        """
        from .models.refusals import check_materialised, check_model, check_protection, resolve_count
        from .models.structure import find_moe_layers, layers_by_position

        config, layers = self.config, find_moe_layers(model) if layers is None else layers
        self.check_names()
        check_model(model, layers)
        check_materialised(layers)
        if config.dataset is None:
            raise ValueError("no calibration data: give dataset=..., for example a list of texts, a file, or 'c4'")
        count = resolve_count(layers[0], config.sparsity, config.num_experts, config.experts_multiple_of)
        check_protection(layers_by_position(model, layers), config.protect_experts or {}, count)
        return count

    def check_names(self) -> None:
        """Refuse an unknown method or selection criterion; needs no model.

        Raises:
            ValueError: naming those that exist.
        """
        from .core.saliency import check_criterion
        from .methods import get_method

        get_method(self.config.method)
        check_criterion(self.config.selection)

    def save(self, model: Any, output: str | Path, tokenizer: Any = None, max_shard_size: str | int = "5GB") -> None:
        """Write a compressed model as an ordinary checkpoint with its card, report and provenance.

        Args:
            model: what `compress_model` returned.
            output: folder; created if missing, files of an earlier checkpoint in it are replaced.
            tokenizer: object, Hub id or path; by default the files beside a local source checkpoint.
            max_shard_size: of one safetensors file.

        Raises:
            ValueError: nothing has been compressed by this compressor yet.
        """
        from .checkpoint.writer import save_checkpoint

        if self.report is None:
            raise ValueError("this compressor has not compressed a model yet; call compress_model first")
        save_checkpoint(model, Path(output), self.report, tokenizer, max_shard_size)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-able values, with the versions of the tools under `meta`."""
        from .versions import tool_versions

        return {**self.config.to_dict(), "meta": {"compressor": [f"{k}:{v}" for k, v in tool_versions().items()]}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DernCompressor":
        """A compressor with the config of `to_dict`."""
        return cls(**{name: value for name, value in values.items() if name != "meta"})

    def _load_batches(self, model: Any, tokenizer: Any) -> list[dict]:
        from .calibration.data import load_batches

        config = self.config
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.sequence_length
        batches = load_batches(
            config.dataset,
            load_tokenizer(tokenizer),
            num_samples=config.num_samples,
            sequence_length=min(config.sequence_length, limit),
            batch_size=config.batch_size,
            seed=config.seed,
            text_column=config.text_column,
        )
        vocabulary = model.get_input_embeddings().weight.shape[0]
        for batch in batches:
            outside = batch["input_ids"][(batch["input_ids"] < 0) | (batch["input_ids"] >= vocabulary)]
            if len(outside):
                raise ValueError(
                    f"the calibration data has token {outside[0].item()}, but the model's vocabulary has {vocabulary} "
                    "entries; give the tokenizer that belongs to the model"
                )
        return batches


def load_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer object from an object, a Hub id or a path; None stays None."""
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    return tokenizer
