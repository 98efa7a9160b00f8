"""Methods that look at each point's residual: how the losses come in, and what is measured of them, in any loop."""

import copy
import re

import pytest
import torch
from torch import nn

from lightning_gradnorm import (
    BalancingSession,
    EqualWeights,
    GradNorm,
    LossBalancingCallback,
    NTKWeighting,
    SelfAdaptivePoints,
    total_loss,
)
from lightning_gradnorm.session import shared
from lightning_gradnorm.traces import generator_of
from tests.helpers import PerPoint, quiet_trainer, same_state
from tests.test_traces import EVERY, POINTS, network, point_by_point, points

FACTORS = {"pde": 30.0, "boundary": 0.5}


def terms(net, x, tasks=tuple(FACTORS)):
    """Residuals, ``[N]`` each."""
    values = net(x)
    return {task: FACTORS[task] * (values[:, k] - x[:, 0]) for k, task in enumerate(FACTORS) if task in tasks}


def squares(net, x, **which):
    return {task: r.square() for task, r in terms(net, x, **which).items()}


def step(session, net, *micro_batches):
    """One optimiser step of an ordinary loop, without the optimiser."""
    for losses in micro_batches:
        with session.batch():
            total = total_loss(losses) / len(micro_batches)
            session.before_backward(total)
            total.backward()
            session.after_backward()
    return session.step()


def exactly(monkeypatch):
    """Every draw of signs in the place of one: the traces are what they are estimates of."""
    monkeypatch.setattr(shared, "random_signs", lambda shape, generator: EVERY)


@pytest.mark.parametrize("layer", ["2.weight", ["0.weight", "2.bias"]], ids=str)
def test_the_weights_are_the_traces_sum_over_ones_own(monkeypatch, layer):
    exactly(monkeypatch)
    net = network()
    session = BalancingSession(NTKWeighting(), net, shared_layer=layer)
    names = [layer] if isinstance(layer, str) else layer
    w, x = [net.get_parameter(name) for name in names], points()
    traces = torch.stack([point_by_point(r, w) for r in terms(net, x).values()])
    measured = step(session, net, squares(net, x)).measurement
    assert measured.ntk_traces.tolist() == pytest.approx(traces.tolist(), rel=1e-12)
    assert measured.losses.tolist() == pytest.approx([loss.mean().item() for loss in squares(net, x).values()])
    assert list(session.balancer.weights.values()) == pytest.approx((traces.sum() / traces).tolist(), rel=1e-12)


def test_all_that_is_trained_is_the_layer_unless_it_is_named(monkeypatch):
    exactly(monkeypatch)
    net = network()
    net.coefficient = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    net[0].bias.requires_grad_(False)
    session = BalancingSession(NTKWeighting(), net)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    with_coefficient = {task: net.coefficient * r if task == "pde" else r for task, r in terms(net, points()).items()}
    expected = [point_by_point(r, trained).item() for r in with_coefficient.values()]
    measured = step(session, net, {task: r.square() for task, r in with_coefficient.items()}).measurement
    assert measured.ntk_traces.tolist() == pytest.approx(expected, rel=1e-12)
    assert "coefficient" in session.shared.names and "0.bias" not in session.shared.names
    assert "all that is trained, as the method has it; name less by shared_layer" in str(session.shared)
    with pytest.raises(
        ValueError, match=r"norm_of='features' reads the gradient at the shared layer's output, and .* names no"
    ):
        step(BalancingSession(NTKWeighting(), net, norm_of="features"), net, squares(net, points()))


def test_a_terms_points_may_be_weighed_and_the_trace_is_of_its_own_residuals(monkeypatch):
    exactly(monkeypatch)
    net, masks = network(), SelfAdaptivePoints(POINTS, lr=0.3)
    session = BalancingSession(NTKWeighting(update_every=1), net, shared_layer="2.weight", points={"pde": masks})
    expected = [point_by_point(r, [net[2].weight]).item() for r in terms(net, points()).values()]
    for _ in range(3):
        measured = step(session, net, squares(net, points())).measurement
    assert measured.ntk_traces.tolist() == pytest.approx(expected, rel=1e-12)
    assert measured.losses[0] < 0.8 * squares(net, points())["pde"].mean(), "the loss is that of masked points"
    assert masks.masks.std() > 0


def test_traces_of_micro_batches_are_averaged_as_their_losses_are(monkeypatch):
    exactly(monkeypatch)
    net = network()
    session = BalancingSession(NTKWeighting(), net, shared_layer="2.weight")
    batches = [points(), 3 * points() - 1]
    expected = sum(torch.stack([point_by_point(r, [net[2].weight]) for r in terms(net, x).values()]) for x in batches) / 2
    measured = step(session, net, *(squares(net, x) for x in batches)).measurement
    assert measured.ntk_traces.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_an_absent_task_keeps_its_weight_and_its_trace():
    net = network()
    session = BalancingSession(NTKWeighting(update_every=1), net, shared_layer="2.weight")
    step(session, net, squares(net, points()))
    before = session.balancer.state_dict()
    step(session, net, squares(net, points(), tasks=("boundary",)))
    after = session.balancer.state_dict()
    assert [after["weights"][0], after["memory"]["trace"][0]] == [before["weights"][0], before["memory"]["trace"][0]]
    assert after["memory"]["measured"].tolist() == [1, 2]
    traces = after["memory"]["trace"]
    assert float(after["weights"][1]) == pytest.approx(float(traces.sum() / traces[1])), "the absent one counts with its last"


