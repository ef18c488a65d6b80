"""`sample MODEL OUTPUT.jsonl`: let a model write its own calibration text, where `compress` cannot hold it whole."""

import argparse
import json
from pathlib import Path
from typing import Any

from .shared.arguments import (
    add_model_arguments,
    check_model_name,
    check_numbers,
    check_output_file,
    check_revision,
)


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate, over several devices
HELP = "Let a model write calibration text into a file."
DESCRIPTION = (
    "Sample text from a model, as compress does by itself where the model fits in memory, and write it as JSON lines\n"
    "of token ids and text: calibration data for compress --dataset.  The model may be spread over several devices,\n"
    "or be a quantised copy of the one to compress, with the same tokenizer."
)
EPILOG = """examples:
  optimum-dern sample Qwen/Qwen3-30B-A3B text.jsonl --device-map auto
  optimum-dern sample ./qwen3-30b-awq text.jsonl --num-samples 512
  optimum-dern compress ./qwen3-30b out --dataset text.jsonl --self-share 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample` to its parser."""
    add_model_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="file to write, .jsonl")
    parser.add_argument("--num-samples", type=int, default=128, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of each (default: what the model is made for, at most %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    parser.add_argument("--device-map", help="auto, or a device (default: a GPU where there is one)")
    parser.add_argument(
        "--load-in", type=int, choices=(4, 8), metavar="BITS", help="quantise with bitsandbytes to 4 or 8 bits"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Load the model, sample from it, and write the rows."""
    _check(args)
    from ..checkpoint.source.provenance import load_tokenizer
    from ..engine.run.own_text import OwnText
    from ..models.context_length import bounded_length
    from ..text_files import replace_rows

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.model, **source)
    model = _load_model(args, source)
    length = bounded_length(model.config, args.sequence_length)
    own = OwnText(model)
    own.write(tokenizer, args.num_samples, length, args.seed)
    replace_rows(args.output, own.rows)
    facts = {"output": str(args.output), "sequences": len(own.rows), "tokens": len(own.rows) * length}
    print(json.dumps(facts) if args.json else "{sequences} sequences, {tokens:,} tokens: {output}".format(**facts))


def _check(args: argparse.Namespace) -> None:
    from ..machine.torch_state import check_device

    check_model_name(args.model)
    check_revision(args, args.model)
    check_numbers(args, "num_samples", "sequence_length", "seed")
    if args.device_map not in MAPS:
        check_device(args.device_map)
    check_output_file(args.output)
    if args.output.suffix != ".jsonl":
        raise ValueError(f"OUTPUT is {args.output}, but the rows are JSON lines: give a name that ends with .jsonl")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; give another name, or --overwrite to replace it")


def _load_model(args: argparse.Namespace, source: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    from ..machine.torch_state import default_device
    from ..models.loading import model_class

    options = {"device_map": args.device_map or str(default_device()), "dtype": args.dtype or "auto"}
    if args.load_in is not None:
        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{args.load_in}bit": True})
    return model_class(args.model, **source).from_pretrained(args.model, **options, **source).eval()
