"""What each of two processes runs for ``test_distributed.py``: every case, one after the other."""

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.callbacks.ranks import RankAgreement
from tests.helpers import TrunkAndHeads, quiet_trainer

STEPS = 6
WORLD = 2


class Scenario(TrunkAndHeads):
    """Each step's losses, with what a case changes."""

    def __init__(self, case: str) -> None:
        super().__init__(torch.optim.Adam)
        self.case = case
        self.automatic_optimization = case != "manual optimisation"

    def shared_layer(self):
        return self.trunk[2]

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.case == "absent on one rank" and rank == 1 and batch_idx % 2 == 0:
            del losses["middle"]
        if self.case == "absent everywhere, every other step" and batch_idx % 2:
            del losses["middle"]
        if self.case == "not a number on one rank" and batch_idx == 2 and rank in (self.bad_rank, -1):
            losses["odd"] = losses["odd"] * torch.nan
        if self.case == "new task on one rank" and batch_idx == 3 and rank == 1:
            losses["surprise"] = losses["odd"] * 2
        total = self.total_loss(losses)
        if self.automatic_optimization:
            return total
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(total)
        optimizer.step()
        return None

    bad_rank = 1


# case → (DDP settings, callback settings, Trainer settings)
CASES = {
    "plain": ({}, {}, {}),
    "per-task engine": ({}, {"engine": "per_task"}, {}),
    "find_unused_parameters": ({"find_unused_parameters": True}, {}, {}),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, {}, {}),
    "static_graph": ({"static_graph": True}, {}, {}),
    "accumulation": ({}, {}, {"accumulate_grad_batches": 2}),
    "update_every": ({}, {"update_every": 3}, {}),
    "features": ({}, {"norm_of": "features"}, {}),
    "closed form": ({}, {"update": "closed_form", "scale": "gradient"}, {}),
    "manual optimisation": ({}, {}, {}),
    "absent everywhere, every other step": ({"find_unused_parameters": True}, {}, {}),
    "absent on one rank": ({"find_unused_parameters": True}, {}, {}),
    "not a number on one rank": ({}, {}, {"detect_anomaly": False}),
    "new task on one rank": ({"find_unused_parameters": True}, {}, {}),
}
# Those in which the weights must equal one process's on the same global batches.
DIFFER = ("absent on one rank", "not a number on one rank", "new task on one rank")
SAME_AS_ONE_PROCESS = [case for case in CASES if case not in DIFFER]


def global_batches():
    return torch.randn(STEPS, WORLD * 4, 6, generator=torch.Generator().manual_seed(3))


class Watch(GradNormCallback):
    """Remembers weights and norms of every step."""

    def __init__(self, **settings):
        super().__init__(lr=0.1, summary=False, **settings)
        self.history = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        norms = self.balancer.diagnostics.get("grad_norm")
        self.history.append((self.weights, None if norms is None else norms.tolist()))


def fit(case, folder, batches, strategy):
    torch.manual_seed(0)
    _, settings, trainer_settings = CASES[case]
    callback, module = Watch(**settings), Scenario(case)
    ddp = {} if strategy == "auto" else {"strategy": strategy, "devices": WORLD, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, callbacks=[callback], **ddp, **trainer_settings)
    trainer.fit(module, DataLoader(list(batches), batch_size=None))
    parameters = torch.cat([p.detach().flatten() for p in module.parameters()])
    return {"history": callback.history, "parameters": parameters, "skipped": int(callback.balancer.skipped_updates)}


def run(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD), NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    calls = []
    reduce = RankAgreement.all_reduce
    RankAgreement.all_reduce = staticmethod(lambda vector: calls.append(vector.numel()) or reduce(vector))
    results = {}
    mine = global_batches()[:, 4 * rank : 4 * rank + 4]
    for case, (ddp, _, _) in CASES.items():
        calls.clear()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **ddp)
        try:
            results[case] = fit(case, folder, mine, strategy) | {"collectives": len(calls)}
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}"}
            break  # the process group is out of step now
        finally:
            torch.save(results, Path(folder) / f"rank{rank}.pt")
    os._exit(0)  # without waiting for a rank that is stuck in a collective
