"""Times by stage, and the exponents of their growth."""

import json
import sys

import pytest


def test_a_stage_inside_another_counts_alone(script, monkeypatch):
    """The clock ticks once a reading; of a generator each value's making counts, and not what its user does."""
    stages, ticks = script("stages"), iter(range(1000))
    monkeypatch.setattr(stages.time, "process_time", lambda: next(ticks))
    timers = stages.Timers()
    inner = timers.wrap("inner", lambda: None)
    outer = timers.wrap("outer", lambda: (inner(), inner()))
    outer()
    assert dict(timers.calls) == {"outer": 1, "inner": 2}
    assert dict(timers.seconds) == {"outer": 3, "inner": 2}  # before, between and after the inner ones
    values = timers.wrap("values", lambda: iter("ab"))()
    assert list(values) == ["a", "b"] and timers.seconds["values"] == 4  # the call, two values, and the end


def test_exponents(script):
    """Time that grows with the square has the exponent 2."""
    assert script("growth").slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


@pytest.mark.slow
def test_a_toy_run(script, monkeypatch, capsys):
    """Every stage of `recommended` is found, and their times add up to the run's."""
    sizes = ["--layers", "1", "--experts", "8", "--top-k", "2", "--hidden", "64", "--width", "32"]
    monkeypatch.setattr(sys, "argv", ["stages.py", *sizes])
    script("stages").main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert {row["stage"] for row in rows} >= {"read", "measure", "propose", "judge", "refit", "neuron refit", "write"}
    assert all(row["seconds"] > 0 for row in rows) and all(
        row["floor"] > 0 for row in rows if row["stage"] == "measure"
    )
