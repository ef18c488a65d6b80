"""`merge BASE CHECKPOINT... OUTPUT`: merge fine-tuned checkpoints of one base into a plain checkpoint."""

import argparse
import json
from pathlib import Path

from .shared.arguments import check_model_name, check_numbers
from .shared.named_data import add_data_arguments, load_named_batches, named_data


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Merge fine-tuned checkpoints of one base model into one."
DESCRIPTION = (
    "Merge checkpoints that were fine-tuned from one base, dense or Mixture-of-Experts.  By default coefficients are\n"
    "learned without labels, on a text for each checkpoint (Expert Merging, arXiv 2509.25712); the other methods are\n"
    "rules without data.  Models that memory does not hold are merged one decoder layer at a time."
)
EPILOG = """examples:
  optimum-dern merge ./base ./coder ./mathematician ./merged --data coder=code.txt mathematician=maths.jsonl
  optimum-dern merge ./base ./coder ./mathematician ./merged --method ties --density 0.3
  optimum-dern merge ./base ./one ./two ./merged --layerwise --data one=code.txt two=maths.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge` to its parser."""
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the model that all were fine-tuned from")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="two or more of them")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="new folder")
    parser.add_argument("--method", choices=("learned", "task_arithmetic", "ties", "dare"), default="learned")
    parser.add_argument("--strength", type=float, metavar="X", help="of the rules")
    parser.add_argument("--density", type=float, metavar="X", help="share of the differences that ties and dare keep")
    parser.add_argument("--initial", type=float, metavar="X", help="coefficient to begin with (default: 0.1)")
    parser.add_argument("--epochs", type=int, metavar="N", help="over the text (default: 4)")
    parser.add_argument("--chunks", type=int, metavar="N", help="coefficients of a tensor in important layers")
    parser.add_argument(
        "--layerwise",
        action="store_true",
        help="one decoder layer of each in memory at a time (default: where memory does not hold the models)",
    )
    parser.add_argument("--device", default="cpu", help="to compute on (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoints' own code")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    add_data_arguments(parser, samples=16, required=False)


def run(args: argparse.Namespace) -> None:
    """Merge, write, and print what was learned."""
    from ..checkpoint.output.new_folder import check_new
    from ..machine.torch_state import check_device

    for model in (args.base, *args.checkpoints):
        check_model_name(model)
    check_device(args.device)
    check_numbers(args, "seed", "epochs", "chunks")
    learned = {
        name: getattr(args, name) for name in ("initial", "epochs", "chunks") if getattr(args, name) is not None
    }
    check_new(args.output)
    texts = _texts_in_order(args)
    if args.method != "learned" and (learned or texts is not None):
        raise ValueError("--data, --initial, --epochs and --chunks are of --method learned alone; leave them out")

    from ..machine.allocator import return_large_blocks
    from ..model_merging.learned import LearnedSettings
    from ..model_merging.merge import merge_checkpoints

    options = {"strength": args.strength, "density": args.density, "seed": args.seed, "device": args.device}
    options["layerwise"] = args.layerwise or None
    if args.layerwise:
        return_large_blocks()
    if args.method == "learned":
        options |= {"texts": texts, "settings": LearnedSettings(**learned)}
    source = {"trust_remote_code": args.trust_remote_code}
    facts = merge_checkpoints(args.base, args.checkpoints, args.output, method=args.method, **options, **source)
    if args.json:
        print(json.dumps(facts | {"output": str(args.output)}))
        return
    if args.method == "learned":
        for checkpoint, factor in zip(args.checkpoints, facts["factors"], strict=True):
            print(f"{checkpoint}: mean coefficient {factor:.3f}")
    print(args.output)


def _texts_in_order(args: argparse.Namespace) -> list[list[dict]] | None:
    """Load the text of each checkpoint, named like its folder or given in their order; None where none is given."""
    if not args.data:
        if args.method == "learned":
            raise ValueError("--method learned needs --data NAME=DATA for each checkpoint; or choose another method")
        return None
    names = named_data(args)
    folders = [Path(checkpoint).name for checkpoint in args.checkpoints]
    if len(names) != len(folders):
        raise ValueError(f"{len(names)} texts for {len(folders)} checkpoints; give one for each")
    order = folders if names.keys() == set(folders) else list(names)

    from ..checkpoint.source.provenance import load_tokenizer
    from ..models.loading import load_config

    source = {"trust_remote_code": args.trust_remote_code}
    config = load_config(args.base, **source)
    texts = load_named_batches(args, config, load_tokenizer(args.base, **source), batch_size=1)
    return [texts[name] for name in order]
