"""`CompressionReport`: what happened to every layer, and the totals, as plain JSON.

Schema version 3; `docs/source/report.md` explains every field.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..text_files import replace_text


__all__ = ["REPORT_VERSION", "CompressionReport", "LayerReport", "ModelSize"]

REPORT_VERSION = 3
READABLE = (1, 2, 3)  # version 1 had neither `segment_flow` nor `similarity_map`, version 2 no `skipped`


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer."""

    name: str  # of the MoE block in the model
    layer: int  # index of its decoder layer
    tokens: int  # calibration tokens, padding left out
    held_out_tokens: int  # of these, kept away from the refit
    load: list[float]  # share of the routed tokens per original expert
    saliency: list[float]  # per original expert
    retained: list[int]  # original indices, in their new order
    errors: dict[str, float]  # relative error of the routed output per candidate, on the held-out tokens
    winner: str  # the candidate that was written
    moved_share: float | None  # of the dropped segments, how many moved to a retained expert
    similarity_quantiles: dict[str, float] | None  # of the dropped segments' best cosines
    seconds: float
    segment_flow: dict[str, Any] | None = None  # moved segments between experts, see `core/pictures/segment_flow.py`
    similarity_map: dict[str, Any] | None = None  # of experts and their neurons, see `core/pictures/similarity_map.py`
    protected: list[int] = field(default_factory=list)  # original indices that the selection could not drop
    largest_output: float = 0.0  # largest absolute component of any original expert's output
    skipped: dict[str, str] = field(default_factory=dict)  # step that could not be taken -> reason


@dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes of a model."""

    parameters: int
    active_parameters: int  # used by one token
    bytes: int
    experts: int  # routed, per layer


@dataclass
class CompressionReport:
    """The last run of a compressor."""

    source: str | None  # Hub id, or name of the folder
    revision: str | None
    model_type: str
    method: str
    config: dict[str, Any]
    calibration: dict[str, Any]  # description, fingerprint, sequences, tokens
    before: ModelSize
    after: ModelSize
    layers: list[LayerReport] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)  # filled in by whoever evaluates
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0  # of the process, or of the GPU where the model is on one
    precision: dict[str, str] = field(default_factory=dict)  # dtypes: stored in the source, computed in, written
    training: str = ""  # of the compressed weights, by whoever trained them
    source_card: dict[str, Any] | None = None  # licence and base models that the source's card names
    report_version: int = REPORT_VERSION
    source_folder: Path | None = field(default=None, compare=False)  # on this machine; in memory only

    @property
    def ratio(self) -> float:
        """Bytes after over bytes before."""
        return self.after.bytes / self.before.bytes

    @property
    def evaluation_length(self) -> int | None:
        """Tokens of the longest sequence that a loss was measured on; None where nothing tells."""
        lengths = [pair["after"].get("sequence_length") for pair in self.evaluation.values()]
        return max((length for length in lengths if length), default=None)

    def add_evaluation(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Record losses measured before and after, `evaluation.loss.perplexity.TextLoss` by name of the text."""
        from .estimate import json_error

        measured = {"before": before, "after": after}
        self.evaluation = {
            name: {
                moment: asdict(losses[name]) | {"standard_error": json_error(losses[name].standard_error)}
                for moment, losses in measured.items()
            }
            for name in before
        }

    def add_training(self, description: str) -> None:
        """Record how the weights were trained after the compression; losses measured before are no longer theirs."""
        self.training, self.evaluation = description, {}

    def summary(self) -> dict[str, Any]:
        """The totals without the layers: sizes, ratio, evaluation, seconds."""
        names = ("before", "after", "ratio", "evaluation", "seconds", "peak_memory_bytes")
        return {name: value for name, value in self.to_dict().items() if name in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values, `ratio` included: what is published, so nothing that tells of a machine."""
        values = asdict(self) | {"ratio": self.ratio}
        del values["source_folder"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a report of a version that this release does not know.
        """
        version = values.get("report_version")
        if version not in READABLE:
            raise ValueError(
                f"report version {version!r}; this release reads {' and '.join(map(str, READABLE))}: "
                "update optimum-dern"
            )
        if "source_card" not in values:
            values = _without_folders(values)
        rest = {name: value for name, value in values.items() if name != "ratio"} | {"report_version": REPORT_VERSION}
        rest["layers"] = [LayerReport(**layer) for layer in values["layers"]]
        rest["before"], rest["after"] = ModelSize(**values["before"]), ModelSize(**values["after"])
        return cls(**rest)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, a layer a line: their long lists of numbers would fill a line each."""
        values = self.to_dict()
        layers = ",\n    ".join(map(json.dumps, values["layers"]))
        text = json.dumps({**values, "layers": []}, indent=2)
        replace_text(Path(path), text.replace('"layers": []', f'"layers": [\n    {layers}\n  ]', 1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CompressionReport":
        """Read a report that `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text("utf-8")))


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """A report of an earlier release, which recorded whole paths, as this one records it."""
    from .description import describe_dataset, recordable_dataset
    from .licence import source_metadata
    from .public_names import public_source

    dataset = recordable_dataset(values["config"]["dataset"])
    return values | {
        "source": public_source(values["source"]),
        "source_card": source_metadata(values["source"], values["revision"]),
        "config": values["config"] | {"dataset": dataset},
        "calibration": values["calibration"] | {"dataset": describe_dataset(dataset)},
    }
