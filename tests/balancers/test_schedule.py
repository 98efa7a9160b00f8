"""``update_every``: one measured step in so many, which no taking of turns can hide from."""

import pytest

from lightning_gradnorm import DynamicWeightAverage, EqualWeights
from lightning_gradnorm.balancers.schedule import is_measured

EVERY = pytest.mark.parametrize("every", [1, 2, 3, 7, 10, 25, 100])


@EVERY
def test_the_first_step_and_one_in_each_block(every):
    measured = [step for step in range(1 + 40 * every) if is_measured(step, every)]
    assert measured[0] == 0
    assert [(step - 1) // every for step in measured[1:]] == list(range(40))


def test_every_1_measures_every_step():
    assert all(is_measured(step, 1) for step in range(1000))


@EVERY
@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 10, 16, 50, 64])
def test_tasks_that_take_turns_are_all_met_and_equally_often(every, period):
    met = [0] * period
    for step in range(80 * every * period):
        met[step % period] += is_measured(step, every)
    assert min(met) >= 60 and max(met) <= 100, "80 of each"


def test_where_every_nth_step_would_see_one_task_alone():
    """The schedule of 0.1, to show that the test above can fail."""
    met = [0, 0]
    for step in range(2000):
        met[step % 2] += step == 0 or (step + 1) % 10 == 0
    assert met == [1, 200]


def test_it_depends_on_the_steps_alone_so_a_resumed_run_goes_on_with_it():
    whole, first, second = (DynamicWeightAverage(update_every=10) for _ in "abc")
    due = []
    for _ in range(60):
        due.append(whole.due)
        whole.update(None)
    for _ in range(33):
        first.update(None)
    second.load_state_dict(first.state_dict())
    again = []
    for _ in range(27):
        again.append(second.due)
        second.update(None)
    assert again == due[33:] and sum(due) == 7


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None, "2", "1.5e0"])
def test_what_is_no_number_of_steps(every):
    with pytest.raises(ValueError, match="update_every is a whole number of steps, 1 or more; got "):
        EqualWeights(update_every=every)
