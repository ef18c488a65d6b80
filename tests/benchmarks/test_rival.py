"""The comparison with plain forward passes: every line in a process of its own, and a table of ratios."""

import json
import sys

import pytest


@pytest.mark.slow
def test_a_toy_run(script, monkeypatch, capsys):
    """Times and peaks are measured, and the table has their ratios."""
    monkeypatch.setattr(sys, "argv", ["rival.py", "--toy", "--only", "prune, reap"])
    script("rival").main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    pruned, plain = found["results"]["prune, reap"], found["results"]["plain"]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["plain", "prune, reap"]
    assert pruned["cpu_seconds"] > 0 and pruned["peak_bytes"] > 0
    ratios = (
        f"{pruned['cpu_seconds'] / plain['cpu_seconds']:.1f}",
        f"{pruned['peak_bytes'] / found['model_bytes']:.2f}",
    )
    assert (table[3].split("|")[3].strip(), table[3].split("|")[5].strip()) == ratios
