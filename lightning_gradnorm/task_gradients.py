"""What a backward brought for each task on the shared parameters: gradients, and what is made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.measurement import widest_float


@dataclass(frozen=True)
class TaskGradients:
    """Each task's gradient on the shared parameters W.

    Attributes:
        tasks: task names, ``T`` of them.
        gradients: per task, per parameter, c_i ∇_W L_i in the parameter's shape, or ``None`` where the task does not
            use that parameter, and where ``factors`` has it.
        cotangents: c_i = s · ∂total/∂L_i, shape ``[T]``: what to divide by for the unweighted gradient.
        parameters: the shared parameters.
        factors: number of a parameter → the factors of all tasks' gradients on it.
        others: per task, number of a parameter → the norm of a gradient that was let go of; ``None`` where none was. Else only
            ``norms`` can be asked for.
        pairs: whether the inner products can be asked for all the same.
    """

    tasks: tuple[str, ...]
    gradients: list[list[Tensor | None]]
    cotangents: Tensor
    parameters: list[Tensor]
    factors: Mapping[int, WeightFactors] = field(default_factory=dict)
    others: list[dict[int, Tensor]] | None = None
    pairs: bool = False

    def norms(self) -> Tensor:
        """n_i = ‖∇_W L_i‖₂ of the unweighted losses, shape ``[T]``, summed in float64 where the device has it."""
        device = self.cotangents.device
        parts = [factors.squares().to(device).sqrt() for factors in self.factors.values()]
        if self.others is not None and any(self.others):
            norms = [
                [norm_of(g) if g is not None else others[k] for k, g in enumerate(row) if g is not None or k in others]
                for row, others in zip(self.gradients, self.others, strict=True)
            ]
            parts.append(_stacked(norms, self.cotangents))
        else:
            rows = [[g for g in row if g is not None] for row in self.gradients]
            if any(rows) or not parts:
                parts.append(_norms(rows, self.cotangents))
        found = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return found / self.cotangents.abs()

    @property
    def entries(self) -> int:
        """∣W∣: entries of one task's gradient; a complex number is two."""
        return sum(parameter.numel() * (1 + parameter.is_complex()) for parameter in self.parameters)

    def cosines(self) -> Tensor:
        """Cosine of the angle between every two tasks' gradients, ``[T, T]``; NaN beside one of zeros."""
        self._check_kept(or_pairs=True)
        signs = self.cotangents.sign()
        if not self.factors:
            return cosines(self._rows(self.gradients, self.parameters)) * torch.outer(signs, signs)
        inner = self._inner()
        norms = inner.diagonal().clamp_min(0).sqrt()
        return inner / torch.outer(norms, norms) * torch.outer(signs, signs)

    def gramian(self) -> Tensor:
        """⟨∇_W L_i, ∇_W L_j⟩ of the unweighted losses, ``[T, T]``, as wide as the device allows."""
        self._check_kept(or_pairs=True)
        inner = self._inner() if self.factors else gramian_of(self._rows(self.gradients, self.parameters))
        return inner / torch.outer(self.cotangents, self.cotangents)

    def _inner(self) -> Tensor:
        """⟨c_i ∇_W L_i, c_j ∇_W L_j⟩, ``[T, T]``, where there are factors."""
        device = self.cotangents.device
        inner = torch.stack([factors.inner().to(device) for factors in self.factors.values()]).sum(0)
        others = [k for k in range(len(self.parameters)) if k not in self.factors]
        if others:
            rows = self._rows([[row[k] for k in others] for row in self.gradients], [self.parameters[k] for k in others])
            inner = inner + gramian_of(rows.to(inner))
        return inner

    def flat(self) -> Tensor:
        """∇_W L_i of the unweighted losses, shape ``[T, ∣W∣]``, in at least float32; 0 where a task uses none of it."""
        self._check_kept()
        made = {k: factors.dense() for k, factors in self.factors.items()}
        whole = [[made[k][i] if k in made else g for k, g in enumerate(row)] for i, row in enumerate(self.gradients)]
        rows = self._rows(whole, self.parameters)
        return rows / self.cotangents.to(rows.dtype).unsqueeze(1)

    def _check_kept(self, *, or_pairs: bool = False) -> None:
        if self.others is not None and not (or_pairs and self.pairs):
            raise RuntimeError(
                "The tasks' gradients were let go of once their norms were known (keep=False), so these are all that can be "
                "asked for. Read them with keep=True; for inner products, pairs=True is enough."
            )

    def _rows(self, gradients: list[list[Tensor | None]], parameters: list[Tensor]) -> Tensor:
        """``[T, entries]``, in at least float32."""
        device = self.cotangents.device
        rows = [
            torch.cat(
                [
                    _plain(torch.zeros_like(p) if g is None else g).flatten().to(device)
                    for g, p in zip(row, parameters, strict=True)
                ]
            )
            for row in gradients
        ]
        stacked = torch.stack(rows)
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


