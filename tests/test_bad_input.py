"""What is refused says what came, what the rule is and the way out; and no state is changed by it."""

import math
import re

import lightning as L
import pytest
import torch

from lightning_gradnorm import (
    GradNorm,
    GradNormCallback,
    JointBackward,
    LossBalancingCallback,
    Measurement,
    PerTaskBackward,
    tap_losses,
)
from tests.helpers import TrunkAndHeads, batches, of_version_0_1, quiet_trainer, same_state

NAN, INF = math.nan, math.inf
pytestmark = of_version_0_1
TASKS = ("a", "b", "c d")


def measured(tasks=TASKS, losses=None, norms=(1.0, 2.0, 4.0)) -> Measurement:
    losses = torch.arange(1.0, 1 + len(tasks), dtype=torch.float64) if losses is None else torch.tensor(losses).double()
    return Measurement(tuple(tasks), losses, None if norms is None else torch.tensor(norms[: len(tasks)]).double())


def live(**settings) -> GradNorm:
    """A balancer in the middle of its work."""
    balancer = GradNorm(**settings)
    balancer.update(measured())
    balancer.update(measured(losses=[0.9, 1.5, 2.9], norms=(2.0, 1.0, 3.0)))
    return balancer


def refuses(balancer: GradNorm, error, words, call) -> None:
    """It raises, by its words, and its state is as it was."""
    before = balancer.state_dict()
    with pytest.raises(error, match=words):
        call(balancer)
    assert same_state(before, balancer.state_dict())


# -- settings ------------------------------------------------------------------------------------------------------------

RULES = {
    "alpha": ((-0.5, NAN, INF), "at least 0: at 0 all norms are pulled together, at 1.5 slow tasks are favoured"),
    "lr": ((-1e-3, NAN, INF), "from 0 to 1: a rate's least"),
    "ema_decay": ((1.0, -0.1, NAN), "at least 0 and below 1"),
    "min_weight": ((1.5, 0.0, -0.1, NAN), "above 0 and at most 1, or no weights could sum to the number of tasks"),
    "max_weight": ((0.5, NAN), "at least 1, or no weights could sum to the number of tasks; None for no bound"),
    "update": (("additive",), "one of 'average', 'paper', 'log', 'closed_form'"),
    "scale": (("mean",), "one of 'sum', 'reference', 'gradient'"),
    "update_every": ((0, -2, True, 1.5, "2"), "a whole number of steps, 1 or more, or 'auto'"),
    "initial_losses": ((0, -3, "mean", True, 2.5), "'first', a number of steps to average, or a dict of task name → L(0)"),
}
TOGETHER = [
    ({"scale": "reference"}, "go together: got scale='reference' with reference=None.*Name the task"),
    ({"scale": "sum", "reference": "a"}, "go together: got scale='sum' with reference='a'.*choose another scale rule"),
    *(({"initial_losses": {"b": 1.0, "a": v}}, f"initial loss of task 'a' is {v!r}; .* finite one above 0.*initial_losses=")
      for v in (0, -0.5, NAN, INF, None, "1", True)),
    *(({"priorities": {"b": 1.0, "a": v}}, f"priority of task 'a' is above 0; 1 is the usual importance; got {v!r}")
      for v in (0, -0.5, NAN, INF)),
    ({"tasks": ["a", "b", "a"]}, "Two tasks with one name: 'a' twice"),
    ({"tasks": ["a b", "a_b"]}, "'a_b' and 'a b' .*both are 'a_b' in a logger's tag"),
    ({"tasks": ["a", "b\n"]}, r"task name 'b\\n' cannot be part of a logger's tag"),
]  # fmt: skip
ALONE = [({name: v}, re.escape(f"{name} is {rule}; got {v!r}.")) for name, (values, rule) in RULES.items() for v in values]


