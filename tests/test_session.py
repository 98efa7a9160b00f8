"""The core in a bare loop: what it does there equals what the callback does under a Trainer on the same batches."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradnorm import (
    DynamicTaskPrioritization,
    GradNorm,
    GradNormCallback,
    GramianWeighting,
    LearningRateAnnealing,
    LossBalancingCallback,
    SelfAdaptivePoints,
    UncertaintyWeighting,
)
from lightning_gradnorm.session import BalancingSession, Loop
from lightning_gradnorm.session.shared import SharedReading
from tests.helpers import MemoryLogger, TrunkAndHeads, quiet_trainer, same_state


class OnTensors(TrunkAndHeads):
    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        return self.total_loss(losses, kpis={task: 1 / (1 + loss) for task, loss in losses.items()})


def made() -> OnTensors:
    torch.manual_seed(0)
    return OnTensors()


def data(steps=6, size=8):
    return torch.randn(steps, size, 6, generator=torch.Generator().manual_seed(1))


def loop(session, module, batches, *, accumulate=1):
    """A loop of one's own, with every call that the session knows; the weights after each step."""
    optimizer = module.configure_optimizers()
    history = []
    for k, x in enumerate(batches):
        losses = module.losses(x)
        total = session.total(losses, kpis={task: 1 / (1 + loss) for task, loss in losses.items()}) / accumulate
        session.before_backward(total)
        total.backward()
        session.after_backward()
        if (k + 1) % accumulate == 0:
            session.before_step()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
            history.append(session.balancer.weights)
        else:
            session.begin_batch()
    return history


def under_a_trainer(tmp_path, callback, batches, **settings):
    module = made()
    loader = torch.utils.data.DataLoader(list(batches), batch_size=None)
    quiet_trainer(tmp_path, callbacks=[callback], **settings).fit(module, loader)
    return module


METHODS = {
    "GradNorm": lambda: GradNorm(lr=0.1),
    "every other step": lambda: GradNorm(1.5, update_every=2),
    "residuals": lambda: GradNorm(residuals=["small"]),
    "as printed": lambda: GradNorm(update="paper", lr=0.1),
    "annealing by the largest entry": lambda: LearningRateAnnealing(reference="small"),
    "indicators": lambda: DynamicTaskPrioritization(),
    "losses alone": lambda: UncertaintyWeighting(),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_bare_loop_equals_the_trainer_bit_for_bit(tmp_path, method, accumulate):
    callback = LossBalancingCallback(method(), summary=False)
    by_trainer = under_a_trainer(tmp_path, callback, data(), accumulate_grad_batches=accumulate)
    module = made()
    session = BalancingSession(method(), module)
    loop(session, module, data(), accumulate=accumulate)
    assert session.balancer.steps == callback.balancer.steps == 6 // accumulate
    assert same_state(session.balancer.state_dict(), callback.balancer.state_dict())
    assert same_state(module.state_dict(), by_trainer.state_dict())


@pytest.mark.parametrize("settings", [{"engine": "per_task"}, {"norm_of": "features"}], ids=str)
def test_so_it_does_with_a_layer_given_and_another_way_of_reading(tmp_path, settings):
    class Given(OnTensors):
        def shared_layer(self):
            return "trunk.2"

    torch.manual_seed(0)
    by_trainer = Given()
    callback = GradNormCallback(lr=0.1, summary=False, **settings)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(by_trainer, torch.utils.data.DataLoader(list(data()), batch_size=None))
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module, shared_layer="trunk.2", **settings)
    loop(session, module, data())
    assert session.balancer.weights == callback.weights
    assert same_state(module.state_dict(), by_trainer.state_dict())


KEPT = {
    "where cosines are logged": ([False, True] * 3, GradNorm, {}, {"logger": True, "log_every_n_steps": 2}),
    "nowhere": ([False] * 6, GradNorm, {"log_cosines": False}, {"logger": True, "log_every_n_steps": 2}),
    "where batches are accumulated": ([True] * 6, GradNorm, {"log_cosines": False}, {"accumulate_grad_batches": 2}),
    "where single entries are asked for": (
        [True] * 6,
        lambda: LearningRateAnnealing(reference="small", update_every=1),
        {"log_cosines": False},
        {},
    ),
    "nowhere for inner products": ([False] * 6, lambda: GramianWeighting(even), {"log_cosines": False}, {}),
}


def even(gramian):
    return 1 / gramian.diagonal().sqrt()


