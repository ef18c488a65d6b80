"""`inspect MODEL`: what would be compressed, and to what size, without loading a weight."""

import argparse
import json

from .arguments import add_config_arguments, add_model_arguments, check_model_name, config_from_arguments
from .tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Show what would be compressed, and the sizes before and after, without loading weights."
DESCRIPTION = "Read a checkpoint's config, build the model without weights, and show what compression would do to it."
EPILOG = """examples:
  optimum-dern inspect mistralai/Mixtral-8x7B-v0.1 --num-experts 4
  optimum-dern inspect ./olmoe --sparsity 0.25 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the structure that was found and the sizes before and after."""
    config = config_from_arguments(args)
    check_model_name(args.model)

    from ..models.refusals import check_model, resolve_count
    from ..models.size import measure_model, predict_size
    from ..models.skeleton import build_skeleton
    from ..models.structure import find_moe_layers

    model = build_skeleton(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    layers = find_moe_layers(model)
    check_model(model, layers)
    count = resolve_count(layers[0], config.sparsity, config.num_experts, config.experts_multiple_of)
    before, after = measure_model(model, layers), predict_size(model, layers, count)
    tokens = config.num_samples * config.sequence_length
    hidden_size = model.config.get_text_config().hidden_size
    memory = estimate_memory(layers, before.bytes + after.bytes, tokens, hidden_size, model.dtype)
    facts = {
        "model": args.model,
        "model_type": model.config.model_type,
        "moe_layers": [layer.name for layer in layers],
        "experts": [before.experts, after.experts],
        "experts_per_token": layers[0].top_k,
        "router_groups": layers[0].num_groups,
        "parameters": [before.parameters, after.parameters],
        "active_parameters": [before.active_parameters, after.active_parameters],
        "bytes": [before.bytes, after.bytes],
        "memory_bytes": memory,
    }
    if args.json:
        print(json.dumps(facts))
        return
    _print_facts(facts)


def estimate_memory(layers: list, model_bytes: int, tokens: int, hidden_size: int, dtype) -> int:
    """Bytes that in-memory compression needs: both models, hidden states, and one layer's working set in float32.

    The original experts stay until the last layer is done, so that an error can put them back.  The working set is
    the layer's experts twice (original and candidate), the recorded inputs, the target and the residual of the refit.
    """
    experts = max(sum(p.numel() for p in layer.experts.parameters(recurse=False)) for layer in layers)
    hidden = tokens * hidden_size * (2 * dtype.itemsize + 3 * 4)
    return model_bytes + 2 * experts * 4 + hidden


def _print_facts(facts: dict) -> None:
    names = facts["moe_layers"]
    print(f"{facts['model']} ({facts['model_type']}): {len(names)} MoE layers, {names[0]} to {names[-1]}")
    groups = f" in {facts['router_groups']} groups" if facts["router_groups"] > 1 else ""
    print(f"{facts['experts_per_token']} of {facts['experts'][0]} experts{groups} per token\n")
    rows = [("experts per layer", *map(str, facts["experts"]))]
    for name in ("parameters", "active_parameters", "bytes"):
        rows.append((name.replace("_", " "), *(f"{value:,}" for value in facts[name])))
    print_table(("", "original", "compressed"), rows)
    print(f"memory to compress it in memory: about {facts['memory_bytes'] / 2**30:.2f} GiB")
