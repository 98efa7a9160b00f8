"""What every balancer promises; a new one is one more line in ``BALANCERS``."""

import contextlib
import io
import math
from functools import partial

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization

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
    LossBalancer,
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
from lightning_gradnorm.balancers.own_losses import OwnLosses
from tests.helpers import of_version_0_1, same_state

pytestmark = [of_version_0_1, pytest.mark.filterwarnings("ignore:.* gave .* a negative weight")]

FIXED = {"a": 0.25, "b": 2.0, "c": 1.5}
WEIGHTINGS = {
    "UPGrad": torchjd.aggregation.UPGradWeighting,
    "MGDA": torchjd.aggregation.MGDAWeighting,
    "IMTL-G": torchjd.aggregation.IMTLGWeighting,
    "Aligned-MTL": torchjd.aggregation.AlignedMTLWeighting,
    "DualProj": torchjd.aggregation.DualProjWeighting,
    "PCGrad": torchjd.aggregation.PCGradWeighting,
    "GradVac": torchjd.aggregation.GradVacWeighting,
    "CR-MOGM": lambda: torchjd.aggregation.CRMOGMWeighting(torchjd.aggregation.UPGradWeighting()),
}
SCALARIZERS = {
    "STCH": lambda: torchjd.scalarization.STCH(1.0),
    "geometric mean": torchjd.scalarization.GeometricMean,
    "random": torchjd.scalarization.Random,
    "IMTL-L": lambda: torchjd.scalarization.IMTLL(3),
    "UW": lambda: torchjd.scalarization.UW(3),
    "DWA": torchjd.scalarization.DWA,
}
FOR_ONE_NUMBER_OF_TASKS = ("TorchJD CR-MOGM", "TorchJD IMTL-L", "TorchJD UW", "TorchJD DWA")


def even_norms(gramian):
    return 1 / gramian.diagonal().sqrt()


def around(outer, make):
    return lambda **settings: outer(make(), **settings)


BALANCERS = {
    "GradNorm": GradNorm,
    "GradNorm alpha": lambda **settings: GradNorm(1.5, **settings),
    "GradNorm residuals": lambda **settings: GradNorm(residuals=["b"], **settings),
    "GradNorm Adam": lambda **settings: GradNorm(1.5, 0.1, optimizer=torch.optim.Adam, **settings),
    "GradNorm every 3rd, mean of 2": lambda **settings: GradNorm(1.5, update_every=3, initial_losses=2, **settings),
    "GradNorm paper": lambda **settings: GradNorm(1.5, update="paper", **settings),
    "GradNorm 0.1": lambda **settings: GradNorm(1.5, update="log", scale="sum", **settings),
    "GradNorm 0.1 defaults": lambda **settings: GradNorm(update="log", **settings),
    "GradNorm 0.1 closed form": lambda **settings: GradNorm(1.5, update="closed_form", scale="sum", **settings),
    "GradNorm 0.1 scale=gradient": lambda **settings: GradNorm(1.5, scale="gradient", **settings),
    "GradNorm 0.1 scale=reference": lambda **settings: GradNorm(1.5, reference="b", **settings),
    "GradNorm 0.1 every 3rd, mean of 2": lambda **settings: GradNorm(
        1.5, scale="sum", update_every=3, initial_losses=2, **settings
    ),
    "EqualWeights": EqualWeights,
    "FixedWeights": lambda tasks=None: FixedWeights(FIXED),
    "LossRatioBalancing": LossRatioBalancing,
    "LossRatioBalancing mean of 2": lambda **settings: LossRatioBalancing(0.5, initial_losses=2, **settings),
    "UncertaintyWeighting": lambda **settings: UncertaintyWeighting({"b": "classification"}, **settings),
    "UncertaintyWeighting revised": lambda **settings: UncertaintyWeighting(form="revised", **settings),
    "DynamicWeightAverage": DynamicWeightAverage,
    "DynamicTaskPrioritization": lambda **settings: DynamicTaskPrioritization({"a": 2.0, "b": 0.5}, **settings),
    "AdaptiveNormalizedLoss": lambda **settings: AdaptiveNormalizedLoss(0.9, **settings),
    "GramianWeighting": lambda **settings: GramianWeighting(even_norms, **settings),
    "DualBalancing": DualBalancing,
    "GO4Align": lambda **settings: GO4Align(beta=0.001, **settings),
    "CoVWeighting": CoVWeighting,
    "SoftOptimalUncertainty": lambda **settings: SoftOptimalUncertainty(2.0, **settings),
    "LearningRateAnnealing": lambda **settings: LearningRateAnnealing("b", update_every=2, **settings),
    "LearningRateAnnealing norm": lambda **settings: LearningRateAnnealing(form="norm", update_every=1, **settings),
    "NTKWeighting": lambda **settings: NTKWeighting(update_every=2, **settings),
    "RandomLossWeighting": RandomLossWeighting,
    "GeometricLoss": GeometricLoss,
    "ReLoBRaLo": lambda **settings: ReLoBRaLo(0.9, expected_rho=0.5, **settings),
    "ScalarizerBalancer": lambda **settings: ScalarizerBalancer(lambda losses: losses.square().sum().sqrt(), **settings),
    "SoftAdapt": lambda **settings: SoftAdapt(5.0, **settings),
    "SoftAdapt normalized": lambda **settings: SoftAdapt(5.0, variant="normalized", **settings),
    "SoftAdapt loss-weighted": lambda **settings: SoftAdapt(variant="loss_weighted", **settings),
}
BALANCERS |= {f"TorchJD {name}": around(GramianWeighting, make) for name, make in WEIGHTINGS.items()}
BALANCERS |= {f"TorchJD {name}": around(ScalarizerBalancer, make) for name, make in SCALARIZERS.items()}


