"""lm-eval on local rows, its prompts and its scoring, against our own scorer.  Needs the extra `eval`."""

import json
import re
import sys

import pytest
import torch
from task_rows import ROWS
from tiny import make_model, tiny_tokenizer

from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks
from optimum_dern.evaluation.tasks.load import make_task
from optimum_dern.installation import install_hint
from optimum_dern.integration.lm_eval import evaluate_with_lm_eval, harness_model, write_lm_eval_tasks
from optimum_dern.integration.lm_eval_rows import DEFINITIONS


TASKS = [make_task(name, rows) for name, rows in ROWS.items()] + [make_task("mmlu", ROWS["mmlu"], cloze=True)]


@pytest.fixture(scope="module")
def model():
    """A tiny model that reads more than the longest row."""
    return make_model("mixtral", max_position_embeddings=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All tasks as lm-eval reads them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    folder = tmp_path_factory.mktemp("tasks")
    write_lm_eval_tasks(TASKS, folder)
    return folder


def test_definitions(folder):
    """Tasks that lm-eval knows include its own definition; the others have ours."""
    for task in TASKS:
        facts = json.loads((folder / f"{task.name.replace(':', '_')}.yaml").read_text("utf-8"))
        if task.name == "mmlu":
            assert facts["task"] == ["mmlu_college_physics", "mmlu_astronomy"]
            facts = json.loads((folder / "mmlu_astronomy.yaml").read_text("utf-8"))
        assert facts.get("include", "").endswith(DEFINITIONS.get(task.name, ("",))[0].format(subject="astronomy"))
        assert ("include" in facts) == (task.name in DEFINITIONS)


def test_prompts(folder):
    """lm-eval asks what we ask, to the character: contexts, continuations and answers of all items."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for task in TASKS:
        loaded = manager.load([task.name.replace(":", "_")])["tasks"]
        requests = {}
        for part in loaded.values():
            part.build_all_requests(limit=None, rank=0, world_size=1)
            for instance in part.instances:
                requests.setdefault(instance.doc["item"], []).append((instance.idx, instance.args))
        for position, item in enumerate(task.items):
            asked = [args for _, args in sorted(requests[position])]
            assert asked == [(request.context, request.continuation) for request in item.requests], task.name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    """The model on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_the_same_results_item_by_item(folder, model, checkpoint, saved):
    """lm-eval and our scorer give every item the same likelihoods and answers, in memory and from disk."""
    tasks = TASKS[1::4] if saved else TASKS
    state = torch.get_rng_state()
    results = evaluate_with_lm_eval(*((checkpoint, None) if saved else (model, tiny_tokenizer())), tasks, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    ours = evaluate_tasks(model, tiny_tokenizer(), tasks)
    assert list(results) == list(ours) == [task.name for task in tasks]
    for name, result in results.items():
        unknown = {"acc_bytes", "acc_norm"} if name == "boolq" else {"acc_bytes"}
        assert result.metrics.keys() == ours[name].metrics.keys() - unknown
        for one, other in zip(result.outcomes, ours[name].outcomes, strict=True):
            assert (one.id, one.log_likelihoods) == (other.id, pytest.approx(other.log_likelihoods, abs=1e-4))
            assert one.metrics.items() <= other.metrics.items()
        for metric, estimate in result.metrics.items():
            assert estimate.value == pytest.approx(ours[name].metrics[metric].value, rel=1e-4)


@pytest.mark.slow
def test_lm_evals_own_model(folder, model, checkpoint):
    """What `lm_eval run --model hf --model_args pretrained=...` calls gives our figures and our standard errors."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={checkpoint},dtype=float32",
        tasks=["piqa", "riddles", "mmlu"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=10,
    )["results"]
    ours = evaluate_tasks(model, tiny_tokenizer(), TASKS)
    assert results["piqa"]["acc_norm,none"] == ours["piqa"].metrics["acc_norm"].value
    assert results["riddles"]["acc,none"] == ours["riddles"].metrics["acc"].value
    assert results["riddles"]["acc_stderr,none"] == pytest.approx(ours["riddles"].metrics["acc"].standard_error)
    assert results["mmlu"]["acc,none"] == pytest.approx(ours["mmlu"].metrics["acc"].value)


def test_other_rows_keep_their_text(tmp_path):
    """Rows of a known name whose text is not lm-eval's prompt are evaluated as they are."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    write_lm_eval_tasks([make_task("piqa", ROWS["riddles"])], tmp_path)
    facts = json.loads((tmp_path / "piqa.yaml").read_text("utf-8"))
    assert "include" not in facts and facts["doc_to_text"] == "context"


def test_a_model_without_its_tokenizer(model):
    """Said before lm-eval guesses one."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        harness_model(model)


def test_the_tokenizer_stays_as_it_is(model):
    """lm-eval sets a padding token on a copy."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    harness_model(model, tokenizer)
    assert tokenizer.pad_token is None


def test_without_lm_eval(tmp_path, monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=re.escape(f"lm-eval is not installed; run {install_hint('eval')}")):
        write_lm_eval_tasks([], tmp_path)
