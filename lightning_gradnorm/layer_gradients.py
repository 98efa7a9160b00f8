"""All tasks at once through one shared Linear or convolution, from its input and the tasks' gradients at its output.

For rows X of the layer's input ``[R, inputs]`` and of task i's gradient at its output Δ_i ``[R, outputs]``, the gradient on the
weight is Δ_iᵀ X. Its norm needs no such product: ‖Δ_iᵀ X‖² = ⟨X Xᵀ, Δ_i Δ_iᵀ⟩, the Gram form, which takes fewer operations
where rows are few. That is counted, and where it takes more, ``JointBackward`` carries each task's gradient down to W as ever.
A convolution is a Linear of its unfolded input; a layer called several times has the rows of all its calls; a bias is an input
that is always 1.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from lightning_gradnorm.measurement import widest_float
from lightning_gradnorm.task_gradients import TaskGradients

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerCall(NamedTuple):
    """One call of the layer.

    Attributes:
        input: what it was given.
        output: what it returned, with its graph.
        edge: where the output's gradient arrives, also if the output was changed in place since.
    """

    input: Tensor
    output: Tensor
    edge: GradientEdge


class LayerGradients(TaskGradients):
    """Each task's gradient on a layer's weight (and bias), kept as the factors that it is a product of.

    Args:
        at_outputs: the tasks' gradients at the outputs of the calls.
        layer: a Linear or a convolution.
        calls: of one step.
        parameters: those of the layer that W consists of.
    """

    def __init__(
        self, at_outputs: TaskGradients, layer: nn.Module, calls: Iterable[LayerCall], parameters: list[Tensor]
    ) -> None:
        super().__init__(at_outputs.tasks, [], at_outputs.cotangents, parameters)
        calls = list(calls)
        with torch.no_grad():
            self._inputs = _joined([_input_rows(layer, call.input.detach()) for call in calls])
            self._deltas = [
                _joined(
                    [
                        _output_rows(layer, torch.zeros_like(call.output) if gradient is None else gradient)
                        for gradient, call in zip(row, calls, strict=True)
                    ]
                )
                for row in at_outputs.gradients
            ]
        self._layer = layer
        self._has_bias = isinstance(layer.bias, Tensor) and any(layer.bias is parameter for parameter in parameters)

    @torch.no_grad()
    def norms(self) -> Tensor:
        squares = self._squares(torch.float32)
        if squares.device.type == "cpu" and not bool(((squares > 1e-24) & (squares < 1e30)).all()):
            squares = self._squares(torch.float64)  # something under- or overflowed, or is zero
        return squares.clamp_min(0).sqrt() / self.cotangents.abs()

    @torch.no_grad()
    def cosines(self) -> Tensor:
        deltas, gram = torch.stack(self._deltas), self._gram(torch.float64)
        tasks = len(deltas)
        carried = torch.matmul(gram, deltas.to(gram))  # [T, groups, R, outputs]
        inner = deltas.to(gram).view(tasks, -1) @ carried.view(tasks, -1).T
        norms = inner.diagonal().clamp_min(0).sqrt()
        signs = self.cotangents.sign()
        return inner / torch.outer(norms, norms) * torch.outer(signs, signs)

    @torch.no_grad()
    def flat(self) -> Tensor:
        inputs = self._inputs.to(self._wide(torch.float32))
        rows = []
        for deltas, cotangent in zip(self._deltas, self.cotangents.to(inputs.dtype).unbind(), strict=True):
            deltas = deltas.to(inputs.dtype)
            parts = [deltas.mT @ inputs if p is self._layer.weight else deltas.sum(1) for p in self.parameters]
            rows.append(torch.cat([part.flatten() for part in parts]) / cotangent)
        return torch.stack(rows)

    def _wide(self, least: torch.dtype) -> torch.dtype:
        least = least if self._inputs.device.type != "mps" else torch.float32
        return torch.promote_types(torch.promote_types(self._inputs.dtype, self._deltas[0].dtype), least)

    def _gram(self, least: torch.dtype) -> Tensor:
        """X Xᵀ, ``[groups, R, R]``; with the input of the bias, which is always 1."""
        inputs = self._inputs.to(self._wide(least))
        gram = inputs @ inputs.mT
        return gram + 1 if self._has_bias else gram

    def _squares(self, least: torch.dtype) -> Tensor:
        """‖c_i ∇_W L_i‖² of every task, ``[T]``, as wide as the device allows."""
        strips = _strips(self._gram(least))
        squares = torch.stack([self._by_strips(strips, deltas) for deltas in self._deltas])
        return squares.to(widest_float(squares.device))

    @staticmethod
    def _by_strips(strips: list[Tensor], deltas: Tensor) -> Tensor:
        """⟨X Xᵀ, Δ Δᵀ⟩ over a triangle of blocks: both are symmetric."""
        deltas, width = deltas.to(strips[0].dtype), strips[0].shape[1]
        parts = [
            torch.linalg.vecdot((deltas[:, k * width : (k + 1) * width] @ deltas[:, k * width :].mT).flatten(), strip.flatten())
            for k, strip in enumerate(strips)
        ]
        whole: Tensor = torch.stack(parts).to(widest_float(deltas.device)).sum()
        return whole


def _strip_count(rows: int) -> int:
    """Into how many strips a symmetric matrix is cut: none so thin that its products are slow."""
    return 4 if rows >= 128 else 1


def _part_of_square(rows: int) -> float:
    """How much of a symmetric matrix of that many rows its triangle of blocks is."""
    strips = _strip_count(rows)
    return (strips + 1) / (2 * strips)


def _strips(gram: Tensor) -> list[Tensor]:
    """Of a symmetric ``[…, R, R]``: rows in so many strips, each from its diagonal block on; what lies beside it doubled."""
    rows = gram.shape[-1]
    width = -(-rows // _strip_count(rows))
    strips = []
    for start in range(0, rows, width):
        strip = 2 * gram[..., start : start + width, start:]
        strip[..., :width] /= 2
        strips.append(strip)
    return strips


def gram_is_less(layer: nn.Module, calls: Iterable[LayerCall], tasks: int) -> bool:
    """Whether the norms take fewer operations by the Gram form than by one product per task."""
    if isinstance(layer, nn.Linear):
        inputs, outputs, channels = layer.in_features, layer.out_features, layer.out_features
    else:
        assert isinstance(layer, CONVOLUTIONS)
        inputs = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        outputs, channels = layer.out_channels // layer.groups, layer.out_channels
    rows = sum(call.output.numel() for call in calls) // channels
    return rows * (inputs + tasks * outputs * _part_of_square(rows)) < tasks * inputs * outputs


def _joined(rows: list[Tensor]) -> Tensor:
    """The rows of all calls, ``[groups, R, …]``."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output place sees of the input, ``[groups, R, inputs]``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    assert isinstance(layer, CONVOLUTIONS)
    dims = len(layer.kernel_size)
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, _padding(layer), mode=mode)
    for i in range(dims):
        reach = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, reach, layer.stride[i])[..., :: layer.dilation[i]]
    places = [0, *range(2, 2 + dims)]
    x = x.permute(*places, 1, *range(2 + dims, 2 + 2 * dims))  # batch, places, channels, kernel
    return x.reshape(math.prod(x.shape[: 1 + dims]), layer.groups, -1).transpose(0, 1)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """As ``F.pad`` takes it: last dimension first, both ends."""
    ends: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            both = layer.dilation[i] * (layer.kernel_size[i] - 1)
            ends += [both // 2, both - both // 2]
        else:
            ends += [0, 0] if isinstance(layer.padding, str) else [layer.padding[i]] * 2
    return ends


def _output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """The gradient at each output place, ``[groups, R, outputs]``."""
    y = y.detach()
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, layer.out_features)
    assert isinstance(layer, CONVOLUTIONS)
    y = y if y.ndim == len(layer.kernel_size) + 2 else y.unsqueeze(0)
    return y.movedim(1, -1).reshape(-1, layer.groups, layer.out_channels // layer.groups).transpose(0, 1)
