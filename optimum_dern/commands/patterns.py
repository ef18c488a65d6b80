"""`patterns build | list | match`: which experts some tasks use, to load a model with these alone."""

import argparse
import json
from pathlib import Path

from .shared.arguments import check_model_name, check_revision
from .shared.named_data import add_data_arguments, load_named_batches, named_data
from .shared.tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Score experts by task, so that a model can be loaded with those that a task needs."
DESCRIPTION = (
    "build scores the experts of every layer for some tasks, in one pass over the checkpoint (PreMoe, arXiv\n"
    "2505.17639); list shows a library's tasks; match finds the task that a prompt is nearest to.  In Python,\n"
    "optimum_dern.load_for(MODEL, LIBRARY, task=..., num_experts=...) then reads only the experts that are needed."
)
EPILOG = """examples:
  optimum-dern patterns build ./mixtral ./library --task code=code.txt maths=maths.jsonl
  optimum-dern patterns list ./library
  optimum-dern patterns match ./library --model ./mixtral --prompt "def main():"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `patterns` and their arguments to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|list|match")
    build = actions.add_parser("build", help="make a library")
    build.add_argument("model", metavar="MODEL", help="local checkpoint folder or Hub id")
    build.add_argument("library", metavar="LIBRARY", type=Path, help="folder to write")
    add_data_arguments(build, "--task")
    build.add_argument("--top", type=int, default=1, metavar="K", help="experts a token that count (default: 1)")
    build.add_argument("--confidence", type=float, metavar="P", help="smallest probability of a token's first expert")
    build.add_argument("--overwrite", action="store_true", help="replace a library that is there")
    _add_loading(build)
    shown = actions.add_parser("list", help="show a library's tasks")
    shown.add_argument("library", metavar="LIBRARY", type=Path)
    match = actions.add_parser("match", help="find the task nearest to a prompt")
    match.add_argument("library", metavar="LIBRARY", type=Path)
    match.add_argument("--model", required=True, metavar="MODEL", help="that the library is of; its first layers run")
    match.add_argument("--prompt", required=True, metavar="TEXT")
    _add_loading(match)
    for action in (build, shown, match):
        action.add_argument("--json", action="store_true", help="print the result as one JSON line")
        action.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    parser.add_argument("--device", help="cpu, or a GPU: cuda or xpu (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> None:
    """Run one of the subcommands."""
    {"build": _build, "list": _list, "match": _match}[args.action](args)


def _build(args: argparse.Namespace) -> None:
    _check_model(args)
    named_data(args)
    from ..patterns.library import FACTS, SCORES

    if not args.overwrite and any((args.library / name).exists() for name in (FACTS, SCORES)):
        raise ValueError(f"{args.library} holds a library; give another folder, or --overwrite to replace it")

    from ..checkpoint.output.new_folder import folder_to_fill
    from ..checkpoint.source.provenance import load_tokenizer
    from ..models.loading import load_config
    from ..patterns.build import build_patterns

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.model, **source)
    tasks = load_named_batches(args, load_config(args.model, **source), tokenizer)
    settings = {"top": args.top, "confidence": args.confidence}
    with folder_to_fill(args.library):
        library = build_patterns(args.model, tasks, **settings, device=args.device, **source)
        library.save(args.library)
    _show(library, args)


def _list(args: argparse.Namespace) -> None:
    from ..patterns.library import PatternLibrary

    _show(PatternLibrary.load(args.library), args)


def _show(library, args: argparse.Namespace) -> None:
    facts = {"library": str(args.library), "model": library.model["name"], "tasks": library.tasks}
    facts |= {"layers": library.layers, **library.settings}
    if args.json:
        print(json.dumps(facts))
        return
    experts = next(iter(library.scores.values())).shape[1]
    print(f"{args.library}: {len(library.layers)} layers of {experts} experts of {library.model['name']}")
    print_table(("task", "tokens"), [(name, f"{facts['tokens']:,}") for name, facts in library.tasks.items()])


def _check_model(args: argparse.Namespace) -> None:
    from ..machine.torch_state import check_device

    check_model_name(args.model)
    check_revision(args, args.model)
    check_device(args.device)


def _match(args: argparse.Namespace) -> None:
    _check_model(args)
    from ..checkpoint.source.provenance import load_tokenizer
    from ..checkpoint.source.recorded import identify_model
    from ..patterns.build import open_source
    from ..patterns.library import PatternLibrary
    from ..patterns.load import match_prompt

    library = PatternLibrary.load(args.library)
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    found = open_source(args.model, **source)
    library.check_model(identify_model(found.open_weights(), None), args.model)
    distances = match_prompt(found, library, args.prompt, load_tokenizer(args.model, **source), args.device)
    if args.json:
        print(json.dumps({"task": distances[0][0], "distances": dict(distances)}))
        return
    print_table(("task", "distance"), [(name, f"{distance:.4f}") for name, distance in distances])
