"""Networks of many kinds with several tasks: each function gives the network and the losses of a batch, or a way to them."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.test_idioms import block, network, two_layers


def two_heads(z, **parts):
    """Tasks a and b on features ``[batch, n]``."""
    n = z.shape[1]
    net = network(**parts, a=nn.Linear(n, 2), b=nn.Sequential(nn.Linear(n, 4), nn.ReLU(), nn.Linear(4, 1)))
    return net, {"a": net["a"](z).square().mean(), "b": net["b"](z).abs().mean()}


def rows():
    return torch.randn(7, 6)


class Pyramid(nn.Module):
    """A feature pyramid: lateral 1×1, top-down sums, a 3×3 per level; heads shared by the levels."""

    def __init__(self, levels=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(levels))
        self.inner = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(levels))
        self.level = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(levels))
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1, 3, padding=1) for task in ("scores", "boxes", "masks")})

    def forward(self, x):
        x, inner = self.stem(x).relu(), []
        for down, lateral in zip(self.down, self.inner, strict=True):
            x = down(x).tanh()
            inner.append(lateral(x))
        for i in reversed(range(len(inner) - 1)):
            inner[i] = inner[i] + F.interpolate(inner[i + 1], scale_factor=2)
        levels = [level(x) for level, x in zip(self.level, inner, strict=True)]
        return {t: torch.cat([head(p).flatten(1) for p in levels], 1) for t, head in self.heads.items()}


def pyramid(**positives):
    """Each task's loss over all levels' anchors at once, some of them on the anchors of some levels only."""

    def build():
        net = Pyramid()
        outputs = net(torch.randn(2, 3, 16, 16))
        ends = {0: slice(0, 64), 1: slice(64, 80), 2: slice(80, 84)}  # 8×8, 4×4, 2×2 anchors
        losses = {"scores": outputs["scores"].square().mean()}
        for task, levels in positives.items():
            losses[task] = torch.cat([outputs[task][:, ends[level]] for level in levels], 1).square().mean()
        return net, losses

    return build


LEVELS = {"level.0.weight", "level.1.weight", "level.2.weight"}


def experts(gates):
    """Experts summed by one gate for all tasks (mixture of experts) or one for each (MMoE)."""

    def build():
        stem, bank = nn.Linear(6, 8), nn.ModuleList(block()[:0].append(nn.Linear(8, 8)) for _ in range(3))
        net = network(stem=stem, bank=bank, gates=nn.ModuleList(nn.Linear(8, 3) for _ in range(gates)))
        net["heads"] = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
        z = stem(rows()).tanh()
        outputs = torch.stack([expert(z).tanh() for expert in bank], 1)
        shares = [gate(z).softmax(1).unsqueeze(-1) for gate in net["gates"]]
        features = [(share * outputs).sum(1) for share in (shares * 2)[:2]]
        return net, {task: h(f).square().mean() for task, h, f in zip("ab", net["heads"], features, strict=True)}

    return build


EXPERTS = {"bank.0.0.weight", "bank.1.0.weight", "bank.2.0.weight"}


def decoder_with_auxiliary_losses(stacked, heads):
    """As DETR: the heads on every decoder layer's output, the losses of the layers as so many tasks."""

    def build():
        layers = [nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(3)]
        net = network(stem=nn.Linear(6, 8), layers=nn.ModuleList(layers))
        net["heads"] = nn.ModuleDict({name: nn.Linear(8, 2) for name in heads})
        memory, h, outputs = net["stem"](torch.randn(2, 5, 6)), torch.randn(2, 4, 8), []
        for part in net["layers"]:
            h = part(h, memory)
            outputs.append(h)
        losses = {}
        for name, head in net["heads"].items():
            predictions = head(torch.stack(outputs)) if stacked else [head(output) for output in outputs]
            losses |= {f"{name}_{i}": predictions[i].square().mean() * (i + 1) for i in range(3)}
        return net, losses

    return build


def prediction_fed_on(detached=False, make=lambda: nn.Linear(8, 3), twice=False):
    """Task b's head takes task a's prediction in, beside the features."""

    def build():
        net = network(trunk=block(), a=make(), b=nn.Linear(11, 2), c=nn.Linear(8, 1))
        z = net["trunk"](rows())
        p = net["a"](z)
        losses = {"a": p.square().mean(), "b": net["b"](torch.cat([z, p.detach() if detached else p], 1)).square().mean()}
        if twice:
            losses["a too"] = p.abs().mean()
        return net, losses | {"c": net["c"](z).square().mean()}

    return build


def prediction_fed_on_and_cat(tasks):
    """The same, the predictions in one tensor."""

    def build():
        net = network(trunk=block(), a=nn.Linear(8, 1), b=nn.Linear(9, 1), c=nn.Linear(8, 1))
        z = net["trunk"](rows())
        a = net["a"](z)
        p = torch.cat([a, net["b"](torch.cat([z, a], 1)), net["c"](z)], 1)
        return net, {task: p[:, i].square().mean() for i, task in enumerate(tasks)}

    return build


