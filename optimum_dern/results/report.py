"""`CompressionReport`: the result of a compression per layer and in total, as plain JSON.

Schema version 3; `docs/source/report.md` explains every field.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..text_files import read_object, replace_text
from .estimate import json_error


__all__ = ["REPORT_VERSION", "CompressionReport", "LayerReport", "ModelSize"]

REPORT_VERSION = 3
READABLE = (1, 2, 3)  # version 1 had neither `segment_flow` nor `similarity_map`, version 2 no `skipped`


@dataclass(frozen=True)
class LayerReport:
    """Result of the compression of one MoE layer."""

    name: str  # of the MoE block in the model
    layer: int  # index of its decoder layer
    tokens: int  # calibration tokens, padding left out
    held_out_tokens: int  # of these, excluded from the refits
    load: list[float]  # fraction of the routed tokens per original expert
    saliency: list[float]  # per original expert
    retained: list[int]  # original indices, in their new order
    errors: dict[str, float]  # relative error of the routed output per candidate, on the held-out tokens
    winner: str  # the candidate that was written
    moved_share: float | None  # fraction of the dropped segments that moved to a retained expert
    similarity_quantiles: dict[str, float] | None  # of the dropped segments' best cosines
    seconds: float
    segment_flow: dict[str, Any] | None = None  # moved segments between experts, see `core/pictures/segment_flow.py`
    similarity_map: dict[str, Any] | None = None  # of experts and their neurons, see `core/pictures/similarity_map.py`
    protected: list[int] = field(default_factory=list)  # original indices of protected experts
    largest_output: float = 0.0  # largest absolute component of any original expert's output
    skipped: dict[str, str] = field(default_factory=dict)  # reason for each step that was skipped
    source_errors: dict[str, dict[str, float]] = field(default_factory=dict)  # per source: of pruning and the winner
    widths: list[int] | None = None  # neurons of each retained expert, where zero padding stands in the place of some
    dense: bool = False  # the layer has no router any more: all tokens use the retained experts, and the shared ones
    divergence: float | None = None  # of the last hidden states, with this layer and those chosen before it dense


@dataclass(frozen=True)
class ModelSize:
    """Parameters, bytes and experts of a model."""

    parameters: int
    active_parameters: int  # used by one token
    bytes: int
    experts: int  # routed, per layer
    width: int | None = None  # neurons of a routed expert; None in reports of earlier releases


@dataclass
class CompressionReport:
    """Result of one compression: source, config, calibration data, sizes, layers and evaluation."""

    source: str | None  # Hub id, or name of the folder
    revision: str | None
    model_type: str
    method: str
    config: dict[str, Any]
    calibration: dict[str, Any]  # description, fingerprint, sequences, tokens
    before: ModelSize
    after: ModelSize
    layers: list[LayerReport] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)  # filled in by `add_evaluation`
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0  # of the process, or of the GPU if the model is on one
    precision: dict[str, str] = field(default_factory=dict)  # dtypes: stored in the source, computed in, written
    training: str = ""  # description of training after the compression, see `add_training`
    source_card: dict[str, Any] | None = None  # licence and base models that the source's card names
    report_version: int = REPORT_VERSION
    source_folder: Path | None = field(default=None, compare=False)  # local folder of the source; never saved
    own_text: list[dict] = field(default_factory=list, compare=False)  # that the model wrote; in a file of its own

    @property
    def ratio(self) -> float:
        """Size of the compressed model in bytes, relative to the original."""
        return self.after.bytes / self.before.bytes

    @property
    def kept_width(self) -> float | None:
        """Neurons of a retained expert that are not zero padding, on average; None without padding."""
        widths = [width for layer in self.layers for width in layer.widths or ()]
        return sum(widths) / len(widths) if widths else None

    @property
    def dense_layers(self) -> list[int]:
        """Decoder layers that the compression has made dense, in the order in which they were chosen."""
        return [layer.layer for layer in self.layers if layer.dense]

    @property
    def evaluation_length(self) -> int | None:
        """Tokens of the longest sequence in the evaluation; None if it was not recorded."""
        lengths = [pair["after"].get("sequence_length") for pair in self.evaluation.values()]
        return max((length for length in lengths if length), default=None)

    def add_evaluation(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Record the losses of the original and the compressed model (`TextLoss` by name of the text)."""
        measured = {"before": before, "after": after}
        self.evaluation = {
            name: {
                moment: asdict(losses[name]) | {"standard_error": json_error(losses[name].standard_error)}
                for moment, losses in measured.items()
            }
            for name in before
        }

    def add_training(self, description: str) -> None:
        """Record training of the compressed weights, and discard losses measured before it."""
        self.training, self.evaluation = description, {}

    def summary(self) -> dict[str, Any]:
        """Return the totals without the layers: sizes, ratio, evaluation, seconds and peak memory."""
        names = ("before", "after", "ratio", "evaluation", "seconds", "peak_memory_bytes")
        return {name: value for name, value in self.to_dict().items() if name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values for publication, with `ratio` and without local folders."""
        values = asdict(self) | {"ratio": self.ratio}
        del values["source_folder"], values["own_text"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressionReport":
        """Create a report from a dictionary made by `to_dict`, of this or an earlier release.

        Raises:
            ValueError: an unknown report version.
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
        """Write the report as JSON, with one line per layer."""
        values = self.to_dict()
        layers = ",\n    ".join(map(json.dumps, values["layers"]))
        text = json.dumps({**values, "layers": []}, indent=2)
        replace_text(Path(path), text.replace('"layers": []', f'"layers": [\n    {layers}\n  ]', 1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CompressionReport":
        """Load a report written by `save`.

        Raises:
            ValueError: the file holds no report that this release reads.
        """
        try:
            return cls.from_dict(read_object(Path(path)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a report that this release can read ({error!r:.200}); compress again"
            ) from error


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a report of an earlier release, which recorded whole paths, to public names."""
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
