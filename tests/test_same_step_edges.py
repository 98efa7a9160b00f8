"""Weights that act in the same step, where other things act too: penalties, hooks, further backward passes, dropped steps."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchjd.aggregation import UPGradWeighting

from lightning_gradnorm import tap_losses
from lightning_gradnorm.meeting_place import ScatteredTasksError
from lightning_gradnorm.recombination import RecombiningBackward
from tests.test_same_step import TRUNK, Network, assert_same, backward, batches, by_hand, gradients, session_of

pytestmark = pytest.mark.usefixtures("float64")


def begun(factor=1):
    """A network, and so many times the total of its losses, whose backward a session is ready for."""
    network = Network()
    (x,) = batches()
    session = session_of(network, UPGradWeighting())
    total = factor * session.total(network.losses(x))
    session.before_backward(total)
    return network, total


def penalty(network, x):
    """On all parameters, and on the output of one head, which makes the head's nodes common to a task and a further term."""
    out = network.heads[0](network.features(x))
    return 0.1 * sum(parameter.square().sum() for parameter in network.parameters()) + 0.3 * out.square().mean()


@pytest.mark.parametrize("shared_layer", [TRUNK, ["trunk.4"]])
def test_a_penalty_on_all_parameters_and_a_heads_output_acts_as_it_is(shared_layer):
    ours, theirs = Network(), Network()
    (x,) = batches()
    session = session_of(ours, UPGradWeighting(), shared_layer)
    z = ours.features(x)
    outs = [head(z).squeeze(1) for head in ours.heads]
    targets = zip(("one", "against", "large"), outs, [x.sum(1), -x.sum(1) + 0.1 * x[:, 0], 30 * x[:, 1]], strict=True)
    total = session.total({task: (out - y).square().mean() for task, out, y in targets})
    decay = 0.1 * sum(parameter.square().sum() for parameter in ours.parameters())
    backward(session, total + decay + 0.3 * outs[0].square().mean())
    by_hand(theirs, UPGradWeighting(), x, shared_layer)
    penalty(theirs, x).backward()
    assert_same(gradients(ours), gradients(theirs))


def test_a_hook_on_the_trunk_beside_a_further_term_is_refused():
    network = Network()
    (x,) = batches()
    z = network.features(x)
    z.register_hook(lambda gradient: 0.5 * gradient)
    session = session_of(network, UPGradWeighting())
    total = session.total(network.losses(x, z)) + 0.3 * z.square().sum()
    session.before_backward(total)
    with pytest.raises(ScatteredTasksError, match="a hook on the trunk's output"):
        total.backward()


def test_a_hook_that_begins_to_change_gradients_later_is_refused_then():
    network, bound = Network(), [1e6]
    session = session_of(network, UPGradWeighting())
    for x in batches(2):
        z = network.features(x)
        z.register_hook(lambda gradient: gradient.clamp(-bound[0], bound[0]))
        total = session.total(network.losses(x, z))
        session.before_backward(total)
        if bound[0] == 1e6:
            total.backward()
            session.after_backward()
            session.step()
            bound[0] = 1e-3
        else:
            with pytest.raises(ScatteredTasksError, match="a hook on the trunk's output"):
                total.backward()


def test_a_hook_beside_a_further_term_is_refused_after_monitoring_too():
    network = Network()
    session = session_of(network, UPGradWeighting())
    for frozen, x in zip((True, False), batches(2), strict=True):
        session.balancer.frozen = frozen
        z = network.features(x)
        z.register_hook(lambda gradient: 0.5 * gradient)
        total = session.total(network.losses(x, z)) + z.square().sum()
        session.before_backward(total)
        with contextlib.nullcontext() if frozen else pytest.raises(ScatteredTasksError, match="a hook on the trunk's output"):
            total.backward()
        if frozen:
            session.after_backward()
            session.step()


def test_many_sums_in_half_precision_are_no_hook():
    trunk = nn.Linear(16, 32).bfloat16()
    x = torch.randn(64, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    session = session_of(trunk, lambda gramian: torch.ones(len(gramian)), ["weight"])
    z = trunk(x)
    backward(session, session.total({f"task {k}": (z.float() - k).square().mean() for k in range(1, 200)}))
    assert session.step().applied.tolist() == [1.0] * 199


@pytest.mark.parametrize("further", [False, True])
def test_a_hook_in_a_head_acts_on_its_task(further):
    ours, theirs = Network(), Network()
    (x,) = batches()
    for network in (ours, theirs):
        network.heads[0].register_full_backward_hook(lambda module, of_inputs, of_outputs: (-2 * of_inputs[0],))
    session = session_of(ours, UPGradWeighting())
    z = ours.features(x)
    total = 3 * session.total(ours.losses(x, z))  # as a scaler does
    backward(session, total + 0.9 * z.square().sum() if further else total)
    by_hand(theirs, UPGradWeighting(), x, TRUNK)
    if further:
        (0.3 * theirs.features(x).square().sum()).backward()
    assert_same({name: gradient / 3 for name, gradient in gradients(ours).items()}, gradients(theirs))


def test_a_wrong_reading_is_found_out(monkeypatch):
    read = RecombiningBackward._found

    def twice_the_last(self):
        *others, last = read(self).gradients
        return replace(read(self), gradients=[*others, [2 * part for part in last]])

    monkeypatch.setattr(RecombiningBackward, "_found", twice_the_last)
    network = Network()
    (x,) = batches()
    session = session_of(network, UPGradWeighting())
    with pytest.raises(RuntimeError, match=r"the norm of task 'large' is .* by the first, .* by the second"):
        backward(session, session.total(network.losses(x)))


def test_gradients_that_are_to_be_differentiated_are_refused():
    network, total = begun()
    with pytest.raises(RuntimeError, match=r"create_graph=True.* Take when='next step'"):
        torch.autograd.grad(total, list(network.trunk.parameters()), create_graph=True)


def test_a_second_backward_of_the_total_is_refused():
    _, total = begun()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="went backward a second time, and the weights of when='same step' act once"):
        total.backward()


