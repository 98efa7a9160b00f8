"""Weights that act in the same step, under a Trainer: what it asks for is as it was, and what cannot be is refused."""

import copy

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import PCGradWeighting, UPGrad, UPGradWeighting
from torchjd.autojac import jac_to_grad, mtl_backward

from lightning_gradnorm import GramianWeighting, LossBalancingCallback
from lightning_gradnorm.meeting_place import ScatteredTasksError
from tests.callbacks import distributed_worker as worker
from tests.callbacks.test_resume import PER_EPOCH, STEPS, assert_went_on, fit
from tests.callbacks.two_processes import on_two_processes
from tests.helpers import SCALES, Recorder, TrunkAndHeads, batches, quiet_trainer


def callback_of(weighting=None, *, shared_layer=("trunk",), **settings):
    balancer = GramianWeighting(weighting or UPGradWeighting(), when="same step")
    return LossBalancingCallback(balancer, shared_layer=list(shared_layer), summary=False, **settings)


def trained(folder, module, callback=None, steps=6, **settings):
    seen = Recorder(callback)
    trainer = quiet_trainer(folder, callbacks=[*([callback] if callback else []), seen], **settings)
    trainer.fit(module, batches(steps))
    return seen


def trained_by_torchjd(module, steps=6, accumulate=1, clip=None):
    """``mtl_backward`` for each batch; what the parameters were after each step."""
    optimizer, found, aggregator = module.configure_optimizers(), [], UPGrad()
    shared, heads = list(module.trunk.parameters()), list(module.heads.parameters())
    for number, (x,) in enumerate(batches(steps), 1):
        kept = {}
        module.features = lambda x, kept=kept: kept.setdefault("z", module.trunk(x))
        losses = [loss / accumulate for loss in module.losses(x).values()]
        held = [None if p.grad is None else p.grad.clone() for p in shared]
        for p in shared:
            p.grad = None
        mtl_backward(losses, features=kept["z"])
        jac_to_grad(shared, aggregator)
        for p, before in zip(shared, held, strict=True):
            p.grad = p.grad if before is None else p.grad + before
        if number % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_([*shared, *heads], clip)
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return found


