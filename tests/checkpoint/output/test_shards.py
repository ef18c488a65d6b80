"""Shards that would not fit on the disk are refused before anything is computed."""

import os
import shutil
from types import SimpleNamespace

import pytest

from optimum_dern.checkpoint.output.shards import OutputTensor, ShardWriter, check_room


def test_room_on_the_disk(tmp_path, monkeypatch):
    """All results count, and what an interrupted run has written counts no more."""
    plan = {"model.safetensors": [OutputTensor("a", "F32", (1 << 18,))]}  # 1 MiB
    plans = {tmp_path / name: plan for name in ("6", "4")}
    for work in plans:
        work.mkdir()
    free = SimpleNamespace(free=(2 << 20) - (1 << 16))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=r"take 0.00195 GiB, and 0.00189 GiB are free") as caught:
        check_room(tmp_path, plans)
    assert caught.value.filename == str(tmp_path)
    writer = ShardWriter(tmp_path / "6", plan)
    with pytest.raises(OSError, match="are free"):  # space is taken when it is written to
        check_room(tmp_path, plans)
    place = writer.places["a"]
    (file,) = writer._files.values()
    os.pwrite(file, bytes(place.size), place.start)
    os.fsync(file)
    check_room(tmp_path, plans)
    writer.close()
