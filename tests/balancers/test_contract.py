"""What every balancer promises; a new one is one more line in ``BALANCERS``."""

import io

import pytest
import torch

from lightning_gradnorm import GradNorm, LossBalancer, Measurement
from tests.helpers import same_state

BALANCERS = {
    "GradNorm": lambda **settings: GradNorm(**settings),
    "GradNorm paper": lambda **settings: GradNorm(update="paper", **settings),
    "GradNorm closed form": lambda **settings: GradNorm(update="closed_form", **settings),
    "GradNorm scale=gradient": lambda **settings: GradNorm(scale="gradient", **settings),
    "GradNorm scale=reference": lambda **settings: GradNorm(scale="reference", reference="b", **settings),
    "GradNorm every 3rd, mean of 2": lambda **settings: GradNorm(update_every=3, initial_losses=2, **settings),
}
every_balancer = pytest.mark.parametrize("make", BALANCERS.values(), ids=BALANCERS)
TASKS = ("a", "b", "c")


def measurements(steps, tasks=TASKS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    scales = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)[: len(tasks)]
    for _ in range(steps):
        losses, norms = (scales * torch.rand(len(tasks), generator=generator, dtype=torch.float64) + 1e-3 for _ in range(2))
        yield Measurement(tasks, losses.to(dtype), norms.to(dtype))


def run(balancer, steps):
    for measurement in steps:
        balancer.update(measurement if balancer.due else None)
    return balancer


@every_balancer
def test_the_first_step_applies_ones(make):
    losses = {task: torch.tensor(float(k + 1)) for k, task in enumerate(TASKS)}
    balancer = make()
    assert balancer.weights_for(TASKS).tolist() == [1.0] * 3
    assert balancer.total(losses).item() == 6.0
    assert balancer.weights == {}


@every_balancer
def test_total_changes_no_state(make):
    balancer = run(make(), measurements(4))
    before = balancer.state_dict()
    balancer.total({"b": torch.tensor(1.0), "new": torch.tensor(2.0)})
    with torch.inference_mode():
        balancer.total({task: torch.tensor(1.0) for task in TASKS})
    assert same_state(balancer.state_dict(), before)


@every_balancer
def test_reported_weights_are_the_applied_ones(make):
    balancer = run(make(), measurements(5))
    losses = {task: torch.tensor(1.7, dtype=torch.float64, requires_grad=True) for task in TASKS}
    applied = torch.autograd.grad(balancer.total(losses), list(losses.values()))
    assert {task: w.item() for task, w in zip(TASKS, applied, strict=True)} == balancer.weights


@every_balancer
def test_weights_are_positive_and_finite_after_every_step(make):
    balancer = make()
    for measurement in measurements(100):
        balancer.update(measurement if balancer.due else None)
        w = balancer.weights_for(TASKS)
        assert w.isfinite().all() and (w > 0).all() and not w.requires_grad


@every_balancer
def test_weights_move(make):
    moved = run(make(), measurements(30)).weights_for(TASKS).sub(1).abs() > 1e-3
    assert moved.sum() >= 2  # a reference task stays at 1


@every_balancer
@pytest.mark.parametrize("stop", [0, 1, 2, 7])
def test_a_restored_state_goes_on_as_if_uninterrupted(make, stop):
    steps = list(measurements(12))
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


@every_balancer
def test_the_order_of_tasks_does_not_matter(make):
    steps = list(measurements(8))
    turned = [Measurement(m.tasks[::-1], m.losses.flip(0), m.gradient_norms.flip(0)) for m in steps]
    mixed = [m if k % 2 else t for k, (m, t) in enumerate(zip(steps, turned, strict=True))]
    straight, crooked = run(make(), steps), run(make(), mixed)
    for task in TASKS:
        assert straight.weights[task] == pytest.approx(crooked.weights[task], rel=1e-12)


@every_balancer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["losses", "gradient_norms"])
def test_a_non_finite_step_is_skipped_and_counted(make, bad, where):
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
    balancer = run(make(tasks=TASKS), measurements(3))
    before = balancer.state_dict()
    one = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Unknown task 'z'.*tasks=\['a', 'b', 'c'\].*Add the name"):
        balancer.total({"a": one, "z": one})
    with pytest.raises(ValueError, match="Unknown task 'z'"):
        balancer.update(Measurement(("a", "z"), torch.ones(2), torch.ones(2)))
    assert same_state(balancer.state_dict(), before)


@every_balancer
def test_settings_are_plain_values(make):
    plain = (str, int, float, bool, type(None), dict, list)
    settings = make().settings()
    assert settings and all(isinstance(value, plain) for value in settings.values())


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        LossBalancer()