@pytest.mark.parametrize(("kept", "method", "settings", "trainer"), KEPT.values(), ids=KEPT)
def test_gradients_are_kept_where_more_than_their_norms_is_asked_for(tmp_path, monkeypatch, kept, method, settings, trainer):
    asked, right = [], SharedReading.before_backward

    def before_backward(self, root, losses, *, keep, **further):
        asked.append(keep)
        return right(self, root, losses, keep=keep, **further)

    monkeypatch.setattr(SharedReading, "before_backward", before_backward)
    trainer = trainer | ({"logger": MemoryLogger()} if trainer.get("logger") else {})
    under_a_trainer(tmp_path, LossBalancingCallback(method(), summary=False, **settings), data(), **trainer)
    assert asked == kept


@pytest.mark.parametrize("method", [lambda: GradNorm(lr=0.1), lambda: GramianWeighting(even)])
def test_a_second_batch_where_a_step_has_one_leaves_one_step_out_and_is_added_from_then_on(method):
    def norms(norms_suffice):
        module, found = made(), []
        session = BalancingSession(method())
        session.open(Loop(module, norms_suffice=lambda: norms_suffice))
        for batches in (1, 1, 2, 2):
            for x in data()[:batches]:
                total = session.total(module.losses(x))
                session.before_backward(total)
                total.backward()
                session.after_backward()
                session.begin_batch()
            found.append(norms_of(session.step()))
        return found

    expected, found = norms(False), norms(True)
    assert [step is None for step in found] == [False, False, True, False]
    for step in (0, 1, 3):
        torch.testing.assert_close(found[step], expected[step])


def test_a_state_goes_on_to_the_step(tmp_path):
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module)
    whole = loop(session, module, data())
    module = made()
    first = BalancingSession(GradNorm(lr=0.1), module)
    loop(first, module, data()[:3])
    second = BalancingSession(GradNorm(lr=0.1), module)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert loop(second, module, data()[3:]) == whole[3:]
    assert second.shared.names == session.shared.names


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_of_a_step_has_what_was_learnt_and_no_graph(copied):
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module)
    loop(session, module, data()[:3])
    total = session.total(module.losses(data()[3]))
    session.before_backward(total)
    twin = copied(session)
    assert same_state(twin.state_dict(), session.state_dict())
    assert twin.noted == [] and not twin.window
    twin.open(Loop(module))
    loop(twin, module, data()[:1])
    assert twin.balancer.steps == session.balancer.steps + 1


def test_once_closed_it_holds_nothing_and_gives_the_plain_sum():
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module, shared_layer="trunk.2", norm_of="features")
    loop(session, module, data())
    session.close()
    losses = module.losses(data()[0])
    assert torch.equal(session.total(losses), sum(losses.values()))
    assert not module.trunk[2]._forward_hooks
    assert session.noted == []
    assert session.step() is None
    assert session.balancer.steps == 6


def test_a_closure_that_is_evaluated_again_is_measured_once():
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module)
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)
    evaluations = []

    def closure():
        optimizer.zero_grad()
        total = session.total(module.losses(data()[0]))
        session.before_backward(total)
        total.backward()
        session.after_backward()
        session.before_step()
        evaluations.append(session.balancer.weights_for(["small"]).item())
        return total

    expected = {task: loss.item() for task, loss in module.losses(data()[0]).items()}
    optimizer.step(closure)
    step = session.step()
    assert len(evaluations) > 2
    assert len(set(evaluations)) == 1
    assert dict(zip(step.measurement.tasks, step.measurement.losses.tolist(), strict=True)) == pytest.approx(expected)
    assert session.balancer.steps == 1


# -- tasks that come and go ------------------------------------------------------------------------------------------------


class Told:
    def __init__(self):
        self.warned, self.informed = [], []

    def loop(self, network, **settings):
        return Loop(network, tell=lambda about, message: self.warned.append(message), inform=self.informed.append, **settings)


def step_with(session, module, x, tasks):
    losses = module.losses(x)
    total = session.total({task: losses[task] for task in tasks})
    session.before_backward(total)
    total.backward()
    session.after_backward()
    return session.step(describe=True)


def norms_of(step):
    return None if step is None else step.measurement.gradient_norms


