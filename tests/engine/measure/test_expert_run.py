"""One run of a layer's experts measures them and hands on their output, in every family."""

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, make_model, runnable
from tiny import compress, padded_batch, random_tokens, same_state, state_of
from tiny import make_model as make_tiny

from optimum_dern.core.layer.statistics import measure_experts
from optimum_dern.engine.measure import expert_run
from optimum_dern.engine.measure.expert_run import chunked_experts, measured_experts
from optimum_dern.engine.measure.recording import record_routing
from optimum_dern.engine.walk import walks
from optimum_dern.models.forward import run_until_stopped
from optimum_dern.models.moe.overrides import takes_routing
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers, layers_by_position
from optimum_dern.models.moe.view import layer_activation, read_layer


LENGTHS = [24, 9, 17]


def logits(model, batch):
    """Logits of the real tokens; DiffusionGemma's are those of its canvas, and start from the same noise each time."""
    torch.manual_seed(0)
    found, mask = model(**batch).logits, batch["attention_mask"].bool()
    return found[mask] if found.shape[:2] == mask.shape else found


@pytest.mark.parametrize("family", runnable(FAMILIES))
@torch.no_grad()
def test_handed_on(family):
    """The model's output stays what it was, and the real tokens' routing, output and statistics are measured."""
    model, batch = make_model(family), padded_batch(LENGTHS, "left")
    mask, layer = batch["attention_mask"].bool(), find_moe_layers(model)[0]
    with record_routing(layer.block, layer.experts) as record:
        expected = logits(model, batch)
    near = {"atol": 1e-5 * expected.abs().max().item(), "rtol": 1e-4}
    with chunked_experts(layer):
        torch.testing.assert_close(logits(model, batch), expected, **near)
    with measured_experts(layer, [mask]) as run:
        torch.testing.assert_close(logits(model, batch), expected, **near)
    assert torch.equal(logits(model, batch), expected) and not layer.block._forward_pre_hooks
    routing = record.without_padding([mask])
    statistics, target = measure_experts(read_layer(layer).segments, routing, layer_activation(layer))
    assert torch.equal(run.routing.index, routing.index) and torch.equal(run.routing.hidden, routing.hidden)
    torch.testing.assert_close(run.target, target)
    torch.testing.assert_close(vars(run.statistics), vars(statistics))
    assert takes_routing(layer.experts) == (family not in ("llama4", "llama4_text"))


@torch.no_grad()
def test_hidden_states_are_kept_once():
    """Where no token is padding, the block's recorded arguments are views of the recorded inputs."""
    model = make_tiny("mixtral")
    layer, batches = find_moe_layers(model)[0], [padded_batch([12, 12], "left", seed) for seed in (0, 1)]
    with measured_experts(layer, [batch["attention_mask"].bool() for batch in batches], stop=True) as run:
        for batch in batches:
            run_until_stopped(model, **batch)
    storage = run.routing.hidden.untyped_storage().data_ptr()
    assert [args[0].untyped_storage().data_ptr() for args, _ in run.block_calls] == [storage] * 2
    assert [args[0].shape for args, _ in run.block_calls] == [(2, 12, 32)] * 2


@pytest.mark.parametrize(
    ("fields", "attention", "measured"),
    [
        ({"calibration_order": "oneshot", "drift_correction": 0.0}, [1, 1, 1], 1),
        ({"drift_correction": 0.0}, [2, 2, 2], 1),
        ({"drift_correction": 0.5}, [4, 4, 4], 1),  # both streams, and what is compressed; one batch once more
    ],
)
def test_runs_of_each_part(fields, attention, measured, monkeypatch):
    """Per micro-batch: of a layer's attention, and of measuring its experts; the model's own experts never run."""
    model = make_tiny("mixtral", num_hidden_layers=3)
    decoder = find_decoder_layers(model, find_moe_layers(model)[0])[1]
    runs, own, measurements = [0] * len(decoder), [], []
    for position in layers_by_position(model, find_moe_layers(model)):

        def count(*_, position=position):
            runs[position] += 1

        decoder[position].self_attn.register_forward_hook(count)
        monkeypatch.setattr(type(decoder[position].mlp.experts), "forward", lambda *_: own.append(1))
    measure = expert_run.measure_experts
    monkeypatch.setattr(expert_run, "measure_experts", lambda *a: measurements.append(1) or measure(*a))
    batches = 3
    compress(model, dataset=random_tokens(12), batch_size=4, **fields)
    noise = 1 if fields["drift_correction"] else 0  # of one micro-batch, whatever their number
    assert runs == [batches * (count - noise) + noise for count in attention]
    assert len(measurements) == batches * measured * len(decoder) and not own


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_tokens_are_kept_only_where_something_works_on_them(preset, monkeypatch):
    """For statistics and weights alone no token's routing or output stays in memory, and the result is the same."""
    measure, runs, states = walks.measured_experts, [], []

    @contextmanager
    def noted(layer, masks, stop, keep):
        with measure(layer, masks, stop, keep or len(runs) >= 2) as run:  # the second time tokens are kept anyway
            runs.append((keep, run))
            yield run

    monkeypatch.setattr(walks, "measured_experts", noted)
    for _ in range(2):
        model = make_tiny("mixtral")
        compress(model, preset=preset)
        states.append(state_of(model))
    assert [keep for keep, _ in runs] == [preset == "fast"] * 4
    kept = [run.routing is not None and len(run.block_calls) > 0 for _, run in runs]
    assert kept == [preset == "fast"] * 2 + [True] * 2
    assert same_state(*states)
