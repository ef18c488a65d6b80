"""Free memory goes back to the system."""

import sys
from pathlib import Path

import pytest

from optimum_dern.machine.allocator import return_free_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_free_memory_is_returned():
    """Also of a heap that cannot shrink, because a block at its end is in use."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [bytearray(b"x" * 100_000) for _ in range(600)]  # 60 MB, each too small for a mapping of its own
    last, held = blocks.pop(), resident()
    del blocks
    return_free_memory()
    assert resident() < held - 40_000_000 and len(last) == 100_000
