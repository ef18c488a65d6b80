"""Presets: the values that fields take where the user leaves them out, and what is off without the option it needs."""

__all__ = ["OFF", "PRESETS"]

SAFE_CALIBRATION = {"self_share": 2 / 3, "random_share": None}  # twice as much own text as of the dataset
PRESETS = {  # from the most to the least work; docs/source/presets.md measures what every step buys
    "recommended": {
        "recombine": False,
        "cluster_init": "own",
        "refit": True,
        "router_refit": False,
        "neuron_refit": True,
        "drift_correction": 0.5,
        "guard": True,
        "calibration_order": "sequential",
        **SAFE_CALIBRATION,
    },
    "fast": {
        "recombine": False,
        "cluster_init": "own",
        "refit": True,
        "router_refit": False,
        "neuron_refit": False,
        "drift_correction": 0.0,
        "refit_ridge": 1e-2,
        "guard": True,
        "calibration_order": "oneshot",
        **SAFE_CALIBRATION,
    },
    "paper": {
        "recombine": True,
        "cluster_init": "gate",
        "refit": False,
        "router_refit": False,
        "neuron_refit": False,
        "drift_correction": 0.0,
        "guard": False,
        "calibration_order": "oneshot",
        "self_share": 0.0,
        "random_share": 0.0,
    },
}
OFF = {
    "router_refit": False,
    "neuron_refit": False,
    "drift_correction": 0.0,
    "recombine": False,
    "cluster_init": "own",
}
