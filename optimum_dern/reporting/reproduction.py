"""The command line that reproduces a compressed checkpoint."""

import dataclasses
import json
import re
import shlex
from typing import Any

from ..results.report import CompressionReport


__all__ = ["is_in_memory", "reproduction_command"]

OLD = {"self_share": 0.0, "random_share": 0.0}  # what reports say that do not have these options
IN_MEMORY = re.compile(r" in memory \(\w+\)$")  # end of the description of data that has no name or path


def reproduction_command(report: CompressionReport) -> str:
    """Make the command line that reproduces a checkpoint, with every option that differs from its default.

    Calibration data that was given in memory has no name for the command line; `DATA` stands for it.
    """
    from ..config import DernConfig

    given = {name: report.config[name] for name in ("preset", "sparsity")}
    plain = DernConfig(**given).to_dict()
    decisive = {name: report.config[name] for name in ("refit", "calibration_order")}  # other defaults depend on these
    defaults = DernConfig(**given, **decisive).to_dict() | {name: plain[name] for name in decisive}
    words = ["optimum-dern", "compress", report.source or "MODEL", "OUTPUT"]
    words += ["--revision", report.revision] if report.revision else []
    for field in dataclasses.fields(DernConfig):
        value = report.config.get(field.name, OLD.get(field.name))  # earlier versions had fewer options
        is_default = value == (field.default if field.name in ("sparsity", "preset") else defaults[field.name])
        if field.name in ("dataset", "quant_method") or is_default or value is None:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict) or (isinstance(value, list) and len(value) == 1):  # a number alone is a count
            words += [flag, json.dumps(value)]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    if report.config["dataset"] is None:  # experts were chosen from the weights alone
        return shlex.join(words)
    dataset = "DATA" if is_in_memory(report.config["dataset"]) else report.config["dataset"]
    sources = [f"{name}={weight}" for name, weight in dataset.items()] if isinstance(dataset, dict) else [dataset]
    return shlex.join([*words, "--dataset", *map(str, sources)])


def is_in_memory(dataset: Any) -> bool:
    """Whether a recorded dataset is only a description of data that was given in memory."""
    return isinstance(dataset, str) and IN_MEMORY.search(dataset) is not None
