"""Where tasks meet does not hang on how the network is written: one network in many ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_gradnorm.shared_layer import detect_shared_layer

TASKS = ("a", "b", "c", "d")


def block(wide=8, wrap=lambda layer: layer) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(6, wide)), nn.Tanh(), wrap(nn.Linear(wide, wide)), nn.Tanh())


def network(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


def batch(rows=7):
    return torch.randn(rows, 6), torch.randn(rows, len(TASKS))


def mean_squares(columns, y):
    return {task: F.mse_loss(column.reshape(-1), y[:, i]) for i, (task, column) in enumerate(zip(TASKS, columns, strict=True))}


# -- one network, written in many ways --------------------------------------------------------------------------------------


def heads_on(trunk, make=lambda: nn.Linear(8, 1)):
    return network(trunk=trunk, heads=nn.ModuleList(make() for _ in TASKS))


def two_layers():
    return nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))


def with_heads(combine, make=lambda: nn.Linear(8, 1)):
    def build():
        net, (x, y) = heads_on(block(), make), batch()
        z = net["trunk"](x)
        return net, combine([head(z) for head in net["heads"]], y)

    return build


def with_wide_head(combine, make=lambda: nn.Linear(8, len(TASKS))):
    def build():
        net, (x, y) = network(trunk=block(), head=make()), batch()
        return net, combine(net["head"](net["trunk"](x)), y)

    return build


def in_dict(outputs, y):
    return mean_squares(dict(zip(TASKS, outputs, strict=True)).values(), y)


def sliced(p, y):
    return {task: F.mse_loss(p[:, i], y[:, i]) for i, task in enumerate(TASKS)}


def indexed_means(p, y):
    return {task: (p - y).square().mean(0)[i] for i, task in enumerate(TASKS)}


def unreduced(p, y):
    return dict(zip(TASKS, F.mse_loss(p, y, reduction="none").mean(0).unbind(), strict=True))


def masked(p, y):
    return {task: ((p - y).square() * F.one_hot(torch.tensor(i), len(TASKS))).sum() for i, task in enumerate(TASKS)}


def written_into(outputs, y):
    p = torch.empty_like(y)
    for i, output in enumerate(outputs):
        p[:, i] = output[:, 0]
    return sliced(p, y)


def selected(p, y):
    return {task: F.mse_loss(p.index_select(1, torch.tensor([i])), y[:, i : i + 1]) for i, task in enumerate(TASKS)}


class ModuleDictOfHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads = block(), nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})


def module_dict():
    net, (x, y) = ModuleDictOfHeads(), batch()
    z = net.trunk(x)
    return net, {task: F.mse_loss(head(z)[:, 0], y[:, i]) for i, (task, head) in enumerate(net.heads.items())}


class BatchedHeads(nn.Module):
    """All heads' layers in one tensor each, ``[T, in, out]``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(len(TASKS), 8, 5))
        self.second = nn.Parameter(torch.randn(len(TASKS), 5, 1))

    def forward(self, z):
        return (torch.einsum("bi,tio->tbo", z, self.first).tanh() @ self.second)[..., 0].T


class GroupedHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(8 * len(TASKS), 20, 1, groups=len(TASKS)), nn.Conv1d(20, 4, 1, groups=len(TASKS))

    def forward(self, z):
        return self.second(self.first(z.repeat(1, len(TASKS)).unsqueeze(-1)).tanh())[..., 0]


def feature_bank():
    """The heads' hidden layers stacked, their last ones each by itself."""
    net, (x, y) = network(trunk=block(), bank=nn.ModuleList(nn.Linear(8, 5) for _ in TASKS)), batch()
    net["heads"] = nn.ModuleList(nn.Linear(5, 1) for _ in TASKS)
    z = net["trunk"](x)
    features = torch.stack([layer(z).tanh() for layer in net["bank"]])
    return net, mean_squares([head(features[i]) for i, head in enumerate(net["heads"])], y)


def and_their_sum(p, y):
    """A fifth task takes all predictions in."""
    return sliced(p, y) | {"sum": F.mse_loss(p.sum(1), y.sum(1))}


def cat(outputs):
    return torch.cat(outputs, 1)


IDIOMS = {
    "a head per loss": with_heads(mean_squares),
    "dict": with_heads(in_dict),
    "ModuleDict": module_dict,
    "cat, slices": with_heads(lambda o, y: sliced(cat(o), y)),
    "cat, mean(0)[i]": with_heads(lambda o, y: indexed_means(cat(o), y)),
    "cat, unreduced": with_heads(lambda o, y: unreduced(cat(o), y)),
    "cat, index_select": with_heads(lambda o, y: selected(cat(o), y)),
    "cat, masks": with_heads(lambda o, y: masked(cat(o), y)),
    "cat, unbind": with_heads(lambda o, y: mean_squares(cat(o).unbind(1), y)),
    "cat, split": with_heads(lambda o, y: mean_squares(cat(o).split(1, 1), y)),
    "cat, and their sum": with_heads(lambda o, y: and_their_sum(cat(o), y)),
    "stack": with_heads(lambda o, y: mean_squares([torch.stack(o)[i] for i in range(len(o))], y)),
    "stacked losses": with_heads(lambda o, y: dict(zip(TASKS, torch.stack([*mean_squares(o, y).values()]), strict=True))),
    "stacked losses, in place": with_heads(written_into),
    "two-layer heads": with_heads(mean_squares, two_layers),
    "two-layer heads, cat, slices": with_heads(lambda o, y: sliced(cat(o), y), two_layers),
    "two-layer heads, cat, and their sum": with_heads(lambda o, y: and_their_sum(cat(o), y), two_layers),
    "two-layer heads, stack": with_heads(lambda o, y: mean_squares([torch.stack(o)[i] for i in range(len(o))], y), two_layers),
    "two-layer heads, hidden layers stacked": feature_bank,
    "wide head, slices": with_wide_head(sliced),
    "wide head, mean(0)[i]": with_wide_head(indexed_means),
    "wide head, chunk": with_wide_head(lambda p, y: mean_squares(p.chunk(len(TASKS), 1), y)),
    "wide head, split": with_wide_head(lambda p, y: mean_squares(p.split(1, 1), y)),
    "wide head, unbind": with_wide_head(lambda p, y: mean_squares(p.unbind(1), y)),
    "wide head, view": with_wide_head(lambda p, y: mean_squares(p.view(-1, len(TASKS), 1).unbind(1), y)),
    "wide head, masks": with_wide_head(masked),
    "wide head, and their sum": with_wide_head(and_their_sum),
    "wide head, weight norm": with_wide_head(sliced, lambda: weight_norm(nn.Linear(8, len(TASKS)))),
    "batched heads": with_wide_head(sliced, BatchedHeads),
    "grouped heads": with_wide_head(sliced, GroupedHeads),
}


@pytest.mark.parametrize("build", IDIOMS.values(), ids=IDIOMS)
def test_one_network_has_one_shared_layer_however_it_is_written(build):
    torch.manual_seed(0)
    net, losses = build()
    shared = detect_shared_layer(losses, net)
    assert shared.names == ("trunk.2.weight",), shared.reason
    assert shared.parameters[0] is net.get_parameter("trunk.2.weight")
