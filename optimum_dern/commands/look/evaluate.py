"""`evaluate MODEL`: measure loss by text, accuracy by task, and agreement with the original model."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ...installation import install_hint
from ...results.estimate import plus_minus
from ..shared.arguments import (
    add_model_arguments,
    check_model_name,
    check_numbers,
    check_output_file,
    check_revision,
)
from ..shared.tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Measure a model: loss on texts, accuracy on tasks, agreement with the original."
DESCRIPTION = (
    "Measure a checkpoint on held-out text, on tasks that are scored by likelihood, and against the model that it\n"
    "was made from, whose predictions are written to disk first: the two are never in memory together."
)
EPILOG = """examples:
  optimum-dern evaluate ./mixtral-4 --data held_out/
  optimum-dern evaluate ./mixtral-4 --tasks suite blimp --tasks-folder bench/ --limit 200
  optimum-dern evaluate ./mixtral-4 --data held_out.txt --against ./mixtral --output results.json
  optimum-dern evaluate ./mixtral-4 --tasks my_questions.jsonl --streamed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate` to its parser."""
    add_model_arguments(parser)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--data", metavar="TEXT", nargs="+", default=[], help="held-out files, or folders of files")
    what.add_argument(
        "--tasks",
        metavar="TASK",
        nargs="+",
        default=[],
        help='.jsonl files, or names in --tasks-folder, "suite", "all"',
    )
    what.add_argument("--tasks-folder", metavar="DIR", type=Path, help="where tasks are looked up by name")
    what.add_argument("--against", metavar="ORIGINAL", help="compare predictions on --data with those of this model")
    what.add_argument("--cache", metavar="DIR", type=Path, help="keep the original's predictions for the next time")
    what.add_argument("--top-k", type=int, default=64, metavar="N", help="tokens of them (default: %(default)s)")
    what.add_argument("--limit", type=int, metavar="N", help="at most N sequences a text and N items a task")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="of texts (default: what MODEL, or ORIGINAL, is made for, at most 2048)",
    )
    how.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences of texts (default: as many as have some 8,000 tokens)"
    )
    how.add_argument("--lm-eval", action="store_true", help=f"score tasks with lm-eval ({install_hint('eval')})")
    how.add_argument("--streamed", action="store_true", help="one decoder layer in memory at a time")
    how.add_argument("--device", help="cpu, or a GPU: cuda or xpu (default: a GPU where there is one)")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write all figures as JSON")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON line instead of tables")


def run(args: argparse.Namespace) -> None:
    """Measure the model, and print or write the results."""
    _check(args)
    from ...evaluation.tasks.load import load_tasks
    from ...text_files import replace_json

    tasks = load_tasks(args.tasks, args.tasks_folder, args.limit)
    tokenizer, texts, length = _load_texts(args)
    with tempfile.TemporaryDirectory() as scratch:
        cache = _original_predictions(args, texts, Path(scratch)) if args.against else None
        figures = _measure(args, tokenizer, texts, tasks, cache)
    settings = {name: getattr(args, name) for name in ("limit", "dtype", "top_k", "lm_eval")}
    figures["settings"] = {"sequence_length": length} | settings
    if args.output is not None:
        replace_json(args.output, figures)
    if args.json:
        print(json.dumps(figures))
    else:
        _print_figures(figures)


def _check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments and missing files before anything is loaded."""
    from ...checkpoint.source.resolve import check_checkpoint
    from ...data.batches import check_source
    from ...machine.torch_state import check_device

    check_device(args.device)
    for name in (args.model, *([args.against] if args.against else [])):
        check_model_name(name)
    check_revision(args, args.model)
    if not args.data and not args.tasks:
        raise ValueError("there is nothing to measure: give --data TEXT, --tasks TASK or both")
    if args.against and not args.data:
        raise ValueError("--against compares predictions on text: give --data, too")
    if args.cache and not args.against:
        raise ValueError("--cache keeps predictions of the model of --against, which is not given")
    if not args.tasks and (args.tasks_folder or args.lm_eval):
        raise ValueError("--tasks-folder and --lm-eval are of tasks: give --tasks, too, or leave them out")
    check_numbers(args, "limit", "batch_size", "top_k")
    if args.lm_eval and args.streamed:
        raise ValueError("lm-eval needs the whole model in memory; leave --lm-eval or --streamed out")
    if args.lm_eval:
        from ...integration.lm_eval import import_lm_eval

        import_lm_eval()
    if args.cache is not None:
        from ...evaluation.agreement.logits_cache import check_folder

        check_folder(args.cache, overwrite=True)
    check_output_file(args.output)
    for name in args.data:
        check_source(name)
    check_checkpoint(args.model, args.revision)
    if args.against:
        check_checkpoint(args.against)


def _load_texts(args: argparse.Namespace) -> tuple[Any, dict[str, list[dict]], int]:
    """Load the model's tokenizer and the batches by name of the text; returns them and the sequence length."""
    from ...checkpoint.source.provenance import load_tokenizer
    from ...evaluation.loss.perplexity import evaluation_length, load_texts
    from ...models.loading import load_config

    source = _source(args)
    own_code = {"trust_remote_code": args.trust_remote_code}
    original, options = (args.against, own_code) if args.against else (args.model, source)
    length = evaluation_length(load_config(original, **options), args.sequence_length)
    tokenizer = load_tokenizer(args.model, **source)
    texts: dict[str, list[dict]] = {}
    for data in args.data:
        found = load_texts(data, tokenizer, length, args.batch_size, args.limit)
        if twice := sorted(set(found) & set(texts)):
            raise ValueError(f"two texts of --data are named {twice[0]!r}; give files different names")
        texts |= found
    return tokenizer, texts, length


def _load_model(args: argparse.Namespace, name: str, **source: Any) -> Any:
    """Load the whole model, or open one that streams its layers."""
    from ...models.loading import load_model

    if not args.streamed:
        return load_model(name, args.device, args.dtype, **source)

    from ...evaluation.loss.streamed import StreamedCheckpoint
    from ...machine.torch_state import default_device

    device = default_device(args.device)
    return StreamedCheckpoint(name, device, dtype=args.dtype, **source)


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "trust_remote_code": args.trust_remote_code}


def _original_predictions(args: argparse.Namespace, texts: dict[str, list[dict]], scratch: Path) -> Any:
    """Read the original's predictions from --cache if they are of these tokens, else compute and write them."""
    from ...evaluation.agreement.logits_cache import CACHE_NAME, LogitsCache, cache_logits

    folder, name = args.cache or scratch / "cache", f"{args.against}, {args.dtype or 'dtype as stored'}"
    if (folder / CACHE_NAME).is_file():
        cache = LogitsCache.load(folder)
        if cache.model == name and cache.top_k == min(args.top_k, cache.vocabulary) and cache.holds(texts):
            return cache
    original = _load_model(args, args.against, trust_remote_code=args.trust_remote_code)
    return cache_logits(original, texts, folder, args.top_k, overwrite=True, name=name)


def _measure(args: argparse.Namespace, tokenizer: Any, texts: dict, tasks: list, cache: Any) -> dict[str, Any]:
    from ...evaluation.agreement.measure import agreement
    from ...evaluation.loss.perplexity import evaluate_texts
    from ...evaluation.tasks.accuracy import evaluate_tasks
    from ...integration.lm_eval import evaluate_with_lm_eval
    from ...versions import __version__

    model = _load_model(args, args.model, **_source(args))
    score = evaluate_with_lm_eval if args.lm_eval else evaluate_tasks
    results = score(model, tokenizer, tasks) if tasks else {}
    losses = evaluate_texts(model, texts) if texts else {}
    agreements = agreement(model, cache) if cache else {}
    return {
        "model": args.model,
        "against": args.against,
        "version": __version__,
        "texts": {name: loss.to_dict() for name, loss in losses.items()},
        "tasks": {name: result.to_dict() for name, result in results.items()},
        "agreement": {name: result.to_dict() for name, result in agreements.items()},
    }


def _print_figures(figures: dict[str, Any]) -> None:
    if figures["texts"]:
        rows = []
        for name, f in figures["texts"].items():
            loss = plus_minus(f["loss"], f["standard_error"])
            rows.append((name, loss, f"{f['perplexity']:.3f}", f"{f['tokens']:,}", f"{f['sequence_length']:,}"))
        print_table(("text", "loss", "perplexity", "tokens", "a sequence"), rows)
    if figures["tasks"]:
        measured = {metric for f in figures["tasks"].values() for metric in f["metrics"]}
        names = [name for name in ("acc", "acc_norm", "perplexity") if name in measured]
        rows = [
            (name, *(_shown(f["metrics"].get(metric)) for metric in names), f"{f['chance']:.2f}", f"{f['items']:,}")
            for name, f in figures["tasks"].items()
        ]
        print_table(("task", *names, "guessing", "items"), rows)
    if figures["agreement"]:
        parts = ("kl", "top1", "original_loss", "loss_increase")
        rows = [
            (name, *(_shown(f[part]) for part in parts), f"{f['tokens']:,}")
            for name, f in figures["agreement"].items()
        ]
        print_table(("against the original", "KL", "same top token", "its loss", "loss increase", "tokens"), rows)


def _shown(estimate: dict[str, float] | None) -> str:
    return "" if estimate is None else plus_minus(estimate["value"], estimate["standard_error"])
