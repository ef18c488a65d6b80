"""A process that is asked to end does so as if interrupted from the keyboard."""

import os
import signal

import pytest

from optimum_dern.commands import main as commands
from optimum_dern.machine.signals import Terminated, ending_cleanly


def test_it_ends_as_by_the_keyboard():
    """What an interrupt closes and releases is closed and released; afterwards the signal does what it did."""
    with pytest.raises(KeyboardInterrupt, match="SIGTERM") as caught, ending_cleanly():
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(caught.value, Terminated) and caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_answers_of_others_stay(monkeypatch):
    """`nohup` has the loss of the connection ignored, and one of several processes may be waiting for the others."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_cleanly():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, earlier)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ending_cleanly():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("begun", [True, False])
def test_what_the_command_says(begun, tmp_path, monkeypatch, capsys):
    """The line says that the work goes on where there is any; the exit code is that of a process which was ended."""
    if begun:
        (tmp_path / ".dern").mkdir()
    monkeypatch.setattr(commands.compress, "run", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        commands.main(["compress", "model", str(tmp_path)])
    assert ended.value.code == 143
    rest = "; what is finished stays, the same command goes on from there" if begun else ""
    assert capsys.readouterr().err == f"optimum-dern: ended by SIGTERM{rest}\n"
