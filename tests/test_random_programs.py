"""Random programs: the readers against one ``autograd.grad`` per task, and the step against the plain one."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lightning_gradnorm.descent import Arrivals
from lightning_gradnorm.task_gradients import TaskGradients
from tests.random_programs.checking import check, least
from tests.random_programs.description import Hook, Piece, Program, Shared, Task
from tests.random_programs.network import LOSSES
from tests.random_programs.operations import AROUND
from tests.random_programs.pieces import PIECES
from tests.random_programs.recombining import check_recombined
from tests.random_programs.running import READERS, run_plainly
from tests.random_programs.strategies import programs


# Most programs have no one place of meeting.
@pytest.mark.parametrize(("compare", "looked_at"), [(check, 1 / 2), (check_recombined, 1 / 6)])
def test_readers_agree_with_one_autograd_grad_per_task_and_leave_no_trace(compare, looked_at):
    """``python -m tests.random_programs --program '…'`` runs again what this prints; without it, many thousands more."""
    outcomes = Counter()

    @settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(programs())
    def one(program):
        verdict = compare(program)
        outcomes[verdict.outcome] += 1
        assert verdict.outcome != "DIFFERENT", f"{program!r}: {verdict.differences}"

    one()
    assert outcomes["agreed"] > outcomes.total() * looked_at  # or nothing is looked at


@given(programs())
def test_a_program_prints_as_the_python_that_makes_it(program):
    names = {cls.__name__: cls for cls in (Hook, Piece, Program, Shared, Task)}
    assert eval(repr(program), names) == program


@pytest.mark.parametrize("kind", [*PIECES, *AROUND])
def test_every_piece_can_be_run_and_built_twice(kind):
    """Or the machine would look for nothing with it."""
    inner = (Piece("activation"), Piece()) if kind in AROUND else ()
    ran = 0
    for option in range(6):
        program = Program(body=(Piece(), Piece(kind, option, inner), Piece()), w=Shared("body"))
        if check(program).outcome != "no program":
            ran += 1
            assert run_plainly(program).differences(run_plainly(program)) == []
    assert ran >= 4


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_can_be_run(loss):
    assert check(Program(tasks=(Task(loss=loss), Task()), w=Shared(at=1))).outcome == "agreed"


@pytest.mark.parametrize("kind", ["value", "head", "w", "module", "module pre", "accumulated", "node", "node pre"])
def test_a_hook_that_runs_too_often_is_noticed(kind, monkeypatch):
    def read_by_two_backwards(root, *arguments, **settings):
        root.backward(retain_graph=True)
        return joint(root, *arguments, **settings)

    program = Program(hooks=(Hook(kind),))
    assert check(program).outcome == "agreed"
    joint = __import__("tests.random_programs.running", fromlist=["JointBackward"]).JointBackward
    monkeypatch.setattr("tests.random_programs.running.JointBackward", read_by_two_backwards)
    assert ("joint", "counts") in check(program).differences


@pytest.mark.parametrize("what", ["norms", "cosines", "flat"])
def test_numbers_that_are_wrong_are_noticed(what, monkeypatch):
    right = getattr(TaskGradients, what)
    monkeypatch.setattr(TaskGradients, what, lambda self: right(self) * 1.001)
    found = check(Program(precision="float32")).differences
    silent = {"norms": (), "cosines": ("letting go",), "flat": ("letting go", "letting go of pairs")}[what]
    assert {(reader, what) for reader in READERS if reader not in silent} == set(found)
    monkeypatch.setattr(TaskGradients, what, lambda self: right(self) * torch.nan)
    assert ("joint", what) in check(Program(precision="bfloat16")).differences


def test_a_gradient_that_the_reading_touches_is_noticed(monkeypatch):
    right = Arrivals.add

    def add(self, task, node, number, cotangent):
        right(self, task, node, number, cotangent)
        cotangent.mul_(1.0000001)

    monkeypatch.setattr(Arrivals, "add", add)
    assert ("joint", "gradients") in check(Program()).differences


def test_an_error_is_asked_for_where_a_task_does_not_reach_w():
    program = Program(body=(Piece(), Piece()), tasks=(Task(), Task(sources=(1,))))
    assert check(program).outcome == "refused"
    assert check(Program(body=(Piece(), Piece()), w=Shared("parameter", 2))).outcome == "agreed"


def test_the_least_program_with_a_difference_is_found(monkeypatch):
    right = TaskGradients.norms
    monkeypatch.setattr(TaskGradients, "norms", lambda self: right(self) * (2 if len(self.tasks) > 1 else 1))
    program = Program(
        body=(Piece("conv1d", 2), Piece("skipped", inner=(Piece("einsum"), Piece("activation")))),
        tasks=(Task(head=(Piece(),), size=1e3), Task(loss="absolute"), Task(reads=0)),
        seed=7,
        extras=("w",),
        hooks=(Hook(),),
    )
    simplest, verdict = least(program, check(program))
    assert simplest == Program(body=simplest.body) and len(simplest.body) == 1
    assert set(verdict.differences) == {(reader, "norms") for reader in READERS}
