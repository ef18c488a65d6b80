"""Stages of pruning and distillation: what each leaves, and that an interrupted run goes on where it was."""

import json

import pytest
from distilling import collate, rows
from tiny import make_model, random_tokens, same_state, state_of
from transformers import TrainerCallback, TrainingArguments

from optimum_dern.integration import slim_stages
from optimum_dern.integration.distillation import DistillationTrainer
from optimum_dern.integration.slim_stages import SlimStages
from optimum_dern.models.moe.structure import find_moe_layers


def arguments(folder, **changes):
    fields = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_steps": 2} | changes
    return TrainingArguments(
        output_dir=folder, report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **fields
    )


def run(folder, stages=((12, 4), (8, 4)), model=None):
    options = {"teacher": make_model("mixtral"), "train_dataset": rows(24), "data_collator": collate}
    model = model or make_model("mixtral")
    return SlimStages(list(stages)).run(model, arguments(folder), **options, dataset=random_tokens())


def test_stages_follow_each_other(tmp_path):
    """Every stage is as wide as asked for, was trained, and is kept with its report."""
    model = run(tmp_path)
    assert [layer.width for layer in find_moe_layers(model)] == [8, 8]
    for folder, steps, width in (("stage-1-width-12", 4, 12), ("stage-2-width-8", 4, 8)):
        report = json.loads((tmp_path / folder / "model" / "dern_report.json").read_text())
        assert report["after"]["width"] == width and report["method"] == "slim"
        assert report["training"] == f"stage {folder[6]}: {steps} steps of distillation at a width of {width}"
        assert not (tmp_path / folder / "saving").exists()
    assert not same_state(state_of(model), state_of(run(tmp_path / "untrained", ((12, 0), (8, 0)))))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """Interrupted in the second stage's training, it ends with the weights of a run in one go."""
    whole = run(tmp_path / "whole")

    class Interrupted(Exception):
        pass

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "stage-2" in args.output_dir and state.global_step == 3:
                raise Interrupted

    class Interrupting(DistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Stop())

    monkeypatch.setattr(slim_stages, "DistillationTrainer", Interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "again")
    monkeypatch.setattr(slim_stages, "DistillationTrainer", DistillationTrainer)
    compressed = []
    monkeypatch.setattr(
        slim_stages.DernCompressor,
        "compress_model",
        lambda self, *args, old=slim_stages.DernCompressor.compress_model: compressed.append(1) or old(self, *args),
    )
    assert same_state(state_of(run(tmp_path / "again")), state_of(whole))
    assert len(compressed) == 1  # the second stage's; the first is loaded


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "give at least one"),
        ([(8, 2), (8, 2)], "each smaller than the one before"),
        ([(8, 2), (12, 2)], "each smaller than the one before"),
        ([(8, -1)], "none below 0"),
    ],
)
def test_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        SlimStages(stages)
