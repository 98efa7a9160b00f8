"""Nodes that compute what they send down one way and not the other: autograd's own formulas, called by hand, compute both.

So a weight's gradient is not made where only the way on is asked for; and on the way through a derivative's graph (of forces,
of a residual), the other factor of each product is not, nor the second derivative of each activation.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

Gradients = list[Tensor | None]
_Part = Callable[[Any, Tensor, Sequence[bool]], Sequence[Tensor | None]]


def _scaled(tensor: Tensor, factor: Any) -> Tensor:
    return tensor if factor == 1 else tensor * (factor.conjugate() if isinstance(factor, complex) else factor)


def _of_mm(node: Any, cotangent: Tensor, wanted: Sequence[bool]) -> Gradients:
    return [
        cotangent @ node._saved_mat2.mH if wanted[0] else None,
        node._saved_self.mH @ cotangent if wanted[1] else None,
    ]


def _of_addmm(node: Any, cotangent: Tensor, wanted: Sequence[bool]) -> Gradients:
    alpha = node._saved_alpha
    return [
        _scaled(cotangent, node._saved_beta) if wanted[0] else None,
        _scaled(cotangent @ node._saved_mat2.mH, alpha) if wanted[1] else None,
        _scaled(node._saved_mat1.mH @ cotangent, alpha) if wanted[2] else None,
    ]


def _of_bmm(node: Any, cotangent: Tensor, wanted: Sequence[bool]) -> Gradients:
    return [
        cotangent.bmm(node._saved_mat2.transpose(1, 2).conj()) if wanted[0] else None,
        node._saved_self.transpose(1, 2).conj().bmm(cotangent) if wanted[1] else None,
    ]


def _of_mul(node: Any, cotangent: Tensor, wanted: Sequence[bool]) -> Gradients:
    return [
        cotangent * node._saved_other.conj() if wanted[0] else None,
        cotangent * node._saved_self.conj() if wanted[1] else None,
    ]


def _of_convolution(node: Any, cotangent: Tensor, wanted: Sequence[bool]) -> Gradients:
    return list(
        torch.ops.aten.convolution_backward(
            cotangent,
            node._saved_input,
            node._saved_weight,
            node._saved_bias_sym_sizes_opt,
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            node._saved_transposed,
            node._saved_output_padding,
            node._saved_groups,
            list(wanted),
        )
    )


def _of_slope(slope: Callable[..., Tensor], *saved: str) -> _Part:
    """For the derivative of an activation, y = slope(x) · z: z is sent the slope times what came; x the whole node's answer."""

    def part(node: Any, cotangent: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        if wanted[1]:
            return cast(Sequence[Tensor | None], node(cotangent))
        given = [getattr(node, f"_saved_{name}") for name in saved]
        return [slope(cotangent, *(value.conj() if isinstance(value, Tensor) else value for value in given)), None]

    return part


_aten = torch.ops.aten
PARTS: dict[str, _Part] = {
    "MmBackward0": _of_mm,
    "AddmmBackward0": _of_addmm,
    "BmmBackward0": _of_bmm,
    "MulBackward0": _of_mul,
    "ConvolutionBackward0": _of_convolution,
    "EluBackwardBackward0": _of_slope(_aten.elu_backward, "alpha", "scale", "input_scale", "is_result", "self_or_result"),
    "SoftplusBackwardBackward0": _of_slope(_aten.softplus_backward, "self", "beta", "threshold"),
    "TanhBackwardBackward0": _of_slope(_aten.tanh_backward, "output"),
}
