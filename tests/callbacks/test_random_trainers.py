"""Random modules through Trainers with random flags: the same weights and parameters as by hand in plain torch."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, event, given, reject, settings

from lightning_gradnorm.losses import plain_sum
from lightning_gradnorm.session.noted import NotedLosses
from lightning_gradnorm.task_gradients import TaskGradients
from tests.random_programs.training import TOLERANCES, Training, by_hand, through_the_trainer
from tests.random_programs.training_strategies import trainings

pytestmark = pytest.mark.filterwarnings("ignore")


def differences(training: Training) -> tuple[int, str]:
    """How many batches could be compared, and the first difference, if there is one."""
    with TemporaryDirectory() as folder:
        weights, parameters, names = through_the_trainer(training, Path(folder))
    if not names:  # W was not found: a task had no gradient anywhere
        found = {weight for step in weights for weight in step.values()}
        return 0, "" if found <= {1.0} else f"no W, and weights {found}"
    tolerance = TOLERANCES[training.precision][0]
    compared, start, largest = 0, parameters[0], 0.0
    for compared, (expected, after) in enumerate(by_hand(training, names), 1):
        found, largest = weights[compared - 1], max([largest, *expected.values()])  # the paper's step is additive
        if found.keys() != expected.keys() or any(abs(found[t] - w) > tolerance * largest for t, w in expected.items()):
            return compared, f"weights after batch {compared}: {found}, by hand {expected}"
        moved = (after - start).norm()
        if not (parameters[compared - 1] - after).norm() <= tolerance * (moved + 0.01):
            off = (parameters[compared - 1] - after).norm()
            return compared, f"parameters after batch {compared} are off by {off:.3g} where they moved by {moved:.3g}"
    return compared, ""


def runs_by_hand(training: Training) -> bool:
    """Whether the module can be trained at all, on finite numbers, and every task reaches W."""
    try:
        steps = list(by_hand(training, ["shared.weight", "shared.bias"]))
    except Exception:
        return False
    return all(bool(parameters.isfinite().all()) and parameters.norm() < 1e6 for _, parameters in steps)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(trainings())
def test_trainer_and_plain_loop_come_to_the_same_weights_and_parameters(training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not runs_by_hand(training):
            reject()
        compared, difference = differences(training)
    event(f"{compared} batches compared")
    assert not difference, f"{training!r}: {difference}"


PLAIN = {
    "plain": Training(),
    "accumulated": Training(batches=5, accumulate=2, epochs=2),
    "resumed": Training(epochs=3, resumed_after=1, optimizer="adam"),
    "tasks absent": Training(batches=6, absent=(0, 2), settings=(("alpha", 1.5),)),
    "by hand": Training(batches=5, accumulate=2, manual=True),
    "clipped": Training(clip=("norm", 0.01)),
    "scaled": Training(precision="scaler", settings=(("lr", 0.5),)),
    "every third": Training(batches=7, settings=(("update_every", 3),)),
}


OTHERS = {"as printed": Training(settings=(("update", "paper"),)), "by Adam": Training(weights_optimizer="adam")}


@pytest.mark.parametrize("training", (PLAIN | OTHERS).values(), ids=PLAIN | OTHERS)
def test_the_loop_by_hand_is_the_trainers(training):
    compared, difference = differences(training)
    assert not difference
    assert compared == training.run_batches * training.epochs  # or the comparison would end before it


@pytest.mark.parametrize("training", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("what", ["norms", "weights applied"])
def test_a_trainer_that_weighs_otherwise_is_noticed(training, what, monkeypatch):
    if what == "norms":
        right, flat = TaskGradients.norms, TaskGradients.flat
        monkeypatch.setattr(TaskGradients, "norms", lambda self: right(self) * (1 + 9 * torch.arange(len(self.tasks))))
        monkeypatch.setattr(TaskGradients, "flat", lambda self: flat(self) * (1 + 9 * torch.arange(len(self.tasks)))[:, None])
    else:
        monkeypatch.setattr(NotedLosses, "total", lambda noted: plain_sum(noted.losses))
    assert differences(training)[1]
