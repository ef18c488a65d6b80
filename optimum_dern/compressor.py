"""`DernCompressor`: the main class; compresses a model with calibration text and reports what it did."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checks.arguments import check_argument
from .checks.batches import check_batches
from .config import DernConfig
from .machine.torch_state import check_device, devices_of, plain_torch
from .options import without_retired
from .results.report import CompressionReport


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
        if config is not None:
            check_argument("config", config, DernConfig, "a DernConfig")
        self.config = config if config is not None else DernConfig(**fields)
        self.report: CompressionReport | None = None

    @plain_torch()
    def compress_model(
        self,
        model: Any,
        tokenizer: Any = None,
        batches: list[dict] | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> Any:
        """Compress a model in memory, in place.

        Whatever can be refused is refused before any work, and an error or interrupt later puts the model back as it
        was: the original experts stay in memory until the last layer is done.

        Args:
            model: a transformers causal language model with MoE layers.
            tokenizer: object, Hub id or path, for calibration data that is text; by default the model's own.
            batches: calibration batches that `prepare` has already made for this model.
            trust_remote_code: run a tokenizer's own code.

        Returns:
            The same model: fewer experts or dense layers, its config updated.  `self.report`, also
            `model.dern_report`, tells what was done; `model.save_pretrained` and `model.push_to_hub` publish it as
            this compressor would.

        Raises:
            ValueError: a model, device, count or dataset that cannot work, or a model with adapters.
            TypeError: a path or Hub id instead of a model.
        """
        if not hasattr(model, "named_modules"):
            raise TypeError(
                f"compress_model takes a loaded model, not {str(model)!r:.80}; compress_checkpoint(MODEL, OUTPUT) "
                "takes a folder or Hub id, or load it with AutoModelForCausalLM.from_pretrained first"
            )
        from .checkpoint.output.publishing import keep_publishable_
        from .checkpoint.source.orientation import keep_orientation_
        from .checkpoint.source.provenance import model_source, source_config
        from .condensing.condense import condense_in_memory_
        from .condensing.layer import Fit
        from .condensing.plan import plan_condensing
        from .engine.run.checks import warn_of_padding, with_dataset
        from .engine.run.in_memory import compress_in_memory_
        from .engine.run.model_batches import with_text_it_can_write
        from .engine.run.own_text import OwnText
        from .engine.run.run_report import make_report
        from .models.moe.structure import find_moe_layers
        from .models.refusals import check_materialised
        from .models.size import measure_model
        from .results.description import describe_calibration

        started = time.perf_counter()
        check_device(model.device)
        layers = find_moe_layers(model)
        num_experts = self.check(model, layers)
        check_materialised(layers)
        warn_of_padding(self.config, layers[0])
        before, source = measure_model(model, layers), source_config(model)
        keep_orientation_(model)
        config, own = self.config, OwnText(model)
        if batches is None:
            config = with_text_it_can_write(with_dataset(config), model)
            batches = _load_batches(config, model, tokenizer, trust_remote_code, own)
        if batches != []:  # as of a config that needs no data
            check_batches(batches, model.get_input_embeddings().weight.shape[0])
        reports = []
        if num_experts < before.experts or self.config.narrows:
            reports = compress_in_memory_(model, layers, batches, config, num_experts)
        elif config.condensed_layers is not None:
            plan = plan_condensing(model, layers, config.condensed_layers, config.num_experts)
            reports = condense_in_memory_(model, plan, batches, Fit.of(config))
        self.report = make_report(
            config,
            model.config.model_type,
            model_source(model),
            (before, measure_model(model, find_moe_layers(model))),
            reports,
            describe_calibration(config.dataset, batches),
            started,
            devices_of(model),
            dict.fromkeys(("computed", "written"), str(model.dtype).removeprefix("torch.")),
        )
        self.report.own_text = own.rows
        keep_publishable_(model, self.report, source)
        return model

    @plain_torch()
    def compress_checkpoint(
        self,
        model: str | Path,
        output: str | Path,
        tokenizer: Any = None,
        *,
        num_experts: int | Sequence[int] | None = None,
        sparsity: float | Sequence[float] | None = None,
        statistics: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        dtype: Any = None,
        max_shard_size: str | int | None = None,
        max_memory: str | int | None = None,
        restart: bool = False,
        overwrite: bool = False,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> CompressionReport | list[CompressionReport]:
        """Compress a checkpoint on disk into another one, holding one decoder layer in memory at a time.

        Interrupted at any moment, the same call goes on at the first unfinished layer.  Where `accelerate launch` or
        `torchrun` has started several processes, all make this call, and share the work.

        Several amounts give several checkpoints out of one pass over the source and the calibration data, each to
        the bit what a run of its own gives, in folders of `output` such as `96-experts`.

        Args:
            model: folder or Hub id of a safetensors checkpoint.
            output: folder; it must be empty or hold an unfinished run of the same kind.
            tokenizer: object, Hub id or path; by default the checkpoint's own.
            num_experts: how many experts stay per layer, instead of the config's amount; a list for several results.
            sparsity: fraction of the experts dropped per layer; a list for several results.
            statistics: `dern_statistics.safetensors` of an earlier oneshot run, instead of calibration data; it is
                enough for configs without refit and guard.
            revision: branch, tag or commit of a Hub model.
            token: access token for a private Hub model.
            trust_remote_code: run modelling and tokenizer code from the checkpoint.
            device: where layers are computed; by default a GPU where there is one, for each process its own.
            dtype: of the output, a `torch.dtype` or its name: "bfloat16" (or "bf16"), "float16" or "float32"; by
                default as stored.
            max_shard_size: of one safetensors file; by default as large as the source's largest.
            max_memory: limit of a CPU run, in bytes or as text such as "8GiB"; hidden states are kept in a file where
                that is needed, and a run that would exceed the limit is refused.
            restart: discard an unfinished run in the output folder.
            overwrite: allow other files in the output folder; an earlier checkpoint there is replaced at the end, a
                README.md of something else is renamed; adapters and weights of other formats are refused.
            subfolder: of the folder or repository, in which the checkpoint is.
            cache_dir: where a Hub model is kept; by default where transformers keeps its own.
            local_files_only: download nothing, use only cached files.
            force_download: download again even if cached.

        Returns:
            The report, a list of them for a list of amounts; the last one is also `self.report`.

        Raises:
            ValueError: a checkpoint, device, dtype, count, dataset, statistics file or output folder that cannot work.
            FileNotFoundError: weights that are not there, or only pickled ones.
            RuntimeError: another run is at the output folder.
            ProcessFailed: another process of this run has ended.
        """
        from .condensing.run.checkpoint import condense_checkpoint
        from .engine.run.checkpoint import compress_checkpoint
        from .engine.run.checks import configs_for
        from .engine.run.prepare import CheckpointRequest, prepare_task
        from .machine.processes import joined_processes

        check_device(device)
        request = CheckpointRequest(
            model=model,
            output=output,
            configs=configs_for(self.config, num_experts, sparsity),
            tokenizer=tokenizer,
            statistics=statistics,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            restart=restart,
            overwrite=overwrite,
            download={
                "subfolder": subfolder,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "force_download": force_download,
            },
        )
        with joined_processes(device) as processes:
            run = compress_checkpoint if self.config.condensed_layers is None else condense_checkpoint
            reports = run(prepare_task(request, processes))
        self.report = reports[-1]
        several = isinstance(num_experts, Sequence) or isinstance(sparsity, Sequence)
        return reports if several else self.report

    @plain_torch()
    def prepare(self, model: Any, tokenizer: Any = None, *, trust_remote_code: bool = False) -> list[dict] | None:
        """Check a model and load the calibration data, before its weights have to be loaded.

        Args:
            model: to be compressed; it may be on the meta device.
            tokenizer: as in `compress_model`.
            trust_remote_code: as in `compress_model`.

        Returns:
            The calibration data, for `compress_model`; None where the model itself is to write some of it, for which
            it needs its weights: `compress_model` then loads all of it.

        Raises:
            ValueError: a model, count or dataset that cannot work.
        """
        from .engine.run.checks import with_dataset
        from .engine.run.model_batches import with_text_it_can_write, writes_text

        self.check(model)
        config = with_text_it_can_write(with_dataset(self.config), model)
        batches = _load_batches(config, model, tokenizer, trust_remote_code)
        return None if config.dataset is not None and writes_text(config) else batches

    @plain_torch()
    def check(self, model: Any, layers: list | None = None) -> int:
        """Check that a model can be compressed with this config, before any long work.

        Args:
            model: to be compressed; it may be on the meta device.
            layers: its MoE layers, if the caller has already found them.

        Returns:
            How many experts every layer would keep.

        Raises:
            ValueError: the model or config cannot work; the message says why and how to mend it.
        """
        from .engine.run.checks import check_request
        from .models.adapters import check_no_adapter
        from .models.moe.structure import find_moe_layers
        from .paths import check_utf8

        check_no_adapter(model, "compressed")
        check_utf8(model.config.name_or_path)
        return check_request(self.config, model, find_moe_layers(model) if layers is None else layers)

    def save(self, model: Any, output: str | Path, tokenizer: Any = None, max_shard_size: str | int = "5GB") -> None:
        """Write a compressed model as an ordinary checkpoint with its card, report and provenance.

        Args:
            model: what `compress_model` returned, trained since then or not.
            output: folder; created if missing, files of an earlier checkpoint in it are replaced, a README.md of
                something else is renamed; adapters and weights of other formats are refused.
            tokenizer: object, Hub id or path; by default the source's own, unless it would run
                code of its own to load it from the Hub; a warning says so where none is saved.
            max_shard_size: of one safetensors file.

        Raises:
            ValueError: nothing has been compressed by this compressor yet, another model, one with adapters that are
                not merged, or the source's own folder.
        """
        from .checkpoint.output.writer import save_checkpoint

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
        """Save a compressed model and upload it to the Hub in one commit; an existing model card is kept.

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
            ValueError: as in `save`.
            HubPushError: the Hub refused; the message names the folder that holds the checkpoint.
        """
        from .checkpoint.hub.push import push_checkpoint
        from .models.adapters import check_no_adapter

        self._require_report()
        check_no_adapter(model, "published")  # before a repository is made
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
        """Return the config as JSON-able values, with the package versions under `meta`."""
        from .versions import tool_versions

        return {**self.config.to_dict(), "meta": {"compressor": [f"{k}:{v}" for k, v in tool_versions().items()]}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DernCompressor":
        """Create a compressor from a dictionary made by `to_dict`."""
        check_argument("the config", values, Mapping, "a dict of DernConfig fields")
        return cls(**{name: value for name, value in without_retired(values).items() if name != "meta"})

    def _require_report(self) -> CompressionReport:
        if self.report is None:
            raise ValueError("this compressor has not compressed a model yet; call compress_model first")
        return self.report


def _load_batches(config: DernConfig, model: Any, tokenizer: Any, trust_remote_code: bool, own: Any = None) -> list:
    """Load the calibration batches; an empty list if the config has no dataset."""
    from .engine.run.model_batches import load_model_batches

    return [] if config.dataset is None else load_model_batches(config, model, tokenizer, trust_remote_code, own)