@pytest.mark.parametrize(
    ("settings", "words"), ALONE + TOGETHER, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
@pytest.mark.parametrize("kind", [GradNorm, GradNormCallback])
def test_a_setting_outside_its_range(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)


def test_settings_at_the_edge_are_fine():
    GradNorm(alpha=0, lr=0, min_weight=1.0, max_weight=1, update_every=1, initial_losses=1, priorities={"a": 1e-9})
    GradNorm(lr=1, ema_decay=0, update="paper")
    GradNorm(max_weight=INF, scale="reference", reference="a")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"update": "log"}, "gradient"),
        ({"update": "closed_form"}, "gradient"),
        ({"update": "paper"}, "sum"),
        ({"reference": "a"}, "reference"),
    ],
    ids=str,
)
def test_the_scale_rule_that_goes_without_saying(settings, scale):
    assert GradNorm(**settings).settings()["scale"] == scale


@pytest.mark.parametrize("tasks", ["depth", "ab"])
def test_one_string_is_no_list_of_tasks(tasks):
    with pytest.raises(TypeError, match=rf"tasks is a list of names, got the string '{tasks}'\. Write tasks=\['{tasks}'\]"):
        GradNorm(tasks=tasks)


@pytest.mark.parametrize("thing", [None, 1.5, "gradnorm", GradNorm, torch.nn.Linear(1, 1), GradNormCallback()])
def test_what_is_no_balancer(thing):
    with pytest.raises(TypeError, match=r"takes a balancer, got .*Write LossBalancingCallback\(GradNorm\(\)\), or"):
        LossBalancingCallback(thing)


@pytest.mark.parametrize("kind", [lambda **k: LossBalancingCallback(GradNorm(), **k), GradNormCallback])
@pytest.mark.parametrize("value", ["fast", None, "Joint"])
def test_an_unknown_way_of_measuring(kind, value):
    with pytest.raises(ValueError, match=f"engine is one of 'auto', 'joint', 'per_task'; got {value!r}"):
        kind(engine=value)
    with pytest.raises(ValueError, match=f"norm_of is one of 'parameters', 'features'; got {value!r}"):
        kind(norm_of=value)


# -- measurements --------------------------------------------------------------------------------------------------------

FIRST = [
    ({"initial_losses": {"a": 1.0, "z": 1.0}}, measured(), "_losses names 'z', which is no task: .* are 'a', 'b', 'c d'"),
    ({"priorities": {"y": 1.0, "z": 2.0}}, measured(), "priorities names 'y', 'z', which is no task: .*Correct the name"),
    ({"reference": "z"}, measured(), "reference names 'z', which is no task: .*list all names with"),
    ({"tasks": ["a", "b"]}, measured(), r"Unknown task 'c d': GradNorm was given tasks=\['a', 'b'\]\. Add the name there"),
    ({"tasks": ["x"]}, measured("ab"), "Unknown tasks 'a', 'b': "),
    ({"alpha": 1}, measured(losses=[1.0, 0.0, 2.0]), r"initial loss of task 'b' is 0\.0; .*finite one above 0.*add a constant"),
    ({"alpha": 1}, measured(losses=[1.0, 2.0, -0.25]), r"loss of task 'c d' is -0\.25; .*initial_losses=\{'c d': math\.log"),
    ({"alpha": 1, "initial_losses": 3}, measured(losses=[-1.0, 2.0, 3.0]), r"initial loss of task 'a' is -1\.0"),
    ({"alpha": 1, "initial_losses": {"a": 1.0}}, measured(losses=[0.0, 0.0, 3.0]), r"initial loss of task 'b' is 0\.0"),
    ({}, measured(norms=None), "GradNorm needs each task's gradient .*measurement has none.*JointBackward, or use Loss"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "measurement", "words"), FIRST, ids=range(len(FIRST)))
def test_a_first_measurement_that_cannot_be_used(settings, measurement, words):
    balancer = GradNorm(**settings)
    refuses(balancer, ValueError, words, lambda b: b.update(measurement))
    assert balancer.weights == {}
    assert balancer.steps == 0


def other_state():
    return GradNorm().state_dict() | {"tasks": ["x", "y"]}


