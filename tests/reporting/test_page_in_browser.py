"""The page in a real browser: it draws without errors, asks nobody, fits a phone, and works without a mouse."""

import dataclasses

import pytest
from sample_reports import sample_report

from optimum_dern import CompressionReport, DernConfig
from optimum_dern.reporting.page import report_page


pytestmark = pytest.mark.slow


def earlier():
    """Of version 1, which did not tell how long the evaluated sequences were."""
    values = sample_report().to_dict() | {"report_version": 1}
    for loss in (loss for pair in values["evaluation"].values() for loss in pair.values()):
        del loss["sequence_length"]
    for layer in values["layers"]:
        del layer["segment_flow"], layer["similarity_map"]
    return CompressionReport.from_dict(values)


def changed(**fields):
    """A report whose layers have other fields."""
    report = sample_report()
    report.layers = [dataclasses.replace(layer, **fields) for layer in report.layers]
    return report


def paper():
    """Of a run without the guard and without an evaluation, from data in memory."""
    report = sample_report(config=DernConfig(preset="paper", dataset="3 dicts in memory (list)"), evaluated=False)
    report.layers = [dataclasses.replace(layer, errors={}, winner="recombined") for layer in report.layers]
    return report


def single():
    """Measured on one sequence a text, which has no standard error."""
    report = sample_report()
    for pair in report.evaluation.values():
        pair["before"]["standard_error"] = pair["after"]["standard_error"] = None
    return report


def nothing():
    """Of a run that kept all experts."""
    report = sample_report(layers=0)
    report.after = report.before
    return report


