"""Made-up rows of evaluation tasks in the format of task files, three per task."""

import json
from pathlib import Path
from typing import Any


def _letters(subject: str, question: str, choices: list[str], label: int) -> dict[str, Any]:
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    row = {"subject": subject, "question": question, "context": f"{about}\n\n{question}\n{lines}Answer:"}
    return row | {"letters": list("ABCD"), "choices": choices, "label": label}


def _blank(sentence: str, choices: list[str], label: int) -> dict[str, Any]:
    before, _, after = sentence.partition("_")
    row = {"contexts": [before + choice for choice in choices], "continuation": after, "sentence": sentence}
    return row | {"choices": choices, "label": label}


ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"context": "Tin melts.\nQuestion: does tin melt?\nAnswer:", "choices": ["no", "yes"], "label": 1},
        {"context": "A. B?\nQuestion: is it so? or\nQuestion: not?\nAnswer:", "choices": ["no", "yes"], "label": 0},
        {"context": "Owls sleep by day.\nQuestion: do owls fly?\nAnswer:", "choices": ["no", "yes"], "label": 1},
    ],
    "piqa": [
        {"context": "Question: Open a tin.\nAnswer:", "choices": ["Use the opener.", "Ask it nicely."], "label": 0},
        {"context": "Question: Dry\na shirt.\nAnswer:", "choices": [" Swim in it.", "Hang it up. "], "label": 1},
        {
            "context": "Question: Boil “eggs”.\nAnswer:",
            "choices": ["In water.", "In a ‘hat’, with it's lid."],
            "label": 0,
        },
    ],
    "hellaswag": [
        {
            "context": "Baking: She kneads the dough. She",
            "choices": ["bakes it.", " eats a  tree.", "[sings.", "flies."],
            "label": 0,
        },
        {
            "context": "Rowing: The boat: it turns.  They",
            "choices": ["pull. ", "paint", "push  ", "sleep."],
            "label": 2,
        },
        {"context": "Chess: He moves a rook and", "choices": ["wins.", "boils.", "grows.", "rains."], "label": 0},
    ],
    "arc_easy": [
        {"context": "Question: What is ice?\nAnswer:", "choices": ["water", "sand", "air"], "label": 0},
        {"context": "Question: What burns?\nAnswer:", "choices": ["stone", "wood", "rain", "glass"], "label": 1},
        {
            "context": "Question: Which is a metal?\nAnswer:",
            "choices": ["oak", "milk", "wool", "tin", "fog"],
            "label": 3,
        },
    ],
    "openbookqa": [
        {"context": "Plants grow towards", "choices": ["light", "noise", "salt", "the naïve moon"], "label": 0},
        {"context": "Fog is likely near:", "choices": ["a desert", "a marsh", "an oven", "the sun"], "label": 1},
        {"context": "A magnet pulls", "choices": ["paper", "hope", "iron", "wood"], "label": 2},
    ],
    "winogrande": [
        _blank("Ann thanked Eve because _ had helped.", ["Ann", "Eve"], 1),
        _blank("The cup fell off the shelf as the _  was steep.", ["cup", "shelf"], 1),
        _blank("Bob met Al at _ 's house.", ["Bob", "Al"], 0),
    ],
    "mmlu": [
        _letters("college_physics", "What has mass?", ["Light", "A stone", "A name", "Time"], 1),
        _letters("astronomy", "Which is a star?", ["The moon", "Mars", "The sun", "Halley"], 2),
        _letters("college_physics", "A unit of work?", ["joule", "volt", "ohm", "mole"], 0),
    ],
    "lambada_openai": [
        {"context": "She took the key and opened the", "target": "door"},
        {"context": "“Come in,” he said,\n\nand she came", "target": "in"},
        {"context": "The dog barked at the other", "target": "dog"},
    ],
    "blimp": [
        {"choices": ["The cats sleep.", "The cats sleeps."], "label": 0},
        {"choices": ["Who did he saw?", "Who did he see?"], "label": 1},
        {"choices": ["No one ever came.", "Someone ever came."], "label": 0},
    ],
    "riddles": [  # a task that lm-eval does not know
        {"context": "Riddle: what has teeth and no mouth?", "choices": ["a comb", "a wolf"], "label": 0},
        {"context": "Riddle: what runs and has no legs?", "choices": ["a chair", "a river", "a hill"], "label": 1},
        {"context": "Riddle: what gets wet as it dries?", "choices": ["a towel", "a fire"], "label": 0},
    ],
}


def write_tasks(folder: Path, *names: str) -> Path:
    """Write task files, by default of all tasks, and return their folder."""
    for name in names or ROWS:
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS[name]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
