"""The shared layer that the graph of a first batch shows."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_gradnorm import tap_losses
from lightning_gradnorm.shared_layer import detect_shared_layer
from tests.helpers import in_another_thread, use_up_node_numbers
from tests.test_shared_layer import NAME_IT


def two_heads(z: torch.Tensor, **parts: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    net = nn.ModuleDict({"a": nn.Linear(z.shape[1], 2), "b": nn.Linear(z.shape[1], 1)} | parts)
    return net, {"a": net["a"](z).pow(2).mean(), "b": net["b"](z).abs().mean()}


def block(wrap=lambda layer: layer) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(4, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh())


def trunk_and_heads(wrap=lambda layer: layer):
    trunk = block(wrap)
    return two_heads(trunk(torch.randn(5, 4)), trunk=trunk)


def partly_shared_decoder():
    trunk, decoder = block(), nn.Linear(8, 8)
    z = trunk(torch.randn(5, 4))
    net, losses = two_heads(decoder(z).tanh(), decoder=decoder, trunk=trunk)
    return net, losses | {"c": z.pow(2).mean()}


def skip_connection():
    first, last = nn.Linear(4, 8), nn.Linear(8, 8)
    x = first(torch.randn(5, 4)).tanh()
    net, losses = two_heads(torch.cat([x, last(x).tanh()], 1), last=last, first=first)
    return net, losses | {"c": (x + last(x)).pow(2).mean()}


def tied_decoder():
    first, last = nn.Linear(4, 8), nn.Linear(8, 8)
    z = last(first(torch.randn(5, 4)).tanh()).tanh()
    return two_heads(z @ first.weight, last=last, first=first)


def convolutions():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten())
    return two_heads(trunk(torch.randn(4, 3, 6, 6)), trunk=trunk)


def transformer():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    return two_heads(encoder(torch.randn(3, 5, 8))[:, 0], encoder=encoder)


def embedding_and_gru():
    embedding, gru = nn.Embedding(10, 4), nn.GRU(4, 8, batch_first=True)
    return two_heads(gru(embedding(torch.randint(10, (3, 5))))[0][:, -1], embedding=embedding, gru=gru)


def physics_informed(wrap=lambda layer: layer, hidden=2):
    sizes = [2, *[8] * hidden, 1]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (wrap(nn.Linear(a, b)), nn.Tanh())]
    net = nn.Sequential(*layers[:-1])
    x = torch.rand(9, 2, requires_grad=True)
    g = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    gg = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)[0]
    return net, {"residual": (gg[:, 0] + g[:, 1]).pow(2).mean(), "boundary": net(torch.rand(5, 2)).pow(2).mean()}


class Matrices(nn.Module):
    """tanh layers whose weights are plain matrices: a derivative uses them in nodes of its own."""

    def __init__(self, *sizes):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        *hidden, last = self.weights
        for weight in hidden:
            x = (x @ weight).tanh()
        return x @ last


def derivative_numbered_by_another_thread():
    use_up_node_numbers()
    net, x = Matrices(2, 8, 8, 8, 1), torch.rand(9, 2, requires_grad=True)
    u = net(x)
    slopes = in_another_thread(lambda: torch.autograd.grad(u.sum(), x, create_graph=True)[0])
    assert slopes.grad_fn._sequence_nr() < u.grad_fn._sequence_nr()
    return net, {"residual": slopes.square().mean(), "boundary": net(torch.rand(5, 2)).square().mean()}


def split_output(*layers: nn.Module):
    net = nn.Sequential(*layers)
    y = net(torch.randn(5, 4))
    return net, {"a": y[:, 0].pow(2).mean(), "b": y[:, 1].abs().mean()}


def one_task():
    net, losses = trunk_and_heads()
    return net, {"a": losses["a"]}


def half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        return trunk_and_heads()


FOUND = {
    "trunk and heads": (trunk_and_heads, "trunk.2.weight"),
    "partly shared decoder": (partly_shared_decoder, "trunk.2.weight"),
    "skip connection": (skip_connection, "last.weight"),
    "tied decoder": (tied_decoder, "last.weight"),
    "convolutions": (convolutions, "trunk.3.weight"),
    "transformer": (transformer, "encoder.layers.1.linear2.weight"),
    "embedding and GRU": (embedding_and_gru, "gru.weight_hh_l0"),
    "one task": (one_task, "a.weight"),
    "physics-informed": (physics_informed, "2.weight"),
    "physics-informed, deep": (lambda: physics_informed(hidden=4), "6.weight"),
    "derivative numbered by another thread": (derivative_numbered_by_another_thread, "weights.2"),
    "split output": (lambda: split_output(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), "0.weight"),
    "one linear": (lambda: split_output(nn.Linear(4, 2)), "0.weight"),
    "bfloat16": (half_precision, "trunk.2.weight"),
    "spectral norm": (lambda: trunk_and_heads(spectral_norm), "trunk.2.parametrizations.weight.original"),
    "weight norm": (lambda: trunk_and_heads(weight_norm), "trunk.2.parametrizations.weight.original1"),
    "physics-informed, weight norm": (lambda: physics_informed(weight_norm), "2.parametrizations.weight.original1"),
}


@pytest.mark.parametrize(("build", "name"), FOUND.values(), ids=FOUND)
@pytest.mark.parametrize("tap", [dict, tap_losses])
def test_the_layer_found(build, name, tap):
    net, losses = build()
    shared = detect_shared_layer(tap(losses), net)
    assert name in shared.names, "of a weight put together from several, the one that holds its direction at least"
    assert {n.rpartition(".")[0] for n in shared.names} == {name.rpartition(".")[0]}, "one layer"
    assert all(p is net.get_parameter(n) for p, n in zip(shared.parameters, shared.names, strict=True))
    assert "name another by shared_layer" in str(shared)


def test_nothing_in_common_says_what_each_task_reaches():
    trunk, many = block().requires_grad_(False), nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    z = trunk(torch.randn(5, 4))
    net, losses = two_heads(z, trunk=trunk, many=many)
    losses |= {"many": many(z).sum(), "bias": many[0].bias.sum()}
    with pytest.raises(ValueError, match=rf"share no trainable weight(.*\n)+.*frozen.*use_reentrant=False.*{NAME_IT}") as e:
        detect_shared_layer(losses, net)
    reached = ["a.weight", "b.weight", "many.4.weight, many.3.weight, many.2.weight and 2 more", "no trainable weight at all"]
    lines = [f"  {task!r} reaches {what}" for task, what in zip(losses, reached, strict=True)]
    assert str(e.value).splitlines()[1:-1] == lines
