"""Weights computed by NumPy where torch's numbers come from: their types, their memory, and who else holds it."""

import math
import warnings

import pytest
import torch

from lightning_gradnorm import (
    DynamicWeightAverage,
    GradNorm,
    LearningRateAnnealing,
    Measurement,
    NTKWeighting,
    ReLoBRaLo,
    SoftAdapt,
    UncertaintyWeighting,
)
from tests.balancers.test_gradnorm_equations import vector

TASKS = ("a", "b")
METHODS = (GradNorm, DynamicWeightAverage, SoftAdapt, ReLoBRaLo, UncertaintyWeighting, lambda: LearningRateAnnealing("a"))
every_method = pytest.mark.parametrize("make", METHODS)


def measured(losses, norms=(1.0, 4.0), dtype=torch.float64, tasks=TASKS):
    norms = torch.tensor(norms, dtype=dtype)
    return Measurement(tasks, torch.tensor(losses, dtype=dtype), norms, 2 * norms, norms / 2)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_measurements_may_be_of_any_float_type(make, dtype):
    narrow, wide = make(), make()
    for losses in ([1.0, 4.0], [0.5, 4.0], [0.5, 2.0]):
        narrow.update(measured(losses, dtype=dtype))
        wide.update(measured(losses))
    assert narrow.weights == pytest.approx(wide.weights, rel=1e-6)
    assert narrow.skipped_updates == 0


@every_method
@pytest.mark.parametrize("losses", [[math.inf, -math.inf], [math.inf, 1.0], [math.nan, 1.0]])
def test_what_is_not_finite_is_counted_without_a_word(make, losses):
    balancer = make()
    balancer.update(measured([1.0, 4.0]))
    before = balancer.weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.update(measured([abs(loss) for loss in losses] if make is ReLoBRaLo else losses))
    assert balancer.skipped_updates == 1 and balancer.steps == 2
    assert balancer.weights == before


@every_method
def test_what_is_remembered_is_not_the_callers(make):
    ours, theirs = make(), make()
    buffer = measured([1.0, 2.0])
    for losses in ([1.0, 2.0], [0.9, 2.0], [0.9, 1.5]):
        buffer.losses.copy_(vector(*losses))
        ours.update(buffer)
        theirs.update(measured(losses))
    buffer.gradient_norms.fill_(777.0)
    for balancer in (ours, theirs):
        balancer.update(measured([0.9], [1.0], tasks=("a",)) if make is not METHODS[-1] else measured([0.9, 1.5]))
    assert ours.weights == theirs.weights


@pytest.mark.parametrize(
    "make", [UncertaintyWeighting, lambda: GradNorm(priorities={"a": 2.0}), lambda: GradNorm(residuals=["a"])]
)
def test_a_state_of_single_precision_goes_on(make):
    """As a run on a device without float64 leaves it."""
    narrow, wide = make(), make()
    for balancer in (narrow, wide):
        balancer.update(measured([1.0, 4.0]))

    def single(value):
        if isinstance(value, dict):
            return {name: single(entry) for name, entry in value.items()}
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    narrow.load_state_dict(single(wide.state_dict()))
    for balancer in (narrow, wide):
        balancer.update(measured([0.5, 2.0]))
        balancer.update(measured([0.5], [1.0], tasks=("a",)))
    assert narrow.weights == pytest.approx(wide.weights, rel=1e-6)


def test_kernels_of_tasks_that_take_turns_count_with_their_last_trace():
    balancer = NTKWeighting(update_every=1)
    for _ in range(3):
        for task, trace in (("a", 1.0), ("b", 1000.0)):
            balancer.update(Measurement((task,), torch.ones(1), ntk_traces=vector(trace)))
    assert balancer.weights == pytest.approx({"a": 1001.0, "b": 1.001})
