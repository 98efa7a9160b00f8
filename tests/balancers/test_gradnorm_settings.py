"""GradNorm's settings: those of version 0.1 and its states, what says what to write, and what is refused."""

import pytest

from lightning_gradnorm import GradNorm, GradNormCallback, Measurement
from tests.balancers.test_gradnorm import given, random_norms
from tests.balancers.test_gradnorm_equations import vector
from tests.helpers import of_version_0_1


@of_version_0_1
@pytest.mark.parametrize("was", [{"update": "log"}, {"update": "paper"}, {"reference": "b"}], ids=str)
def test_weights_of_another_update_count_as_the_average_of_its_steps(was):
    old = given(GradNorm(**was), *random_norms(30).tolist())
    state = old.state_dict()
    if was.get("update") == "log":
        state["memory"] = {}  # as 0.1 saved it
    balancer = GradNorm()
    balancer.load_state_dict(state)
    assert balancer.weights == old.weights
    given(balancer, (1.0, 10.0, 100.0))
    rate = 2 / (31 + 30)
    expected = [w ** (1 - rate) * rest**rate for w, rest in zip(old.weights.values(), (37.0, 3.7, 0.37), strict=True)]
    assert list(balancer.weights.values()) == pytest.approx(expected, rel=1e-9)


@of_version_0_1
@pytest.mark.parametrize(
    "settings", [{"update": "log"}, {"update": "closed_form"}, {"update": "paper"}, {"reference": "b"}], ids=str
)
def test_a_state_of_0_1_goes_on_under_its_own_settings(settings):
    rows = random_norms(60).tolist()
    whole = given(GradNorm(**settings), *rows)
    state = given(GradNorm(**settings), *rows[:30]).state_dict() | {"memory": {}}  # as 0.1 saved it
    resumed = GradNorm(**settings)
    resumed.load_state_dict(state)
    assert given(resumed, *rows[30:]).weights == whole.weights


def test_weights_that_were_frozen_have_averaged_nothing():
    balancer = GradNorm(update_every=4)
    balancer.frozen = True
    given(balancer, *[(1.0, 100.0)] * 1000)
    assert balancer.weights == {"a": 1.0, "b": 1.0}
    balancer.frozen = False
    given(balancer, *[(1.0, 10.0)] * 4)
    rate = 2 * 4 / (4 + 30)
    assert balancer.weights == pytest.approx({"a": 5.5**rate, "b": 0.55**rate})


def test_the_printed_rule_keeps_the_papers_settings():
    settings = GradNorm(update="paper").settings()
    assert (settings["alpha"], settings["lr"], settings["optimizer"], settings["scale"]) == (0.12, 0.025, "Adam", "sum")
    assert GradNorm().settings()["optimizer"] is None and "scale" not in GradNorm().settings()
    assert GradNorm(**GradNorm(0.5, residuals=["a"]).settings()).settings() == GradNorm(0.5, residuals=["a"]).settings()


@pytest.mark.parametrize("make", [GradNorm, GradNormCallback])
@pytest.mark.parametrize(
    ("settings", "write"),
    [
        ({"update": "log"}, "update='log' .* leave update out"),
        ({"update": "closed_form"}, "update='closed_form' .* leave update out"),
        ({"scale": "sum"}, "scale .* leave it out"),
        ({"scale": "gradient", "update": "paper"}, "scale .* leave it out"),
        ({"reference": "pde"}, r"reference .* residuals=\['pde'\]"),
        ({"ema_decay": 0.98}, "ema_decay .* lr=1 - ema_decay"),
    ],
    ids=str,
)
def test_what_is_gone_in_the_next_version_says_what_to_write(make, settings, write):
    with pytest.warns(FutureWarning, match=f"GradNorm's {write}") as told:
        made = make(**settings)
    assert told[0].filename == __file__
    balancer = made.balancer if isinstance(made, GradNormCallback) else made
    assert balancer.update_rule == settings.get("update", "log"), "it does what it did"


@of_version_0_1
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "average", "reference": "pde"}, "reference does not go with update='average'. Write: residuals="),
        ({"update": "paper", "residuals": ["pde"]}, "residuals is for update='average', the default"),
        ({"ema_decay": 0.98, "residuals": ["pde"]}, "without scale, reference and ema_decay"),
        ({"residuals": "pde"}, r"Write residuals=\['pde'\]"),
        ({"lr": 1.5}, "lr is from 0 to 1"),
        ({"update_every": "sometimes"}, "update_every is a whole number of steps, 1 or more, or 'auto'; got 'sometimes'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GradNorm(**settings)


def test_a_residual_that_is_no_task_is_named():
    balancer = GradNorm(residuals=["pdf"])
    with pytest.raises(ValueError, match="residuals names 'pdf', which is no task: the tasks are 'border', 'pde'"):
        balancer.update(Measurement(("pde", "border"), vector(1.0, 1.0), vector(1.0, 1.0)))
    assert balancer.weights == {}
