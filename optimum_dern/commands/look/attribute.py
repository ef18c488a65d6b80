"""`attribute MODEL OUTPUT --data NAME=DATA ...`: what every expert does for each domain, as a page and as JSON."""

import argparse
import json
from pathlib import Path

from ..shared.arguments import add_model_arguments, check_model_name, check_revision
from ..shared.named_data import add_data_arguments, load_named_batches, named_data
from ..shared.tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Show which experts and neurons work for which domain of text, and write a model without a domain's own."
DESCRIPTION = (
    "Measure on each text how often every expert is chosen and how much it contributes, in one pass with one layer\n"
    "in memory at a time.  OUTPUT gets attribution.json, attribution.safetensors (neurons) and attribution.html.\n"
    "--mask-domain also writes OUTPUT/masked: a plain checkpoint without the experts or neurons of that domain."
)
EPILOG = """examples:
  optimum-dern attribute ./mixtral ./who --data code=code.txt books=books.txt
  optimum-dern attribute ./mixtral ./who --data code=code.txt books=books.txt --mask-domain code --mask-experts 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `attribute` to its parser."""
    add_model_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write")
    add_data_arguments(parser, samples=64)
    parser.add_argument("--mask-domain", metavar="NAME", help="also write OUTPUT/masked, without what is its own")
    parser.add_argument("--mask-experts", type=int, default=0, metavar="N", help="experts of every layer that go")
    parser.add_argument("--mask-neurons", type=int, default=0, metavar="N", help="or neurons that are zeroed")
    parser.add_argument("--device", help="cpu, or a GPU: cuda or xpu (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Measure, write the files, and print the experts that are most a domain's own."""
    from ...machine.torch_state import check_device

    check_model_name(args.model)
    check_revision(args, args.model)
    check_device(args.device)
    names = named_data(args)
    _check(args, names)

    from ...attribution.masking import mask_checkpoint
    from ...attribution.measure import attribute_experts
    from ...checkpoint.output.new_folder import folder_to_fill
    from ...checkpoint.source.provenance import load_tokenizer
    from ...models.loading import load_config

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.model, **source)
    texts = load_named_batches(args, load_config(args.model, **source), tokenizer)
    with folder_to_fill(args.output):
        found = attribute_experts(args.model, texts, tokenizer, args.device, **source)
        files = found.save(args.output)
        if args.mask_domain is not None:
            counts = {"experts": args.mask_experts, "neurons": args.mask_neurons}
            masked = args.output / "masked"
            files.append(mask_checkpoint(args.model, masked, found, args.mask_domain, **counts, **source))
    if args.json:
        print(json.dumps({"files": list(map(str, files)), "tokens": found.tokens}))
        return
    if len(found.tokens) > 1:
        rows = [(domain, *map(str, own[0])) for domain in found.domains for own in [_first(found, domain)]]
        print_table(("domain", "expert most its own", "share", "largest elsewhere"), rows)
    for file in files:
        print(file)


def _check(args: argparse.Namespace, names: dict[str, str]) -> None:
    from ...checkpoint.output.folder import WORK_NAME
    from ...checkpoint.output.new_folder import check_no_part

    masks = args.mask_experts, args.mask_neurons
    if min(masks) < 0 or (args.mask_domain is None and any(masks)):
        raise ValueError("give --mask-experts and --mask-neurons numbers above 0, with --mask-domain NAME")
    if args.mask_domain is not None:
        if args.mask_domain not in names:
            raise ValueError(f"--mask-domain {args.mask_domain!r} is none of the data; give one of {', '.join(names)}")
        if (masks[0] > 0) == (masks[1] > 0) or len(names) < 2:
            raise ValueError("--mask-domain needs --mask-experts N or --mask-neurons N, and at least two texts")
        masked = args.output / "masked"
        if masked.exists() and not (masked / WORK_NAME).is_dir():  # else of a run that was interrupted, which goes on
            raise ValueError(f"{masked} exists; give another OUTPUT, or remove it")
        check_no_part(masked)


def _first(found, domain: str) -> list[tuple[str, str, str]]:
    """Return the expert that is most a domain's own, with its share there and the largest elsewhere."""
    number = found.domains.index(domain)
    skew, share = found.skew()[number], found.measures["share"][number]
    layer, expert = divmod(int(skew.argmax()), skew.shape[1])
    here = share[layer, expert].item()
    place = f"layer {found.layers[layer]}, expert {expert}"
    return [(place, f"{here:.1%}", f"{here - skew[layer, expert].item():.1%}")]
