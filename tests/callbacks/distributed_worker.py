"""What each of two processes runs for ``test_distributed.py``: every case, one after the other."""

import os
from datetime import timedelta
from functools import partial

import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from torchjd.aggregation import GradVacWeighting, PCGradWeighting, UPGradWeighting
from torchjd.scalarization import IMTLL, STCH, Random

from lightning_gradnorm import (
    CoVWeighting,
    DynamicTaskPrioritization,
    GO4Align,
    GradNormCallback,
    GramianWeighting,
    LossBalancingCallback,
    NTKWeighting,
    ScalarizerBalancer,
    SelfAdaptivePoints,
)
from lightning_gradnorm.session import RankAgreement
from tests.callbacks.two_processes import WORLD
from tests.helpers import SCALES, TrunkAndHeads, quiet_trainer

STEPS = 6


class Scenario(TrunkAndHeads):
    """Each step's losses, with what a case changes."""

    def __init__(self, case: str) -> None:
        torch.manual_seed(0)
        super().__init__(torch.optim.Adam)
        self.case = case
        self.automatic_optimization = case != "manual optimisation"

    def shared_layer(self):
        return None if "layer found" in self.case else self.trunk[2]

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.case == "layer found on one rank" and rank == 1 and batch_idx < 3:
            del losses["middle"]
        if self.case == "layer found late" and batch_idx < 2:
            del losses["middle"]
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
    "short last window": ({}, {}, {"accumulate_grad_batches": 4}),
    "update_every": ({}, {"update_every": 3}, {}),
    "features": ({}, {"norm_of": "features"}, {}),
    "residuals": ({}, {"residuals": ["small"]}, {}),
    "manual optimisation": ({}, {}, {}),
    "layer found": ({}, {}, {}),
    "layer found late": ({"find_unused_parameters": True}, {"tasks": list(SCALES)}, {}),
    "layer found on one rank": ({"find_unused_parameters": True}, {"tasks": list(SCALES)}, {}),
    "absent everywhere, every other step": ({"find_unused_parameters": True}, {}, {}),
    "absent on one rank": ({"find_unused_parameters": True}, {}, {}),
    "not a number on one rank": ({}, {}, {"detect_anomaly": False}),
    "new task on one rank": ({"find_unused_parameters": True}, {}, {}),
}
# Those in which the weights must equal one process's on the same global batches.
DIFFER = ("layer found on one rank", "absent on one rank", "not a number on one rank", "new task on one rank")
SAME_AS_ONE_PROCESS = [case for case in CASES if case not in DIFFER]


def global_batches():
    return torch.randn(STEPS, WORLD * 4, 6, generator=torch.Generator().manual_seed(3))


class OtherMethods(Scenario):
    """Indicators of the tasks, and a term whose rows are fixed points, known by index."""

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        losses["points"] = self.heads["odd"](self.trunk(batch)).square().mean(1)
        index = torch.arange(len(batch)) + (4 * int(os.environ.get("LOCAL_RANK", 0)) if len(batch) == 4 else 0)
        kpis = {task: batch[:, k].sigmoid().mean() for k, task in enumerate(losses)}
        return self.total_loss(losses, kpis=kpis, points={"points": index})


class WatchOther(LossBalancingCallback):
    """Remembers weights and masks of every step."""

    def __init__(self):
        masks = {"points": SelfAdaptivePoints(WORLD * 4, lr=0.1)}
        super().__init__(DynamicTaskPrioritization(smoothing=0.5), points=masks, summary=False)
        self.history = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.history.append((self.weights, self.points["points"].masks.tolist()))


def run_other_methods(rank, path):
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    torch.save(fit_module(OtherMethods("plain"), WatchOther(), path.parent, part_of(rank), strategy), path)


class Residuals(Scenario):
    """With each task's squared residuals."""

    def reduced(self, squares):
        return squares


class WatchTraces(LossBalancingCallback):
    """Remembers weights and averaged traces of every step."""

    def __init__(self):
        super().__init__(NTKWeighting(update_every=2), summary=False)
        self.history = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.history.append((self.weights, self.balancer.state_dict()["memory"]["trace"].tolist()))


def run_residuals(rank, path):
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), find_unused_parameters=True)
    module = Residuals("absent on one rank")
    torch.save(fit_module(module, WatchTraces(), path.parent, part_of(rank), strategy), path)


OF_TORCHJD = {
    "UPGrad": lambda: GramianWeighting(UPGradWeighting()),
    "PCGrad": lambda: GramianWeighting(PCGradWeighting(), ema_decay=0),  # draws random orders
    "GradVac": lambda: GramianWeighting(GradVacWeighting()),
    "STCH": lambda: ScalarizerBalancer(STCH(0.1)),
    "IMTL-L": lambda: ScalarizerBalancer(IMTLL(len(SCALES))),
    "random": lambda: ScalarizerBalancer(Random()),
}


