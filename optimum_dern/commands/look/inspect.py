"""`inspect MODEL`: show a model's MoE layers, and its predicted size, memory and time, without loading weights."""

import argparse
import json

from ..shared.arguments import (
    add_config_arguments,
    add_model_arguments,
    check_model_name,
    check_revision,
    check_sources,
    config_from_arguments,
)
from ..shared.tables import print_table


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Show what would be compressed, sizes before and after, memory, disk and time, without loading weights."
DESCRIPTION = (
    "Read a checkpoint's config, build the model without weights, show what compression would do to it, and predict\n"
    "what it takes."
)
EPILOG = """examples:
  optimum-dern inspect mistralai/Mixtral-8x7B-v0.1 --num-experts 4
  optimum-dern inspect ./olmoe --sparsity 0.25 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect` to its parser."""
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    parser.add_argument("--max-memory", metavar="SIZE", help='refuse what would take more, such as "8GiB"')
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the MoE layers found, the sizes before and after, and the predicted memory, disk space and time."""
    config = config_from_arguments(args)
    check_model_name(args.model)
    check_revision(args, args.model)
    check_sources(config.dataset)

    from ...checkpoint.output.shards import parse_bytes
    from ...checkpoint.source.find import find_checkpoint
    from ...condensing.plan import condensed_size
    from ...engine.cost.duration import measure_rate, predict_seconds
    from ...engine.cost.memory import plan_memory
    from ...engine.layer.narrowing import padding_notice, written_width
    from ...engine.run.checks import check_names, check_request, needs_data, with_dataset
    from ...engine.run.model_batches import sequences_in_all, with_text_it_can_write
    from ...engine.run.serving import advise_serving
    from ...engine.run.whole_model import check_fits
    from ...machine.torch_state import default_device
    from ...models.context_length import bounded_length
    from ...models.moe.structure import find_moe_layers
    from ...models.size import measure_model, predict_size

    check_names(config)
    options = {"trust_remote_code": args.trust_remote_code, "need_weights": False}
    model = find_checkpoint(args.model, args.revision, **options).skeleton
    layers = find_moe_layers(model)
    count = check_request(config, model, layers)
    before = measure_model(model, layers)
    after = predict_size(model, layers, count, written_width(layers[0], config))
    if config.condensed_layers is not None:
        after = condensed_size(model, layers, config.condensed_layers, config.num_experts)
    bound, device = parse_bytes(args.max_memory) if args.max_memory else None, default_device()
    config = with_text_it_can_write(config, model, lambda: check_fits(model, device, bound))
    sequences = 0  # where compress runs no text through the model
    if config.dataset is not None or needs_data(config):
        sequences = sequences_in_all(with_dataset(config))
    tokens = sequences * bounded_length(model.config, config.sequence_length)
    memory = plan_memory(model, layers, tokens, config, count, bound, device)
    rate = measure_rate(device)
    facts = {
        "model": args.model,
        "model_type": model.config.model_type,
        "moe_layers": [layer.name for layer in layers],
        "experts": [before.experts, after.experts],
        "width": [before.width, after.width],
        "dense_layers": config.condensed_layers,
        "experts_per_token": layers[0].top_k,
        "router_groups": layers[0].num_groups,
        "selection": config.selection,
        "protected": config.protect_experts or {},
        "parameters": [before.parameters, after.parameters],
        "active_parameters": [before.active_parameters, after.active_parameters],
        "bytes": [before.bytes, after.bytes],
        "calibration_tokens": tokens,
        "memory_bytes": memory.peak,
        "layer_bytes": memory.layer,
        "working_bytes": memory.working,
        "hidden_bytes": memory.hidden,
        "hidden_in_file": memory.spilled,
        "experts_in_file": memory.experts_in_file,
        "disk_bytes": after.bytes + memory.disk,
        "padding": padding_notice(layers[0], config),
        "seconds": predict_seconds(model, layers, tokens, config, count, rate),
        "advice": advise_serving(model.config.model_type, before, after),
    }
    if args.json:
        print(json.dumps(facts))
        return
    _print_facts(facts)
    for line in filter(None, (facts["padding"], facts["advice"])):
        print(line)
    _print_protection(config.protect_experts)


def _print_facts(facts: dict) -> None:
    names = facts["moe_layers"]
    print(f"{facts['model']} ({facts['model_type']}): {len(names)} MoE layers, {names[0]} to {names[-1]}")
    groups = f" in {facts['router_groups']} groups" if facts["router_groups"] > 1 else ""
    print(f"{facts['experts_per_token']} of {facts['experts'][0]} experts{groups} per token\n")
    rows = [("experts per layer", *map(str, facts["experts"])), ("neurons per expert", *map(str, facts["width"]))]
    if facts["dense_layers"] is not None:
        which = facts["dense_layers"]
        rows.append(("dense layers", "", f"{which}, to be searched" if isinstance(which, int) else str(which)))
    for name in ("parameters", "active_parameters", "bytes"):
        rows.append((name.replace("_", " "), *(f"{value:,}" for value in facts[name])))
    print_table(("", "original", "compressed"), rows)
    gib = 2**30
    hidden, layer = ("in a file" if facts[name] else "in memory" for name in ("hidden_in_file", "experts_in_file"))
    tokens = f"{facts['calibration_tokens']:,}" if facts["calibration_tokens"] else "no"
    print(f"with {tokens} calibration tokens, a layer at a time, about:")
    print(
        f"  memory {facts['memory_bytes'] / gib:.2f} GiB: largest layer {facts['layer_bytes'] / gib:.2f} {layer}, "
        f"work on it {facts['working_bytes'] / gib:.2f}, hidden states {facts['hidden_bytes'] / gib:.2f} {hidden}"
    )
    print(f"  disk   {facts['disk_bytes'] / gib:.2f} GiB")
    print(f"  time   {_duration(facts['seconds'])} on this machine, loading and writing aside")


def _print_protection(protected: dict | str | None) -> None:
    if protected == "super":
        print("protected: super experts, found while compressing; the report names them")
    elif protected:
        layers = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in protected.items())
        print(f"protected: {layers}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
