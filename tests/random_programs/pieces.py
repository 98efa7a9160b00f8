"""The layers that programs are made of, each a map of ``[rows, width]`` to itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECES: dict[str, Callable[[int, int], nn.Module]] = {}  # kind → of width and option
_Apply = Callable[..., Tensor]


class Through(nn.Module):
    """``apply(part, …, h)`` of the parts that it owns."""

    def __init__(self, apply: _Apply, *parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._apply_to = apply
        self._names = [f"part{i}" for i in range(len(parts))]
        for name, part in zip(self._names, parts, strict=True):
            setattr(self, name, part)

    def forward(self, h: Tensor) -> Tensor:
        return self._apply_to(*(getattr(self, name) for name in self._names), h)


def piece(make: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
    """Enter a piece under its function's name."""
    PIECES[make.__name__] = make
    return make


def fit(h: Tensor, width: int) -> Tensor:
    """``[n, …]`` → ``[n, width]``, cut off or filled up with zeros."""
    h = h.flatten(1)
    return h[:, :width] if h.shape[1] >= width else F.pad(h, (0, width - h.shape[1]))


def in_two(h: Tensor) -> Tensor:
    """``[n, width]`` → ``[n, 2, width / 2]``."""
    return h.reshape(len(h), 2, h.shape[1] // 2)


def weights(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Drawn anew, about as large as a layer's."""
    return nn.Parameter(torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5)


def _chosen(variants: Sequence[Any], option: int) -> Any:
    return variants[option % len(variants)]


@piece
def linear(width: int, option: int) -> nn.Module:
    layer = nn.Linear(width, width, bias=option % 3 != 1)
    if option == 5:
        layer.weight.requires_grad_(False)
    return layer


@piece
def two_layers(width: int, option: int) -> nn.Module:
    middle = _chosen([4, 2 * width, 1], option)
    return nn.Sequential(nn.Linear(width, middle), nn.Tanh(), nn.Linear(middle, width))


_CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 2, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 2, "dilation": 2, "padding": 1, "bias": False},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 1, "bias": False},
]


def _convolution(kind: type[nn.Module], shape: tuple[int, ...], settings: dict[str, Any]) -> nn.Module:
    layer = kind(shape[0], 2 * shape[0], **settings)

    def convolve(layer: nn.Module, h: Tensor) -> Tensor:
        if kind is nn.Conv3d:  # in bfloat16 its backward reads memory that nothing was written to (torch 2.13, CPU)
            with torch.autocast("cpu", enabled=False):
                return fit(layer(h.reshape(len(h), *shape).to(layer.weight.dtype)), h.shape[1])
        return fit(layer(h.reshape(len(h), *shape)), h.shape[1])

    return Through(convolve, layer)