OF_LOSSES = {
    "CoV": CoVWeighting,
    "GO4Align": lambda: GO4Align(3, beta=0.001),
}


class WatchMethod(LossBalancingCallback):
    """Remembers the weights of every step."""

    def __init__(self, make):
        super().__init__(make(), summary=False)
        self.history = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.history.append(self.weights)


def run_of_torchjd(rank, path):
    run_methods(OF_TORCHJD, rank, path)


def run_of_losses(rank, path):
    run_methods(OF_LOSSES, rank, path)


def run_methods(methods, rank, path):
    found = {}
    for name, make in methods.items():
        torch.manual_seed(rank)  # what a method draws must not come from here
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        found[name] = fit_module(Scenario("plain"), WatchMethod(make), path.parent, part_of(rank), strategy)
    torch.save(found, path)


# case → (DDP settings, Trainer settings)
SAME_STEP = {
    "plain": ({}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, {}),
    "static_graph": ({"static_graph": True}, {}),
}


def fit_same_step(case, folder, batches, strategy, **trainer_settings):
    callback = WatchMethod(lambda: GramianWeighting(UPGradWeighting(), when="same step"))
    return fit_module(Scenario(case), callback, folder, batches, strategy, **trainer_settings)


def run_same_step(rank, path):
    found, calls = {}, []
    reduce = RankAgreement.all_reduce
    RankAgreement.all_reduce = staticmethod(lambda vector: calls.append(vector.numel()) or reduce(vector))
    for case, (ddp, trainer_settings) in SAME_STEP.items():
        calls.clear()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **ddp)
        found[case] = fit_same_step("plain", path.parent, part_of(rank), strategy, **trainer_settings)
        found[case]["collectives"] = len(calls)
    torch.save(found, path)


def run_same_step_absent(rank, path):
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20), find_unused_parameters=True)
    try:
        fit_same_step("absent on one rank", path.parent, part_of(rank), strategy)
        error = ""
    except Exception as raised:
        error = str(raised)
    torch.save({"error": error}, path)


class Watch(GradNormCallback):
    """Remembers weights and norms of every step, and the total that was logged."""

    def __init__(self, **settings):
        super().__init__(lr=0.1, summary=False, **settings)
        self.history, self.totals = [], []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        norms = self.balancer.diagnostics.get("grad_norm")
        self.history.append((self.weights, None if norms is None else norms.tolist()))
        self.totals.append(float(self.logged.get("total_loss/unweighted", torch.nan)))


def fit(case, folder, batches, strategy):
    _, settings, trainer_settings = CASES[case]
    return fit_module(Scenario(case), Watch(**settings), folder, batches, strategy, **trainer_settings)


def fit_module(module, callback, folder, batches, strategy, *, callbacks=(), ckpt_path=None, **trainer_settings):
    """Train on the batches in order; on two processes unless ``strategy`` is ``"auto"``."""
    both = {} if strategy == "auto" else {"strategy": strategy, "devices": WORLD, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, callbacks=[callback, *callbacks], **both, **trainer_settings)
    trainer.fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=ckpt_path)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    parameters = torch.cat([p.detach().flatten() for p in whole])
    found = {"history": callback.history, "parameters": parameters, "skipped": int(callback.balancer.skipped_updates)}
    return found | {"totals": getattr(callback, "totals", [])}


def part_of(rank):
    """This rank's part of every global batch."""
    return global_batches()[:, 4 * rank : 4 * rank + 4]


def run(rank, path):
    calls = []
    reduce = RankAgreement.all_reduce
    RankAgreement.all_reduce = staticmethod(lambda vector: calls.append(vector.numel()) or reduce(vector))
    results = {}
    for case, (ddp, _, _) in CASES.items():
        calls.clear()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **ddp)
        try:
            results[case] = fit(case, path.parent, part_of(rank), strategy) | {"collectives": len(calls)}
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}"}
            break  # the process group is out of step now
        finally:
            torch.save(results, path)


class Stops(Scenario):
    """The second rank raises in the third step, in the hook named."""

    def __init__(self, hook):
        super().__init__("plain")
        setattr(self, hook, partial(self._stop, getattr(self, hook)))

    def _stop(self, hook, *args):
        if self.global_step == 2 and os.environ.get("LOCAL_RANK") == "1":
            raise OSError("this rank's disk is gone")
        return hook(*args)


def run_until_one_rank_stops(hook, rank, path):
    callback = Watch()
    strategy = DDPStrategy(process_group_backend="gloo")  # with its default timeout: half an hour
    try:
        fit_module(Stops(hook), callback, path.parent, part_of(rank), strategy)
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    left = (len(callback._session.noted), bool(callback._session.window))
    state = {"steps": callback.balancer.steps, "weights": callback.weights, "history": callback.history}
    torch.save({"error": error, "left": left, **state}, path)
