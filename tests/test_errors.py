"""Refusals are told apart from faults of the program by how they came about."""

import json
from functools import partial

import pytest

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.checkpoint.output.manifest import only_process
from optimum_dern.errors import describe_error, is_deliberate


def caught(function):
    """The error that a function ends with."""
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("no error")


def locked_twice(folder):
    """Two runs at one folder."""
    with only_process(folder), only_process(folder):
        pass


def test_refusals(tmp_path):
    """What this package raises on purpose, whatever its class; broken text; files and modules."""
    for function in (
        partial(DernConfig, sparsity=2),
        partial(DernCompressor().compress_model, "./model"),  # a TypeError
        partial(locked_twice, tmp_path),  # a RuntimeError
        partial(json.loads, "{"),
        partial(bytes.decode, b"\xff"),
        partial(open, tmp_path / "nowhere"),
        partial(__import__, "no_such_module"),
    ):
        error = caught(function)
        assert is_deliberate(error) and describe_error(error) == str(error)


def misuse():
    """A call that Python itself refuses."""
    return DernConfig(no_such_field=1)


def unequal():
    """A ValueError that nobody has raised."""
    first, second = [1]
    return first, second


def library():
    """A TypeError that a library raises about its caller."""
    return json.dumps(object())


@pytest.mark.parametrize("function", [misuse, unequal, library, lambda: {}["key"], lambda: 1 / 0, lambda: None.x])
def test_accidents(function):
    """They keep their type."""
    error = caught(function)
    assert not is_deliberate(error)
    assert describe_error(error) == f"{type(error).__name__}: {error}"


def test_an_error_that_was_never_raised():
    """Without a traceback nothing says that it was raised on purpose."""
    assert not is_deliberate(ValueError("made"))
