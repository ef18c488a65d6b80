"""Inputs for the readers that are chosen by the coverage of our code: atheris, which is libFuzzer for Python.

An input's first byte chooses the reader.  It starts with valid files and the stored inputs, and ends at a failure.
"""

import contextlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn


__all__ = ["fuzz_bytes", "instrumented"]

LONGEST = 8192  # bytes of an input


def instrumented(wanted: bool) -> contextlib.AbstractContextManager:
    """Open the context in which our modules are imported, which records what they run where that is wanted."""
    if not wanted:
        return contextlib.nullcontext()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed; run `pip install atheris`, or leave --bytes out")
    return atheris.instrument_imports(include=["optimum_dern"], enable_loader_override=False)


def fuzz_bytes(readers: list[str], seconds: int, seed: int) -> NoReturn:
    """Fuzz for some time, and end the process.

    Args:
        readers: keys of `READERS`, of which inputs are.
        seconds: in all.
        seed: of libFuzzer.
    """
    import atheris
    from fuzz_attempt import attempt

    def read(data: bytes) -> None:
        reader = readers[data[0] % len(readers)] if data else readers[0]
        if (outcome := attempt(reader, data[1:])).kind == "failed":
            raise RuntimeError(f"{reader}: {outcome.says}\n  {data[1:][:300]!r}")

    with TemporaryDirectory() as folder:
        write_seeds(Path(folder), readers)
        limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=8192"]
        atheris.Setup([sys.argv[0], *limits, f"-seed={seed + 1}", "-print_final_stats=1", folder], read)
        atheris.Fuzz()
    raise SystemExit


def write_seeds(folder: Path, readers: list[str]) -> None:
    """Write a valid file of each reader and its stored inputs, each behind the byte that chooses the reader."""
    from fuzz_corpus import stored_inputs
    from fuzz_readers import READERS

    stored = [(reader, file.read_bytes()) for reader, file in stored_inputs() if reader in readers]
    for number, (reader, content) in enumerate([*((name, READERS[name][1]()) for name in readers), *stored]):
        (folder / str(number)).write_bytes(bytes([readers.index(reader)]) + content)