REPORTS = {
    "whole": sample_report,
    "large": lambda: sample_report(48, 128, width=768),
    "two experts": lambda: sample_report(1, 2),
    "version 1": earlier,
    "paper": paper,
    "nothing": nothing,
    "single": single,
    "pruned": lambda: changed(segment_flow=None, moved_share=None, winner="pruned", errors={"pruned": 0.2}),
    "broken": lambda: changed(errors={"pruned": float("inf"), "recombined+refit": float("nan")}, saliency=[0.0] * 8),
    "long names": lambda: changed(name="model.language_model.layers.0.feed_forward.sparse_moe_block" * 2),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Where a report's page is."""
    folder = tmp_path_factory.mktemp("pages")

    def write(name):
        path = folder / f"{name}.html"
        if not path.exists():
            path.write_text(report_page(REPORTS[name]()), "utf-8")
        return path

    return write


@pytest.mark.parametrize("name", REPORTS)
def test_it_draws(chromium, page, name):
    """No error, no request, no overflow on a phone, and a text for every drawing."""
    for width in (1280, 390):
        chromium.open(page(name), width)
        assert chromium.messages() == []
        assert {url for url in chromium.requests() if not url.startswith("data:")} == {page(name).as_uri()}
        assert chromium.run("return document.documentElement.scrollWidth") <= width
        seen = chromium.run("return document.body.innerText")
        assert not any(word in seen for word in ("NaN", "undefined", "null", "Infinity", "[object"))
    assert chromium.run("return [...document.querySelectorAll('.plot')].every((plot) => plot.ariaLabel.length > 20)")
    assert ("in sequences of up to 2,048 tokens" in seen) == (name not in ("version 1", "paper"))
    assert chromium.run("return [...document.querySelectorAll('h3[id]')].length") >= 3


def test_headline(chromium, page):
    """What was gained, what was lost, where: the first thing to read."""
    chromium.open(page("whole"))
    assert chromium.run("return document.title") == "some-moe, 4 of 8 experts · DERN report"
    gained, lost, where = (card.text for card in chromium.driver.find_elements("css selector", "#headline .card"))
    assert "−48 % bytes" in gained and "61.1 GB → 32.0 GB" in gained and "8 → 4" in gained
    assert "+0.130 nats" in lost and "× 1.14" in lost and "news +0.160" in lost
    layers = sample_report().layers
    worst = max(layers, key=lambda layer: layer.errors[layer.winner])
    assert f"layer {worst.layer}" in where and "4 of 4 layers" in where.replace("\u00a0", " ")


def test_layers_by_mouse(chromium, page):
    """Buttons, the list, the errors' columns and the map's tiles all choose the layer."""
    chromium.open(page("whole"))
    summary = lambda: chromium.text("#layer-summary").split(" dropped")[0]  # noqa: E731
    assert summary() == "Layer 0" and not chromium.find("#previous").is_enabled()
    chromium.find("#next").click()
    assert summary() == "Layer 1" and chromium.find("#previous").is_enabled()
    chromium.find("#pick option[value='3']").click()
    assert summary() == "Layer 3" and not chromium.find("#next").is_enabled()
    chromium.find("#error-figure [data-i='2']").click()
    assert summary() == "Layer 2"
    assert chromium.find("#pick").get_attribute("value") == "2"
    chromium.find("#map-figure [data-i='8']").click()  # the first expert of layer 1
    assert summary() == "Layer 1"
    assert chromium.text("#map-figure .readout").startswith("Layer 1, expert 0: ")
    retained = ", ".join(map(str, sample_report().layers[1].retained))
    assert chromium.find("#saliency-figure .plot").get_attribute("aria-label").endswith(f"; 4 stay: {retained}")
    worst = max(sample_report().layers, key=lambda layer: layer.errors[layer.winner])
    chromium.run("scrollTo(0, 0)")
    chromium.find("#headline .more").click()
    assert summary() == f"Layer {worst.layer}"
    assert chromium.messages() == []


def test_layers_by_keyboard(chromium, page):
    """Tab reaches the list and the figures; arrow keys move, Enter chooses, and each step is told."""
    chromium.open(page("whole"))
    focused = "return document.activeElement.id || document.activeElement.closest('figure')?.id"
    order = []
    for _ in range(24):
        chromium.press("Tab")
        order.append(chromium.run(focused))
        assert chromium.run("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    for first, second in [("theme", "error-figure"), ("error-figure", "map-figure"), ("map-figure", "pick")]:
        assert order.index(first) < order.index(second)
    chromium.run("document.querySelector('#error-figure .plot').focus()")
    chromium.press("ArrowRight", "ArrowRight", "Enter")
    assert chromium.text("#error-figure .readout").startswith("Layer 2: ")
    assert chromium.text("#layer-summary").startswith("Layer 2 dropped 4 experts")
    chromium.run("document.querySelector('#map-figure .plot').focus()")
    chromium.press("ArrowDown", "ArrowRight")
    assert chromium.text("#map-figure .readout").startswith("Layer 1, expert 1: ")
    assert len(chromium.driver.find_elements("css selector", "#map-figure .cursor")) == 1
    chromium.press("End", "Enter")
    assert chromium.text("#layer-summary").startswith("Layer 3")
    chromium.run("document.getElementById('next').focus(); document.getElementById('pick').focus()")
    chromium.run("document.getElementById('pick').value = 0")
    chromium.press("ArrowDown")
    assert chromium.text("#layer-summary").startswith("Layer 1")


def test_the_cursor_stays_in_sight(chromium, page):
    """On a phone a wide map scrolls inside its card, along with the cursor; the page does not."""
    chromium.open(page("large"), 390)
    chromium.run("document.querySelector('#map-figure .plot').focus()")
    chromium.press("End")
    place = "const box = document.querySelector('.cursor').getBoundingClientRect(); return [box.left, box.right]"
    left, right = chromium.run(place)
    assert 0 < left < right < 390
    assert chromium.run("return [scrollX, document.querySelector('#map-figure .plot').scrollLeft > 0]") == [0, True]


def test_details_of_a_layer(chromium, page):
    """Candidates in the order of their errors, the written one marked; streams of neurons; likeness."""
    chromium.open(page("whole"))
    layer = sample_report().layers[0]
    names = [item.text for item in chromium.driver.find_elements("css selector", ".candidates .name > :first-child")]
    assert names[0].split("\n")[0].startswith("recombined neurons, refit of the down projections")
    assert len(names) == 4 and "written" in names[0] and names[-1] == "plain pruning"
    chromium.run("document.querySelector('#flow-figure .plot').focus()")
    chromium.press("ArrowDown")
    dropped = sorted(set(range(8)) - set(layer.retained))
    moved = layer.segment_flow["moved"][1]
    assert chromium.text("#flow-figure .readout").startswith(f"Dropped expert {dropped[1]}: {moved} of 64 neurons")
    streams = [link for link in layer.segment_flow["links"] if link[0] == dropped[1]]
    assert len(chromium.driver.find_elements("css selector", "#flow-figure .ribbon.on")) == len(streams)
    chromium.run("document.querySelector('#alike-figure .plot').focus()")
    chromium.press("ArrowRight", "ArrowDown", "ArrowRight")
    third = layer.similarity_map["cosines"][7] / 100  # experts 1 and 2
    assert chromium.text("#alike-figure .readout") == f"Experts 1 and 2: cosine {third:.2f}"


def test_tables(chromium, page):
    """Every figure with numbers unfolds into a table of them."""
    chromium.open(page("whole"))
    for fold in chromium.driver.find_elements("css selector", "figure summary"):
        fold.click()
    chromium.driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert chromium.run("return document.querySelectorAll('figure details table').length") == 7
    sources = chromium.run("return [...document.querySelectorAll('#candidate-figure tr')].map((row) => row.innerText)")
    assert [row.split("\t")[0] for row in sources] == ["Held-out text", "notes.txt", "self"]
    rows = chromium.run("return [...document.querySelectorAll('#map-figure tbody tr')].map((row) => row.innerText)")
    layers = sample_report().layers
    assert [row.split("\t")[1] for row in rows] == [", ".join(map(str, layer.retained)) for layer in layers]
    assert "2.5000 ± 0.0100" in chromium.text("#loss-figure table")


@pytest.mark.parametrize("dark", [False, True])
def test_theme(chromium, page, dark):
    """The system's theme first, the other by the button, and back."""
    chromium.open(page("whole"), dark=dark)
    light = "const [, r] = getComputedStyle(document.body.parentNode).backgroundColor.match(/(\\d+)/); return r > 128"
    assert chromium.run(light) is not dark
    button = chromium.find("#theme")
    for expected in (not dark, dark):
        button.click()
        assert chromium.run(light) is not expected
        assert button.get_attribute("aria-pressed") == str(expected).lower()


def test_order_of_the_map(chromium, page):
    """By saliency, the first tile of a layer is its most salient expert."""
    chromium.open(page("whole"))
    chromium.find("input[value='saliency']").click()
    chromium.find("#map-figure [data-i='0']").click()
    saliency = sample_report().layers[0].saliency
    first = saliency.index(max(saliency))
    assert chromium.text("#map-figure .readout").startswith(f"Layer 0, expert {first}: stays")
    assert "rank 1 of 8" in chromium.text("#map-figure .readout")


def test_print(chromium, page):
    """On paper the page is light and has no controls."""
    chromium.open(page("whole"), dark=True)
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not chromium.find("#theme").is_displayed() and not chromium.find("nav").is_displayed()
    assert chromium.run("return getComputedStyle(document.documentElement).colorScheme") == "light"
    assert chromium.find("#map-figure svg").is_displayed()
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
