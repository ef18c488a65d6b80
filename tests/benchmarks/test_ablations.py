"""Which results of `benchmarks/ablations.py` may stand in one file."""

import pytest


def test_ablations_know_their_text(script, tmp_path):
    """A file without the names of its texts is of the default ones: others are refused."""
    ablations, results_file = script("ablations"), script("results_file")
    path, old = tmp_path / "results.json", {"sparsity": 0.5, "windows": 16}
    results_file.write_results(path, {"model": {"settings": old, "increase": {}}})

    def check(name="model", **changes):
        results_file.check_settings(path, name, old | ablations.TEXTS | changes, ablations.TEXTS)

    check()
    check("other", windows=8)
    for change in ({"evaluation": "novels"}, {"calibration": "novels"}, {"windows": 8}, {"threads": 2}):
        with pytest.raises(SystemExit, match=f"other {next(iter(change))}; give another --output"):
            check(**change)
