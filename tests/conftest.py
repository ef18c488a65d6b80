"""Settings of all tests: no network, one thread."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
from family_table import pytest_addoption, pytest_terminal_summary  # noqa: E402, F401 - hooks of `--family-table`


torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Which transformers the run is about."""
    from importlib.metadata import version

    return f"transformers {version('transformers')}, torch {torch.__version__}"


def pytest_collection_modifyitems(items) -> None:
    """Files with slow tests first: one that comes last would keep the other processes waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
