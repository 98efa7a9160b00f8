"""Which terms are no task: those of the weights alone, seen by the graph, and those that are called so."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import EqualWeights, FixedWeights, GradNorm, UncertaintyWeighting, tap_losses
from lightning_gradnorm.regularisers import is_weight_penalty, sounds_like_a_regulariser
from lightning_gradnorm.session import BalancingSession, Loop


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.bank = nn.Linear(3, 4), nn.Linear(4, 2), nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(self.trunk(x).tanh())


def rows():
    return torch.randn(6, 3)


def vector(net):
    return nn.utils.parameters_to_vector(net.parameters())


PENALTIES = {
    "weight decay": lambda net: 1e-4 * sum(p.pow(2).sum() for p in net.parameters()),
    "of one weight": lambda net: net.trunk.weight.square().mean() * torch.tensor(1e-3),
    "a product": lambda net: (net.trunk.weight * net.trunk.weight).sum() / 7,
    "lasso": lambda net: net.trunk.weight.abs().sum(),
    "group lasso": lambda net: net.trunk.weight.norm(dim=1).sum(),
    "norms": lambda net: torch.stack([p.norm() for p in net.parameters()]).sum(),
    "of each": lambda net: sum(torch._foreach_norm(list(net.parameters()))),
    "of all": lambda net: vector(net).norm(),
    "of all, by a product": lambda net: vector(net).dot(vector(net)),
    "a root": lambda net: (net.head.weight.square().sum() + 1e-8).sqrt(),
    "in half precision": lambda net: net.head.weight.half().pow(2).sum().float(),
    "of a size": lambda net: (net.head.weight.norm() - 1).square(),
}
TASKS = {
    "a regression": lambda net: F.mse_loss(net(rows()), rows()[:, :2]),
    "a classification": lambda net: F.cross_entropy(net(rows()), torch.tensor([0, 1] * 3)),
    "a size of outputs": lambda net: net(rows()).square().mean(),
    "a product with data": lambda net: (net.trunk.weight * torch.randn(4, 3)).sum().square(),
    "a distance from data": lambda net: (net.bank.weight - torch.randn(5, 4)).square().sum(),
    "data beside weights": lambda net: torch.cat([net.head.bias, torch.ones(3)]).square().sum(),
    "of rows of a table": lambda net: (net.bank(torch.tensor([0, 2])) * net.bank(torch.tensor([1, 3]))).sum().square(),
    "of chosen entries": lambda net: net.bank.weight[torch.tensor([0, 2])].square().sum(),
    "an equation": lambda net: torch.autograd.grad(net(x := rows().requires_grad_()).sum(), x, create_graph=True)[0].norm(),
    "a number that is fitted": lambda net: (net.scale - rows().mean()).square(),
    "of an input": lambda net: (rows().requires_grad_() * 2).square().sum(),
    "recomputed": lambda net: checkpoint(lambda x: net(x).square().mean(), rows(), use_reentrant=False),
    "with a penalty": lambda net: net(rows()).square().mean() + net.trunk.weight.square().sum(),
    "of another network's weights": lambda net: Net().trunk.weight.square().sum(),
}  # fmt: skip


@pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)
def test_what_is_made_of_the_networks_weights_alone_is_a_penalty(make):
    net = Net()
    losses = tap_losses({"penalty": make(net)})
    assert is_weight_penalty(losses["penalty"], net)


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_what_may_know_data_is_none(make):
    net = Net()
    assert not is_weight_penalty(tap_losses({"task": make(net)})["task"], net)


def test_a_loss_without_a_graph_is_none():
    assert not is_weight_penalty(torch.ones(()), Net())


@pytest.mark.parametrize("name", ["kl", "kl_loss", "loss/KL", "klDivergence", "l2_reg", "weightDecay", "gradient penalty"])
def test_a_regulariser_by_its_name(name):
    assert sounds_like_a_regulariser(name)


@pytest.mark.parametrize(
    "name",
    ["reg", "box_reg", "l1", "l2", "decay", "weight", "entropy", "pde", "boundary", "digit", "ink", "kelvin", "loss_ckl"],
)
def test_names_of_tasks_are_none(name):
    assert not sounds_like_a_regulariser(name)


# -- in a session --------------------------------------------------------------------------------------------------------


def told(balancer, terms):
    """What two steps say of penalties."""
    net, said = Net(), []
    session = BalancingSession(balancer)
    session.open(Loop(net, tell=lambda about, message: said.append(message)))
    for _ in range(2):
        total = session.total({task: make(net) for task, make in terms.items()})
        session.before_backward(total)
        total.backward()
        session.after_backward()
        session.step()
        net.zero_grad()
    return [message for message in said if "whatever the data" in message], session.words.penalties


BOTH = {"data": TASKS["a regression"], "other": TASKS["a size of outputs"], "l2": PENALTIES["weight decay"]}


@pytest.mark.parametrize("balancer", [GradNorm, lambda: UncertaintyWeighting(kinds={"data": "regression"})])
def test_a_weight_penalty_among_the_tasks_is_told_once_with_where_it_belongs(balancer):
    (message,), penalties = told(balancer(), BOTH)
    assert message.startswith("Task 'l2': made of the network's parameters alone, whatever the data. That is a weight penalty")
    assert "add it to the total, total_loss({…}) + penalty; or use the optimiser's weight_decay" in message
    assert penalties == ["l2"]


@pytest.mark.parametrize("balancer", [EqualWeights(), FixedWeights({"data": 1.0, "other": 1.0, "l2": 1.0})])
def test_a_weight_that_nobody_moves_is_no_reason_to_tell(balancer):
    assert told(balancer, BOTH) == ([], ["l2"])


def test_where_all_tasks_are_of_the_weights_they_are_the_problem():
    assert told(GradNorm(), {"a": PENALTIES["lasso"], "b": PENALTIES["of one weight"]}) == ([], [])
