"""Settings of all tests: no network, one torch thread, files with slow tests first."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "passive"  # where tests have two threads, one that waits takes no core

import torch  # noqa: E402
from family_table import pytest_addoption, pytest_terminal_summary  # noqa: E402, F401 - hooks of `--family-table`

from optimum_dern.options import PRESETS  # noqa: E402


torch.set_num_threads(1)
# Tests are of the data that they give; those of text that the model writes beside it ask for a share of it.
PRESETS |= {name: PRESETS[name] | {"self_share": 0.0} for name in ("recommended", "fast")}


def pytest_report_header() -> str:
    """Show the versions of transformers and torch in pytest's header."""
    from importlib.metadata import version

    return f"transformers {version('transformers')}, torch {torch.__version__}"


def pytest_collection_finish() -> None:
    """Look for garbage less often, and not among what is imported by now: a fortieth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(items) -> None:
    """Run files with slow tests first, so that parallel runs do not wait for a slow file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