Weigh = Callable[[TaskGradients], Sequence[float]]
"""Makes a weight for each task out of the tasks' gradients on W."""


def _plain(gradient: Tensor) -> Tensor:
    """Dense, and a complex tensor as pairs of its real and imaginary parts, ``[…, 2]``: what is trained are these."""
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()  # of an embedding with sparse=True
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


_FEW = 1 << 16  # elements


def _norms(rows: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """Euclidean norm of each row of gradients as one vector, ``[T]``.

    Where gradients are small, many norms cost more than one copy.
    """
    every = [g for row in rows for g in row]
    lengths = [sum([g.numel() for g in row]) for row in rows]
    kinds = {(g.device, g.dtype, g.layout) for g in every}
    alike = len(kinds) == 1 and every[0].layout == torch.strided and not every[0].is_complex()
    if not alike or max(lengths) > _FEW or len(every) == len(rows):
        return _stacked([[norm_of(g) for g in row] for row in rows], like)
    flat, wide = torch.cat([_as_it_lies(g).flatten() for g in every]), widest_float(every[0].device)
    if len(set(lengths)) == 1:
        found: Tensor = torch.linalg.vector_norm(flat.view(len(rows), -1), dim=1, dtype=wide)
    else:
        found = torch.stack([torch.linalg.vector_norm(row, dtype=wide) for row in torch.split(flat, lengths)])
    return found.to(like.device)


def _as_it_lies(gradient: Tensor) -> Tensor:
    """With dimensions in the order of memory, which matters to no norm."""
    if gradient.is_contiguous():
        return gradient
    return gradient.permute(sorted(range(gradient.ndim), key=gradient.stride, reverse=True))


def _stacked(rows: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """The norm of vectors with these norms as one vector, for each row of them, ``[T]``; 0 where there are none."""
    found = []
    for row in rows:
        norms = [norm.to(like.device) for norm in row] or [like.new_zeros(())]
        found.append(norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))
    return torch.stack(found)


def is_small(tensor: Tensor) -> bool:
    """Whether a gradient on it is best taken together with others."""
    return tensor.numel() <= _FEW


def norm_of(gradient: Tensor) -> Tensor:
    """Euclidean norm, scalar, as wide as the device allows."""
    return _norm_of_one(_plain(gradient))


def _norm_of_one(gradient: Tensor) -> Tensor:
    wide = widest_float(gradient.device)
    if gradient.device.type == "cpu" and gradient.dtype == torch.float32 and gradient.ndim > 1 and gradient.numel() > _FEW:
        # A float64 norm makes a float64 copy on the CPU. The rows, as they lie in memory, are short enough for float32.
        rows = _as_it_lies(gradient).flatten(1)
        norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1), dtype=wide)
        if 1e-12 < norm < 1e18:  # nothing in it over- or underflowed
            return norm
    whole: Tensor = torch.linalg.vector_norm(gradient, dtype=wide)
    return whole


def cosines(gradients: Tensor) -> Tensor:
    """Cosine of the angle between every two rows, ``[T, ∣W∣]`` → ``[T, T]``; NaN beside a row of zeros."""
    if gradients.shape[1]:
        gradients = gradients / _largest(gradients)
    unit = gradients / torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    return torch.mm(unit, unit.T)


def gramian_of(gradients: Tensor) -> Tensor:
    """Inner products of every two rows, ``[T, |W|]`` → ``[T, T]``, as wide as the device allows."""
    if not gradients.shape[1]:
        return gradients.new_zeros(len(gradients), len(gradients), dtype=widest_float(gradients.device))
    largest = _largest(gradients)
    unit = gradients / largest.where(largest > 0, 1)
    sizes = largest.flatten().to(widest_float(gradients.device))
    return torch.mm(unit, unit.T).to(sizes) * torch.outer(sizes, sizes)


def _largest(gradients: Tensor) -> Tensor:
    """Largest |entry| of each row, ``[T, 1]``: over it, squares neither over- nor underflow."""
    return gradients.abs().amax(1, keepdim=True)
