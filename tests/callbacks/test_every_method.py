"""Every method behind the callback: one word changed, the same features."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchjd import aggregation, scalarization
from torchmetrics import MeanMetric

from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    CoVWeighting,
    DualBalancing,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GeometricLoss,
    GO4Align,
    GradNorm,
    GramianWeighting,
    LearningRateAnnealing,
    LossBalancingCallback,
    LossRatioBalancing,
    Measurement,
    NTKWeighting,
    RandomLossWeighting,
    ReLoBRaLo,
    ScalarizerBalancer,
    SoftAdapt,
    SoftOptimalUncertainty,
    UncertaintyWeighting,
)
from lightning_gradnorm.traces import generator_of, random_signs
from tests.callbacks.test_resume import PER_EPOCH, STEPS, assert_went_on, fit
from tests.helpers import SCALES, MemoryLogger, PerPoint, Recorder, TrunkAndHeads, batches, quiet_trainer

TASKS = tuple(SCALES)
METHODS = {
    "equal": EqualWeights,
    "fixed": lambda: FixedWeights({"small": 2.0, "middle": 1.0, "large": 0.5, "odd": 0.5}),
    "loss ratio": LossRatioBalancing,
    "uncertainty": lambda: UncertaintyWeighting({"odd": "classification"}),
    "DWA": DynamicWeightAverage,
    "DTP": DynamicTaskPrioritization,
    "AMNL": AdaptiveNormalizedLoss,
    "annealing": lambda: LearningRateAnnealing("middle", update_every=2),
    "annealing, norms": lambda: LearningRateAnnealing(form="norm", update_every=3),
    "NTK": lambda: NTKWeighting(update_every=2),
    "random": RandomLossWeighting,
    "geometric": GeometricLoss,
    "ReLoBRaLo": lambda: ReLoBRaLo(0.9, expected_rho=0.5),
    "SoftAdapt": lambda: SoftAdapt(1.0, variant="normalized"),
    "GradNorm": GradNorm,
    "DB-MTL": lambda: DualBalancing(update_every=2),
    "UW-SO": SoftOptimalUncertainty,
    "GO4Align": lambda: GO4Align(3, beta=0.001),
    "CoV": CoVWeighting,
    "UPGrad": lambda: GramianWeighting(aggregation.UPGradWeighting()),
    "MGDA": lambda: GramianWeighting(aggregation.MGDAWeighting(), update_every=2),
    "DualProj": lambda: GramianWeighting(aggregation.DualProjWeighting(), ema_decay=0.5),
    "IMTL-G": lambda: GramianWeighting(aggregation.IMTLGWeighting(), allow_negative=True),
    "Aligned-MTL": lambda: GramianWeighting(aggregation.AlignedMTLWeighting(), allow_negative=True),
    "PCGrad": lambda: GramianWeighting(aggregation.PCGradWeighting()),
    "GradVac": lambda: GramianWeighting(aggregation.GradVacWeighting()),
    "STCH": lambda: ScalarizerBalancer(scalarization.STCH(1.0)),
    "IMTL-L": lambda: ScalarizerBalancer(scalarization.IMTLL(len(TASKS))),
    "TorchJD random": lambda: ScalarizerBalancer(scalarization.Random()),
    "TorchJD DWA": lambda: ScalarizerBalancer(scalarization.DWA()),
}


def module_for(make, *settings):
    """With losses as the method needs them."""
    return (PerPoint if make().needs_residuals else TrunkAndHeads)(*settings)


every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@every_method
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The weight of task 'large' has come to")  # MGDA's and IMTL-G's, with reason
def test_resumed_equals_uninterrupted(tmp_path, make):
    """Stopped in mid-epoch and at an epoch's end: histories of epochs and states of random numbers included."""
    whole_callback = LossBalancingCallback(make(), summary=False)
    module = partial(module_for, make)
    whole = fit(tmp_path, whole_callback, make=module)
    assert len(whole.logged) == STEPS
    for stop in (1, PER_EPOCH - 1, PER_EPOCH, STEPS - 1):
        callback = LossBalancingCallback(make(), summary=False)
        resumed = fit(tmp_path, callback, ckpt_path=tmp_path / f"step={stop}.ckpt", make=module)
        assert_went_on(resumed, whole, stop)
        assert resumed.logged == whole.logged[stop:]


