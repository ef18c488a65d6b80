"""What is predicted of condensing layers and of the search among them, against what torch counts while they run."""

from contextlib import nullcontext

import pytest
import torch
from families import make_model as make_family
from live_bytes import LiveBytes
from tiny import make_model
from torch.utils.flop_counter import FlopCounterMode

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.condensing.condense import condense_each
from optimum_dern.condensing.dense_network import fill_
from optimum_dern.condensing.layer import Fit
from optimum_dern.condensing.layer_search import search_layers
from optimum_dern.engine.cost.condensing import condensing_operations, plan_of
from optimum_dern.engine.cost.memory import plan_memory
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.skeleton import build_skeleton


ROWS, LENGTH = 64, 32
COUNTED = {
    torch.ops.aten.addmm_: lambda total, a, b, **kwargs: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.bmm: lambda *args, **kwargs: 0,  # attention scores, which are not predicted
}


def config_of(which, **fields):
    """Two experts of some layers, in micro-batches of 16 sequences."""
    shares = {"self_share": 0.0, "random_share": 0.0, "sequence_length": LENGTH, "batch_size": 16}
    return DernConfig(method="cd_moe", condensed_layers=which, num_experts=2, **shares, **fields)


def counted(work):
    """How many operations some work takes."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        work()
    return counter.get_total_flops()


def run(model, config):
    """Operations of condensing and of searching, from shapes and as they are counted."""
    layers, ids = find_moe_layers(model), torch.randint(100, (ROWS, LENGTH), generator=torch.manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]
    plan = plan_of(model, layers, config)

    def keep(position, neurons, report):
        fill_(plan.networks[position], neurons, plan.at[position])

    condensing = counted(lambda: condense_each(model, plan, batches, Fit.of(config), keep))
    said = condensing_operations(model, layers, ROWS * LENGTH, config)
    if not plan.searched:
        return said, condensing, 0.0, 0.0
    networks = [nullcontext(network) for network in plan.networks.values()]
    by_position = dict(zip(plan.networks, networks, strict=True))
    searching = counted(lambda: search_layers(model, plan, batches, by_position.get))
    alone = condensing_operations(model, layers, ROWS * LENGTH, config_of([*plan.networks], preset=config.preset))
    return alone, condensing, said - alone, searching


@pytest.mark.parametrize("preset", ["paper", "recommended"])
@pytest.mark.parametrize(
    ("family", "which"),
    [("qwen3_moe", 1), ("qwen3_moe", 2), ("qwen3_moe", [1]), ("deepseek_v3", 1), ("deepseek_v3", 2)],
)
def test_operations(family, which, preset):
    """Within a quarter of what is counted, where any layers may be chosen and where they come in order."""
    condensing, expected, searching, search = run(make_family(family), config_of(which, preset=preset))
    assert 0.75 < condensing / expected < 1.25
    if search:
        assert 0.75 < searching / search < 1.25


def test_a_pass_for_every_layer():
    """The first pass is exactly what the layers' products are; later ones try fewer layers, and take less."""
    model = make_model("qwen3_moe", num_hidden_layers=4)
    first, second, third = (run(model, config_of(number, preset="paper")) for number in (1, 2, 3))
    assert first[2] == first[3]
    assert 1.5 * first[2] < second[2] < 2 * first[2]
    assert second[2] < third[2] < second[2] + (second[2] - first[2])
    assert third[2] == pytest.approx(third[3], rel=0.2)


def test_the_memory_of_the_search(tmp_path):
    """Where many layers are tried on much text, their hidden states take most: within 15 % of what is alive."""
    make_model("qwen3_moe", num_hidden_layers=12).save_pretrained(tmp_path / "source")
    rows = [{"input_ids": ids} for ids in torch.randint(100, (2 * ROWS, LENGTH), generator=torch.manual_seed(0))]
    skeleton = build_skeleton(tmp_path / "source")
    searched, named = (
        plan_memory(skeleton, find_moe_layers(skeleton), 2 * ROWS * LENGTH, config_of(which, preset="paper"), 8)
        for which in (1, [0])
    )
    with LiveBytes() as live:
        DernCompressor(config_of(1, dataset=rows, preset="paper")).compress_checkpoint(
            tmp_path / "source", tmp_path / "out"
        )
    assert 0.85 < (searched.peak - searched.interpreter) / live.peak < 1.15
    assert live.peak > 1.15 * (named.peak - named.interpreter)


def test_the_search_in_files():
    """A bound puts the hidden states of all trials into files, and what stays in memory is counted."""
    model = make_model("qwen3_moe", num_hidden_layers=16)
    layers = find_moe_layers(model)
    free = plan_memory(model, layers, 4096, config_of(1), 8)
    spilled = plan_memory(model, layers, 4096, config_of(1), 8, free.peak - 1)
    named = plan_memory(model, layers, 4096, config_of([0]), 8)
    assert spilled.spilled and not spilled.experts_in_file and spilled.hidden == free.hidden > named.hidden
    assert spilled.disk >= spilled.hidden + 16 * 3 * 2 * 16 * 32 * 4  # and the networks of all layers
    assert spilled.peak < free.peak