def _of_go4align():
    """Of the losses 1, 2 and 3, the first alone in its group."""
    smoothness = [math.exp(-0.001 * k) for k in (1, 2, 3)]
    first, second, third = (3 * q / sum(smoothness) * 2 / k for k, q in enumerate(smoothness, 1))
    return [first, (second + third) / 2, (second + third) / 2]


# What the first step applies to losses of 1, 2 and 3, where that is not ones.
FIRST = {
    "FixedWeights": [0.25, 2.0, 1.5],
    "UncertaintyWeighting": [0.5, 1.0, 0.5],
    "UncertaintyWeighting revised": [0.5, 0.5, 0.5],
    "AdaptiveNormalizedLoss": [1 / 3, 1 / 6, 1 / 9],
    "GeometricLoss": [6 ** (1 / 3) / 3, 6 ** (1 / 3) / 6, 6 ** (1 / 3) / 9],
    "DualBalancing": [1, 1 / 2, 1 / 3],
    "GO4Align": _of_go4align(),
    "SoftOptimalUncertainty": [math.exp(0.5 / k) / sum(math.exp(0.5 / j) for j in (1, 2, 3)) for k in (1, 2, 3)],
    "ScalarizerBalancer": [k / 14**0.5 for k in (1, 2, 3)],
    "TorchJD STCH": [math.exp(k / 3) / sum(math.exp(j / 3) for j in (1, 2, 3)) / 3 for k in (1, 2, 3)],
    "TorchJD UW": [0.5, 0.5, 0.5],
}
FIRST["TorchJD geometric mean"] = FIRST["GeometricLoss"]
TORCHJD = {name for name in BALANCERS if name.startswith("TorchJD")}
UNBOUND = {
    *FIRST, *TORCHJD - {"TorchJD DWA"}, "GramianWeighting",
    "GradNorm", "GradNorm alpha", "GradNorm residuals", "GradNorm Adam", "GradNorm every 3rd, mean of 2",
    "GradNorm 0.1 defaults", "GradNorm 0.1 scale=gradient", "GradNorm 0.1 scale=reference", "DynamicTaskPrioritization",
    "LearningRateAnnealing", "LearningRateAnnealing norm", "NTKWeighting",
}  # fmt: skip
EPOCH = 5
every_balancer = pytest.mark.parametrize("make", BALANCERS.values(), ids=BALANCERS)
TASKS = ("a", "b", "c")


