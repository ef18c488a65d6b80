"""Refusals are told apart from faults of the program by how they came about."""

import errno
import json
import os
from functools import partial

import pytest
import torch
from safetensors import SafetensorError

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.checkpoint.output.manifest import only_process
from optimum_dern.errors import describe_error, explained, is_deliberate, naming


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


SYSTEM = {  # what the machine refuses, as Python and as libraries tell it -> what to do
    "disk": (OSError(errno.ENOSPC, "No space left on device", "a"), "device: a; free some space there"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), "free some space there"),
    "copy": (OSError(errno.ENOSPC, "No space left on device", "a", None, "b"), "device: b; free some space"),
    "safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space there"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "a"), "have its permissions changed"),
    "rights": (PermissionError(errno.EACCES, "Permission denied", "a"), "have its permissions changed"),
    "files": (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    "memory": (MemoryError(), "not enough memory (MemoryError); lower the batch size"),
    "torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower the batch size"),
    "GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "lower the batch size"),
}


@pytest.mark.parametrize("name", SYSTEM)
def test_what_the_machine_refuses(name):
    """It is no fault of the code, and the message says what to do, whoever tells it."""
    error, mend = SYSTEM[name]
    assert is_deliberate(error)
    assert mend in describe_error(error) and describe_error(error).endswith("then give the same command again")
    with pytest.raises(type(error)), explained("this file cannot be read", "mend it"):  # it is not the file's fault
        raise error


def test_a_write_names_its_file(tmp_path):
    """The system's error of a descriptor names none."""
    file = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    with pytest.raises(OSError) as caught, naming(tmp_path / "file"):
        os.write(file, b"x")
    os.close(file)
    assert caught.value.filename == str(tmp_path / "file")


def test_what_a_library_makes_of_the_system_s_errors(tmp_path):
    """The file is named there, too; what is no error of the system's passes."""
    with pytest.raises(OSError) as caught, naming(tmp_path / "file"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert describe_error(caught.value).startswith(f"No space left on device: {tmp_path / 'file'}; free some space")
    with pytest.raises(SafetensorError, match="header"), naming(tmp_path / "file"):
        raise SafetensorError("header too large")


def test_an_error_that_was_never_raised():
    """Without a traceback nothing says that it was raised on purpose."""
    assert not is_deliberate(ValueError("made"))
