"""Detection of models with PEFT adapters, without importing peft."""

from torch import nn


__all__ = ["check_no_adapter", "has_adapter"]


def has_adapter(model: nn.Module) -> bool:
    """Return whether a model is wrapped by peft or contains peft layers, merged or not."""
    return any(base.__module__.split(".")[0] == "peft" for module in model.modules() for base in type(module).__mro__)


def check_no_adapter(model: nn.Module, task: str) -> None:
    """Refuse a model with PEFT adapters, whose tensor names differ from those of a plain checkpoint.

    Args:
        model: of transformers, or wrapped by peft.
        task: participle of the refused operation for the message, such as "compressed".

    Raises:
        ValueError: it has adapters; the message tells how to merge them.
    """
    if has_adapter(model):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, so it cannot be {task}: its weights are not those of a "
            "plain checkpoint, not even after merge_adapter(). Merge first, and give what comes back: "
            "model = peft_model.merge_and_unload() (a saved adapter becomes a peft_model by PeftModel.from_pretrained)"
        )
