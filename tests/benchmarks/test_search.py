"""The sums of the search benchmark: solvable by their steps, checked up to the first that is wrong."""

import random

import pytest


@pytest.fixture(scope="module")
def search(script):
    return script("search")


def test_problems_are_solved_by_their_steps(search):
    """Read back with plain arithmetic."""

    def number(units, tens):
        return int(tens) * 10 + int(units)

    draw = random.Random(0)
    for _ in range(50):
        prompt, steps = search.make_problem(draw)
        words = prompt.split()
        total, partial = number(*words[:2]), []
        for sign, units, tens in zip(words[2:-1:3], words[3::3], words[4::3], strict=True):
            total += number(units, tens) * (1 if sign == "+" else -1)
            partial.append(total)
        assert [number(*search.answer_of(step).split()) for step in steps.split("\n")] == partial
        assert len(partial) == 3 and all(0 <= each <= 99 for each in partial)


def test_checker_counts_right_steps(search):
    """Up to the first wrong one; ends of lines do not matter."""
    score, texts = search.right_steps({"p": "a\nb\nc"}), ["a\n", "x\nb", "a\nb\n", "a\nx\nc", "a\nb\nc", ""]
    assert score("p", texts) == pytest.approx([1 / 3, 0, 2 / 3, 1 / 3, 1, 0])


def test_seeds_draw_their_own_problems(search):
    """The same for all methods of a seed."""
    assert search.draw_problems(0, 9) == search.draw_problems(0, 20)[:9] != search.draw_problems(1, 9)
