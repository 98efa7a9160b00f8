"""Weights that act in the step whose gradients they are of: against TorchJD's own ``mtl_backward``, and where they must not."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import (
    IMTLG,
    MGDA,
    AlignedMTL,
    AlignedMTLWeighting,
    IMTLGWeighting,
    MGDAWeighting,
    UPGrad,
    UPGradWeighting,
)
from torchjd.autojac import jac_to_grad, mtl_backward

from lightning_gradnorm import BalancingSession, GramianWeighting
from lightning_gradnorm.meeting_place import ScatteredTasksError

pytestmark = pytest.mark.usefixtures("float64")
TRUNK = ["trunk.0", "trunk.2", "trunk.4"]
PAIRS = {
    "UPGrad": (UPGradWeighting, UPGrad),
    "MGDA": (MGDAWeighting, MGDA),
    "Aligned-MTL": (AlignedMTLWeighting, AlignedMTL),
    "IMTL-G": (IMTLGWeighting, IMTLG),
}


class Network(nn.Module):
    """A trunk of three layers and three heads, of which the second is at odds with the first."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def features(self, x):
        return self.trunk(x)

    def losses(self, x, features=None):
        z = self.features(x) if features is None else features
        targets = [x.sum(1), -x.sum(1) + 0.1 * x[:, 0], 30 * x[:, 1]]
        return {
            name: (head(z).squeeze(1) - y).square().mean()
            for name, head, y in zip(("one", "against", "large"), self.heads, targets, strict=True)
        }


def batches(count=1, seed=1):
    return torch.randn(count * 8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).split(8)


def backward(session, total):
    session.before_backward(total)
    total.backward()
    session.after_backward()


def session_of(network, weighting, shared_layer=TRUNK, **settings):
    reading = {name: settings.pop(name) for name in ("norm_of", "engine") if name in settings}
    balancer = GramianWeighting(weighting, when="same step", **settings)
    return BalancingSession(balancer, network, shared_layer=shared_layer, **reading)


def gradients(network):
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def by_hand(network, weighting, x, shared_layer):
    """One ``autograd.grad`` per task, the Gram matrix of W, and Σ w_i g_i on the trunk."""
    losses = network.losses(x)
    trunk = dict(network.trunk.named_parameters(prefix="trunk"))
    rows = [
        dict(zip(trunk, torch.autograd.grad(loss, list(trunk.values()), retain_graph=True), strict=True))
        for loss in losses.values()
    ]
    names = [name for name in trunk if any(name.startswith(layer) for layer in shared_layer)]
    jacobian = torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows])
    weights = weighting(jacobian @ jacobian.T)
    sum(losses.values()).backward()
    for name, parameter in trunk.items():
        parameter.grad = sum(weight * row[name] for weight, row in zip(weights, rows, strict=True))
    return weights


def assert_same(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11 * float(gradient.abs().max()), msg=name)


def assert_is_by_hand(ours, theirs, shared_layer=TRUNK, further=None):
    """Both of one kind and seed; ``further`` gives the terms that are added to the total of a network."""
    (x,) = batches()
    session = session_of(ours, UPGradWeighting(), shared_layer)
    total = session.total(ours.losses(x))
    backward(session, total if further is None else total + further(ours))
    weights = by_hand(theirs, UPGradWeighting(), x, shared_layer)
    if further is not None:
        further(theirs).backward()
    assert_same(gradients(ours), gradients(theirs))
    return session, weights


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_mtl_backward_where_all_that_is_shared_is_compared(method, seed):
    weighting, aggregator = PAIRS[method]
    ours, theirs = Network(seed), Network(seed)
    (x,) = batches(seed=seed)
    session = session_of(ours, weighting(), allow_negative=True)
    backward(session, session.total(ours.losses(x)))
    z = theirs.features(x)
    mtl_backward(list(theirs.losses(x, z).values()), features=z)
    jac_to_grad(list(theirs.trunk.parameters()), aggregator())
    assert_same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("layer", TRUNK)