def measurements(steps, tasks=TASKS, dtype=torch.float64):
    generator, others = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    scales = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)[: len(tasks)]
    for _ in range(steps):
        gradients = scales[:, None] * torch.randn(len(tasks), 5, generator=others, dtype=torch.float64)
        draws = torch.rand(5, len(tasks), generator=generator, dtype=torch.float64)
        losses, norms, maxima, means = (scales * draw + 1e-3 for draw in draws[:4])
        vectors = (losses, norms, maxima, means, draws[4], means.square(), gradients @ gradients.T)
        yield Measurement(tasks, *(vector.to(dtype) for vector in vectors))


def run(balancer, steps):
    for measurement in steps:
        balancer.update(measurement if balancer.due else None)
        if balancer.steps % EPOCH == 0:
            balancer.end_epoch()
    return balancer


@pytest.mark.parametrize("name", BALANCERS)
def test_the_first_step_applies_ones_or_what_the_method_says(name):
    losses = {task: torch.tensor(float(k + 1), dtype=torch.float64) for k, task in enumerate(TASKS)}
    balancer = BALANCERS[name]()
    expected = FIRST.get(name, [1.0] * 3)
    if name == "TorchJD random":
        expected = balancer.weights_at(losses).tolist()
        assert sum(expected) == pytest.approx(1) and min(expected) > 0
    exact = 1e-6 if isinstance(balancer, ScalarizerBalancer) else 1e-14  # these get the losses in float32
    exact = 2e-8 if name == "DualBalancing" else exact  # it adds 1e-8 to each
    assert balancer.weights_at(losses).tolist() == pytest.approx(expected, rel=exact)
    assert balancer.total(losses).item() == pytest.approx(sum(w * (k + 1) for k, w in enumerate(expected)), rel=exact)
    assert balancer.weights == {}


@pytest.mark.parametrize("name", BALANCERS)
def test_the_weights_sum_to_the_number_of_tasks_unless_the_method_says_otherwise(name):
    balancer = BALANCERS[name]()
    for measurement in measurements(25):
        run(balancer, [measurement])
        total = sum(balancer.weights.values())
        if name in UNBOUND:
            if abs(total - 3) > 1e-3:
                return
        else:
            assert total == pytest.approx(3, rel=1e-6 if name in TORCHJD else 1e-12)
    assert name not in UNBOUND, "it is bound after all"


@every_balancer
def test_total_changes_no_state(make):
    balancer = run(make(), measurements(4))
    before = balancer.state_dict()
    with contextlib.suppress(ValueError):  # of scalarisers that are made for three losses
        balancer.total({"b": torch.tensor(1.0)} | ({} if isinstance(balancer, FixedWeights) else {"new": torch.tensor(2.0)}))
    with torch.inference_mode():
        balancer.total({task: torch.tensor(1.0) for task in TASKS})
    assert same_state(balancer.state_dict(), before)


@every_balancer
def test_reported_weights_are_the_applied_ones(make):
    balancer = run(make(), measurements(5))
    losses = {task: torch.tensor(1.7, dtype=torch.float64, requires_grad=True) for task in TASKS}
    applied = torch.stack(torch.autograd.grad(balancer.total(losses), list(losses.values())))
    assert torch.equal(applied, balancer.weights_at(losses))
    if not isinstance(balancer, OwnLosses | ScalarizerBalancer):  # their weights are of the losses themselves
        assert dict(zip(TASKS, applied.tolist(), strict=True)) == balancer.weights


