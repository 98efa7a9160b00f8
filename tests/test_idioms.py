"""Where tasks meet does not hang on how the network is written: one network in many ways, and networks of many kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

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


# -- networks of many kinds -------------------------------------------------------------------------------------------------


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


def trunk_with(wrap):
    def build():
        trunk = block(wrap=wrap)
        return two_heads(trunk(rows()), trunk=trunk)

    return build


def attention():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    stem = nn.Linear(6, 8)
    z = stem(torch.randn(3, 5, 6))
    return two_heads((z + layer(z, z, z)[0])[:, 0], stem=stem, attention=layer)


def convolutions():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU())
    net = network(trunk=trunk, heads=nn.Conv2d(8, 3, 1))
    p = net["heads"](trunk(torch.randn(2, 3, 8, 8)))
    return net, {"depth": p[:, 0].abs().mean(), "normals": p[:, 1:].square().mean()}


def recurrent():
    cell, x, h = nn.RNNCell(6, 8), torch.randn(4, 7, 6), torch.zeros(7, 8)
    for step in x:
        h = cell(step, h)
    return two_heads(h, cell=cell)


def gated():
    gru = nn.GRU(6, 8, 2, batch_first=True)
    return two_heads(gru(torch.randn(7, 4, 6))[0][:, -1], gru=gru)


def tied_output():
    """A language model whose output layer is its embedding, and a second head."""
    net = network(words=nn.Embedding(9, 6), trunk=block(), back=nn.Linear(8, 6), other=nn.Linear(6, 1))
    z = net["back"](net["trunk"](net["words"](torch.randint(9, (7,)))))
    next_word = F.cross_entropy(z @ net["words"].weight.T, torch.randint(9, (7,)))
    return net, {"next word": next_word, "other": net["other"](z).square().mean()}


def towers(sparse=False):
    words = nn.Embedding(20, 8, sparse=sparse)
    return two_heads(words(torch.randint(20, (7,))), words=words)


def encoder_decoder():
    coder = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)
    stem = nn.Linear(6, 8)
    return two_heads(coder(stem(torch.randn(2, 5, 6)), torch.randn(2, 3, 8))[:, 0], coder=coder, stem=stem)


def early_exit():
    """A classifier half-way, as GoogLeNet's."""
    net = network(first=nn.Linear(6, 8), last=nn.Linear(8, 8), exit=nn.Linear(8, 1), out=nn.Linear(8, 1))
    h = net["first"](rows()).tanh()
    return net, {"exit": net["exit"](h).square().mean(), "out": net["out"](net["last"](h).tanh()).square().mean()}


def features_in_parts():
    """Each task takes half of the last features: they meet in the layer before."""
    trunk, net = block(), network(a=nn.Linear(4, 1), b=nn.Linear(4, 1))
    z = trunk(rows())
    net["trunk"] = trunk
    return net, {"a": net["a"](z[:, :4]).square().mean(), "b": net["b"](z[:, 4:]).square().mean()}


def without_biases(layers):
    def build():
        net = nn.Module()
        net.weights = nn.ParameterList(torch.randn(8 if i else 6, 8) for i in range(layers))
        net.heads = nn.ParameterList(torch.randn(8, 1) for _ in range(2))
        z = rows()
        for weight in net.weights:
            z = (z @ weight).tanh()
        return net, {task: (z @ head).square().mean() for task, head in zip("ab", net.heads, strict=True)}

    return build


def forces():
    """Energy, and its derivative by the input, beside a task with a head of its own."""
    net = network(trunk=block(), energy=nn.Linear(8, 1), charge=nn.Linear(8, 1))
    x = rows().requires_grad_()
    z = net["trunk"](x)
    energy = net["energy"](z)
    slope = torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
    return net, {"energy": energy.square().mean(), "force": slope.square().mean(), "charge": net["charge"](z).abs().mean()}