def test_of_a_part_of_it_all_below_the_meeting_is_put_together(layer):
    session, weights = assert_is_by_hand(Network(), Network(), [layer])
    step = session.step()
    torch.testing.assert_close(step.applied, weights, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.tensor(list(session.balancer.weights.values())), weights, rtol=1e-10, atol=0)


def test_at_the_features():
    ours, theirs = Network(), Network()
    (x,) = batches()
    session = session_of(ours, MGDAWeighting(), "trunk", norm_of="features")
    session.begin_batch()
    backward(session, session.total(ours.losses(x)))
    z = theirs.features(x)
    losses = theirs.losses(x, z)
    rows = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses.values()])
    sum(losses.values()).backward(retain_graph=True)
    theirs.trunk.zero_grad()
    z.backward((MGDAWeighting()(rows @ rows.T) @ rows).view_as(z))
    assert_same(gradients(ours), gradients(theirs))


def test_each_micro_batch_has_its_own_weights():
    ours, theirs = Network(), Network()
    session = session_of(ours, UPGradWeighting(), ["trunk.4"])
    weights = []
    for x in batches(3):
        before = gradients(theirs) if weights else {}
        backward(session, session.total(ours.losses(x)) / 3)
        theirs.zero_grad()
        weights.append(by_hand(theirs, UPGradWeighting(), x, ["trunk.4"]))
        for name, parameter in theirs.named_parameters():
            parameter.grad = parameter.grad / 3 + before.get(name, 0)
    assert_same(gradients(ours), gradients(theirs))
    torch.testing.assert_close(session.step().applied, torch.stack(weights).mean(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_measured_is_of_the_mean_gradient_as_ever(count):
    network, late = Network(), Network()
    session = session_of(network, UPGradWeighting(), ["trunk.4"])
    other = BalancingSession(GramianWeighting(UPGradWeighting()), late, shared_layer=["trunk.4"])
    for x in batches(count):
        backward(session, session.total(network.losses(x)))
        backward(other, other.total(late.losses(x)))
    found, expected = session.step().measurement, other.step().measurement
    for name in ("losses", "gradient_norms", "gramian"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=0)


def test_where_the_weighting_has_no_answer_the_last_weights_act():
    network, plain = Network(), Network()
    answers = [torch.tensor([torch.nan, 1.0, 1.0]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([torch.inf, 1.0, 1.0])]
    session = session_of(network, lambda gramian: answers.pop(0))
    (x,) = batches()
    applied = []
    for _ in range(3):
        network.zero_grad()
        backward(session, session.total(network.losses(x)))
        if not applied:
            sum(plain.losses(x).values()).backward()
            assert_same(gradients(network), gradients(plain))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            applied.append(session.step().applied.tolist())
    assert applied == [[1.0, 1.0, 1.0], [0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]
    assert int(session.balancer.skipped_updates) == 2


def test_further_terms_of_the_total_act_as_they_are():
    ours, theirs = Network(), Network()
    (x,) = batches()
    session = session_of(ours, UPGradWeighting())
    z = ours.features(x)
    total = session.total(ours.losses(x, z))
    backward(session, total + 0.3 * z.square().sum() + ours.trunk[2].weight.square().sum())
    by_hand(theirs, UPGradWeighting(), x, TRUNK)
    (0.3 * theirs.features(x).square().sum() + theirs.trunk[2].weight.square().sum()).backward()
    assert_same(gradients(ours), gradients(theirs))


class Branches(Network):
    """Two heads share a pooled part of the trunk's output, and one of its two parts is one head's alone."""

    def losses(self, x, features=None):
        z = self.features(x) if features is None else features
        left, right = z.chunk(2, dim=1)
        pooled = torch.cat([left.sin(), right.mean(1, keepdim=True).expand(-1, 2)], 1).cos()
        targets = [x.sum(1), -x.sum(1), 30 * x[:, 1]]
        inputs = [pooled, pooled, torch.cat([left, right], 1)]
        return {
            name: (head(z).squeeze(1) - y).square().mean()
            for name, head, z, y in zip(("one", "against", "large"), self.heads, inputs, targets, strict=True)
        }


def test_operations_that_some_share_may_lie_above():
    assert_is_by_hand(Branches(), Branches(), ["trunk.4"])


def test_a_trunk_with_several_outputs():
    class Split(Network):
        def losses(self, x, features=None):
            one, other = self.features(x).chunk(2, dim=1)  # the heads never see the whole
            parts = [one, other, one]
            return {
                task: (head.weight[:, :2] @ part.T + head.bias - x[:, k]).square().mean()
                for k, (task, head, part) in enumerate(zip(("one", "against", "large"), self.heads, parts, strict=True))
            }

    assert_is_by_hand(Split(), Split())


def test_a_penalty_on_all_parameters_makes_no_head_a_part_of_the_trunk():
    def penalty(network):
        return sum(p.square().sum() for p in network.parameters())

    assert_is_by_hand(Network(), Network(), ["trunk.4"], penalty)


@pytest.mark.parametrize("scale", [1e-3, 65536.0])
def test_a_scaled_loss_has_scaled_gradients_and_the_same_weights(scale):
    plain, scaled = Network(), Network()
    (x,) = batches()
    found = []
    for network, factor in ((plain, 1.0), (scaled, scale)):
        session = session_of(network, UPGradWeighting())
        backward(session, factor * session.total(network.losses(x)))
        found.append(session.step().applied)
    assert_same({name: g / scale for name, g in gradients(scaled).items()}, gradients(plain))
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_inside_a_checkpoint():
    class Checkpointed(Network):
        def features(self, x):
            return checkpoint(self.trunk, x, use_reentrant=False)

    assert_is_by_hand(Checkpointed(), Network())


def test_a_whole_training_is_that_of_mtl_backward():
    ours, theirs = Network(), Network()
    mine, other = (torch.optim.Adam(network.parameters(), lr=0.01) for network in (ours, theirs))
    session, aggregator = session_of(ours, UPGradWeighting()), UPGrad()
    for x in batches(30):
        with session.batch():
            backward(session, session.total(ours.losses(x)))
        mine.step()
        mine.zero_grad()
        session.step()
        z = theirs.features(x)
        mtl_backward(list(theirs.losses(x, z).values()), features=z)
        jac_to_grad(list(theirs.trunk.parameters()), aggregator)
        other.step()
        other.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


def test_a_task_without_a_gradient_has_no_say():
    ours = Network()
    (x,) = batches()
    session = session_of(ours, lambda gramian: torch.full(gramian.shape[:1], 1.0 / len(gramian), dtype=gramian.dtype))
    z = ours.features(x)
    losses = ours.losses(x, z) | {"idle": 0.0 * z.sum()}
    backward(session, session.total(losses))
    with pytest.warns(UserWarning, match="took no part so far"):
        step = session.step()
    torch.testing.assert_close(step.applied, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))


def test_what_is_not_finite_stays_so():
    ours = Network()
    (x,) = batches()
    session = session_of(ours, UPGradWeighting())
    backward(session, session.total(ours.losses(x)) * torch.inf)
    assert not ours.trunk[0].weight.grad.isfinite().any()
    with pytest.warns(UserWarning, match="skipped 1 weight update"):
        session.step()
    assert int(session.balancer.skipped_updates) == 1


def test_monitoring_changes_nothing():
    ours, theirs = Network(), Network()
    (x,) = batches()
    session = session_of(ours, UPGradWeighting())
    session.balancer.frozen = True
    backward(session, session.total(ours.losses(x)))
    sum(theirs.losses(x).values()).backward()
    assert_same(gradients(ours), gradients(theirs))
    assert session.step().applied.tolist() == [1.0, 1.0, 1.0]


# -- where it is refused ---------------------------------------------------------------------------------------------------


def refused(network, losses, match, shared_layer=TRUNK):
    session = session_of(network, UPGradWeighting(), shared_layer)
    total = session.total(losses)
    with pytest.raises(ScatteredTasksError, match=match):
        session.before_backward(total)
    session.drop()
    total.backward()  # no hook is left


def test_where_a_task_takes_the_trunk_half_way():
    network = Network()
    (x,) = batches()
    early = network.trunk[:2](x)
    z = network.trunk[2:](early)
    losses = network.losses(x, z)
    losses["against"] = losses["against"] + early.square().mean()
    refused(network, losses, r"they come to the shared layer by several ways \(Tanh\)")
    # Beside W, the last layer, the early way does not show; it would keep a gradient of another weight.
    early = network.trunk[:2](x)
    losses = network.losses(x, network.trunk[2:](early))
    losses["against"] = losses["against"] + early.square().mean()
    refused(network, losses, "a task also comes to Tanh, inside the trunk", ["trunk.4"])


def test_where_tasks_meet_at_the_parameters():
    network = Network()
    one, other = batches(2)
    losses = {"one": network.losses(one)["one"], "against": network.losses(other)["against"]}
    refused(network, losses, r"they come to the shared layer by several ways \(T, a parameter of shape")
    losses = {"one": network.losses(one)["one"], "against": network.losses(other)["against"]}
    refused(network, losses, "they also share a parameter of shape", ["trunk.4.bias"])


def test_where_heads_share_a_parameter():
    network = Network()
    (x,) = batches()
    scale = nn.Parameter(torch.ones(()))
    losses = {task: loss * (scale if task != "large" else 1.0) for task, loss in network.losses(x).items()}
    refused(network, losses, r"they also share a parameter of shape \(\)")


def test_where_a_hook_changes_what_arrives():
    network = Network()
    (x,) = batches()
    z = network.features(x)
    z.register_hook(lambda gradient: 0.5 * gradient)
    session = session_of(network, UPGradWeighting())
    total = session.total(network.losses(x, z))
    session.before_backward(total)
    with pytest.raises(ScatteredTasksError, match="a hook on the trunk's output"):
        total.backward()


def test_a_closure_that_is_evaluated_again():
    network = Network()
    (x,) = batches()
    session = session_of(network, UPGradWeighting())
    backward(session, session.total(network.losses(x)))
    session.before_step()
    total = session.total(network.losses(x))
    with pytest.raises(RuntimeError, match="it evaluates its closure again"):
        session.before_backward(total)


def test_a_backward_that_leaves_the_trunk_out():
    network = Network()
    (x,) = batches()
    session = session_of(network, UPGradWeighting())
    total = session.total(network.losses(x))
    session.before_backward(total)
    total.backward(inputs=list(network.heads.parameters()))
    with pytest.raises(RuntimeError, match="did not come to where the tasks' gradients meet"):
        session.after_backward()


def test_settings_that_are_of_other_steps():
    for setting, said in ({"ema_decay": 0.5}, "ema_decay=0.5"), ({"update_every": 2}, "update_every=2"):
        with pytest.raises(ValueError, match=f"takes each step's weights from that step's own gradients, and {said}"):
            GramianWeighting(UPGradWeighting(), when="same step", **setting)
    with pytest.raises(ValueError, match="when is one of"):
        GramianWeighting(UPGradWeighting(), when="now")
    with pytest.raises(ValueError, match="engine='per_task' reads the gradients before the backward"):
        session_of(Network(), UPGradWeighting(), engine="per_task")
    settings = GramianWeighting(UPGradWeighting(), when="same step").settings()
    assert settings["when"] == "same step"
    assert settings["ema_decay"] == 0.0


def test_a_copy_and_a_state_go_on_alike():
    network = Network()
    session = session_of(network, UPGradWeighting())
    for x in batches(2):
        backward(session, session.total(network.losses(x)))
        session.step()
    other = session_of(copy.deepcopy(network), UPGradWeighting())
    other.load_state_dict(session.state_dict())
    assert other.balancer.weights == session.balancer.weights
    assert other.balancer.steps == 2
