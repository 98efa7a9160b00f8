"""Every setting of every method takes what numpy, pandas, enums, tensors and YAML give, and keeps plain values."""

import enum
import io
import math

import numpy as np
import pytest
import torch
import yaml

from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GeometricLoss,
    GradientNormPoints,
    GradNorm,
    GradNormCallback,
    LearningRateAnnealing,
    LossBalancer,
    LossBalancingCallback,
    LossRatioBalancing,
    Measurement,
    NTKWeighting,
    PointWeighting,
    RandomLossWeighting,
    ReLoBRaLo,
    ResidualAttentionPoints,
    SelfAdaptivePoints,
    SoftAdapt,
    UncertaintyWeighting,
)
from lightning_gradnorm.pointwise import NotedPoints
from tests.helpers import of_version_0_1, same_state
from tests.test_plain import Series

pytestmark = of_version_0_1
TASKS = ["a", "b", "c"]
SETTINGS = {
    GradNorm: {
        "alpha": 1.5, "lr": 1e-3, "update": "average", "initial_losses": {"a": 2.5}, "residuals": ["b"],
        "update_every": 2, "min_weight": 1e-3, "max_weight": 1e3, "priorities": {"a": 2.0, "c": 1e-1}, "tasks": TASKS,
    },
    LossRatioBalancing: {"alpha": 1e-1, "initial_losses": 2, "tasks": TASKS, "update_every": 2},
    UncertaintyWeighting: {
        "kinds": {"b": "classification"}, "lr": 1e-3, "form": "revised", "initial_log_variance": 0.5, "tasks": TASKS,
    },
    DynamicWeightAverage: {"temperature": 1e-1, "tasks": TASKS, "update_every": 1},
    DynamicTaskPrioritization: {"gamma": {"a": 2.0, "b": 0.5}, "smoothing": 0.5, "floor": 1e-3, "tasks": TASKS},
    AdaptiveNormalizedLoss: {"decay": 0.5, "floor": 1e-8, "tasks": TASKS},
    LearningRateAnnealing: {"reference": "b", "form": "max_mean", "decay": 0.5, "update_every": 1, "tasks": TASKS},
    NTKWeighting: {"decay": 0.5, "update_every": 2, "tasks": TASKS},
    RandomLossWeighting: {"seed": 7, "tasks": TASKS},
    GeometricLoss: {"tasks": TASKS, "update_every": 1},
    ReLoBRaLo: {"alpha": 0.5, "temperature": 1e-1, "expected_rho": 0.5, "seed": 3, "tasks": TASKS},
    SoftAdapt: {"beta": 0.5, "variant": "normalized", "tasks": TASKS},
    EqualWeights: {"tasks": TASKS, "update_every": 3},
    FixedWeights: {"weights": {"a": 0.5, "b": 2.0, "c": 1e-3}, "update_every": 2},
    SelfAdaptivePoints: {
        "num_points": 3, "mask": "polynomial", "lr": 1e-3, "initial": 1.5, "coefficient": 2.0, "exponent": 3.0,
    },
    ResidualAttentionPoints: {"num_points": 3, "decay": 0.5, "rate": 1e-3},
    GradientNormPoints: {"residual": math.cos, "max_weight": 10.0, "chunk_size": 4},
}  # fmt: skip


def as_text(value):
    """As YAML 1.1 reads 1e-3."""
    return f"{value:e}" if isinstance(value, float) else value


FORMS = {  # of names and choices, of numbers, of what is given per task
    "numpy": (np.str_, lambda number: np.array(number)[()], dict),
    "numpy, narrow": (
        np.str_,
        lambda number: np.int32(number) if isinstance(number, int) else np.float64(np.float32(number)),
        dict,
    ),
    "arrays": (np.array, np.array, Series),
    "pandas": (np.str_, np.float64, Series),
    "tensors": (str, lambda number: torch.tensor(number, dtype=torch.float64), dict),
    "enums": (
        lambda text: enum.Enum("Text", {"MEMBER": text}, type=str).MEMBER,
        lambda number: enum.Enum("Number", {"MEMBER": number}, type=type(number)).MEMBER,
        dict,
    ),
    "YAML": (str, as_text, dict),
}


def given(value, name, number, per_task, key=False):
    if isinstance(value, dict):
        keys = np.str_ if name is np.array else name  # an array cannot be a key
        return per_task({keys(task): given(entry, name, number, per_task) for task, entry in value.items()})
    if isinstance(value, list):
        return [name(entry) for entry in value]
    if isinstance(value, str):
        return name(value)
    return number(value) if isinstance(value, int | float) else value


