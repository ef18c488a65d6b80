"""Models that carry adapters (PEFT), told without importing peft: what they compute is not what they store."""

from torch import nn


__all__ = ["check_no_adapter", "has_adapter"]


def has_adapter(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft, or has layers of it inside: merged into their weights or not."""
    return any(base.__module__.split(".")[0] == "peft" for module in model.modules() for base in type(module).__mro__)


def check_no_adapter(model: nn.Module, task: str) -> None:
    """Refuse a model with adapters, whose tensors are stored under other names than a plain checkpoint has.

    Args:
        model: of transformers, or wrapped by peft.
        task: what cannot be done with it.

    Raises:
        ValueError: it has adapters; the message tells how to merge them.
    """
    if has_adapter(model):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, so it cannot be {task}: its weights are not those of a "
            "plain checkpoint, not even after merge_adapter(). Merge first, and give what comes back: "
            "model = peft_model.merge_and_unload() (a saved adapter becomes a peft_model by PeftModel.from_pretrained)"
        )