LATER = {
    "no norms": ({}, lambda b: b.update(measured(norms=None)), "needs each task's gradient on"),
    "an undeclared task": ({"tasks": TASKS}, lambda b: b.update(measured("ax")), "Unknown task 'x'"),
    "its loss": ({"tasks": TASKS}, lambda b: b.total({"a": torch.ones(()), "x": torch.ones(())}), "Unknown task 'x'"),
    "its weight": ({"tasks": TASKS}, lambda b: b.weights_for(["x", "a"]), "Unknown task 'x'"),
    "its state": ({"tasks": TASKS}, lambda b: b.load_state_dict(other_state()), "Unknown tasks 'x', 'y'"),
    "a new task at 0": ({"alpha": 1}, lambda b: b.update(measured("abd", [1, 2, 0])), r"initial loss of task 'd' is 0\.0"),
    "a new task below 0": ({"alpha": 1}, lambda b: b.update(measured("dab", [-1, 2, 1])), r"initial loss of task 'd' is -1\.0"),
    "no loss at all": ({}, lambda b: b.total({}), "at least one task's loss, got none"),
    "no name for a tag": ({}, lambda b: b.update(measured(["a", "b\n"])), "cannot be part of a logger's tag"),
    "two names for a tag": ({}, lambda b: b.update(measured(["a", "c_d"])), "Two tasks with one name: 'c_d' and 'c d'"),
}  # fmt: skip


@pytest.mark.parametrize("update", ["average", "log", "paper", "closed_form"])
@pytest.mark.parametrize(("settings", "call", "words"), LATER.values(), ids=LATER)
def test_a_later_call_that_cannot_be_served(settings, call, words, update):
    balancer, other = live(update=update, **settings), live(update=update, **settings)
    refuses(balancer, ValueError, words, call)
    for it in (balancer, other):
        it.update(measured(losses=[0.5, 1.0, 2.5], norms=(1.0, 3.0, 2.0)))
    assert same_state(balancer.state_dict(), other.state_dict()), "and it goes on as if it had not been asked"


def test_a_ratio_needs_only_its_first_loss_above_zero():
    """Later losses may be zero: such a task is done."""
    balancer = live()
    balancer.update(measured(losses=[0.0, 1.0, 1.0]))
    assert balancer.skipped_updates == 0
    assert all(0 < weight < 10 for weight in balancer.weights.values())


# -- in a bare loop ------------------------------------------------------------------------------------------------------

BARE = {
    "empty": (lambda loss: {}, "at least one task's loss, got none"),
    "vector": (lambda loss: {"a": loss, "b": loss.expand(2)}, "loss of task 'b' has shape"),
    "complex": (lambda loss: {"a": loss, "b": loss * 1j}, "loss of task 'b' is complex"),
    "detached": (lambda loss: {"a": loss, "b": loss.detach()}, "loss of task 'b' is detached"),
    "name": (lambda loss: {"a": loss, "b/": loss}, "task name 'b/' cannot be part of a logger's tag"),
}


@pytest.mark.parametrize("engine", [JointBackward, PerTaskBackward])
@pytest.mark.parametrize(("losses", "words"), BARE.values(), ids=BARE)
def test_a_loop_without_a_trainer_is_told_the_same(losses, words, engine):
    """The four lines of GradNorm's docstring."""

    def step(gradnorm):
        tapped = tap_losses(losses(w.pow(2).sum()))
        total = gradnorm.total(tapped)
        reader = engine(total, tapped, [w])
        total.backward()
        gradnorm.update(reader.measurement())

    w = torch.nn.Parameter(torch.ones(3))
    refuses(live(), ValueError, words, step)


# -- through the Trainer -------------------------------------------------------------------------------------------------


class Spoilt(TrunkAndHeads):
    """Hands in what ``spoil`` makes of the losses, from step ``at`` on."""

    def __init__(self, spoil, at=0):
        super().__init__()
        self.spoil, self.at = spoil, at

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        return self.total_loss(losses) if batch_idx < self.at else self.spoil(self, losses)


def handing_in(change):
    return lambda module, losses: module.total_loss(change(losses))


def in_two_calls(module, losses):
    one, *others = losses.items()
    return module.total_loss([one]) + module.total_loss(others)


def as_new(value):
    return handing_in(lambda losses: losses | {"new": losses["small"] - losses["small"].detach() + value})


