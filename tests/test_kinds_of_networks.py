"""Where tasks meet, in networks of many kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_gradnorm.shared_layer import detect_shared_layer
from tests.networks import (
    EXPERTS,
    LEVELS,
    adapters,
    bottleneck_with_a_loss_of_its_own,
    branches_that_start_at_zero,
    chain_of_predictions,
    cross_stitch,
    decoder_with_auxiliary_losses,
    experts,
    frozen_top,
    prediction_fed_on,
    prediction_fed_on_and_cat,
    pyramid,
    residual,
    rows,
    skip_of_one_task,
    task_tokens,
    two_heads,
    uncertainty_heads,
    variational,
)
from tests.test_idioms import block, cat, mean_squares, network, sliced, with_heads


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