def is_plain(value):
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) in (str, int) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return type(value) in (str, int, float, bool, type(None), torch.Tensor)


def learn(method):
    if isinstance(method, PointWeighting):
        method.update([NotedPoints(torch.rand(3), None)])
        return
    for _ in range(4):
        losses = torch.rand(3, dtype=torch.float64) + 0.1
        method.update(Measurement(tuple(map(np.str_, TASKS)), losses, losses, losses, losses, losses / 2, losses))
        method.end_epoch()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("method", SETTINGS, ids=lambda method: method.__name__)
def test_what_is_given_becomes_plain(method, form):
    settings = SETTINGS[method]
    in_form = {name: given(value, *form) for name, value in settings.items()}
    ours, plain = method(**in_form), method(**settings)
    assert is_plain(ours.settings()), ours.settings()
    assert yaml.safe_load(yaml.safe_dump(ours.settings())) == ours.settings()
    assert repr(ours.settings()) == repr(plain.settings()) or form is FORMS["numpy, narrow"]
    for it in (ours, plain):
        torch.manual_seed(0)
        learn(it)
    assert is_plain(ours.state_dict())
    torch.save(ours.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    restored = method(**in_form)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_state(restored.state_dict(), ours.state_dict())
    if form is not FORMS["numpy, narrow"]:
        assert same_state(ours.state_dict(), plain.state_dict())
    if isinstance(ours, LossBalancer):
        assert [type(task) for task in (*ours.tasks, *ours.weights)] == [str] * 6


def test_the_table_has_every_method_and_every_setting():
    import inspect

    for method, settings in SETTINGS.items():
        others = {"optimizer", "update_every", "tasks", "scale", "reference", "ema_decay"}  # three of version 0.1
        assert set(inspect.signature(method).parameters) - others <= set(settings), method


NOT_A_NUMBER = [None, True, np.bool_(True), torch.tensor(True), "fast", "0.5", b"1e-3", (1.0,), [1.0], torch.ones(2), 1j]
NUMERIC = [
    (method, name)
    for method, settings in SETTINGS.items()
    for name, value in settings.items()
    if isinstance(value, int | float) and name != "initial_losses"
]
MAY_BE_NONE = {"max_weight", "num_points", "initial", "alpha", "lr"}


@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=repr)
@pytest.mark.parametrize(("method", "name"), NUMERIC, ids=lambda it: getattr(it, "__name__", it))
def test_what_is_no_number_is_refused_by_the_settings_name(method, name, value):
    if value is None and name in MAY_BE_NONE:
        return
    with pytest.raises(ValueError, match=rf"^{name} is .*; got "):
        method(**SETTINGS[method] | {name: value})


def test_a_number_in_quotes_is_told_so():
    with pytest.raises(
        ValueError, match=r"lr is from 0 to 1: a rate's least; got '0\.5'\. That is text: write the number without quotes\."
    ):
        GradNorm(lr="0.5")
    with pytest.raises(ValueError, match=r"lr is from 0 to 1: a rate's least; got 'fast'\.$"):
        GradNorm(lr="fast")


CHOICES = [(GradNorm, "update"), (UncertaintyWeighting, "form"), (LearningRateAnnealing, "form"),
           (SoftAdapt, "variant"), (SelfAdaptivePoints, "mask")]  # fmt: skip
BARE = enum.Enum("Bare", {"log": "log"}).log