IN_A_STEP = {
    "empty": (handing_in(lambda losses: {}), ValueError, "needs at least one task's loss, got none"),
    "no dict": (handing_in(lambda losses: losses["odd"]), TypeError, "takes a dict of task name → loss, got Tensor"),
    "vector": (handing_in(lambda losses: losses | {"odd": losses["odd"].expand(2)}), ValueError, r"'odd' has shape \(2,\)"),
    "complex": (handing_in(lambda losses: losses | {"odd": losses["odd"] * 1j}), ValueError, "'odd' is complex"),
    "detached": (handing_in(lambda losses: losses | {"odd": losses["odd"].detach()}), ValueError, "'odd' is detached"),
    "number": (handing_in(lambda losses: losses | {"odd": 1.0}), TypeError, "loss of task 'odd' is a float"),
    "name": (handing_in(lambda losses: losses | {"a\nb": losses["odd"]}), ValueError, "cannot be part of a logger's tag"),
    "one name twice": (handing_in(lambda losses: [*losses.items()] * 2), ValueError, "'small' twice"),
    "undeclared": (handing_in(lambda losses: losses | {"x": losses["odd"]}), ValueError, "Unknown task 'x'"),
    "two calls": (
        in_two_calls,
        RuntimeError,
        r"called twice in one step: first for .*'small'.*now for .*'middle'.*Call it once",
    ),
    "starts at 0": (as_new(0.0), ValueError, r"initial loss of task 'new' is 0\.0"),
    "starts below 0": (as_new(-2.0), ValueError, r"initial loss of task 'new' is -2\.0"),
}


def learnt(callback):
    """The state without the sums of an epoch that broke off."""
    return {name: part for name, part in callback.state_dict().items() if name != "epoch"}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(("spoil", "error", "words"), IN_A_STEP.values(), ids=IN_A_STEP)
def test_a_bad_step_ends_the_fit_and_leaves_the_state_of_the_step_before(tmp_path, spoil, error, words, at):
    tasks = None if "'new'" in words else ["small", "middle", "large", "odd"]
    callback, clean = (GradNormCallback(0.5, tasks=tasks, summary=False) for _ in "ab")
    with pytest.raises(error, match=words):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(Spoilt(spoil, at), batches(4))
    if at:
        torch.manual_seed(0)
        quiet_trainer(tmp_path, callbacks=[clean], max_steps=at).fit(Spoilt(spoil, at), batches(4))
    assert callback.balancer.steps == at
    assert same_state(learnt(callback), learnt(clean))


def test_a_module_that_somebody_else_wrote_and_that_hands_over_nothing(tmp_path):
    class Plain(L.LightningModule):
        configure_optimizers = TrunkAndHeads.configure_optimizers

        def __init__(self):
            super().__init__()
            self.layer, self.make_optimizer, self.lr = torch.nn.Linear(6, 2), torch.optim.SGD, 0.1

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

    words = r"training_step of Plain never called total_loss\(\).*write total_loss\(.*import total_loss.*mix in MultiTaskMixin"
    with pytest.raises(RuntimeError, match=words):
        quiet_trainer(tmp_path, callbacks=[GradNormCallback()]).fit(Plain(), batches(2))


class OtherMethod(GradNorm):
    pass


@pytest.mark.parametrize("second", [GradNorm, OtherMethod])
def test_two_balancing_callbacks(tmp_path, second):
    module = TrunkAndHeads()
    with pytest.raises(ValueError, match=r"One callback weighs the losses, .* given 2: GradNormCallback, LossBal.*Keep one"):
        quiet_trainer(tmp_path, callbacks=[GradNormCallback(), LossBalancingCallback(second())]).fit(module, batches(1))
    assert module._loss_balancing is None


@pytest.mark.parametrize("setting", ["initial_losses", "priorities"])
def test_a_name_misspelt_in_a_setting_ends_the_fit_at_the_first_step(tmp_path, setting):
    callback = GradNormCallback(**{setting: {"small": 1.0, "larg": 2.0}})
    with pytest.raises(ValueError, match=f"{setting} names 'larg', which is no task: the tasks are 'large', 'middle', 'odd'"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(TrunkAndHeads(), batches(2))
    assert same_state(learnt(callback), learnt(GradNormCallback()))
