"""Shards that would not fit on the disk are refused before anything is computed."""

import shutil
from types import SimpleNamespace

import pytest

from optimum_dern.checkpoint.output.shards import OutputTensor, ShardWriter, check_room, check_space


def test_room_on_the_disk(tmp_path, monkeypatch):
    """All results count; a run that has begun is left to go on, as what it has written takes room already."""
    plan = {"model.safetensors": [OutputTensor("a", "F32", (1 << 18,))]}  # 1 MiB
    plans = {tmp_path / name: plan for name in ("6", "4")}
    for work in plans:
        work.mkdir()
    room = SimpleNamespace(free=(2 << 20) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(OSError, match="take 0.00195 GiB, and 0.00195 GiB are free") as caught:
        check_room(tmp_path, plans)
    assert caught.value.filename == str(tmp_path)
    room.free += 1
    check_room(tmp_path, plans)
    room.free = 0
    ShardWriter(tmp_path / "6", plan).close()
    check_room(tmp_path, plans)


def test_room_for_a_new_folder(tmp_path, monkeypatch):
    """The disk is that of the nearest folder there is."""
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=9))
    check_space(tmp_path / "deep" / "out", 9)
    assert asked == [tmp_path]
    with pytest.raises(OSError, match="are free") as caught:
        check_space(tmp_path / "deep" / "out", 10)
    assert caught.value.filename == str(tmp_path / "deep" / "out")