@every_method
def test_the_trainer_trains_as_a_loop_written_by_hand(tmp_path, make):
    """Total, backward, update, step: with gradients taken per task by autograd where the method needs them."""
    torch.manual_seed(3)
    module = module_for(make)
    by_hand, balancer = copy.deepcopy(module), make()
    seen = Recorder(callback := LossBalancingCallback(make(), summary=False))
    quiet_trainer(tmp_path, callbacks=[callback, seen], max_epochs=2).fit(module, batches(5))
    optimizer, shared = by_hand.configure_optimizers(), by_hand.trunk[2].weight
    step = 0
    for _ in range(2):
        for (x,) in batches(5):
            points = by_hand.losses(x)
            losses = {task: loss.mean() for task, loss in points.items()}
            rows = [torch.autograd.grad(loss, shared, retain_graph=True)[0].double() for loss in losses.values()]
            traces = traces_by_hand(points, list(by_hand.parameters()), step) if balancer.needs_residuals else None
            total = balancer.total(losses)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            stacked = torch.stack([loss.detach().double() for loss in losses.values()])
            norms, maxima, means = (
                torch.stack([reduce(row) for row in rows])
                for reduce in (torch.linalg.vector_norm, lambda g: g.abs().max(), lambda g: g.abs().mean())
            )
            flat = torch.stack([row.flatten() for row in rows])
            measurement = Measurement(TASKS, stacked, norms, maxima, means, 1 / (1 + stacked), traces, flat @ flat.T)
            balancer.update(measurement if balancer.due else None)
            assert seen.weights[step] == pytest.approx(balancer.weights, rel=1e-4)
            torch.testing.assert_close(
                seen.parameters[step], torch.cat([p.detach().flatten() for p in by_hand.parameters()]), rtol=1e-3, atol=1e-5
            )
            step += 1
        balancer.end_epoch()


def traces_by_hand(points, tensors, step, rank=0):
    """With the signs that the session draws; ``[T]``."""
    traces = []
    for number, squares in enumerate(points.values()):
        signs = random_signs(squares.shape, generator_of(step, rank, 0, number))
        gradients = torch.autograd.grad((signs * squares.sqrt()).sum(), tensors, retain_graph=True, allow_unused=True)
        traces.append(sum(g.double().square().sum() for g in gradients if g is not None) / squares.numel())
    return torch.stack(traces)


class Differentiating(TrunkAndHeads):
    """Takes ∂total/∂L_i of each step by autograd: the sum of what its points have."""

    def __init__(self, method):
        super().__init__()
        self.applied, self.per_point = [], method().needs_residuals

    def reduced(self, squares):
        return squares if self.per_point else squares.mean()

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        total = self.total_loss(losses, kpis=dict.fromkeys(losses, 0.5))
        gradients = torch.autograd.grad(total, list(losses.values()), retain_graph=True)
        self.applied.append(dict(zip(losses, (g.sum().item() for g in gradients), strict=True)))
        return total


@every_method
def test_what_is_logged_is_what_was_applied(tmp_path, make):
    module, logger = Differentiating(make), MemoryLogger()
    callback = LossBalancingCallback(make(), summary=False)
    quiet_trainer(tmp_path, callbacks=[callback], logger=logger, max_epochs=2).fit(module, batches(4))
    logged = [
        {tag[12:]: value for tag, value in values.items() if tag.startswith("loss_weight/")} for _, values in logger.logged
    ]
    assert len(logged) == 8
    for ours, applied in zip(logged, module.applied, strict=True):
        assert ours == pytest.approx(applied, rel=1e-6)


@every_method
def test_accumulation_keeps_the_weights_and_updates_once(tmp_path, make):
    module, callback = module_for(make), LossBalancingCallback(make(), summary=False)
    seen = Recorder(callback)
    quiet_trainer(tmp_path, callbacks=[callback, seen], accumulate_grad_batches=2).fit(module, batches(4))
    assert callback.balancer.steps == 2
    assert seen.weights[0] == {}
    assert seen.weights[1] == seen.weights[2] != {}


# -- key performance indicators --------------------------------------------------------------------------------------