@piece
def conv1d(width: int, option: int) -> nn.Module:
    return _convolution(nn.Conv1d, (2, width // 2), _chosen(_CONVOLUTIONS, option))


@piece
def conv2d(width: int, option: int) -> nn.Module:
    return _convolution(nn.Conv2d, (2, 2, width // 4), _chosen(_CONVOLUTIONS, option))


@piece
def conv3d(width: int, option: int) -> nn.Module:
    return _convolution(nn.Conv3d, (2, 2, 2, width // 8), _chosen(_CONVOLUTIONS, option))


@piece
def conv_of_one_place(width: int, option: int) -> nn.Module:
    """Many channels on few places: where norms by the Gram form are less work."""
    return _convolution(nn.Conv1d, (width, 1), _chosen([*_CONVOLUTIONS[:1], *_CONVOLUTIONS[2:3], *_CONVOLUTIONS[5:]], option))


@piece
def transposed_conv(width: int, option: int) -> nn.Module:
    kind, shape = _chosen([(nn.ConvTranspose1d, (2, width // 2)), (nn.ConvTranspose2d, (2, 2, width // 4))], option)
    return _convolution(kind, shape, _chosen([{"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "groups": 2}], option // 2))


@piece
def batch_norm(width: int, option: int) -> nn.Module:
    return nn.BatchNorm1d(width, affine=option % 3 != 1, momentum=None if option % 3 == 2 else 0.1)


@piece
def layer_norm(width: int, option: int) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=option % 2 == 0)


@piece
def group_norm(width: int, option: int) -> nn.Module:
    return Through(
        lambda norm, h: norm(h.reshape(len(h), 4, h.shape[1] // 4)).flatten(1), nn.GroupNorm(_chosen([2, 4], option), 4)
    )


def _words(h: Tensor) -> Tensor:
    return torch.arange(len(h)) * 5 % h.shape[1]


@piece
def embedding(width: int, option: int) -> nn.Module:
    table = nn.Embedding(width, width, sparse=option % 2 == 1, scale_grad_by_freq=option == 2)
    return Through(lambda table, h: h + table(_words(h)), table)


@piece
def tied_embedding(width: int, option: int) -> nn.Module:
    """Words in, and the same table for the words out."""
    return Through(lambda table, h: F.linear((h + table(_words(h))).tanh(), table.weight), nn.Embedding(width, width))


@piece
def cells(width: int, option: int) -> nn.Module:
    kind, times = _chosen([nn.GRUCell, nn.RNNCell, nn.LSTMCell], option), 1 + option // 3

    def run(cell: nn.Module, h: Tensor) -> Tensor:
        state: Any = None
        for _ in range(times):
            state = cell(h, state)
        return state[0] if isinstance(state, tuple) else state

    return Through(run, kind(width, width, bias=option != 3))


@piece
def recurrent(width: int, option: int) -> nn.Module:
    kind = _chosen([nn.GRU, nn.LSTM], option)
    return Through(lambda layer, h: layer(in_two(h))[0].flatten(1), kind(width // 2, width // 2, batch_first=True))


@piece
def attention(width: int, option: int) -> nn.Module:
    layer = nn.MultiheadAttention(width // 2, 2, dropout=0.1 * (option % 2), batch_first=True)

    def attend(layer: nn.Module, h: Tensor) -> Tensor:
        z = in_two(h)
        return layer(z, z, z, need_weights=option % 3 == 0)[0].flatten(1)

    return Through(attend, layer)


@piece
def transformer(width: int, option: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width // 2, 2, width, dropout=0.2 * (option % 2), batch_first=True, norm_first=option > 2
    )
    return Through(lambda layer, h: layer(in_two(h)).flatten(1), layer)


@piece
def einsum(width: int, option: int) -> nn.Module:
    form = _chosen(["ni,ij->nj", "ni,ji->nj", "ni,nj,ij->ni"], option)
    if form.count(",") == 2:
        return Through(lambda w, h: torch.einsum(form, h, h.tanh(), w), weights(width, width))
    return Through(lambda w, h: torch.einsum(form, h, w), weights(width, width))


@piece
def raw_weight(width: int, option: int) -> nn.Module:
    """A parameter without a layer: by matmul, addmm, as a bias, as a factor, expanded."""
    half = width // 2
    return _chosen(
        [
            Through(lambda w, h: h @ w.T, weights(width, width)),
            Through(lambda w, b, h: torch.addmm(b, h, w), weights(width, width), weights(width)),
            Through(lambda b, h: h + b, weights(width)),
            Through(lambda s, h: h * s, weights(width)),
            Through(lambda w, h: torch.bmm(in_two(h), w.expand(len(h), -1, -1)).flatten(1), weights(half, half)),
        ],
        option,
    )


@piece
def bilinear(width: int, option: int) -> nn.Module:
    return Through(lambda layer, h: layer(h, h.tanh()), nn.Bilinear(width, width, width, bias=option % 2 == 0))


@piece
def prelu(width: int, option: int) -> nn.Module:
    return nn.PReLU(_chosen([1, width], option))


@piece
def complex_linear(width: int, option: int) -> nn.Module:
    layer = nn.Linear(width // 2, width // 2, bias=option % 2 == 0, dtype=torch.complex64)

    def apply(layer: nn.Module, h: Tensor) -> Tensor:
        z = layer(torch.view_as_complex(h.reshape(len(h), h.shape[1] // 2, 2).contiguous()))
        return torch.view_as_real(z.conj().resolve_conj() if option > 2 else z).flatten(1)

    return Through(apply, layer)


@piece
def fourier(width: int, option: int) -> nn.Module:
    """As in a Fourier neural operator."""
    factors = weights(width // 2 + 1, dtype=torch.complex64)
    return Through(lambda factors, h: torch.fft.irfft(torch.fft.rfft(h) * factors, n=h.shape[1]), factors)


@piece
def weight_norm(width: int, option: int) -> nn.Module:
    layer = nn.Linear(width, width)
    if option % 2:
        return nn.utils.weight_norm(layer, dim=_chosen([0, None], option // 2))
    return nn.utils.parametrizations.weight_norm(layer, dim=_chosen([0, None], option // 2))


@piece
def spectral_norm(width: int, option: int) -> nn.Module:
    if option % 2:
        return nn.utils.spectral_norm(nn.Linear(width, width))
    return nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))


@piece
def tied_linear(width: int, option: int) -> nn.Module:
    """Two layers with one weight."""
    first, second = nn.Linear(width, width), nn.Linear(width, width)
    second.weight = first.weight
    if option % 2:
        return Through(lambda layer, h: F.linear(layer(h).tanh(), layer.weight.T), first)
    return Through(lambda first, second, h: second(first(h).tanh()), first, second)


@piece
def substituted(width: int, option: int) -> nn.Module:
    """Called with other parameters than its own."""
    layer, other = nn.Linear(width, width), weights(width, width)

    def call(layer: nn.Module, other: Tensor, h: Tensor) -> Tensor:
        weight = _chosen([2 * layer.weight, layer.weight + other, layer.weight, other], option)
        return torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (h,))

    return Through(call, layer, other)


@piece
def patched(width: int, option: int) -> nn.Module:
    """Its ``forward`` replaced on the instance, or hooks around it that change what goes in and out."""
    layer = nn.Linear(width, width)
    plain = layer.forward
    if option % 5 == 0:
        layer.forward = lambda h: F.linear(h, layer.weight * 0.5, layer.bias)
    elif option % 5 == 1:
        layer.forward = lambda h: plain(h) + 0.1 * plain(h.tanh())
    elif option % 5 == 2:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5,))
    elif option % 5 == 3:
        layer.register_forward_hook(lambda _, inputs, output: output * 2 + inputs[0])
    else:
        layer.forward = lambda h: plain(h.detach())
    return layer