def forces_of_branches():
    """The same on two branches side by side: by the derivative each weight lies above each other one."""
    net = network(
        stem=nn.Linear(6, 8), one=nn.Linear(8, 8), other=nn.Linear(8, 8), energy=nn.Linear(8, 1), charge=nn.Linear(8, 1)
    )
    x = rows().requires_grad_()
    h = net["stem"](x).tanh()
    z = net["one"](h).tanh() + net["other"](h).tanh()
    energy = net["energy"](z)
    slope = torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
    return net, {"energy": energy.square().mean(), "force": slope.square().mean(), "charge": net["charge"](z).abs().mean()}


def operator_network(derivative):
    """Branch and trunk of a DeepONet, shared whole: output layers side by side, and the last hidden ones below them."""

    def build():
        net = network(branch=block()[:3], trunk=block()[:3])
        a, x = rows(), torch.randn(7, 6, requires_grad=True)
        u = (net["branch"](a) * net["trunk"](x)).sum(1)
        losses = {"data": u.square().mean(), "mean": u.mean().square()}
        if derivative:
            losses["residual"] = torch.autograd.grad(u.sum(), x, create_graph=True)[0].square().mean()
        return net, losses

    return build


def slopes_only():
    """Two tasks on derivatives, none on the output itself."""
    net = block()[:3].append(nn.Tanh()).append(nn.Linear(8, 1))
    x = rows().requires_grad_()
    slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    return net, {"first": slope[:, 0].square().mean(), "second": slope[:, 1].square().mean()}


def half_precision(dtype, scale=1.0):
    def build():
        with torch.autocast("cpu", dtype):
            net, losses = with_heads(lambda o, y: sliced(cat(o), y))()
        return net, {task: loss * scale for task, loss in losses.items()}

    return build


def one_loss_without_gradient(build):
    """c has a loss and nothing to learn from it: a hinge at zero."""

    def built():
        net, losses = build()
        return net, losses | {"c": (losses["c"] - 1e3).relu()}

    return built