@every_balancer
def test_weights_are_positive_and_finite_after_every_step(make):
    balancer = make()
    for measurement in measurements(100):
        run(balancer, [measurement])
        w = balancer.weights_for(TASKS)
        assert w.isfinite().all() and (w > 0).all() and not w.requires_grad


@pytest.mark.parametrize("name", BALANCERS)
def test_weights_move_unless_they_are_fixed(name):
    start = torch.tensor(FIRST.get(name, [1.0] * 3), dtype=torch.float64)
    moved = (run(BALANCERS[name](), measurements(30)).weights_for(TASKS) - start).abs() > 1e-4
    assert moved.sum() == 0 if name in ("EqualWeights", "FixedWeights") else moved.sum() >= 2  # a reference task stays at 1


@every_balancer
@pytest.mark.parametrize("stop", [0, 1, 2, 7])
def test_a_restored_state_goes_on_as_if_uninterrupted(make, stop):
    steps = list(measurements(17))
    whole = run(make(), steps)
    first = run(make(), steps[:stop])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make()
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(second, steps[stop:])
    assert same_state(second.state_dict(), whole.state_dict())


@every_balancer
def test_the_state_is_a_snapshot(make):
    balancer = run(make(), measurements(5))
    state = balancer.state_dict()
    kept = torch.save(state, buffer := io.BytesIO()) or torch.load(io.BytesIO(buffer.getvalue()))
    run(balancer, measurements(5))
    assert same_state(state, kept)


@every_balancer
def test_reset_forgets_everything(make):
    steps = list(measurements(6))
    used, fresh = run(make(), steps[::-1]), make()
    used.reset()
    assert same_state(used.state_dict(), fresh.state_dict())
    assert same_state(run(used, steps).state_dict(), run(fresh, steps).state_dict())


@pytest.mark.parametrize("name", BALANCERS)
def test_the_order_of_tasks_does_not_matter(name):
    make = partial(BALANCERS[name], **({"tasks": TASKS} if name in TORCHJD else {}))  # draws and parameters go by number there
    steps = list(measurements(8))
    turned = [m.only([2, 1, 0]) for m in steps]
    mixed = [m if k % 2 else t for k, (m, t) in enumerate(zip(steps, turned, strict=True))]
    straight, crooked = run(make(), steps), run(make(), mixed)
    for task in TASKS:
        assert straight.weights[task] == pytest.approx(crooked.weights[task], rel=1e-12)


@every_balancer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["losses", "needed"])
def test_a_non_finite_step_is_skipped_and_counted(make, bad, where):
    where = "losses" if where == "losses" else next(iter(make().needs), "losses")
    if where == "kpis":
        where = "losses"  # an indicator that is no number is an error
    steps = list(measurements(6))
    balancer, clean = run(make(), steps[:3]), run(make(), steps[:3])
    broken = getattr(steps[3], where).clone()
    broken[1] = bad
    while not balancer.due:
        balancer.update(None)
        clean.update(None)
    balancer.update(steps[3]._replace(**{where: broken}))
    assert balancer.skipped_updates == 1
    expected = clean.state_dict() | {"steps": clean.steps + 1, "skipped_updates": torch.tensor(1)}
    assert same_state(balancer.state_dict(), expected)


@every_balancer
def test_declared_tasks_refuse_others(make):
    balancer = run(make(tasks=TASKS), measurements(3))  # FixedWeights has declared them
    before = balancer.state_dict()
    one = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Unknown task 'z'.*tasks=\['a', 'b', 'c'\].*Add the name"):
        balancer.total({"a": one, "z": one})
    with pytest.raises(ValueError, match="Unknown task 'z'"):
        balancer.update(Measurement(("a", "z"), *(torch.ones(2) for _ in range(6))))
    assert same_state(balancer.state_dict(), before)


