"""Advice on sizes for serving: one line, and only where there is something to say."""

import pytest

from optimum_dern.engine.run.serving import advise_serving


@pytest.mark.parametrize("experts", [1, 2, 4, 8, 16, 24, 40, 64, 96, 128, 1024])
def test_nothing_to_say(experts):
    assert advise_serving("mixtral", experts) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("mixtral", 6),
            "6 experts are neither a power of two nor a multiple of 8, which kernels prefer (4",
        ),
        (("mixtral", 100), "(96 or 104 are)"),
        (("deepseek_v4", 160), "does not load 160 experts, the nearest it does is 128"),
        (("deepseek_v3", 8, 8), "llama.cpp needs more experts than the router's 8 groups"),
        (("mixtral", 2048), "llama.cpp loads at most 1,024 experts"),
        (("mixtral", 8, 1, 600), "600 neurons an expert are no multiple of 64"),
    ],
)
def test_advice(arguments, words):
    line = advise_serving(*arguments)
    assert line.startswith("for serving: ") and words in line and "\n" not in line


def test_several_at_once():
    line = advise_serving("deepseek_v4", 6, 8, 100)
    assert line.count(";") == 3


@pytest.mark.parametrize("experts", [128, 192, 256, 320, 576])
def test_vllm_loads_these(experts):
    assert advise_serving("deepseek_v4", experts) is None