KINDS = {
    "pyramid": (pyramid(boxes=(0, 1, 2)), LEVELS),
    "pyramid, positives on one level": (pyramid(boxes=(1,)), LEVELS),
    "pyramid, positives on different levels": (pyramid(boxes=(1,), masks=(2,)), LEVELS),
    "mixture of experts": (experts(gates=1), EXPERTS | {"gates.0.weight"}),
    "MMoE": (experts(gates=2), EXPERTS),
    "DETR, stacked": (decoder_with_auxiliary_losses(True, ["class", "box"]), {"layers.0.linear2.weight"}),
    "DETR, layer by layer": (decoder_with_auxiliary_losses(False, ["class", "box"]), {"layers.0.linear2.weight"}),
    "DETR, stacked, one head": (decoder_with_auxiliary_losses(True, ["box"]), {"heads.box.weight"}),
    "DETR, layer by layer, one head": (decoder_with_auxiliary_losses(False, ["box"]), {"heads.box.weight"}),
    "prediction fed on": (prediction_fed_on(), {"trunk.2.weight"}),
    "prediction fed on, detached": (prediction_fed_on(detached=True), {"trunk.2.weight"}),
    "prediction fed on, two layers": (
        prediction_fed_on(make=lambda: block()[:0].append(nn.Linear(8, 5)).append(nn.Linear(5, 3))),
        {"trunk.2.weight"},
    ),
    "prediction fed on, two losses on it": (prediction_fed_on(twice=True), {"trunk.2.weight"}),
    "prediction fed on, cat": (prediction_fed_on_and_cat("abc"), {"trunk.2.weight"}),
    "prediction fed on, cat, two tasks": (prediction_fed_on_and_cat("ab"), {"trunk.2.weight"}),
    "chain of predictions": (chain_of_predictions, {"trunk.2.weight"}),
    "bottleneck with a loss of its own": (bottleneck_with_a_loss_of_its_own, {"trunk.2.weight"}),
    "variational": (variational, {"mean.weight", "spread.weight"}),
    "residual": (residual, {"layers.1.2.weight"}),
    "skip of one task": (skip_of_one_task, {"last.weight"}),
    "cross-stitch": (cross_stitch, {"columns.0.1.weight", "columns.1.1.weight"}),
    "task tokens": (task_tokens, {"head.2.weight"}),
    "uncertainty heads": (uncertainty_heads, {"trunk.2.weight"}),
    "adapters": (lambda: adapters(inner=False), {"up.weight"}),
    "adapters, inner zero": (lambda: adapters(inner=True), {"down.weight"}),
    "frozen top": (frozen_top, {"trunk.0.weight"}),
    "branches that start at zero": (branches_that_start_at_zero, {"stem.weight"}),
    "weight norm": (trunk_with(weight_norm), {f"trunk.2.parametrizations.weight.original{i}" for i in (0, 1)}),
    "weight norm, old": (trunk_with(old_weight_norm), {"trunk.2.weight_g", "trunk.2.weight_v"}),
    "weight norm, scalar": (
        trunk_with(lambda m: weight_norm(m, dim=None)),
        {f"trunk.2.parametrizations.weight.original{i}" for i in (0, 1)},
    ),
    "spectral norm": (trunk_with(spectral_norm), {"trunk.2.parametrizations.weight.original"}),
    "spectral norm, old": (trunk_with(nn.utils.spectral_norm), {"trunk.2.weight_orig"}),
    "attention": (attention, {"attention.out_proj.weight"}),
    "convolutions, 1×1 heads": (convolutions, {"trunk.3.weight"}),
    "recurrent": (recurrent, {"cell.weight_hh"}),
    "GRU": (gated, {"gru.weight_hh_l1"}),
    "tied output": (tied_output, {"back.weight"}),
    "embedding and towers": (towers, {"words.weight"}),
    "embedding with sparse gradients": (lambda: towers(sparse=True), {"words.weight"}),
    "encoder-decoder": (encoder_decoder, {"coder.decoder.layers.0.linear2.weight"}),
    "early exit": (early_exit, {"first.weight"}),
    "features in parts": (features_in_parts, {"trunk.0.weight"}),
    "without biases": (without_biases(3), {"weights.2"}),
    "without biases, two layers": (without_biases(2), {"weights.1"}),
    "without biases, one layer": (without_biases(1), {"weights.0"}),
    "forces": (forces, {"trunk.2.weight"}),
    "forces of branches": (forces_of_branches, {"one.weight", "other.weight"}),
    "operator network": (operator_network(derivative=False), {"branch.0.weight", "trunk.0.weight"}),
    "operator network, derivative": (operator_network(derivative=True), {"trunk.0.weight"}),
    "slopes only": (slopes_only, {"2.weight"}),
    "bfloat16": (half_precision(torch.bfloat16), {"trunk.2.weight"}),
    "float16, underflowing": (half_precision(torch.float16, 1e-8), {"trunk.2.weight"}),
    "a loss without gradient": (one_loss_without_gradient(with_heads(mean_squares)), {"trunk.2.weight"}),
    "a loss without gradient, cat": (one_loss_without_gradient(with_heads(lambda o, y: sliced(cat(o), y))), {"trunk.2.weight"}),
}


SILENT = {"a loss without gradient", "a loss without gradient, cat"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_layer_found_is_where_the_tasks_meet(kind):
    torch.manual_seed(0)
    build, names = KINDS[kind]
    net, losses = build()
    shared = detect_shared_layer(losses, net)
    assert set(shared.names) == names, shared.reason
    assert ("had no gradient so far, and no say" in shared.reason) == (kind in SILENT)
    for task, loss in losses.items():
        gradients = torch.autograd.grad(loss * 1e4, shared.parameters, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.to_dense().any() for g in gradients) or kind in SILENT, f"no gradient of {task}"
