"""The page as a file: small, whole in itself, and true to a report whatever is in it."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
from sample_reports import sample_report

from optimum_dern import CompressionReport
from optimum_dern.reporting.page import report_page
from optimum_dern.reporting.verdict import verdict


class Reader(HTMLParser):
    """Elements, and the content of the data element."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.inside, self.data = [], None, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id")

    def handle_data(self, data):
        if self.inside == "data":
            self.data += data

    def handle_endtag(self, tag):
        self.inside = None


def data_of(page):
    """The numbers in a page, read as strictly as a browser does."""
    return json.loads(Reader(page).data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_size():
    """48 layers of 128 experts take less than 1.5 MB, and nearly all of that is numbers."""
    assert len(report_page(sample_report(48, 128, width=768)).encode()) < 1_500_000
    assert len(report_page(sample_report(1, 2)).encode()) < 80_000


def test_nothing_from_outside():
    """No address is loaded: no link, script or image but what is inside."""
    page = report_page(sample_report())
    elements = Reader(page).tags
    addresses = [value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(address.startswith(("#", "data:,")) for address in addresses)
    assert {"link", "script", "style"} <= {tag for tag, _ in elements}
    assert "{{" not in page and not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert set(re.findall(r"https?://[^\s\"'<`]+", page)) == {"http://www.w3.org/2000/svg"}


def test_numbers():
    """The page has the report's numbers, to seven digits."""
    report = sample_report()
    found = data_of(report_page(report))
    assert found["layers"][1]["saliency"] == pytest.approx(report.layers[1].saliency, rel=1e-6)
    assert found["layers"][2]["segment_flow"] == report.layers[2].segment_flow
    assert found["evaluation"]["news"]["after"] == pytest.approx(report.evaluation["news"]["after"], rel=1e-6)
    assert found["command"].startswith("optimum-dern compress you/some-moe OUTPUT")


def test_hostile_names():
    """What is in a report cannot end the data or become markup."""
    report = sample_report()
    report.source = "a</script><script>alert(1)</script>{{script}}<!--"
    page = report_page(report)
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert data_of(page)["source"] == report.source


def test_numbers_that_json_has_not():
    """An error that is not finite becomes null."""
    report = sample_report(1)
    layer = dataclasses.replace(report.layers[0], errors={"pruned": math.inf, "recombined+refit": math.nan})
    report.layers[0] = layer
    assert data_of(report_page(report))["layers"][0]["errors"] == {"pruned": None, "recombined+refit": None}


def test_an_earlier_report():
    """Version 1 had neither flows nor maps, and fewer options; it still makes a page, and is saved as of today."""
    values = sample_report().to_dict() | {"report_version": 1}
    for layer in values["layers"]:
        del layer["segment_flow"], layer["similarity_map"]
    del values["config"]["neuron_refit"]
    report = CompressionReport.from_dict(values)
    assert data_of(report_page(report))["layers"][0]["similarity_map"] is None
    assert report.to_dict()["report_version"] == 3
    with pytest.raises(ValueError, match="report version 4; this release reads 1 and 2 and 3"):
        CompressionReport.from_dict(values | {"report_version": 4})


def test_verdict():
    """What was given and what it cost, in words that fit the numbers."""
    report = sample_report()
    assert verdict(report) == (
        "Each layer keeps half of its routed experts (4 of 8), which leaves 52 % of the bytes. The loss on 4 "
        "held-out texts rose from 2.800 to 2.930 nats per token (+0.130, perplexity × 1.14)."
    )
    report.evaluation = {"a": {"before": {"loss": 2.0}, "after": {"loss": 1.9}}}
    assert "The loss on a held-out text fell from 2.000 to 1.900" in verdict(report)
    report.evaluation = {}
    assert verdict(report).endswith("What that costs in quality has not been measured.")
    report.after = dataclasses.replace(report.after, experts=5)
    assert verdict(report).startswith("Each layer keeps 5 of its 8 routed experts, which")
    report.after = report.before
    assert verdict(report) == "Nothing was compressed: every layer keeps its 8 routed experts."