class WithIndicators(TrunkAndHeads):
    def __init__(self, kpis):
        super().__init__(scales={"small": 0.05, "large": 20.0})
        self.kpis = kpis
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        self.mean.update(0.25)
        return self.total_loss(self.losses(batch[0]), kpis=self.kpis(self))


INDICATORS = {
    "a number": lambda module: {"small": 0.25, "large": 0.5},
    "a tensor": lambda module: {"small": torch.tensor([0.25]), "large": torch.tensor(0.5)},
    "a metric": lambda module: {"small": module.mean, "large": 0.5},
    "a callable": lambda module: {"small": lambda: torch.tensor(0.25), "large": lambda: 0.5},
}


@pytest.mark.parametrize("kpis", INDICATORS.values(), ids=INDICATORS)
def test_an_indicator_in_any_form(tmp_path, kpis):
    callback = LossBalancingCallback(DynamicTaskPrioritization(), summary=False)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(WithIndicators(kpis), batches(3))
    expected = DynamicTaskPrioritization()
    expected.update(Measurement(("small", "large"), torch.ones(2), kpis=torch.tensor([0.25, 0.5])))
    assert callback.weights == pytest.approx(expected.weights)


@pytest.mark.parametrize(
    ("kpis", "words"),
    [
        ({}, r"No key performance indicator for task 'small', 'large'. Pass one for every task .*kpis={'small'"),
        ({"small": 0.5}, "No key performance indicator for task 'large'"),
        ({"small": 0.5, "large": 1.5}, "indicator of task 'large' is 1.5; it lies between 0"),
        ({"small": 0.5, "large": torch.ones(2)}, r"indicator of task 'large' has shape \(2,\)"),
    ],
)
def test_indicators_that_cannot_be_used(tmp_path, kpis, words):
    callback = LossBalancingCallback(DynamicTaskPrioritization(), summary=False)
    with pytest.raises(ValueError, match=words):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(WithIndicators(lambda module: kpis), batches(3))
    assert callback.weights == {}


def test_indicators_are_averaged_over_micro_batches(tmp_path):
    values = iter([0.2, 0.6])
    module = WithIndicators(lambda module: dict.fromkeys(("small", "large"), next(values)))
    callback = LossBalancingCallback(DynamicTaskPrioritization(), summary=False)
    quiet_trainer(tmp_path, callbacks=[callback], accumulate_grad_batches=2).fit(module, batches(2))
    assert callback.balancer.diagnostics["kpi"].tolist() == pytest.approx([0.4, 0.4])


# -- what a method cannot have ---------------------------------------------------------------------------------------


def test_sizes_of_entries_cannot_come_from_features():
    LossBalancingCallback(LearningRateAnnealing(form="norm"), norm_of="features")
    with pytest.raises(ValueError, match=r"norm_of='features' has norms only.* Take norm_of='parameters'"):
        LossBalancingCallback(LearningRateAnnealing("a"), norm_of="features")


class Signed(TrunkAndHeads):
    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        return self.total_loss({"small": losses["small"], "large": losses["large"] - 1000.0})


@pytest.mark.parametrize("make", [GeometricLoss, LossRatioBalancing, AdaptiveNormalizedLoss, DynamicWeightAverage, ReLoBRaLo])
def test_a_negative_loss_stops_the_fit_with_the_way_out(tmp_path, make):
    module = Signed()
    before = copy.deepcopy(module.state_dict()) if make is GeometricLoss else None
    with pytest.raises(ValueError, match=f"{make.__name__} compares losses by their ratios.*task 'large' is -.*Add a constant"):
        quiet_trainer(tmp_path, callbacks=[LossBalancingCallback(make(), summary=False)]).fit(module, batches(3))
    if before is not None:  # its total would have been NaN: refused before the step
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class OfAllWeights(TrunkAndHeads):
    def shared_layer(self):
        return [layer.weight for layer in self.trunk if isinstance(layer, nn.Linear)]


def test_annealing_over_all_weights_of_the_trunk(tmp_path):
    callback = LossBalancingCallback(LearningRateAnnealing("middle", update_every=1), summary=False)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=4).fit(OfAllWeights(), batches(5))
    assert callback.weights["middle"] == 1.0
    assert callback.weights["small"] > 1.5 > 1.0 > callback.weights["large"]