@pytest.mark.parametrize("value", [BARE, 1, b"log", ["log"], np.array(["log"]), torch.tensor(1)], ids=repr)
@pytest.mark.parametrize(("method", "name"), CHOICES, ids=lambda it: getattr(it, "__name__", it))
def test_what_is_no_choice_is_refused_by_the_settings_name(method, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is one of '.*'; got "):
        method(**SETTINGS[method] | {name: value})


PER_TASK = [(GradNorm, "priorities"), (UncertaintyWeighting, "kinds"), (FixedWeights, "weights")]


@pytest.mark.parametrize("value", [3, "a", ["a"], [("a", 1.0)], torch.ones(2)], ids=repr)
@pytest.mark.parametrize(("method", "name"), PER_TASK, ids=lambda it: getattr(it, "__name__", it))
def test_what_is_not_given_per_task_is_refused(method, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is a dict of task name → "):
        method(**SETTINGS[method] | {name: value})


@pytest.mark.parametrize("name", [3, None, BARE, ("a", "b"), b"a"], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda name: GradNorm(tasks=[name]),
        lambda name: GradNorm(priorities={name: 1.0}),
        lambda name: GradNorm(initial_losses={name: 1.0}),
        lambda name: FixedWeights({name: 1.0}),
        lambda name: DynamicTaskPrioritization({name: 1.0}),
        lambda name: UncertaintyWeighting({name: "regression"}),
        lambda name: EqualWeights().update(Measurement((name,), torch.ones(1))),
        lambda name: EqualWeights().total({name: torch.ones(())}),
        lambda name: EqualWeights().weights_for([name]),
        lambda name: GeometricLoss().total({name: torch.ones(())}),
        lambda name: AdaptiveNormalizedLoss().total({name: torch.ones(())}),
        lambda name: LossBalancingCallback(EqualWeights(), points={name: SelfAdaptivePoints()}),
    ],
)
def test_what_is_no_name_is_refused_wherever_names_enter(make, name):
    with pytest.raises(TypeError, match="A task's name is a string, got "):
        make(name)


@pytest.mark.parametrize("name", [3, BARE, ("a", "b"), b"a"], ids=repr)
def test_what_is_no_name_is_no_reference(name):
    for make in (GradNorm, LearningRateAnnealing):
        with pytest.raises(TypeError, match="A task's name is a string, got "):
            make(reference=name)


@pytest.mark.parametrize("tasks", [3, b"ab", 1.5, torch.tensor(1), np.array(1)], ids=repr)
def test_what_is_no_list_of_tasks_is_refused(tasks):
    with pytest.raises(TypeError, match=r"tasks is a list of names, got .*Write tasks=\['depth', 'normals'\]|name is a string"):
        GradNorm(tasks=tasks)


@pytest.mark.parametrize("name", [np.str_("a"), enum.Enum("Text", {"A": "a"}, type=str).A])
def test_one_name_is_no_list_of_tasks_in_any_form(name):
    with pytest.raises(TypeError, match=r"got the string 'a'\. Write tasks=\['a'\]"):
        GradNorm(tasks=name)


@pytest.mark.parametrize(
    "tasks", [np.array(TASKS), tuple(TASKS), iter(TASKS), dict.fromkeys(TASKS), Series(dict.fromkeys(TASKS)).keys()]
)
def test_any_list_of_tasks_will_do(tasks):
    assert GradNorm(tasks=tasks).known_tasks == ("a", "b", "c")


@pytest.mark.parametrize("make", [GradNorm, UncertaintyWeighting, SelfAdaptivePoints])
@pytest.mark.parametrize("optimizer", ["Adam", None, 3])
def test_what_makes_no_optimiser_is_refused(make, optimizer):
    if optimizer is None and make is GradNorm:
        return  # the update's own
    with pytest.raises(ValueError, match=r"^optimizer is an optimiser class or a functools\.partial of one, .*; got "):
        make(optimizer=optimizer)


@pytest.mark.parametrize("whole", [np.int64(3), 3.0, np.float32(3), torch.tensor(3), "3e0"], ids=repr)
def test_a_whole_number_may_come_as_any_number(whole):
    balancer = GradNorm(update_every=whole, initial_losses=whole)
    assert repr(balancer.settings()) == repr(GradNorm(update_every=3, initial_losses=3).settings())


def test_the_callback_keeps_plain_names_of_points():
    callback = GradNormCallback(points={np.str_("a"): SelfAdaptivePoints()})
    assert [type(task) for task in (*callback.points, *callback.state_dict()["points"])] == [str, str]


# -- a state of another method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [it for it in SETTINGS if issubclass(it, LossBalancer)], ids=lambda it: it.__name__)
@pytest.mark.parametrize("other", [GradNorm, RandomLossWeighting, EqualWeights, DynamicWeightAverage])
@pytest.mark.parametrize("named", [True, False], ids=["", "of 0.1"])
def test_a_state_of_another_method_is_refused(method, other, named):
    ours, theirs = method(**SETTINGS[method]), other(**SETTINGS[other])
    learn(ours)
    learn(theirs)
    before, state = ours.state_dict(), theirs.state_dict()
    if not named:
        del state["method"]
    own = {name for name, _ in ours._remembers} | set(ours._parts)
    if method is other or not (named or own - set(state) - set(state["memory"])):
        return  # a state of 0.1 that has all that is needed cannot be told apart
    words = f"of {other.__name__}" if named else "without '"
    with pytest.raises(
        ValueError, match=rf"^{method.__name__} takes up a state of its own, and this one is {words}.*start anew"
    ):
        ours.load_state_dict(state)
    assert same_state(ours.state_dict(), before)


def test_a_method_made_of_another_takes_up_its_states():
    class Mine(GradNorm):
        pass

    ours, theirs = Mine(), GradNorm()
    learn(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert ours.weights == theirs.weights
