"""Devices that are not there are refused by name, before anything is opened."""

import pytest
import torch

from optimum_dern import DernCompressor
from optimum_dern.machine.torch_state import check_device


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "meta"])
def test_devices_that_are_there(device):
    """The CPU always is; models without weights are refused elsewhere."""
    check_device(device)


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
