"""Router distillation and the evaluation callback in two processes: the steps and the values of one."""

import os
import socket
import sys
from pathlib import Path

import forked
import pytest
import torch


# Trains two steps on the same sixteen rows in an order that does not depend on the number of processes.
WORKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from distilling import make_trainer, rows, with_noisy_routers
from tiny import make_model
from transformers import TrainerCallback
from optimum_dern.evaluation.agreement.logits_cache import cache_logits
from optimum_dern.integration.router_kd import router_parameters
from optimum_dern.integration.trainer import DernEvaluationCallback

torch.set_num_threads(1)
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
folder, reported = sys.argv[2], []
ids = torch.stack([row["input_ids"] for row in rows(4)])
cache = cache_logits(make_model("mixtral"), {"text": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]},
                     f"{folder}/cache-{size}-{rank}", 300)
model = with_noisy_routers("mixtral")
trainer = make_trainer(model, make_model("mixtral"), folder, max_steps=2, per_device_train_batch_size=8 // size,
                       per_device_eval_batch_size=8, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
                       eval_strategy="steps", eval_steps=1)

class Reporter(TrainerCallback):  # as those of `report_to` do
    def on_log(self, args, state, control, logs=None, **options):
        if state.is_world_process_zero:
            reported.append({name: value for name, value in logs.items() if "dern" in name})

trainer.add_callback(DernEvaluationCallback(trainer, cache))
trainer.add_callback(Reporter())
trainer.train()
routers = [router.detach() for router in router_parameters(model)]
frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
result = {"routers": routers, "reported": [values for values in reported if values], "frozen": frozen}
torch.save(result, f"{folder}/{size}-{rank}.pt")
"""


def run(folder, size):
    """What every process has ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent.parent
    running = []
    for rank in range(size):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | {key: str(group[key]) for key in group if size > 1}
        command = [sys.executable, "-c", WORKER, tests, folder]
        running.append(forked.Popen(command, env=environment, stderr=forked.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The same routers on both as in one process, the same values, reported once, and nothing left frozen."""
    (alone,), pair = run(tmp_path, 1), run(tmp_path, 2)
    for routers in zip(alone["routers"], pair[0]["routers"], pair[1]["routers"], strict=True):
        assert torch.equal(routers[1], routers[2])
        assert torch.allclose(routers[0], routers[1], atol=1e-5)
    assert len(alone["reported"]) == len(pair[0]["reported"]) == 2
    assert pair[1]["reported"] == []
    for one, two in zip(alone["reported"], pair[0]["reported"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert alone["reported"][0]["eval_dern_kl"] != alone["reported"][1]["eval_dern_kl"]
    assert all(result["frozen"] == [] for result in (alone, *pair))