def test_signs_are_others_in_each_step_micro_batch_rank_and_task_and_nobodys_stream_moves(monkeypatch):
    drawn = []
    monkeypatch.setattr(shared, "generator_of", lambda *numbers: drawn.append(numbers) or generator_of(*numbers))
    net = network()
    session = BalancingSession(NTKWeighting(update_every=2), net, shared_layer="2.weight")
    stream = torch.get_rng_state()
    for _ in range(5):
        step(session, net, squares(net, points()), squares(net, points()))
    assert torch.equal(torch.get_rng_state(), stream)
    due = [number for number in range(5) if due_at(number)]
    assert drawn == [(number, 0, batch, task) for number in due for batch in range(2) for task in range(2)]
    assert 1 < len(due) < 5, "steps that are not due measure nothing"


def due_at(number):
    balancer = NTKWeighting(update_every=2)
    balancer.steps = number
    return balancer.due


def trained(session, net, batches):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    for x in batches:
        step(session, net, squares(net, x))
        optimizer.step()
        optimizer.zero_grad()
    return session.state_dict()


def test_a_bare_loop_that_is_resumed_goes_on_to_the_last_digit():
    batches = torch.rand(9, POINTS, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = network()
    session = BalancingSession(NTKWeighting(update_every=2), net, shared_layer="2.weight")
    state = copy.deepcopy(trained(session, net, batches[:4]))
    torch.manual_seed(77)
    other = copy.deepcopy(net)
    resumed = BalancingSession(NTKWeighting(update_every=2), other, shared_layer="2.weight")
    resumed.load_state_dict(state)
    whole = trained(session, net, batches[4:])
    assert same_state(trained(resumed, other, batches[4:]), whole)
    assert whole["balancer"]["memory"]["measured"].tolist() != state["balancer"]["memory"]["measured"].tolist()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_trainer_comes_to_what_a_bare_loop_does(tmp_path, accumulate, precision):
    class OnTensors(PerPoint):
        def training_step(self, batch, batch_idx):
            return self.total_loss(self.losses(batch))

    torch.manual_seed(0)
    module = OnTensors()
    by_hand = copy.deepcopy(module)
    x = torch.randn(6, 8, 6, generator=torch.Generator().manual_seed(1))
    callback = LossBalancingCallback(NTKWeighting(update_every=2), summary=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], accumulate_grad_batches=accumulate, precision=precision)
    trainer.fit(module, torch.utils.data.DataLoader(list(x), batch_size=None))
    session = BalancingSession(NTKWeighting(update_every=2), by_hand)
    optimizer = by_hand.configure_optimizers()
    for batches in x.split(accumulate):
        micro = []
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
                micro.append(by_hand.losses(batch))
        step(session, by_hand, *micro)
        optimizer.step()
        optimizer.zero_grad()
    assert same_state(session.balancer.state_dict(), callback.balancer.state_dict())
    assert same_state(by_hand.state_dict(), module.state_dict())
    assert max(callback.weights.values()) > 100


def test_outside_training_the_total_is_the_plain_sum_of_means():
    net = network()
    session = BalancingSession(NTKWeighting(), net, shared_layer="2.weight")
    step(session, net, squares(net, points()))
    expected = sum(loss.mean() for loss in squares(net, points()).values())
    with torch.no_grad():
        assert session.total(squares(net, points())).item() == pytest.approx(expected.item(), rel=1e-12)


# -- what cannot be -----------------------------------------------------------------------------------------------------

WAY_OUT = "NTKWeighting looks at the residual of each point: give its square for each of them, shape (N,), as residual.square()"
WRONG = {
    "a scalar": (torch.mean, "has shape (), and " + WAY_OUT),
    "no points": (lambda loss: loss[:0], "has shape (0,), and " + WAY_OUT),
    "complex": (lambda loss: loss * 1j, "is complex"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_loss_without_residuals_is_refused_with_the_way_out(change, words):
    net = network()
    session = BalancingSession(NTKWeighting(), net, shared_layer="2.weight")
    losses = squares(net, points())
    with pytest.raises(ValueError, match=re.escape("The loss of task 'boundary' " + words)):
        session.total(losses | {"boundary": change(losses["boundary"])})
    assert session.balancer.tasks == ()


def test_other_methods_take_no_residuals_unless_their_points_are_weighed():
    net = network()
    for balancer in (EqualWeights(), GradNorm()):
        with pytest.raises(ValueError, match=r"The loss of task 'pde' has shape \(5,\); every loss is a scalar"):
            BalancingSession(balancer, net).total(squares(net, points()))


def test_a_weight_before_a_loss_cannot_be_had():
    session = BalancingSession(NTKWeighting(), network())
    words = r"weight\('pde'\) stands for the number before one loss, and NTKWeighting needs the loss of each point.*total_loss"
    with pytest.raises(ValueError, match=words):
        session.weight("pde")


def test_a_loss_below_zero_is_no_square_and_the_step_is_counted():
    net = network()
    session = BalancingSession(NTKWeighting(), net, shared_layer="2.weight")
    losses = squares(net, points())
    with pytest.warns(UserWarning, match="skipped 1 weight update so far: a task's loss or gradient was not finite"):
        step(session, net, losses | {"pde": losses["pde"] - 1e6})
    assert session.balancer.skipped_updates == 1
    assert set(session.balancer.weights.values()) == {1.0}


def test_a_dict_of_scalars_from_within_is_refused_at_once():
    net = network()
    with pytest.raises(
        ValueError, match=r"losses_of='0' takes a scalar for each loss, and NTKWeighting needs the loss of each point"
    ):
        BalancingSession(NTKWeighting(), net, losses_of="0")
