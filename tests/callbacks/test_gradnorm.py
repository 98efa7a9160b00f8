"""GradNorm through the Trainer against a transcription of Algorithm 1 by autograd, in a loop written by hand."""

import copy

import pytest
import torch

from lightning_gradnorm import GradNorm, GradNormCallback, LossBalancingCallback
from tests.helpers import SCALES, Recorder, TrunkAndHeads, batches, of_version_0_1, quiet_trainer

STEPS = 200
TASKS = tuple(SCALES)
MILD = {"small": 0.5, "middle": 0.4, "large": 0.3, "odd": 0.2}  # so that the additive rule needs no bound


def algorithm_1(module, loader, *, alpha, lr, optimizer, network_optimizer, logarithmic, keeps_gradient):
    """Chen et al. 2018, Algorithm 1, with L_grad differentiated by autograd through a second-order graph.

    ``logarithmic``: the variant on log w with the feasible target, of L_grad / Ḡ; ``keeps_gradient``: w (Σ n / Σ w n)^0.1.
    """
    w = torch.ones(len(TASKS), requires_grad=True)
    v = torch.zeros(len(TASKS), requires_grad=True)  # log w
    own = optimizer([v if logarithmic else w], lr=lr)
    network = network_optimizer(module.parameters(), lr=module.lr)
    shared = module.trunk[2].weight
    history, initial = [], None
    for (x,) in loader:
        applied = v.exp() if logarithmic else w
        losses = torch.stack(list(module.losses(x).values()))
        initial = losses.detach() if initial is None else initial
        norms = torch.stack(
            [torch.autograd.grad(wi * li, shared, create_graph=True)[0].norm() for wi, li in zip(applied, losses, strict=True)]
        )
        ratios = (losses / initial).detach()
        rates = ratios / ratios.mean()
        shares = rates**alpha
        targets = (norms.mean() * (shares / shares.mean() if logarithmic else shares)).detach()
        loss_grad = (norms - targets).abs().sum()
        loss_grad = loss_grad / norms.mean().detach() if logarithmic else loss_grad
        gradient = torch.autograd.grad(loss_grad, v if logarithmic else w, retain_graph=True)[0]
        network.zero_grad()
        (applied.detach() * losses).sum().backward()
        history.append((applied.detach().clone(), norms.detach(), ratios, rates, targets))
        own.zero_grad()
        (v if logarithmic else w).grad = gradient
        own.step()
        network.step()
        with torch.no_grad():
            new, n = (v.exp() if logarithmic else w), norms / applied
            new = new * ((n.sum() / (n * new).sum()) ** 0.1 if keeps_gradient else len(TASKS) / new.sum())
            v.copy_(new.log())
            w.copy_(new)
    return history


class Diagnostics(Recorder):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.applied = self.balancing.balancer.weights_for(TASKS)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        shown = self.balancing.balancer.diagnostics
        self.history = getattr(self, "history", [])
        self.history.append((self.applied, *(shown[tag] for tag in ("grad_norm", "loss_ratio", "inverse_rate", "target_norm"))))


@of_version_0_1
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("engine", ["joint", "per_task"])
@pytest.mark.parametrize("network_optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["net SGD", "net Adam"])
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.01), (torch.optim.Adam, 0.025)], ids=["SGD", "Adam"])
@pytest.mark.parametrize(("update", "scale"), [("paper", None), ("log", "sum"), ("log", None)])
def test_equals_algorithm_1_through_the_trainer(tmp_path, update, scale, optimizer, lr, network_optimizer, engine):
    module = TrunkAndHeads(network_optimizer, lr=0.002, scales=MILD)
    by_hand = copy.deepcopy(module)
    callback = GradNormCallback(
        alpha=1.5, lr=lr, update=update, scale=scale, optimizer=optimizer, min_weight=1e-12, engine=engine, summary=False
    )
    seen = Diagnostics(callback)
    quiet_trainer(tmp_path, callbacks=[callback, seen], log_every_n_steps=1000, precision="64-true").fit(module, batches64())
    expected = algorithm_1(
        by_hand,
        batches64(),
        alpha=1.5,
        lr=lr,
        optimizer=optimizer,
        network_optimizer=network_optimizer,
        logarithmic=update == "log",
        keeps_gradient=update == "log" and scale is None,
    )
    assert callback.engine_used == engine and len(seen.history) == STEPS
    signs = torch.stack([torch.sign(norms - targets) for _, norms, _, _, targets in expected])
    assert ((signs.diff(dim=0) != 0).sum(0) > 0).sum() >= 3, "the reference should be one whose signs flip"
    for step, (ours, theirs) in enumerate(zip(seen.history, expected, strict=True)):
        for name, a, b in zip(("weights", "norms", "ratios", "rates", "targets"), ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, s=step, n=name: f"{n} at step {s}: {text}")
    for ours, theirs in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def batches64():
    loader = batches(STEPS)
    loader.dataset.tensors = tuple(tensor.double() for tensor in loader.dataset.tensors)
    return loader


def test_the_named_callback_is_the_general_one_with_gradnorm(tmp_path):
    torch.manual_seed(0)
    module = TrunkAndHeads()
    named, general = GradNormCallback(alpha=0.7, lr=0.1), LossBalancingCallback(GradNorm(alpha=0.7, lr=0.1))
    for callback in (named, general):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(copy.deepcopy(module), batches(10))
    assert named.weights == general.weights
    assert named.state_key == general.state_key == "LossBalancing[GradNorm]"


def test_the_networks_step_is_that_of_the_weighted_sum(tmp_path):
    """Replaying the recorded weights as constants gives the same network, bit for bit: nothing leaks."""
    module = TrunkAndHeads(torch.optim.Adam)
    by_hand = copy.deepcopy(module)
    callback = GradNormCallback(lr=0.1)
    seen = Diagnostics(callback)
    quiet_trainer(tmp_path, callbacks=[callback, seen]).fit(module, batches(30))
    optimizer = by_hand.configure_optimizers()
    for (x,), (weights, *_) in zip(batches(30), seen.history, strict=True):
        optimizer.zero_grad()
        sum(w * loss for w, loss in zip(weights.float(), by_hand.losses(x).values(), strict=True)).backward()
        optimizer.step()
    for ours, theirs in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_learning_rate_zero_is_the_plain_sum_bit_for_bit(tmp_path):
    balanced = TrunkAndHeads(torch.optim.Adam)
    plain = copy.deepcopy(balanced)
    quiet_trainer(tmp_path, callbacks=[GradNormCallback(update="paper", lr=0.0)]).fit(balanced, batches(20))
    quiet_trainer(tmp_path).fit(plain, batches(20))
    for ours, theirs in zip(balanced.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_constructors_agree():
    """Every argument of GradNorm is one of GradNormCallback, with the same default."""
    import inspect

    balancer, callback = (inspect.signature(cls).parameters for cls in (GradNorm, GradNormCallback))
    for name, parameter in balancer.items():
        assert callback[name].default == parameter.default, name
        assert callback[name].kind == parameter.kind, name
