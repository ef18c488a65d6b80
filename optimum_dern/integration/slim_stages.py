"""`SlimStages`: make experts narrower in several stages, with distillation after each (SlimMoE, arXiv 2506.18349)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from ..compressor import DernCompressor
from ..evaluation.agreement.logits_cache import LogitsCache
from .distillation import DistillationTrainer


__all__ = ["SlimStages"]


@dataclass(frozen=True)
class SlimStages:
    """Stages of neuron pruning and distillation: prune to a width, train so many steps, prune on, train on.

    Args:
        stages: (width, steps) of each, widths falling.

    Raises:
        ValueError: no stage, widths that do not fall, or a negative number of steps.
    """

    stages: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        widths = [width for width, _ in self.stages]
        if not widths or widths != sorted(set(widths), reverse=True):
            raise ValueError(f"stages have the widths {widths}; give at least one, each smaller than the one before")
        if min(steps for _, steps in self.stages) < 0:
            raise ValueError(f"stages have the steps {[steps for _, steps in self.stages]}; give none below 0")

    def run(
        self,
        model: nn.Module,
        args: Any,
        *,
        teacher: nn.Module | LogitsCache,
        train_dataset: Any,
        data_collator: Any,
        tokenizer: Any = None,
        **compression: Any,
    ) -> nn.Module:
        """Run all stages; a run that was interrupted goes on where it was, in the same output folder.

        Args:
            model: the original, which is compressed and trained in place; give another copy as a teacher.
            args: `TrainingArguments`; each stage sets `max_steps`, and has a folder of its own in `output_dir`, with
                the trainer's checkpoints and at its end the model.
            teacher: of the `DistillationTrainer`: the original model, or a cache of its predictions.
            train_dataset: rows to train on.
            data_collator: makes batches of them.
            tokenizer: for the calibration data, and saved with the model; by default the model's own.
            **compression: fields of `DernConfig` beside the width, such as `dataset`; the method is "slim", and refits
                are left to the training unless asked for.

        Returns:
            The model after the last stage: the one given, or one loaded from where an earlier run has ended.
        """
        options = {"method": "slim", "preset": "paper"} | compression
        for number, (width, steps) in enumerate(self.stages, start=1):
            folder = Path(args.output_dir) / f"stage-{number}-width-{width}"
            done = folder / "model"
            if (done / "config.json").is_file():
                model = type(model).from_pretrained(done, dtype=model.dtype)
                continue
            compressor = DernCompressor(width=width, **options)
            compressor.compress_model(model, tokenizer)
            own = copy.copy(args)
            own.output_dir, own.max_steps = str(folder / "trainer"), max(1, steps)
            trainer = DistillationTrainer(
                model, own, teacher=teacher, train_dataset=train_dataset, data_collator=data_collator
            )
            if steps:
                trainer.train(resume_from_checkpoint=_last_checkpoint(own.output_dir))
            compressor.report.add_training(f"stage {number}: {steps} steps of distillation at a width of {width}")
            compressor.save(model, folder / "saving", tokenizer)
            (folder / "saving").replace(done)  # so that an interrupted stage never looks finished
        return model


def _last_checkpoint(folder: str) -> str | None:
    """Return the trainer's last checkpoint in a folder, if there is one."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None
