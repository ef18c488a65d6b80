"""Devices that are not there are refused by name, before anything is opened; modules get their modes back."""

import pytest
import torch

from optimum_dern import DernCompressor
from optimum_dern.machine.torch_state import check_device, evaluation_mode, plain_torch


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "meta"])
def test_devices_that_are_there(device):
    """The CPU always is; models without weights are refused elsewhere."""
    check_device(device)


def test_no_accelerator(monkeypatch):
    """torch 2.6 raises where later ones return None."""

    def current_accelerator():
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with plain_torch():
        check_device("cpu")
    with pytest.raises(ValueError, match="finds the cpu alone"):
        check_device("cuda")


def test_several_gpus(monkeypatch):
    """A device without a number is any of them; one past the last is not there."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0), "cpu"):
        check_device(device)
    for device in ("cuda:2", "xpu"):
        with pytest.raises(ValueError, match=f"no device '{device}' here: .* the cpu and cuda:0 to cuda:1; name"):
            check_device(device)


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("gpu", "'gpu' is not a device of torch; give cpu or cuda"),
        ("cuda:99", "there is no device 'cuda:99' here: torch .* finds the cpu"),
        ("xpu:99", "there is no device 'xpu:99'"),
        ("mps", "has no float64"),
    ],
)
def test_devices_that_cannot_work(device, match, tmp_path):
    """The message names what is there; nothing is written."""
    with pytest.raises(ValueError, match=match):
        check_device(device)
    with pytest.raises(ValueError, match=match):
        DernCompressor().compress_checkpoint(tmp_path / "nowhere", tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", [True, False])
def test_every_module_gets_its_own_mode_back(fails):
    """A frozen part of a model in training stays frozen, also after an error."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [module.training for module in model.modules()] == before == [True, True, False, False, False]