def test_a_curriculum_settles_the_layer_where_its_tasks_meet():
    """The first batches have one task alone: the layer is not looked for on what that one has for itself."""
    told, module = Told(), made()
    session = BalancingSession(GradNorm(lr=0.1))
    session.open(told.loop(module))
    assert norms_of(step_with(session, module, data()[0], ["small"])) is None
    assert norms_of(step_with(session, module, data()[1], ["small"])) is None
    assert session.shared is None
    step = step_with(session, module, data()[2], ["small", "odd"])
    assert session.shared.names == ("trunk.2.weight",)
    assert step.measurement.tasks == ("small", "odd")
    assert session.balancer.steps == 3
    assert session.balancer.weights["small"] > 1
    assert len(told.informed) == 1 and "trunk.2.weight" in told.informed[0]
    assert told.warned == []


def test_with_declared_tasks_it_is_not_settled_before_each_was_there():
    module = made()
    session = BalancingSession(GradNorm(lr=0.1, tasks=["small", "odd", "large"]), module)
    assert norms_of(step_with(session, module, data()[0], ["small", "odd"])) is None
    assert norms_of(step_with(session, module, data()[1], ["large"])) is not None
    assert session.shared.names == ("trunk.2.weight",)


def test_a_declared_task_that_never_comes_is_told_at_the_end_of_the_epoch():
    told, module = Told(), made()
    session = BalancingSession(GradNorm(lr=0.1, tasks=["small", "odd", "typo"]))
    session.open(told.loop(module))
    for x in data():
        step_with(session, module, x, ["small", "odd"])
    session.end_epoch()
    assert len(told.warned) == 1
    assert "every declared task ('small', 'odd', 'typo') has had a batch" in told.warned[0]
    assert session.balancer.steps == 6


class Branching(OnTensors):
    """Two tasks that meet at ``trunk.4``, and one that leaves before it."""

    def __init__(self):
        super().__init__()
        self.trunk.extend([nn.Linear(10, 10), nn.Tanh()])

    def losses(self, x):
        losses = super().losses(x)
        below = self.trunk[:4](x)
        return losses | {"early": (below.mean(1) - x[:, 0]).square().mean()}


def test_a_task_that_comes_later_and_does_not_reach_the_layer_has_it_looked_for_anew():
    told, module = Told(), Branching()
    session = BalancingSession(GradNorm(lr=0.1))
    session.open(told.loop(module))
    step_with(session, module, data()[0], ["small", "odd"])
    assert session.shared.names == ("trunk.4.weight",)
    step = step_with(session, module, data()[1], ["small", "odd", "early"])
    assert session.shared.names == ("trunk.2.weight",)
    assert step.measurement.gradient_norms is not None
    assert sum("does not reach what was the shared layer until now" in said for said in told.informed) == 1
    step_with(session, module, data()[2], ["early", "odd"])
    assert len(told.informed) == 3


def test_a_layer_that_changes_in_the_middle_of_a_step_leaves_that_step_unmeasured():
    told, module = Told(), Branching()
    session = BalancingSession(GradNorm(lr=0.1))
    session.open(told.loop(module))
    step_with(session, module, data()[0], ["small", "odd"])
    before = session.balancer.weights
    for tasks in (["small", "odd"], ["early"]):
        losses = module.losses(data()[1])
        total = session.total({task: losses[task] for task in tasks})
        session.before_backward(total)
        total.backward()
        session.after_backward()
    assert session.step() is None, "the one backward was read on one layer, the other would be on another"
    assert session.balancer.weights == before
    assert session.balancer.steps == 2
    step = step_with(session, module, data()[2], ["small", "odd", "early"])
    assert session.shared.names == ("trunk.2.weight",)
    assert step.measurement.tasks == ("small", "odd", "early")


def test_one_task_alone_is_no_reason_to_warn():
    told, module = Told(), made()
    session = BalancingSession(GradNorm(lr=0.1))
    session.open(told.loop(module))
    step_with(session, module, data()[0], ["small"])
    session.end_epoch()
    assert told.warned == []
    assert told.informed == [
        "There is one task so far, 'small', and so there is nothing to weigh. Hand over the losses of all tasks."
    ]


@pytest.mark.parametrize("all_at_once", [True, False])
def test_a_batch_whose_terms_are_all_absent_changes_nothing(all_at_once):
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module)
    loop(session, module, data()[:2])
    before = copy.deepcopy(session.state_dict())
    total = session.total({"small": 0.0, "odd": torch.zeros(())} if all_at_once else {"small": 0.0})
    assert total.item() == 0
    session.before_backward(total)
    total.backward()
    session.after_backward()
    assert session.step() is None
    assert same_state(session.state_dict(), before)