def chain_of_predictions():
    """a's prediction feeds b, both feed c."""
    net = network(trunk=block(), a=two_layers(), b=nn.Linear(9, 1), c=nn.Linear(10, 1))
    z = net["trunk"](rows())
    a = net["a"](z)
    b = net["b"](torch.cat([z, a], 1))
    c = net["c"](torch.cat([z, a, b], 1))
    return net, {"a": a.square().mean(), "b": b.square().mean(), "c": c.square().mean()}


def bottleneck_with_a_loss_of_its_own():
    """A penalty on the features, which are all that the heads see: there the tasks meet."""
    trunk = block()
    z = trunk(rows())
    net, losses = two_heads(z, trunk=trunk)
    return net, losses | {"penalty": z.square().mean()}


def variational():
    net = network(encoder=block(), mean=nn.Linear(8, 3), spread=nn.Linear(8, 3), decoder=nn.Linear(3, 6))
    x = rows()
    h = net["encoder"](x)
    mean, spread = net["mean"](h), net["spread"](h)
    z = mean + spread.exp() * torch.randn_like(mean)
    kl = (mean.square() + (2 * spread).exp() - 2 * spread).mean()
    return net, {"reconstruction": F.mse_loss(net["decoder"](z), x), "kl": kl}


def residual(blocks=2):
    stem, layers = (
        nn.Linear(6, 8),
        nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(blocks)),
    )
    z = stem(rows())
    for layer in layers:
        z = z + layer(z)
    return two_heads(z, stem=stem, layers=layers)


def skip_of_one_task():
    """Task b takes the features before the last layer in as well; both have heads of their own."""
    net = network(first=nn.Linear(6, 8), last=nn.Linear(8, 8), a=nn.Linear(8, 1), b=nn.Linear(16, 1))
    x = net["first"](rows()).tanh()
    z = net["last"](x).tanh()
    return net, {"a": net["a"](z).square().mean(), "b": net["b"](torch.cat([x, z], 1)).square().mean()}


class CrossStitch(nn.Module):
    def __init__(self):
        super().__init__()
        self.columns = nn.ModuleList(nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)]) for _ in range(2))
        self.stitches = nn.ParameterList(nn.Parameter(torch.tensor([[0.9, 0.1], [0.1, 0.9]])) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, x):
        hs = [x, x]
        for depth, stitch in enumerate(self.stitches):
            hs = [column[depth](h).tanh() for column, h in zip(self.columns, hs, strict=True)]
            hs = [stitch[i, 0] * hs[0] + stitch[i, 1] * hs[1] for i in range(2)]
        return [head(h) for head, h in zip(self.heads, hs, strict=True)]


def cross_stitch():
    net = CrossStitch()
    a, b = net(rows())
    return net, {"a": a.square().mean(), "b": b.square().mean()}


def task_tokens():
    """A learnt vector per task, added to the shared features."""
    net = network(trunk=block(), tokens=nn.Embedding(2, 8), head=block()[2:3], out=nn.Linear(8, 1))
    z, tokens = net["trunk"](rows()), net["tokens"].weight
    return net, {task: net["out"](net["head"](z + tokens[i]).tanh()).square().mean() for i, task in enumerate("ab")}


def uncertainty_heads():
    net = network(trunk=block(), a=nn.Linear(8, 2), b=nn.Linear(8, 2))
    net.spread = nn.Parameter(torch.zeros(2, 1))
    z, losses = net["trunk"](rows()), {}
    for i, task in enumerate("ab"):
        mean, spread = net[task](z).chunk(2, 1)
        losses[task] = ((mean.square() / spread.exp() + spread).mean() * net.spread[i].exp() + net.spread[i]).sum()
    return net, losses


def adapters(inner):
    """Low-rank adapters on a frozen trunk, the outer factor zero at first."""
    net = network(first=nn.Linear(6, 8), last=nn.Linear(8, 8)).requires_grad_(False)
    net["down"], net["up"] = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
    nn.init.zeros_((net["down"] if inner else net["up"]).weight)
    h = net["first"](rows()).tanh()
    return two_heads((net["last"](h) + net["up"](net["down"](h))).tanh(), **net)


def frozen_top():
    trunk = block()
    trunk[2].requires_grad_(False)
    return two_heads(trunk(rows()), trunk=trunk)


def branches_that_start_at_zero():
    """Residual branches ending in a zero: no task has a gradient in them yet."""
    stem, layer = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    layer.gamma = nn.Parameter(torch.zeros(8))
    z = stem(rows()).tanh()
    return two_heads(z + layer.gamma * layer(z), stem=stem, layer=layer)
