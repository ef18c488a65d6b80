"""`DernCompressor`: the Optimum-style entry point, from a model and some text to a smaller model and a report."""

import time
from pathlib import Path
from typing import Any

from .config import DernConfig
from .reporting.report import CompressionReport, LayerReport, ModelSize


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

    def compress_model(self, model: Any, tokenizer: Any = None, batches: list[dict] | None = None) -> Any:
        """Compress a model in memory, in place.

        Whatever can be refused is refused before any work, and an error or interrupt later puts the model back as it
        was: the original experts stay in memory until the last layer is done.

        Args:
            model: a transformers causal language model with MoE layers.
            tokenizer: object, Hub id or path, for calibration data that is text; by default the model's own.
            batches: the calibration data, where `prepare` has made it for this model already.

        Returns:
            The same model: fewer experts, its config updated.  `self.report`, also `model.dern_report`, tells what was
            done; `model.save_pretrained` and `model.push_to_hub` publish it as this compressor would.

        Raises:
            ValueError: a model, count or dataset that cannot work.
        """
        from .calibration.model_batches import load_model_batches
        from .checkpoint.orientation import keep_orientation_
        from .checkpoint.publishing import keep_publishable_
        from .checkpoint.source import source_config
        from .engine.layers import compress_layers_
        from .models.mode import evaluation_mode
        from .models.refusals import check_materialised
        from .models.size import measure_model
        from .models.structure import find_moe_layers
        from .models.view import restored_on_error, write_counts_

        started = time.perf_counter()
        layers = find_moe_layers(model)
        num_experts = self.check(model, layers)
        check_materialised(layers)
        before, source = measure_model(model, layers), source_config(model)
        keep_orientation_(model)
        batches = load_model_batches(self.config, model, tokenizer) if batches is None else batches
        reports = []
        if num_experts < before.experts:
            with evaluation_mode(model), restored_on_error(layers):
                reports = compress_layers_(model, layers, batches, self.config, num_experts)
            write_counts_(model, layers, num_experts)
        seconds = time.perf_counter() - started
        self.report = self._make_report(model, before, batches, reports, seconds)
        keep_publishable_(model, self.report, source)
        return model

    def compress_checkpoint(
        self,
        model: str | Path,
        output: str | Path,
        tokenizer: Any = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        max_shard_size: str | int | None = None,
        max_memory: str | int | None = None,
        restart: bool = False,
        overwrite: bool = False,
    ) -> CompressionReport:
        """Compress a checkpoint on disk into another, with one decoder layer in memory at a time.

        Interrupted at any moment, the same call goes on at the first unfinished layer.  Where `accelerate launch` or
        `torchrun` has started several processes, all make this call, and share the work.

        Args:
            model: folder or Hub id of a safetensors checkpoint.
            output: folder; it must be empty or hold an unfinished run of the same kind.
            tokenizer: object, Hub id or path; by default the checkpoint's own.
            revision: branch, tag or commit of a Hub model.
            token: for a private one.
            trust_remote_code: run modelling code from the checkpoint.
            device: where layers are computed; by default a GPU where there is one, for each process its own.
            dtype: of the output, "bfloat16", "float16" or "float32"; by default as stored.
            max_shard_size: of one safetensors file; by default as large as the source's largest.
            max_memory: bytes, or a text such as "8GiB", that a CPU run may take; hidden states go to a file where that
                keeps it, and what cannot keep it is refused.
            restart: discard an unfinished run in the output folder.
            overwrite: allow other files in the output folder; an earlier checkpoint there is replaced at the end.

        Returns:
            The report, also `self.report`.

        Raises:
            ValueError: a checkpoint, count, dataset or output folder that cannot work.
            FileNotFoundError: weights that are not there, or only pickled ones.
            RuntimeError: another run is at the output folder.
            ProcessFailed: another process of this run has ended.
        """
        import torch

        from .calibration.data import holds_text
        from .calibration.model_batches import load_model_batches
        from .checkpoint.preparation import find_checkpoint, prepare_output
        from .checkpoint.shards import parse_bytes
        from .checkpoint.tensor_file import dtype_name
        from .engine.checkpoint import CheckpointTask, compress_checkpoint
        from .engine.distributed import joined_processes
        from .engine.memory import plan_memory
        from .models.structure import find_moe_layers

        shard_size = parse_bytes(max_shard_size) if max_shard_size else None
        bound = parse_bytes(max_memory) if max_memory else None
        with joined_processes(device) as processes:
            source = processes.main_first(lambda: find_checkpoint(model, revision, token, trust_remote_code, dtype))
            skeleton = source.skeleton
            layers = find_moe_layers(skeleton)
            num_experts = self.check(skeleton, layers)
            if num_experts == layers[0].num_experts:
                raise ValueError(f"nothing to compress: every layer would keep all of its {num_experts} experts")
            output = processes.on_main(lambda: prepare_output(source.folder, Path(output), restart, overwrite))
            tokenizer = source.folder if tokenizer is None and holds_text(self.config.dataset) else tokenizer
            batches = processes.on_main(lambda: load_model_batches(self.config, skeleton, tokenizer))
            tokens = sum(batch["input_ids"].numel() for batch in processes.share(batches))
            memory = plan_memory(skeleton, layers, tokens, self.config, num_experts, bound)
            reader = processes.main_first(source.open_weights)
            self.report = compress_checkpoint(
                CheckpointTask(
                    model=skeleton,
                    layers=layers,
                    reader=reader,
                    name=str(model),
                    revision=source.commit,
                    batches=batches,
                    config=self.config,
                    num_experts=num_experts,
                    output=output,
                    max_shard_size=shard_size or reader.largest_file,
                    spill=memory.spilled,
                    dtype=dtype and dtype_name(getattr(torch, dtype)),
                    processes=processes,
                )
            )
        return self.report

    def prepare(self, model: Any, tokenizer: Any = None) -> list[dict]:
        """Do what comes before the long work, on a model whose weights need not be there yet.

        Args:
            model: to be compressed; it may be on the meta device.
            tokenizer: as in `compress_model`.

        Returns:
            The calibration data, for `compress_model`.

        Raises:
            ValueError: a model, count or dataset that cannot work.
        """
        from .calibration.model_batches import load_model_batches

        self.check(model)
        return load_model_batches(self.config, model, tokenizer)

    def check(self, model: Any, layers: list | None = None) -> int:
        """Refuse whatever cannot work before any long work begins.

        Args:
            model: to be compressed; it may be on the meta device.
            layers: its MoE layers, where they are known already.

        Returns:
            How many experts every layer would keep.

        Raises:
            ValueError: what was found, what is allowed, and the mend.
        """
        from .models.refusals import check_model, check_protection, resolve_count
        from .models.structure import find_moe_layers, layers_by_position

        config, layers = self.config, find_moe_layers(model) if layers is None else layers
        self.check_names()
        check_model(model, layers)
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

        save_checkpoint(model, Path(output), self._require_report(), tokenizer, max_shard_size)

    def push_to_hub(
        self,
        model: Any,
        repo_id: str,
        tokenizer: Any = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        folder: str | Path | None = None,
        max_shard_size: str | int = "5GB",
    ) -> str:
        """Save a compressed model and publish the folder in one commit; a card that the repository has stays.

        Args:
            model: what `compress_model` returned.
            repo_id: `name` or `namespace/name`; created if missing.
            tokenizer: as in `save`.
            private: whether a new repository is private; None leaves it to the account's default.
            token: of the Hub; by default the one of `hf auth login`.
            revision: branch to commit to.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.
            folder: where to save first; by default a temporary one, which stays if the push fails.
            max_shard_size: of one safetensors file.

        Returns:
            URL of the commit.

        Raises:
            ValueError: nothing has been compressed by this compressor yet.
            HubPushError: the Hub refused; the message names the folder that holds the checkpoint.
        """
        from .checkpoint.hub import push_checkpoint

        self._require_report()
        return push_checkpoint(
            lambda path: self.save(model, path, tokenizer, max_shard_size),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            folder=folder,
        )

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-able values, with the versions of the tools under `meta`."""
        from .versions import tool_versions

        return {**self.config.to_dict(), "meta": {"compressor": [f"{k}:{v}" for k, v in tool_versions().items()]}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DernCompressor":
        """A compressor with the config of `to_dict`."""
        return cls(**{name: value for name, value in values.items() if name != "meta"})

    def _make_report(
        self, model: Any, before: ModelSize, batches: list[dict], layers: list[LayerReport], seconds: float
    ) -> CompressionReport:
        from .calibration.description import describe_calibration, recordable_dataset
        from .checkpoint.source import model_source
        from .engine.progress import peak_memory_bytes
        from .models.size import measure_model
        from .models.structure import find_moe_layers
        from .versions import tool_versions

        name, revision = model_source(model)
        return CompressionReport(
            source=name,
            revision=revision,
            model_type=model.config.model_type,
            method=self.config.method,
            config={**self.config.to_dict(), "dataset": recordable_dataset(self.config.dataset)},
            calibration=describe_calibration(self.config.dataset, batches),
            before=before,
            after=measure_model(model, find_moe_layers(model)),
            layers=layers,
            versions=tool_versions(),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(model.device),
        )

    def _require_report(self) -> CompressionReport:
        if self.report is None:
            raise ValueError("this compressor has not compressed a model yet; call compress_model first")
        return self.report
