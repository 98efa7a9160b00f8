"""Multi-task networks, from a conv trunk to an interatomic potential: what a balanced step is timed on.

Each factory takes its sizes, so that the tests can build small ones. The data are random: only the work counts.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Losses = dict[str, Tensor]
Batch = Mapping[str, Tensor]


class Workload(NamedTuple):
    """A network with several losses.

    Attributes:
        network: in training mode.
        make_losses: called as ``make_losses(network, batch)``: task name → scalar loss.
        shared: the shared parameters W.
        batch: one batch of random data.
    """

    network: nn.Module
    make_losses: Callable[[nn.Module, Batch], Losses]
    shared: list[Tensor]
    batch: Batch

    @property
    def losses(self) -> Losses:
        """The losses of the batch, with a new graph."""
        return self.make_losses(self.network, self.batch)


# -- conv: a ResNet-18 trunk and three heads -----------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way around them (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class Decoder(nn.Sequential):
    """A light way back to half the images' size: three times, twice the size and fewer channels."""

    def __init__(self, inputs: int, width: int) -> None:
        layers: list[nn.Module] = []
        for outputs in (2 * width, width, width // 2):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        super().__init__(*layers, nn.Conv2d(inputs, 1, 1))


class ConvNet(nn.Module):
    """ResNet-18 with a 3x3 stem of stride 2, which suits 64x64 images, and heads for the image, a vector and each pixel."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            layers += [BasicBlock(inputs, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.trunk = nn.Sequential(*layers)
        self.label = nn.Linear(inputs, classes)
        self.pose = nn.Linear(inputs, 6)
        self.depth = Decoder(inputs, width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        z = self.trunk(images)
        pooled = z.mean((2, 3))
        return {"label": self.label(pooled), "pose": self.pose(pooled), "depth": self.depth(z)}


def conv_losses(network: nn.Module, batch: Batch) -> Losses:
    out = network(batch["images"])
    depth = F.interpolate(out["depth"], size=batch["depth"].shape[-2:], mode="bilinear")
    return {
        "label": F.cross_entropy(out["label"], batch["label"]),
        "pose": F.mse_loss(out["pose"], batch["pose"]),
        "depth": F.l1_loss(depth, batch["depth"]),
    }


def conv(batch: int = 16, size: int = 64, width: int = 64, classes: int = 10) -> Workload:
    """ResNet-18, 3 tasks, W = the trunk's last 3x3 convolution."""
    network = ConvNet(width, classes)
    data = {
        "images": torch.randn(batch, 3, size, size),
        "label": torch.randint(classes, (batch,)),
        "pose": torch.randn(batch, 6),
        "depth": torch.rand(batch, 1, size, size),
    }
    return Workload(network, conv_losses, [network.trunk[-1].conv2.weight], data)


# -- transformer: an encoder and two heads -------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A transformer encoder with a head for each token and a head for the sequence."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.tag = nn.Linear(width, 32)
        self.score = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        z = self.encoder(self.embedding(tokens))
        return {"tag": self.tag(z), "score": self.score(z.mean(1))}


def transformer_losses(network: nn.Module, batch: Batch) -> Losses:
    out = network(batch["tokens"])
    return {
        "tag": F.cross_entropy(out["tag"].flatten(0, 1), batch["tag"].flatten()),
        "score": F.mse_loss(out["score"][:, 0], batch["score"]),
    }


def transformer(batch: int = 16, length: int = 64, width: int = 256, layers: int = 4, vocabulary: int = 1000) -> Workload:
    """Transformer encoder, 2 tasks, W = the weight of its last Linear."""
    network = Encoder(width, layers, vocabulary)
    data = {
        "tokens": torch.randint(vocabulary, (batch, length)),
        "tag": torch.randint(32, (batch, length)),
        "score": torch.randn(batch),
    }
    return Workload(network, transformer_losses, [network.encoder.layers[-1].linear2.weight], data)


# -- mlp: many heads on a small trunk ------------------------------------------------------------------------------------


class ManyHeads(nn.Module):
    """Equal layers and a linear head per task: with four layers the worst case, for W is a quarter of the trunk."""

    def __init__(self, width: int, tasks: int, layers: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())))
        self.heads = nn.ModuleList([nn.Linear(width, 8) for _ in range(tasks)])

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def mlp_losses(network: nn.Module, batch: Batch) -> Losses:
    outputs = network(batch["x"])
    return {f"task{i}": F.mse_loss(y, target) for i, (y, target) in enumerate(zip(outputs, batch["y"].unbind(), strict=True))}


def mlp(batch: int = 256, width: int = 512, tasks: int = 10, layers: int = 4) -> Workload:
    """MLP, 10 tasks, W = the last weight of the trunk."""
    network = ManyHeads(width, tasks, layers)
    data = {"x": torch.randn(batch, width), "y": torch.randn(tasks, batch, 8)}
    return Workload(network, mlp_losses, [network.trunk[-2].weight], data)


# -- pinn: losses that meet only at the parameters -----------------------------------------------------------------------


