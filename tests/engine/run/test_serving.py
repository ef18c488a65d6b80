"""Advice on sizes for serving: one line, and only where there is something to say."""

import pytest

from optimum_dern.engine.run.serving import advise_serving
from optimum_dern.results.report import ModelSize


def advise(model_type, experts, width=768):
    """The advice on a model that had 768 neurons an expert."""
    sizes = (ModelSize(4, 2, 8, 4 * experts, 768), ModelSize(2, 1, 4, experts, width))
    return advise_serving(model_type, *sizes)


@pytest.mark.parametrize("experts", [0, 1, 2, 4, 8, 16, 24, 40, 64, 96, 128, 1024])
def test_nothing_to_say(experts):
    assert advise("mixtral", experts) is None


def test_a_width_that_is_the_original_s():
    """It is no matter of the compression."""
    sizes = [ModelSize(4, 2, 8, experts, 600) for experts in (16, 8)]
    assert advise_serving("mixtral", *sizes) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("mixtral", 6),
            "6 experts are neither a power of two nor a multiple of 8, which kernels prefer (4",
        ),
        (("mixtral", 100), "(96 or 104 are)"),
        (("deepseek_v4", 160), "does not load 160 experts, the nearest it does is 128"),
        (("mixtral", 2048), "llama.cpp loads at most 1,024 experts"),
        (("mixtral", 8, 600), "600 neurons an expert are no multiple of 64"),
    ],
)
def test_advice(arguments, words):
    line = advise(*arguments)
    assert line.startswith("for serving: ") and words in line and "\n" not in line


def test_several_at_once():
    line = advise("deepseek_v4", 6, 100)
    assert line.count(";") == 2


@pytest.mark.parametrize("experts", [128, 192, 256, 320, 576])
def test_vllm_loads_these(experts):
    assert advise("deepseek_v4", experts) is None