def test_a_total_of_weight_0_is_refused_with_a_way_out_that_is_open():
    _, total = begun(0)
    with pytest.raises(RuntimeError, match="give it a small weight, or take when='next step'"):
        total.backward()


def test_a_task_that_is_alone_in_its_batch_keeps_its_gradient():
    ours, theirs = Network(), Network()
    one, other = batches(2)
    session = session_of(ours, lambda gramian: torch.tensor([0.5, 2.0]))
    losses = ours.losses(one)
    backward(session, session.total({task: losses[task] for task in ("one", "against")}))
    with pytest.warns(UserWarning, match="A backward had one task alone, 'large', and when='same step' left its gradient"):
        backward(session, session.total({"large": ours.losses(other)["large"]}))
    assert session.step().applied.tolist() == [0.5, 2.0, 1.0]
    assert session.balancer.weights == {"one": 0.5, "against": 2.0, "large": 1.0}
    plain = theirs.losses(one)
    (0.5 * plain["one"] + 2.0 * plain["against"] + theirs.losses(other)["large"]).backward()
    assert_same(gradients(ours.trunk), gradients(theirs.trunk))


def test_one_task_alone_has_nobody_to_meet():
    network = Network()
    (x,) = batches()
    losses = tap_losses({"one": network.losses(x)["one"]})
    for term in 0.0, sum(parameter.square().sum() for parameter in network.parameters()):
        with pytest.raises(ScatteredTasksError, match="Here there is one task alone"):
            RecombiningBackward(losses["one"] + term, losses, network.trunk.parameters(), weigh=lambda gradients: [1.0])


@pytest.mark.parametrize("end", ["error in the batch", "close"])
def test_what_acted_in_a_step_that_was_given_up_is_forgotten(end):
    network = Network()
    one, other = batches(2)
    factors = iter([100.0, 1.0])
    session = session_of(network, lambda gramian: next(factors) * torch.arange(1, 1 + len(gramian)))
    if end == "close":
        backward(session, session.total(network.losses(one)))
        loop = session._loop
        session.close()
        session.open(loop)
    else:
        with contextlib.suppress(MemoryError), session.batch():
            backward(session, session.total(network.losses(one)))
            raise MemoryError
    with session.batch():
        backward(session, session.total(network.losses(other)))
    session.step()
    assert session.balancer.weights == {"one": 1.0, "against": 2.0, "large": 3.0}


DEEP = """
import sys
import torch
from torch import nn
from lightning_gradnorm import BalancingSession, GramianWeighting

when, norm_of, layer, shared = sys.argv[1:]
network = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "last", "one", "other")})
scale = nn.Parameter(torch.ones(()))
balancer = GramianWeighting(lambda gramian: torch.ones(len(gramian)), when=when)
session = BalancingSession(balancer, network, shared_layer=layer, norm_of=norm_of)
for _ in range(3):
    session.begin_batch()
    z = network["first"](torch.ones(1, 4))
    for _ in range(60_000):
        z = z * 1.0
    z = network["last"](z)
    losses = {task: network[task](z).square().mean() for task in ("one", "other")}
    if shared == "scale":
        losses = {task: scale * loss for task, loss in losses.items()}
    elif shared == "little":
        losses["other"] = network["other"](torch.ones(4)).mean()
    total = session.total(losses)
    try:
        session.before_backward(total)
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__)
        session.drop()
    else:
        total.backward()
        session.after_backward()
        session.step()
    del z, losses, total
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (("same step", "features", "last", "trunk"), ""),
        (("same step", "features", "last", "scale"), "ScatteredTasksError"),
        (("next step", "parameters", "first", "little"), "UnreachedSharedLayerError"),
    ],
)
def test_a_deep_graph_is_let_go_of_without_harm(settings, error):
    done = subprocess.run([sys.executable, "-c", DEEP, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [error] * 3 if error else not done.stdout