@pytest.mark.parametrize("name", BALANCERS)
def test_a_frozen_method_applies_the_same_weights_whatever_the_losses_are(name):
    balancer = BALANCERS[name]()
    balancer.frozen = True
    losses = {task: torch.tensor(float(k + 1), dtype=torch.float64) for k, task in enumerate(TASKS)}
    others = {task: 7 * loss.square() for task, loss in losses.items()}
    before = balancer.applied_at(losses)
    assert torch.equal(balancer.applied_at(others), before)
    run(balancer, measurements(8))
    assert torch.equal(balancer.applied_at(losses), before) and torch.equal(balancer.applied_at(others), before)
    total = sum(weight * loss for weight, loss in zip(before.tolist(), losses.values(), strict=True))
    assert balancer.total(losses).item() == pytest.approx(float(total))


@every_balancer
def test_settings_are_plain_values(make):
    plain = (str, int, float, bool, type(None), dict, list)
    settings = make().settings()
    assert settings and all(isinstance(value, plain) for value in settings.values())


@pytest.mark.parametrize("name", BALANCERS)
def test_a_task_that_is_absent_keeps_its_weight_and_a_new_one_joins(name):
    make, whole = BALANCERS[name], list(measurements(12))
    without = [m.only([0, 1]) for m in whole]
    balancer = run(make(), whole[:4])
    before = balancer.weights["c"]
    if name in FOR_ONE_NUMBER_OF_TASKS:
        with pytest.raises(ValueError, match=r"shape|number of objectives"):
            run(balancer, without[4:8])
        return
    run(balancer, without[4:8])
    if not isinstance(balancer, DynamicWeightAverage):  # an epoch has ended since, and compares all tasks
        assert balancer.weights["c"] == before
    late = run(make(), without[:4])
    run(late, whole[4:])
    assert list(late.weights) == ["a", "b", "c"]
    assert all(0 < weight < float("inf") for weight in late.weights.values())


@every_balancer
def test_what_the_method_needs_is_asked_for(make):
    balancer = run(make(), measurements(3))
    before = balancer.state_dict()
    for name in balancer.needs:
        while not balancer.due:
            run(balancer, measurements(1))
            before = balancer.state_dict()
        with pytest.raises(ValueError, match=f"{type(balancer).__name__} needs each task's"):
            balancer.update(next(measurements(1))._replace(**{name: None}))
        assert same_state(balancer.state_dict(), before)


@every_balancer
def test_a_negative_loss_is_refused_where_ratios_are_taken(make):
    balancer = run(make(), measurements(3))
    before = balancer.state_dict()
    bad = next(measurements(1))
    bad.losses[1] = -2.0
    if balancer.needs_positive_losses:
        with pytest.raises(ValueError, match=r"none may be negative; the loss of task 'b' is -2\. Add a constant"):
            balancer.update(bad)
        assert same_state(balancer.state_dict(), before)
    elif make is BALANCERS["TorchJD geometric mean"]:
        with pytest.raises(ValueError, match="only defined for non-negative values"):
            balancer.update(bad)
    else:
        balancer.update(bad)
        assert balancer.weights_for(TASKS).isfinite().all()


@every_balancer
def test_losses_of_zero_and_of_any_size_leave_usable_weights(make):
    balancer = make()
    for losses in ([1.0, 0.0, 2.0], [1e30, 1e-30, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]):
        measurement = next(measurements(1))._replace(losses=torch.tensor(losses, dtype=torch.float64))
        if balancer.steps == 0:
            run(balancer, measurements(6))
        run(balancer, [measurement] * 5)
        w = balancer.weights_for(TASKS)
        may_be_none = isinstance(balancer, ScalarizerBalancer | SoftOptimalUncertainty | GO4Align)  # beside a loss of 1e30
        least = 0.0 if may_be_none else torch.finfo(torch.float64).tiny
        assert w.isfinite().all() and (w >= least).all(), losses


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        LossBalancer()