def helmholtz_losses(network: nn.Module, batch: Batch) -> Losses:
    """Δu + u = q inside, u = 0 on the boundary, u known at a few points."""
    x, y = (column.requires_grad_() for column in batch["inside"].split(1, dim=1))
    u = network(torch.cat([x, y], 1))
    u_x, u_y = torch.autograd.grad(u.sum(), (x, y), create_graph=True)
    u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]
    u_yy = torch.autograd.grad(u_y.sum(), y, create_graph=True)[0]
    return {
        "residual": F.mse_loss(u_xx + u_yy + u, batch["source"]),
        "boundary": network(batch["boundary"]).pow(2).mean(),
        "data": F.mse_loss(network(batch["known"]), batch["value"]),
    }


def pinn(points: int = 128, width: int = 50) -> Workload:
    """Physics-informed MLP with 4 hidden layers, 3 tasks, W = all its parameters.

    128 points inside and 4 x 128 on the boundary, as in Wang, Teng, Perdikaris (SISC 2021): so few that the plain step is
    mostly the launching of small operations, which is the worst case for a balancer that launches some more.
    """
    sizes = [2, width, width, width, width]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    network = nn.Sequential(*layers, nn.Linear(width, 1))
    data = {
        "inside": 2 * torch.rand(points, 2) - 1,
        "source": torch.randn(points, 1),
        "boundary": 2 * torch.rand(4 * points, 2) - 1,
        "known": 2 * torch.rand(points, 2) - 1,
        "value": torch.randn(points, 1),
    }
    return Workload(network, helmholtz_losses, list(network.parameters()), data)


# -- forces: an interatomic potential, whose forces and stress are derivatives of its energy ------------------------------


class Interaction(nn.Module):
    """Atoms take in their neighbours through filters of the distance (Schütt et al., NeurIPS 2017)."""

    def __init__(self, width: int, radial: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(radial, width), nn.SiLU(), nn.Linear(width, width))
        self.inward = nn.Linear(width, width, bias=False)
        self.outward = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, radial: Tensor, near: Tensor, first: Tensor, second: Tensor) -> Tensor:
        messages = self.inward(x)[second] * (self.filter(radial) * near)
        return x + self.outward(torch.zeros_like(x).index_add(0, first, messages))


class Potential(nn.Module):
    """Energy of each cluster: a sum over its atoms of what a small readout makes of each."""

    def __init__(self, width: int, blocks: int, radial: int, species: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.centres: Tensor
        self.register_buffer("centres", torch.linspace(0.5, cutoff, radial))
        self.embedding = nn.Embedding(species, width)
        self.blocks = nn.ModuleList([Interaction(width, radial) for _ in range(blocks)])
        self.readout = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, vectors: Tensor, batch: Batch) -> Tensor:
        first, second = batch["pairs"]
        distance = vectors.norm(dim=1, keepdim=True)
        radial = (-4 * (distance - self.centres).square()).exp()
        near = 0.5 * ((math.pi / self.cutoff * distance).cos() + 1)
        x = self.embedding(batch["species"])
        for block in self.blocks:
            x = block(x, radial, near, first, second)
        return batch["energy"].new_zeros(len(batch["energy"])).index_add(0, batch["cluster"], self.readout(x)[:, 0])


def energy_and_slopes(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Energies, forces -∂E/∂positions and, where the batch has them, stresses ∂E/∂strain."""
    first, second = batch["pairs"]
    inputs = [batch["positions"].detach().requires_grad_()]
    vectors = inputs[0][second] - inputs[0][first]
    if "stress" in batch:
        inputs.append(torch.zeros_like(batch["stress"], requires_grad=True))
        strain = (inputs[1] + inputs[1].mT) / 2
        vectors = vectors + torch.einsum("pi,pij->pj", vectors, strain[batch["cluster"][first]])
    energy = network(vectors, batch)
    slopes = torch.autograd.grad(energy.sum(), inputs, create_graph=True)
    return {"energy": energy, "forces": -slopes[0], **({"stress": slopes[1]} if "stress" in batch else {})}


def potential_losses(network: nn.Module, batch: Batch) -> Losses:
    return {task: F.mse_loss(value, batch[task]) for task, value in energy_and_slopes(network, batch).items()}


def potential(
    stress: bool = False, clusters: int = 16, atoms: int = 12, width: int = 64, blocks: int = 3, radial: int = 20
) -> Workload:
    """SchNet-like potential, 2 tasks or, with stress, 3; W = the readout's hidden weight."""
    cutoff, species = 5.0, 4
    network = Potential(width, blocks, radial, species, cutoff)
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    places = torch.cat([1.5 * grid[torch.randperm(len(grid))[:atoms]] for _ in range(clusters)])
    positions = places + 0.1 * torch.randn(len(places), 3)
    cluster = torch.arange(clusters).repeat_interleave(atoms)
    close = (torch.cdist(positions, positions) < cutoff) & (cluster[:, None] == cluster)
    data = {
        "positions": positions,
        "species": torch.randint(species, (len(places),)),
        "cluster": cluster,
        "pairs": close.fill_diagonal_(False).nonzero().T,
        "energy": torch.randn(clusters),
        "forces": torch.randn(len(places), 3),
    }
    if stress:
        data["stress"] = torch.randn(clusters, 3, 3)
    return Workload(network, potential_losses, [network.readout[0].weight], data)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "conv": conv,
    "transformer": transformer,
    "mlp": mlp,
    "pinn": pinn,
    "pinn-2048": functools.partial(pinn, points=2048),
    "forces": potential,
    "stress": functools.partial(potential, stress=True),
}
