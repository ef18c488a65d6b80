"""`compress MODEL OUTPUT`: compress a checkpoint into a smaller one, and measure both if asked to."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..checkpoint.output.folder import check_output
from .shared.arguments import (
    add_config_arguments,
    add_model_arguments,
    check_model_name,
    check_revision,
    check_sources,
    config_from_arguments,
)
from .shared.tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Compress a checkpoint and write an ordinary, smaller one."
DESCRIPTION = (
    "Drop the experts that the router uses least, recombine their neurons into the retained ones where that helps,\n"
    "refit, and write a checkpoint that plain transformers loads.  One decoder layer is in memory at a time;\n"
    "the same command goes on where an interrupted run has stopped.  accelerate launch or torchrun with several\n"
    "processes split the calibration text among them; the result is that of one process."
)
EPILOG = """examples:
  optimum-dern compress ./olmoe out                # half of the experts; the model writes its own calibration text
  optimum-dern compress Qwen/Qwen3-30B-A3B out --dataset c4
  optimum-dern compress ./mixtral out --num-experts 4 --dataset notes.txt --evaluate held_out.txt
  optimum-dern compress ./olmoe out --preset paper --dataset wikitext2
  optimum-dern compress ./olmoe out --num-experts 48 32 16 --dataset c4          # out/48-experts, out/32-experts, ...
  optimum-dern compress ./qwen3 out --method cd_moe --condensed-layers 8 --dataset c4          # 8 dense layers
  optimum-dern compress ./olmoe more --preset paper --sparsity 0.3 --statistics out/dern_statistics.safetensors
  accelerate launch --num_processes 4 -m optimum_dern compress ./olmoe out --dataset c4
  optimum-dern compress ./olmoe out --method prune --selection reap --dataset code.jsonl=2 wikitext2=1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compress` to its parser."""
    add_model_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the compressed checkpoint")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that is not empty: an earlier model*.safetensors checkpoint and its tokenizer are "
        "replaced, another README.md is renamed, adapters, GGUF and weights of other formats are refused, and all "
        "else stays",
    )
    parser.add_argument(
        "--evaluate", metavar="TEXT", help="held-out file or folder: measure the loss before and after"
    )
    parser.add_argument(
        "--evaluation-length",
        type=int,
        metavar="N",
        help="tokens per sequence of --evaluate (default: the model's maximum length, at most 2048)",
    )
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        type=Path,
        help="dern_statistics.safetensors of an earlier oneshot run, instead of --dataset; for runs without refit and "
        "guard, such as --preset paper",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line instead of a table")
    parser.add_argument("--restart", action="store_true", help="discard an unfinished run in OUTPUT")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the result (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help='largest file, such as "5GB" (default: as in the source)'
    )
    parser.add_argument(
        "--max-memory", metavar="SIZE", help='memory limit, such as "8GiB"; a run that would exceed it is refused'
    )
    parser.add_argument(
        "--device", default=None, help="cpu, or a GPU: cuda or xpu (default: a GPU where there is one)"
    )
    add_config_arguments(parser, several=True)


def run(args: argparse.Namespace) -> None:
    """Compress, write and evaluate a checkpoint layer by layer, and print the table of before and after."""
    from ..machine.allocator import return_large_blocks
    from ..machine.processes import joined_processes
    from ..machine.torch_state import check_device

    check_device(args.device)
    if args.max_memory:
        return_large_blocks()
    with joined_processes(args.device) as processes:
        try:
            reports, texts = _compress(args)
        except Exception:
            if processes.is_first_to_fail():
                raise
            sys.exit(2)  # one error is enough: that of the process that has failed first
    if processes.is_main:
        if texts:
            _evaluate(reports, args, texts, processes.device)
        _print_results(reports, args)
    if processes.count > 1:
        sys.stdout.flush()
        os._exit(0)  # a thread that torch leaves behind may abort an ordinary exit, and the launcher stops the others


def _compress(args: argparse.Namespace) -> tuple[dict[Path, Any], dict[str, list[dict]]]:
    """Check the arguments and compress; returns the reports by folder, and the texts to evaluate on."""
    config = config_from_arguments(args)
    check_model_name(args.model)
    check_revision(args, args.model)
    check_output(Path(args.model).expanduser(), args.output, args.overwrite)
    check_sources(config.dataset, args.evaluate)
    if args.evaluation_length is not None and not args.evaluate:
        raise ValueError(
            "--evaluation-length is of the text of --evaluate: give --evaluate TEXT, too, or leave it out"
        )

    from ..compressor import DernCompressor
    from ..engine.run.checks import check_names

    check_names(config)
    texts = _load_texts(args) if args.evaluate else {}
    amounts = getattr(args, "amounts", {})
    found = DernCompressor(config).compress_checkpoint(
        args.model,
        args.output,
        **amounts,
        statistics=args.statistics,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        max_memory=args.max_memory,
        restart=args.restart,
        overwrite=args.overwrite,
    )
    if not amounts:
        return {args.output: found}, texts
    return {args.output / f"{report.after.experts}-experts": report for report in found}, texts


def _load_texts(args: argparse.Namespace) -> dict[str, list[dict]]:
    from ..checkpoint.source.provenance import load_tokenizer
    from ..checkpoint.source.resolve import check_checkpoint
    from ..evaluation.loss.perplexity import evaluation_length, load_texts
    from ..models.loading import load_config

    check_checkpoint(args.model, args.revision)
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    length = evaluation_length(load_config(args.model, **source), args.evaluation_length)
    return load_texts(args.evaluate, load_tokenizer(args.model, **source), length)


def _evaluate(reports: dict[Path, Any], args: argparse.Namespace, texts: dict[str, list[dict]], device: Any) -> None:
    """Measure the loss of all checkpoints, and write it into their reports and cards."""
    from ..checkpoint.output.publishing import write_report
    from ..evaluation.loss.streamed import evaluate_checkpoint

    own_code = {"trust_remote_code": args.trust_remote_code}
    before = evaluate_checkpoint(args.model, texts, device, revision=args.revision, **own_code)
    for folder, report in reports.items():
        report.add_evaluation(before, evaluate_checkpoint(folder, texts, device, **own_code))
        write_report(folder, report)


def _print_results(reports: dict[Path, Any], args: argparse.Namespace) -> None:
    results = [{"output": str(folder), **report.summary()} for folder, report in reports.items()]
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else {"results": results}))
        return
    for folder, report in reports.items():
        _print_result(folder, report)


def _print_result(folder: Path, report: Any) -> None:
    from ..engine.run.serving import advise_serving

    kept = [] if report.kept_width is None else [("not zero, on average", "", f"{report.kept_width:g}", "")]
    rows = [
        ("experts per layer", f"{report.before.experts}", f"{report.after.experts}", ""),
        ("neurons per expert", f"{report.before.width}", f"{report.after.width}", ""),
        *kept,
        _size_row("parameters", report.before.parameters, report.after.parameters),
        _size_row("active per token", report.before.active_parameters, report.after.active_parameters),
        _size_row("bytes", report.before.bytes, report.after.bytes),
    ]
    if report.dense_layers:
        rows.append(("dense layers", "", ", ".join(map(str, sorted(report.dense_layers))), ""))
    if report.evaluation_length:
        rows.append(("text, tokens a sequence", *[f"{report.evaluation_length:,}"] * 2, ""))
    for name, pair in report.evaluation.items():
        before, after = pair["before"]["loss"], pair["after"]["loss"]
        rows.append((f"loss, {name}", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"))
    print_table(("", "original", "compressed", "change"), rows)
    winners = [layer.winner for layer in report.layers]
    counts = ", ".join(f"{winners.count(name)} x {name}" for name in dict.fromkeys(winners))
    print(f"layers: {counts or 'unchanged'}; {report.seconds:.1f} s; saved to {folder}")
    if advice := advise_serving(report.model_type, report.before, report.after):
        print(advice)


def _size_row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"x {after / before:.2f}"
