"""`compare ORIGINAL COMPRESSED...`: measure the quality, size, memory and speed of several models side by side."""

import argparse
import json
from pathlib import Path

from ..shared.arguments import check_model_name, check_numbers, check_output_file
from ..shared.tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Compare models: quality, size, memory and speed, measured side by side in one run."
DESCRIPTION = (
    "Measure an original and its compressed models on equal terms, each in a process of its own.  Quality is\n"
    "measured one model at a time; speed in turn, round by round, so that slow spells of the machine meet all alike,\n"
    "and the medians are shown.  All models are then in memory at once: --no-speed where they do not fit."
)
EPILOG = """examples:
  optimum-dern compare ./mixtral ./mixtral-6 ./mixtral-4 --data held_out.txt
  optimum-dern compare ./mixtral ./mixtral-4 --batch-size 16 --prompt-length 1024 --json
  optimum-dern compare ./mixtral ./mixtral-4 --data held_out/ --output comparison.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare` to its parser."""
    parser.add_argument("original", metavar="ORIGINAL", help="checkpoint folder or Hub id")
    parser.add_argument("compressed", metavar="COMPRESSED", nargs="+", help="the models to set against it")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--data", metavar="TEXT", help="held-out file, or folder with one file a domain")
    quality.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="of texts, for all models (default: what ORIGINAL is made for, at most 2048)",
    )
    quality.add_argument("--tasks", metavar="TASK", nargs="+", default=[], help="as in optimum-dern evaluate")
    quality.add_argument("--tasks-folder", metavar="DIR", type=Path, help="where tasks are looked up by name")
    quality.add_argument("--limit", type=int, metavar="N", help="at most N sequences a text and N items a task")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--no-speed", dest="speed", action="store_false", help="leave speed and memory out")
    speed.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences (default: %(default)s)")
    speed.add_argument("--prompt-length", type=int, default=512, metavar="N", help="(default: %(default)s)")
    speed.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded (default: %(default)s)")
    speed.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--device", help="cpu, or a GPU: cuda or xpu (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="auto", help="default: stored")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoints' own code")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table (.md) or all figures (.json)")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON line instead of a table")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")


def run(args: argparse.Namespace) -> None:
    """Measure the models, and print or write the comparison."""
    _check(args)

    from ...evaluation.compare.models import compare_models
    from ...evaluation.compare.speed import SpeedSettings
    from ...reporting.comparison import comparison_rows, markdown_table
    from ...text_files import replace_text

    speed = SpeedSettings(args.batch_size, args.prompt_length, args.new_tokens, args.repeats) if args.speed else None
    comparison = compare_models(
        args.original,
        args.compressed,
        args.data,
        args.sequence_length,
        args.limit,
        args.tasks,
        args.tasks_folder,
        speed,
        args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    header, rows = comparison_rows(comparison)
    if args.output is not None:
        markdown = args.output.suffix == ".md"
        text = markdown_table(header, rows) if markdown else json.dumps(comparison.to_dict(), indent=2)
        replace_text(args.output, text + "\n")
    if args.json:
        print(json.dumps(comparison.to_dict()))
        return
    print_table(header, rows)
    if speed is not None:
        print(
            f"{comparison.device}, {comparison.threads} threads; medians of {speed.repeats} interleaved rounds: "
            f"{speed.batch_size} x {speed.prompt_length} tokens prefilled, {speed.new_tokens} decoded"
        )


def _check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments and missing files before a model is loaded."""
    from ...checkpoint.source.resolve import check_checkpoint
    from ...data.batches import check_source
    from ...evaluation.tasks.load import load_tasks
    from ...machine.torch_state import check_device

    check_device(args.device)
    for name in (args.original, *args.compressed):
        check_model_name(name)
    check_numbers(args, "limit", "batch_size", "prompt_length", "new_tokens", "repeats")
    if args.data is not None:
        check_source(args.data)
    elif not args.speed and not args.tasks:
        raise ValueError("there is nothing to compare: give --data TEXT or --tasks, or leave --no-speed out")
    if args.tasks_folder and not args.tasks:
        raise ValueError("--tasks-folder is of tasks: give --tasks, too, or leave it out")
    load_tasks(args.tasks, args.tasks_folder, limit=1)
    if args.output is not None and args.output.suffix not in (".md", ".json"):
        raise ValueError(f"--output is {args.output}; give a file that ends in .md or .json")
    check_output_file(args.output)
    for name in (args.original, *args.compressed):
        check_checkpoint(name)
