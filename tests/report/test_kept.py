"""Curves kept in memory: thinned out evenly, and the same after a resume."""

import io

import pytest
import torch

from lightning_gradnorm.report.kept import KeptCurves
from tests.helpers import same_state


def keep(curves, steps, tags=("loss_weight/a", "task_loss/a")):
    for step in steps:
        if not curves.skips_next():
            curves.add(step, tags, torch.tensor([step, -step], dtype=torch.float64))


def test_what_is_kept_is_what_was_added():
    curves = KeptCurves()
    keep(curves, range(3))
    keep(curves, [5], ("loss_weight/b", "task_loss/b"))
    keep(curves, [7])
    history = curves.history()
    assert history.tasks == ("a", "b")
    assert history.of("task_loss") == {"a": ([0, 1, 2, 7], [0.0, -1.0, -2.0, -7.0]), "b": ([5], [-5.0])}


@pytest.mark.parametrize(("steps", "every"), [(400, 1), (401, 2), (801, 4), (10_000, 32)])
def test_a_long_run_is_thinned_out_evenly(steps, every):
    curves = KeptCurves()
    keep(curves, range(steps))
    assert curves.history().of("loss_weight")["a"].steps == list(range(0, steps, every))


@pytest.mark.parametrize("stop", [0, 1, 399, 400, 401, 777])
def test_a_resumed_run_keeps_what_an_uninterrupted_one_does(stop):
    whole, first, resumed = KeptCurves(), KeptCurves(), KeptCurves()
    keep(whole, range(1500))
    keep(first, range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    keep(resumed, range(stop, 1500))
    assert same_state(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("resumed", [False, True])
def test_names_are_kept_once_for_all_steps(resumed):
    kept, taken = KeptCurves(), KeptCurves()
    for step in range(50):
        keep(kept, [step], (f"loss_weight/{'a' * 3}", "task_loss/a"))
    taken.load_state_dict(kept.state_dict())
    curves = taken if resumed else kept
    assert len({id(tags) for _, tags, _ in curves._rows}) == 1


def test_tasks_that_take_turns_survive_a_resume_in_their_order():
    curves, resumed = KeptCurves(), KeptCurves()
    for step in range(6):
        keep(curves, [step], (f"loss_weight/{'ab'[step % 2]}", "task_loss/a"))
    resumed.load_state_dict(curves.state_dict())
    assert resumed.history().of("task_loss") == curves.history().of("task_loss")
    assert resumed.history().of("loss_weight")["b"].steps == [1, 3, 5]
