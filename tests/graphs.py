"""Networks of several shapes, each as losses and the shared parameters: what the engine has to read."""

import torch
from torch import Tensor, nn

Graph = tuple[dict[str, Tensor], list[Tensor]]


def _named(*losses: Tensor) -> dict[str, Tensor]:
    return {f"task{i}": loss for i, loss in enumerate(losses)}


def trunk_and_heads() -> Graph:
    trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU())
    heads = [nn.Linear(16, 2) for _ in range(3)]
    z = trunk(torch.randn(5, 8))
    return _named(*[head(z).pow(2).mean() for head in heads]), list(trunk[2].parameters())


def shared_decoder() -> Graph:
    """Tasks 0 and 1 share a decoder, task 2 does not."""
    trunk, decoder, heads = nn.Linear(8, 16), nn.Linear(16, 16), [nn.Linear(16, 2) for _ in range(3)]
    z = trunk(torch.randn(5, 8)).tanh()
    d = decoder(z).tanh()
    return _named(heads[0](d).pow(2).mean(), heads[1](d).abs().mean(), heads[2](z).pow(2).mean()), [trunk.weight]


def skip_connection() -> Graph:
    """Task 1 reaches the trunk around the shared layer too."""
    a, b, heads = nn.Linear(8, 16), nn.Linear(16, 16), [nn.Linear(16, 2), nn.Linear(32, 2)]
    x = a(torch.randn(5, 8)).tanh()
    z = b(x).tanh()
    return _named(heads[0](z).pow(2).mean(), heads[1](torch.cat([x, z], 1)).pow(2).mean()), [b.weight]


def recurrent() -> Graph:
    """W is used several times."""
    cell, heads = nn.RNNCell(8, 16), [nn.Linear(16, 2) for _ in range(2)]
    h = torch.zeros(5, 16)
    for _ in range(4):
        h = cell(torch.randn(5, 8), h)
    return _named(*[head(h).pow(2).mean() for head in heads]), [cell.weight_hh, cell.weight_ih]


def physics_informed() -> Graph:
    """Second derivatives; the losses meet only at the parameters, which are all shared."""
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.rand(20, 2, requires_grad=True)
    g = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    gg = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)[0]
    return _named((gg[:, 0] + net(x)[:, 0]).pow(2).mean(), net(torch.rand(9, 2)).pow(2).mean()), list(net.parameters())


def physics_informed_one_evaluation() -> Graph:
    """The residual and a data term read the same evaluation, so they meet above the parameters as well."""
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.rand(20, 2, requires_grad=True)
    u = net(x)
    g = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return _named(g.pow(2).mean(), (u - 1).pow(2).mean(), (g[:, :1] + u).abs().mean()), list(net.parameters())


def nested_losses() -> Graph:
    """One loss is built from another."""
    net, heads = nn.Linear(8, 16), [nn.Linear(16, 1) for _ in range(2)]
    z = net(torch.randn(5, 8)).tanh()
    a = heads[0](z).pow(2).mean()
    return _named(a, heads[1](z).pow(2).mean() + 0.3 * a), [net.weight]


def same_loss_twice() -> Graph:
    """Two tasks hand in one tensor."""
    net = nn.Linear(8, 4)
    loss = net(torch.randn(5, 8)).pow(2).mean()
    return _named(loss, loss, loss.sqrt()), [net.weight]


def convolutions() -> Graph:
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
    heads = [nn.Conv2d(8, 2, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))]
    z = trunk(torch.randn(4, 3, 9, 9)).relu()
    return _named(*[head(z).pow(2).mean() for head in heads]), [trunk[3].weight]


def transformer() -> Graph:
    trunk = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2, enable_nested_tensor=False)
    heads = [nn.Linear(16, 3), nn.Linear(16, 1)]
    z = trunk(torch.randn(3, 5, 16))
    last = trunk.layers[-1].linear2
    return _named(heads[0](z[:, 0]).pow(2).mean(), heads[1](z).abs().mean()), [last.weight, last.bias]


def leaf_loss() -> Graph:
    """A regulariser directly on W beside a task."""
    net = nn.Linear(8, 4)
    return _named(net(torch.randn(5, 8)).pow(2).mean(), net.weight.pow(2).sum()), [net.weight]


def split_output() -> Graph:
    """A network shared to its very last layer, whose outputs are the tasks."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    y = net(torch.randn(5, 8))
    return _named(*[column.pow(2).mean() for column in y.unbind(1)]), [net[0].weight]


def part_of_the_parameters() -> Graph:
    """Each task uses another part of W."""
    shared, own = nn.Linear(8, 16), [nn.Linear(16, 4), nn.Linear(16, 4)]
    z = shared(torch.randn(5, 8)).tanh()
    losses = _named(*[layer(z).pow(2).mean() for layer in own])
    return losses, [shared.weight, own[0].weight, own[1].weight]


def checkpointed() -> Graph:
    """Trunk and W are computed again in the backward (non-reentrant activation checkpointing)."""
    from torch.utils.checkpoint import checkpoint

    trunk, heads = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()),
        [nn.Linear(16, 2) for _ in range(3)],
    )
    z = checkpoint(trunk, torch.randn(5, 8), use_reentrant=False)
    return _named(*[head(z).pow(2).mean() for head in heads]), [trunk[2].weight]


ALL = [
    trunk_and_heads,
    shared_decoder,
    skip_connection,
    recurrent,
    physics_informed,
    physics_informed_one_evaluation,
    nested_losses,
    same_loss_twice,
    convolutions,
    transformer,
    leaf_loss,
    split_output,
    part_of_the_parameters,
    checkpointed,
]
