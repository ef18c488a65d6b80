"""Find the MoE layers of any transformers model by the shapes of their parameters.

No table of class names: an experts module carries 3-D `gate_up_proj` (or `up_proj`) and `down_proj` parameters, its
parent is the MoE block, and whatever else in the router part of the block has a dimension equal to the number of
experts belongs to the router.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ...core.layer.segments import ExpertLayout
from ...core.layer.workspace import IN_MEMORY, Workspace


__all__ = [
    "COUNT_KEYS",
    "MoELayer",
    "find_decoder",
    "find_decoder_layers",
    "find_moe_layers",
    "layers_by_position",
]

# Config keys that hold the number of routed experts, modules' attributes that repeat it, and those of their width.
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
COUNT_ATTRIBUTES = ("num_experts", "n_routed_experts", "num_routed_experts", "num_local_experts", "out_features")
WIDTH_ATTRIBUTES = (
    "intermediate_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "expert_dim",
)  # of experts modules
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
ROUTER_PARTS = ("gate", "router", "moe_statics")


@dataclass(frozen=True)
class RoutingTensor:
    """A router weight, bias or scale with one entry per expert."""

    module: nn.Module  # module that holds the tensor
    name: str  # attribute of the module
    path: str  # name inside the block
    dim: int  # the expert dimension

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def is_parameter(self) -> bool:
        return self.name in self.module._parameters


@dataclass(frozen=True, eq=False)
class MoELayer:
    """A MoE block of a model: its modules, router tensors, and the counts that constrain pruning."""

    name: str  # of the block in the model
    block: nn.Module
    experts: nn.Module
    experts_name: str  # of the experts in the model
    config: object  # the (sub-)config with the number of experts
    layout: ExpertLayout
    num_experts: int
    width: int  # neurons of an expert
    top_k: int
    num_groups: int  # of a group-limited router, else 1
    topk_group: int
    routing: tuple[RoutingTensor, ...]
    twins: tuple["MoELayer", ...] = ()  # other blocks that use the very same weights (DiffusionGemma's two passes)
    workspace: Workspace = IN_MEMORY  # allocator and memory limits for tensors made from its experts

    @property
    def router_weight(self) -> RoutingTensor | None:
        """The router's weight matrix (E, d), or None if it has none or several."""
        matrices = [r for r in self.routing if r.tensor.dim() == 2 and r.dim == 0 and r.tensor.shape[1] > 1]
        return matrices[0] if len(matrices) == 1 else None

    @property
    def router_bias(self) -> RoutingTensor | None:
        """The bias (E,) that the router adds to its logits, or None."""
        path = self.router_weight and self.router_weight.path.removesuffix("weight") + "bias"
        return next((r for r in self.routing if r.path == path), None)


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find all MoE layers of a model, in module order; weights may be on the meta device."""
    found = [_describe(model, name, experts) for name, experts in model.named_modules() if _is_experts(name, experts)]
    same: dict[tuple, list[MoELayer]] = {}
    for layer in found:
        tensors = [layer.experts.down_proj, *(r.tensor for r in layer.routing)]
        same.setdefault(tuple(map(id, tensors)), []).append(layer)
    return [replace(first, twins=tuple(twins)) for first, *twins in same.values()]


def find_decoder_layers(model: nn.Module, layer: MoELayer) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers that contains a MoE layer (the outermost ModuleList), and its name.

    Raises:
        ValueError: there is no such list.
    """
    parts = layer.name.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            return name, module
    raise ValueError(f"{layer.name!r} is not inside a list of decoder layers; this architecture is not supported")


def find_decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers of a language model, dense or with MoE layers, and its name.

    Raises:
        ValueError: there is none.
    """
    if layers := find_moe_layers(model):
        return find_decoder_layers(model, layers[0])
    inside = {id(module) for module in model.get_decoder().modules()}
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no list of the {count} decoder layers that its config describes; this "
        "architecture is not supported"
    )


def layers_by_position(model: nn.Module, layers: list[MoELayer]) -> dict[int, MoELayer]:
    """Map the index of each decoder layer to the MoE layer that it contains; empty for a dense model.

    Raises:
        ValueError: they are not all in the same list of decoder layers.
    """
    if not layers:
        return {}
    lists = list(dict.fromkeys(find_decoder_layers(model, layer)[0] for layer in layers))
    if len(lists) > 1:
        raise ValueError(
            f"{type(model).__name__} has several stacks of MoE layers ({', '.join(lists)}); "
            "compress the part that holds the language model alone"
        )
    return {int(layer.name.removeprefix(f"{lists[0]}.").split(".")[0]): layer for layer in layers}


def _is_experts(name: str, module: nn.Module) -> bool:
    parameters = module._parameters
    up, down = parameters.get("gate_up_proj", parameters.get("up_proj")), parameters.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return False
    return "shared" not in name.rpartition(".")[2]  # attribute, not class: GraniteMoeShared's are routed


def _describe(model: nn.Module, name: str, experts: nn.Module) -> MoELayer:
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    config = getattr(experts, "config", None) or model.config.get_text_config()
    num_experts = experts.down_proj.shape[0]
    groups = _first(config, ("n_group", "num_expert_group"), 1)
    transposed = _is_transposed(experts)
    return MoELayer(
        name=block_name,
        block=block,
        experts=experts,
        experts_name=name,
        config=config,
        layout=ExpertLayout(
            gated=getattr(experts, "has_gate", "gate_up_proj" in experts._parameters),
            transposed=transposed,
            interleaved=not getattr(experts, "is_concatenated", True),
            biased=getattr(experts, "has_bias", False),
        ),
        num_experts=num_experts,
        width=experts.down_proj.shape[1 if transposed else 2],
        top_k=_first(config, TOP_K_KEYS, 1),
        num_groups=groups,
        topk_group=_first(config, ("topk_group",), groups),
        routing=tuple(_routing_tensors(block, experts, num_experts)),
    )


def _is_transposed(experts: nn.Module) -> bool:
    """Return whether weights are stored as (E, in, out), from the module's flag or (Llama 4) from their shapes."""
    declared = getattr(experts, "is_transposed", None)
    if declared is not None or "gate_up_proj" not in experts._parameters:
        return bool(declared)
    return experts.gate_up_proj.shape[1] != 2 * experts.down_proj.shape[2]  # else both are 2 f


def _routing_tensors(block: nn.Module, experts: nn.Module, num_experts: int) -> Iterator[RoutingTensor]:
    inside = {id(module) for module in experts.modules()}
    for prefix, module in block.named_modules():
        if id(module) in inside or (prefix and prefix.split(".")[0] not in ROUTER_PARTS):
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and num_experts in tensor.shape:
                path = f"{prefix}.{name}" if prefix else name
                yield RoutingTensor(module, name, path, tensor.shape.index(num_experts))


def _single_count(key: str, value: object) -> object:
    """Reduce a per-layer list of equal counts in a config to the count (Hunyuan-A13B: `"moe_topk": [8, 8, ...]`)."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise ValueError(
            f"the config's {key} is {value}; layers with different numbers, or none, cannot be compressed: it must be "
            "one number, or a list that repeats one"
        )
    return value[0]


def _first(config: object, keys: tuple[str, ...], default: int) -> int:
    """Return the value of the first of the keys that the config sets, else the default."""
    found = ((key, value) for key in keys if (value := getattr(config, key, None)) is not None)
    return next((_single_count(key, value) for key, value in found), default)