@pytest.mark.feature("`when='same step'` under automatic optimisation", "supported", "equals TorchJD's `mtl_backward`")
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"accumulate": 3, "clip": 0.5}, {"clip": 0.1}], ids=str)
def test_trains_as_mtl_backward_does(tmp_path, settings):
    module = TrunkAndHeads(torch.optim.Adam)
    theirs = trained_by_torchjd(copy.deepcopy(module), **settings)
    of_trainer = {"accumulate_grad_batches": settings.get("accumulate", 1), "gradient_clip_val": settings.get("clip")}
    seen = trained(tmp_path, module, callback_of(), **of_trainer)
    for found, expected in zip(seen.parameters, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(tmp_path, precision):
    module = TrunkAndHeads()
    full = trained(tmp_path, copy.deepcopy(module), callback_of())
    other = trained(tmp_path, copy.deepcopy(module), callback_of(), precision=precision)
    plain = trained(tmp_path, copy.deepcopy(module))
    moved = (plain.parameters[-1] - full.parameters[-1]).norm()
    assert (other.parameters[-1].float() - full.parameters[-1]).norm() < (0.1 if precision == "bf16-mixed" else 1e-4) * moved


@pytest.mark.filterwarnings("ignore:.*weight update.* so far")
@pytest.mark.parametrize("init_scale", [8.0, 65536.0, 2.0**40])
def test_grad_scaler_is_divided_out_and_sees_what_overflows(tmp_path, init_scale):
    module = TrunkAndHeads(scales=dict.fromkeys(SCALES, 0.01))

    def half(scale):
        scaler, callback = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6), callback_of()
        seen = trained(tmp_path, copy.deepcopy(module), callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return seen, callback

    (scaled, callback), (plain, _) = half(init_scale), half(4.0)
    if init_scale == 2.0**40:
        assert callback.balancer.skipped_updates == 6
        assert torch.equal(scaled.parameters[-1], torch.cat([p.detach().flatten() for p in module.parameters()]))
    else:
        for one, other in zip(scaled.weights, plain.weights, strict=True):
            assert one == pytest.approx(other, rel=0.05)


@pytest.mark.feature("`when='same step'` above a compiled trunk, with `norm_of='features'`", "supported", "as without it")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_above_a_compiled_trunk(tmp_path):
    module = TrunkAndHeads()
    other = copy.deepcopy(module)
    other.trunk = torch.compile(other.trunk, backend="aot_eager")
    at_features = {"shared_layer": ["trunk"], "norm_of": "features"}
    one, two = trained(tmp_path, module, callback_of(**at_features)), trained(tmp_path, other, callback_of(**at_features))
    torch.testing.assert_close(one.parameters[-1], two.parameters[-1])
    assert len({weights["small"] for weights in two.weights}) == 6


@pytest.mark.parametrize("weighting", [UPGradWeighting, PCGradWeighting])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_equals_uninterrupted(tmp_path, weighting):
    whole = fit(tmp_path, callback_of(weighting()))
    assert len(whole.logged) == STEPS
    for stop in (1, PER_EPOCH - 1, PER_EPOCH, STEPS - 1):
        resumed = fit(tmp_path, callback_of(weighting()), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert_went_on(resumed, whole, stop)
        assert resumed.logged == whole.logged[stop:]


class Watch(LossBalancingCallback):
    """Remembers what each step was logged with."""

    def __init__(self, **settings):
        balancer = GramianWeighting(UPGradWeighting(), when="same step")
        super().__init__(balancer, shared_layer=["trunk"], summary=False, **settings)
        self.seen = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.seen.append({tag: float(value) for tag, value in self.logged.items()})


def test_what_is_logged_is_what_acted(tmp_path):
    callback = Watch()
    seen = trained(tmp_path, TrunkAndHeads(), callback)
    for logged, weights in zip(callback.seen, seen.weights, strict=True):
        assert {task: logged[f"loss_weight/{task}"] for task in weights} == pytest.approx(weights)
        assert logged["total_loss/unweighted"] > 0
    assert len({weights["small"] for weights in seen.weights}) == 6
    assert callback.mean_weights == pytest.approx(
        {task: sum(weights[task] for weights in seen.weights) / 6 for task in seen.weights[0]}
    )


class Recomputed(TrunkAndHeads):
    """Its trunk is run again in the backward."""

    def features(self, x):
        return checkpoint(self.trunk, x, use_reentrant=False)


@pytest.mark.feature("`when='same step'` with a checkpointed trunk", "supported", "as without it")
def test_inside_a_checkpoint(tmp_path):
    module = TrunkAndHeads()
    other = Recomputed()
    other.load_state_dict(module.state_dict())
    one, two = trained(tmp_path, module, callback_of()), trained(tmp_path, other, callback_of())
    torch.testing.assert_close(one.parameters[-1], two.parameters[-1])


@pytest.mark.feature("`when='same step'` where tasks meet at several places", "refused", "“Take when='next step'”")
def test_tasks_that_meet_elsewhere_are_refused(tmp_path):
    class Skips(TrunkAndHeads):
        def losses(self, x):
            losses = super().losses(x)
            return losses | {"odd": losses["odd"] + self.trunk[0](x).square().mean()}

    with pytest.raises(ScatteredTasksError, match="Take when='next step'"):
        trained(tmp_path, Skips(), callback_of())


def test_lbfgs_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="it evaluates its closure again"):
        trained(tmp_path, TrunkAndHeads(torch.optim.LBFGS), callback_of())


@pytest.mark.slow
@pytest.mark.feature("`when='same step'` under DDP", "supported", "one Gram matrix, of the mean gradients, on every rank")
def test_two_processes_equal_one(tmp_path):
    one, other = on_two_processes(worker.run_same_step, tmp_path, timeout=200)
    for case, (_, trainer_settings) in worker.SAME_STEP.items():
        assert one[case]["history"] == other[case]["history"], case
        assert torch.equal(one[case]["parameters"], other[case]["parameters"]), case
        assert one[case]["collectives"] == other[case]["collectives"] == worker.STEPS, "one for each backward, none after it"
        alone = worker.fit_same_step("plain", tmp_path, worker.global_batches(), "auto", **trainer_settings)
        for weights, its_weights in zip(one[case]["history"], alone["history"], strict=True):
            assert weights == pytest.approx(its_weights, rel=1e-4), case
        torch.testing.assert_close(one[case]["parameters"], alone["parameters"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_task_that_a_rank_lacks_is_refused(tmp_path):
    for found in on_two_processes(worker.run_same_step_absent, tmp_path, timeout=100):
        assert "'middle' is missing from the batch of a rank" in found["error"]
