"""The page of an attribution in a real browser: it draws, asks nobody, fits a phone, and can be searched."""

import pytest
import torch

from optimum_dern.attribution import Attribution
from optimum_dern.attribution.page import attribution_page
from optimum_dern.attribution.result import MEASURES


pytestmark = pytest.mark.slow
EVIL = "</script><b>bold</b>"


def sample(layers=3, experts=64, domains=("code", "books", EVIL)):
    generator = torch.Generator().manual_seed(0)
    shares = {name: torch.rand(len(domains), layers, experts, generator=generator) / experts for name in MEASURES}
    examples = [
        [
            [
                {
                    "domain": domains[e % len(domains)],
                    "before": f"before {e} ",
                    "token": EVIL,
                    "after": " after",
                    "size": 1,
                }
            ]
            for e in range(experts)
        ]
        for _ in range(layers)
    ]
    neurons = torch.rand(len(domains), layers, experts, 2, generator=generator)
    return Attribution("some-moe", dict.fromkeys(domains, 1000), list(range(layers)), shares, neurons, examples)


@pytest.fixture(params=[(), (1, 2, ("code",))], ids=["three domains", "one domain"])
def page(request, tmp_path):
    path = tmp_path / "attribution.html"
    path.write_text(attribution_page(sample(*request.param)), "utf-8")
    return path


def test_it_draws(chromium, page):
    for width in (1280, 390):
        chromium.open(page, width)
        assert chromium.messages() == []
        assert {url for url in chromium.requests() if not url.startswith("data:")} == {page.as_uri()}
        assert chromium.run("return document.documentElement.scrollWidth") <= width
        seen = chromium.run("return document.body.innerText")
        assert not any(word in seen for word in ("NaN", "undefined", "Infinity", "[object"))
        assert chromium.run("return document.querySelectorAll('main b').length") == 0  # text stays text


def test_search_and_maps(chromium, tmp_path):
    path = tmp_path / "attribution.html"
    path.write_text(attribution_page(sample()), "utf-8")
    chromium.open(path)
    assert chromium.text("#found").startswith("192 experts")
    assert chromium.run("return document.querySelectorAll('#experts article').length") == 24
    chromium.find("#more").click()
    assert chromium.run("return document.querySelectorAll('#experts article').length") == 48
    chromium.find("#search").send_keys("before 7 ")
    assert chromium.text("#found").startswith("3 experts for")
    chromium.run("document.querySelectorAll('.map')[1].querySelectorAll('button')[64 + 5].click()")
    assert chromium.text("#experts").startswith("Layer 1, expert 5")
    chromium.find("#measure option[value='energy']").click()
    assert "|g e|^2" in chromium.text("#description")
    chromium.run("document.querySelectorAll('.map button')[0].focus()")
    chromium.press("ArrowDown")
    chromium.press("ArrowRight")
    assert chromium.run("return document.activeElement.title").startswith("Layer 1, expert 1: ")
    assert chromium.messages() == []