def test_points_have_masks_in_training_and_none_outside():
    torch.manual_seed(0)
    net, points = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), SelfAdaptivePoints(5, lr=0.1)
    session = BalancingSession(GradNorm(lr=0.1), net, points={"curve": points})
    x = torch.linspace(0, 1, 5)[:, None]
    for _ in range(3):
        total = session.total({"curve": (net(x) - x.sin()).square().squeeze(1), "end": net(x[-1]).square().sum()})
        session.before_backward(total)
        total.backward()
        session.after_backward()
        session.step()
    assert points.masks.unique().numel() > 2
    seen = []
    session.on_evaluation = seen.append
    with torch.no_grad():
        losses = {"curve": (net(x) - x.sin()).square().squeeze(1)}
        assert torch.equal(session.total(losses), losses["curve"].mean())
    assert list(seen[0]) == ["curve"]


def test_warnings_go_where_the_loop_says_each_once_and_again_in_the_next_run():
    told, module = Told(), made()
    session = BalancingSession(GradNorm(lr=0.1))
    for _ in range(2):
        session.open(told.loop(module, name="MyLoop"))
        for x in data()[:2]:
            step_with(session, module, x * torch.nan, ["small", "odd"])
            session.tell_counts()
    assert len(told.warned) == 2
    assert all("MyLoop skipped" in message for message in told.warned)


def test_without_a_loop_of_its_own_it_warns_as_python_does():
    module = made()
    session = BalancingSession(GradNorm(lr=0.1), module)
    loop(session, module, data()[:1] * torch.nan)
    with pytest.warns(UserWarning, match="BalancingSession skipped 1 weight update so far"):
        session.tell_counts()


class Dropping(Branching):
    """``trunk.4`` is left out of some steps for all tasks; of the first of these on there is a new task."""

    step = -1

    def losses(self, x):
        self.step += 1
        whole, self.trunk = self.trunk, self.trunk if self.step % 2 == 0 else self.trunk[:4]
        losses = OnTensors.losses(self, x)
        self.trunk = whole
        return losses


def test_a_new_task_in_a_step_without_the_layer_is_no_reason_to_look_anew():
    told, module = Told(), Dropping()
    session = BalancingSession(GradNorm(lr=0.1))
    session.open(told.loop(module))
    step_with(session, module, data()[0], ["small", "odd"])
    assert step_with(session, module, data()[1], ["small", "odd", "large"]) is None
    step = step_with(session, module, data()[2], ["small", "odd", "large"])
    assert session.shared.names == ("trunk.4.weight",)
    assert step.measurement.tasks == ("small", "odd", "large")
    assert len(told.informed) == len(told.warned) == 1
    assert "No task's loss reached the shared layer" in told.warned[0]


def test_a_task_that_never_reaches_a_given_layer_which_others_did_is_an_error():
    module = Branching()
    session = BalancingSession(GradNorm(lr=0.1), module, shared_layer="trunk.4")
    step_with(session, module, data()[0], ["small", "odd"])
    with pytest.raises(ValueError, match="The loss of task 'early' does not reach the shared layer"):
        step_with(session, module, data()[1], ["early"])


def test_a_state_of_another_network_has_the_layer_looked_for_anew():
    module = made()
    first = BalancingSession(GradNorm(lr=0.1), module)
    loop(first, module, data()[:2])
    assert first.shared.names == ("trunk.2.weight",)

    class Elsewhere(OnTensors):
        def features(self, x):
            return self.trunk[:2](x)

    other = Elsewhere()
    second = BalancingSession(GradNorm(lr=0.1), other)
    second.load_state_dict(first.state_dict())
    loop(second, other, data()[:2])
    assert second.shared.names == ("trunk.0.weight",)


def test_a_task_without_a_gradient_on_the_layer_is_told_with_what_to_look_at():
    told, module = Told(), made()
    session = BalancingSession(GradNorm(lr=0.1))
    session.open(told.loop(module))
    for x in data():
        losses = module.losses(x)
        total = session.total({"small": losses["small"], "odd": losses["odd"], "dead": F.relu(-1 - losses["large"] ** 2)})
        session.before_backward(total)
        total.backward()
        session.after_backward()
        session.step()
        session.tell_counts()
    assert [
        message for message in told.warned if "took no part so far, as if they were absent: 'dead' in 1 step. Their" in message
    ] != []
    assert len(told.warned) == 1
    assert session.balancer.weights["dead"] == 1
