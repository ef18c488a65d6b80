"""`CompressionReport` as JSON."""

import json
import math

from optimum_dern.evaluation.loss.perplexity import TextLoss
from optimum_dern.reporting.card import _evaluation_rows
from optimum_dern.results.report import REPORT_VERSION, CompressionReport, LayerReport, ModelSize


LAYER = LayerReport(
    name="model.layers.3.mlp",
    layer=3,
    tokens=100,
    held_out_tokens=10,
    load=[0.5, 0.25, 0.25],
    saliency=[0.5, 0.2, 0.3],
    retained=[0, 2],
    errors={"pruned": 0.25, "pruned+refit": 0.125},
    winner="pruned+refit",
    moved_share=None,
    similarity_quantiles=None,
    seconds=1.5,
)
REPORT = CompressionReport(
    source="me/model",
    revision="abc",
    model_type="mixtral",
    method="prune",
    config={"seed": 0},
    calibration={"dataset": "c4", "sha256": "0", "sequences": 1, "tokens": 100},
    before=ModelSize(300, 200, 1200, 3),
    after=ModelSize(200, 200, 900, 2),
    layers=[LAYER],
    versions={"optimum-dern": "0"},
    seconds=2.5,
    peak_memory_bytes=7,
)


def test_round_trip():
    """The dict is JSON and makes an equal report."""
    assert CompressionReport.from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT


def test_schema():
    """Version and ratio are written out, for readers that do not have this package."""
    values = REPORT.to_dict()
    assert (values["report_version"], values["ratio"]) == (REPORT_VERSION, 0.75)
    assert values["layers"][0]["errors"] == LAYER.errors
    sizes = {"parameters": 300, "active_parameters": 200, "bytes": 1200, "experts": 3, "width": None}
    assert values["before"] == sizes


def test_summary():
    """Totals without the layers, with the evaluation once there is one."""
    report = CompressionReport.from_dict(REPORT.to_dict())
    assert report.summary().keys() == {"before", "after", "ratio", "evaluation", "seconds", "peak_memory_bytes"}
    report.add_evaluation({"a": TextLoss(1.0, 0.1, 9)}, {"a": TextLoss(2.0, 0.2, 9, 10)})
    assert report.summary()["evaluation"] == {
        "a": {
            "before": {"loss": 1.0, "standard_error": 0.1, "tokens": 9, "sequence_length": None},
            "after": {"loss": 2.0, "standard_error": 0.2, "tokens": 9, "sequence_length": 10},
        }
    }
    assert REPORT.evaluation == {}


def test_length_of_the_evaluated_sequences():
    """The longest of all texts; unknown in reports of earlier releases."""
    report = CompressionReport.from_dict(REPORT.to_dict())
    assert report.evaluation_length is None
    losses = {name: TextLoss(1.0, 0.1, 9, length) for name, length in (("a", 7), ("b", 256))}
    report.add_evaluation(losses, losses)
    assert CompressionReport.from_dict(report.to_dict()).evaluation_length == 256
    for pair in report.evaluation.values():
        for moment in pair.values():
            del moment["sequence_length"]
    assert CompressionReport.from_dict(report.to_dict()).evaluation_length is None


def test_a_single_sequence():
    """It has no standard error, which JSON calls null."""
    report = CompressionReport.from_dict(REPORT.to_dict())
    report.add_evaluation({"a": TextLoss(1.0, math.nan, 9)}, {"a": TextLoss(2.0, 0.2, 9)})
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))["evaluation"]["a"]
    assert [stored[moment]["standard_error"] for moment in ("before", "after")] == [None, 0.2]
    (row,) = _evaluation_rows(report)
    assert (row["before"], row["after"]) == ("1.0000 (–)", "2.0000 (0.2000)")
