"""One optimiser step's measurement, out of its micro-batches and ranks."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradnorm.measurement import Measurement, is_of_gradients, stack_scalars, widest_float
from lightning_gradnorm.task_gradients import TaskGradients, cosines, gramian_of

AllReduceSum = Callable[[Tensor], Tensor]
Numbers = Mapping[str, Mapping[str, Tensor]]  # field of a measurement → task name → scalar


def _summed(held: Tensor | None, value: Tensor) -> Tensor:
    return value if held is None else held + value


def _mean(total: Tensor, count: int | Tensor) -> Tensor:
    return total if isinstance(count, int) and count == 1 else total / count


def _in_order(pair: tuple[str, str]) -> tuple[str, str]:
    one, other = pair
    return pair if one < other else (other, one)


class MeasurementWindow:
    """Adds up the micro-batches of one optimiser step, and then the ranks.

    The norm of a step is the norm of its *mean* gradient, as if the micro-batches of all ranks were one batch; the mean of
    their norms would be another number. A task's mean is over the micro-batches that have it.

    Args:
        of_features: whether the gradients are of features, each micro-batch having its own, instead of parameters: their
            squared norms add up then.
        besides: fields of a measurement that every task brings a number for, which is averaged as its loss is.
        pairs: whether the inner products of every two tasks' gradients are wanted too.

    Attributes:
        is_whole: whether all ranks' parts are in it.
    """

    def __init__(self, *, of_features: bool = False, besides: Sequence[str] = (), pairs: bool = False) -> None:
        self._of_features, self._pairs = of_features, pairs
        self._noted: list[tuple[Mapping[str, Tensor], Tensor, Numbers]] = []  # micro-batches not added up yet
        self._applied: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}
        self._besides: dict[str, dict[str, Tensor]] = {field: {} for field in besides}
        self._counts: dict[str, int | Tensor] = {}
        self._only: TaskGradients | None = None  # while there is one micro-batch, its gradients as they came: no copy
        self._sums: dict[str, Tensor] = {}
        self._products: dict[
            tuple[str, str], Tensor
        ] = {}  # of features, Σ ⟨g_a, g_b⟩ over the micro-batches, in one order each
        self._measured = False
        self.is_whole: bool = False

    def __bool__(self) -> bool:
        return bool(self._noted or self._losses)

    @property
    def entries(self) -> int:
        """Numbers per task that the ranks exchange: |W|, 1 for features; 0 before any gradient was measured."""
        if self._of_features or not self._measured:
            return int(self._measured)
        if self._only is not None:
            return self._only.entries
        return next(iter(self._sums.values())).numel()

    @property
    def has_let_go(self) -> bool:
        """Whether of the one micro-batch only norms are here, to which no other's can be added."""
        return self._only is not None and self._only.others is not None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that took part."""
        self._add_up()
        return tuple(self._losses)

    @property
    def counts(self) -> Mapping[str, int | Tensor]:
        """Task → how many micro-batches had it."""
        self._add_up()
        return self._counts

    @property
    def applied(self) -> dict[str, Tensor]:
        """Task → the weight that this rank's micro-batches applied, on average."""
        self._add_up()
        return self._applied

    def add_losses(self, losses: Mapping[str, Tensor], weights: Tensor, besides: Numbers | None = None) -> None:
        """Take one micro-batch.

        Args:
            losses: task name → detached scalar loss.
            weights: those that its total applied, shape ``[T]``.
            besides: field of a measurement → task name → scalar, of all these tasks.
        """
        self._noted.append((losses, weights, besides or {}))  # most steps are neither measured nor logged: no sum then

    def _add_up(self) -> None:
        for losses, weights, besides in self._noted:
            for task, weight in zip(losses, weights.unbind(), strict=True):
                wide = widest_float(losses[task].device)
                self._losses[task] = _summed(self._losses.get(task), losses[task].to(wide))
                for field, held in self._besides.items():
                    if task in (numbers := besides.get(field, {})):
                        held[task] = _summed(held.get(task), numbers[task].to(wide))
                self._count(task, 1, weight)
        self._noted.clear()

    def _count(self, task: str, times: int | Tensor, weight: Tensor) -> None:
        """So many more micro-batches of the task, which have applied this weight."""
        count = self._counts[task] = self._counts.get(task, 0) + times
        before = self._applied.get(task)
        # This form of the mean is exact where all are the same.
        self._applied[task] = weight if before is None else before + (weight - before) * times / count

    def add_gradients(self, gradients: TaskGradients) -> None:
        """Take the gradients of the micro-batch whose losses were added last."""
        if not self._measured:
            self._only, self._measured = gradients, True
            return
        self._spread_out()
        self._add_flat(gradients)

    def join(self, batch: "MeasurementWindow", applied: Mapping[str, float]) -> None:
        """Take a window of one micro-batch, of this rank or of all.

        Args:
            batch: of the same kind as this one; it is not to be used any more.
            applied: task → the weight that the micro-batch has applied.
        """
        batch._add_up()
        self._add_up()
        batch._applied = {task: loss.new_tensor(applied[task]) for task, loss in batch._losses.items()}
        if not self:
            vars(self).update(vars(batch))
            return
        self._spread_out()
        batch._spread_out()
        self.is_whole &= batch.is_whole
        for task, weight in batch._applied.items():
            self._count(task, batch._counts[task], weight)
        of_fields = [(self._besides[field], batch._besides[field]) for field in self._besides]
        for held, further in ((self._losses, batch._losses), (self._sums, batch._sums), *of_fields):
            held.update({task: _summed(held.get(task), value) for task, value in further.items()})
        for pair, product in batch._products.items():
            self._products[pair] = _summed(self._products.get(pair), product)

    def _spread_out(self) -> None:
        if self._only is not None:
            self._add_flat(self._only)
            self._only = None

    def _add_flat(self, gradients: TaskGradients) -> None:
        if self._of_features and self._pairs:
            inner = gradients.gramian()
            rows = inner.diagonal().unsqueeze(1)
            for (a, one), (b, other) in itertools.combinations(enumerate(gradients.tasks), 2):
                pair = _in_order((one, other))
                self._products[pair] = _summed(self._products.get(pair), inner[a, b])
        else:
            rows = gradients.norms().square().unsqueeze(1) if self._of_features else gradients.flat()
        for task, gradient in zip(gradients.tasks, rows, strict=True):
            self._sums[task] = _summed(self._sums.get(task), gradient)

    def reduce(
        self, all_reduce: AllReduceSum, tasks: Sequence[str], entries: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take in what the other ranks measured, with one collective, whatever this one has seen.

        Args:
            all_reduce: sums a vector over the ranks.
            tasks: all tasks, in the order that the ranks have agreed on.
            entries: |W|, or 0 where no gradients are measured.
            device: where the collective works.
            dtype: in which; the same on every rank, also on one that has nothing to send.
        """
        self._add_up()
        self._spread_out()
        besides = [field for field in self._besides if entries or not is_of_gradients(field)]
        pairs = list(itertools.combinations(tasks, 2)) if entries and self._of_features and self._pairs else []
        width = entries + len(besides) + 2
        packed = torch.zeros(len(tasks) * width + len(pairs), dtype=dtype, device=device)
        for row, task in zip(packed[: len(tasks) * width].view(len(tasks), width), tasks, strict=True):
            if task in self._losses:
                if entries:
                    row[:entries] = self._sums.pop(task)
                numbers = [*(self._besides[field][task] for field in besides), self._losses[task]]
                row[entries:-1] = torch.stack([value.to(device, dtype) for value in numbers])
                row[-1] = self._counts[task]
        for place, pair in enumerate(pairs, len(tasks) * width):
            packed[place] = self._products.get(_in_order(pair), 0)
        whole = all_reduce(packed)
        reduced, products = whole[: len(tasks) * width].view(len(tasks), width), whole[len(tasks) * width :]
        here = set(self._losses)
        # What this rank had is present; of what it had not, it asks.
        present = [k for k, task in enumerate(tasks) if task in here or bool(reduced[k, -1] > 0)]
        self._losses = {tasks[k]: reduced[k, -2].to(widest_float(device)) for k in present}
        for place, field in enumerate(besides, entries):
            self._besides[field] = {tasks[k]: reduced[k, place].to(widest_float(device)) for k in present}
        self._counts = {tasks[k]: reduced[k, -1] for k in present}
        self._sums = {tasks[k]: reduced[k, :entries] for k in present} if entries else {}
        self._products = {_in_order(pair): product for pair, product in zip(pairs, products.unbind(), strict=True)}
        self._measured = bool(self._sums)
        self.is_whole = True

    def measurement(self, *, magnitudes: bool = False) -> Measurement | None:
        """Means, and norms of the mean gradients if there are any, of the tasks that took part; ``None`` if none did.

        Args:
            magnitudes: whether the largest and the mean size of the gradients' entries are wanted too.
        """
        self._add_up()
        if not self._losses:
            return None
        losses = stack_scalars(_mean(loss, self._counts[task]) for task, loss in self._losses.items())
        besides = {
            field: stack_scalars(_mean(number, self._counts[task]) for task, number in held.items())
            for field, held in self._besides.items()
            if held
        }
        maxima, means = self._magnitudes() if magnitudes and self._measured else (None, None)
        gramian = self._gramian() if self._pairs and self._measured else None
        norms = self._norms() if self._measured and gramian is None else None
        norms = norms if gramian is None else gramian.diagonal().clamp_min(0).sqrt()
        return Measurement(self.tasks, losses, norms, maxima, means, **besides, gramian=gramian)

    def _magnitudes(self) -> tuple[Tensor, Tensor]:
        """Largest |g| and mean |g| over the entries of each task's mean gradient, ``[T]`` each."""
        rows = self._only.flat() if self._only is not None else torch.stack(self._mean_gradients())
        rows = rows.abs().to(widest_float(rows.device))
        return rows.amax(1), rows.mean(1)

    def cosines(self) -> Tensor | None:
        """Cosine between every two tasks' mean gradients, ``[T, T]``; ``None`` where they cannot be had."""
        if not self._measured or (self._of_features and self._only is None):
            return None
        return self._only.cosines() if self._only is not None else cosines(torch.stack(list(self._sums.values())))

    def _norms(self) -> Tensor:
        if self._only is not None:
            return self._only.norms()
        if self._of_features:
            return torch.stack([self._sums[task].sum().sqrt() / count for task, count in self._counts.items()])
        means = self._mean_gradients()
        return torch.stack([torch.linalg.vector_norm(mean, dtype=widest_float(mean.device)) for mean in means])

    def _mean_gradients(self) -> list[Tensor]:
        return [self._sums[task] / count for task, count in self._counts.items()]

    def _gramian(self) -> Tensor:
        if self._only is not None:
            return self._only.gramian()
        if not self._of_features:
            return gramian_of(torch.stack(self._mean_gradients()))
        inner = torch.diag(torch.cat([self._sums[task] for task in self._counts]))
        for (a, one), (b, other) in itertools.combinations(enumerate(self._counts), 2):
            inner[a, b] = inner[b, a] = self._products.get(_in_order((one, other)), 0.0)
        counts = torch.stack(
            [torch.as_tensor(count, dtype=inner.dtype, device=inner.device) for count in self._counts.values()]
        )
        return inner / torch.outer(counts, counts)
