"""Fixture that imports the scripts of `benchmarks/` and undoes their side effects; the core's helpers importable."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from optimum_dern.methods import METHODS


HERE = Path(__file__).parent
BENCHMARKS = HERE.parent.parent / "benchmarks"
sys.path.insert(0, str(HERE.parent / "core"))


@pytest.fixture(scope="module")
def script():
    """Function that imports a script by name; methods, modules and settings are restored after the tests of a file."""
    methods, modules, threads = dict(METHODS), set(sys.modules), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(
            (str(BENCHMARKS), str(HERE.parent.parent / "examples"))
        ):
            del sys.modules[name]
    METHODS.clear()
    METHODS.update(methods)
    torch.set_num_threads(threads)
    logging.enable_progress_bar()
