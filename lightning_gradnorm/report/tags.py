"""The names of what is logged, and TensorBoard's page of charts.

| tag | meaning |
|---|---|
| ``loss_weight/<task>`` | the weight that this step applied |
| ``task_loss/<task>`` | L_i, unweighted |
| ``grad_norm/<task>`` | G_i = w_i ‖∇_W L_i‖, weighted |
| ``target_norm/<task>`` | what GradNorm wants G_i to be |
| ``loss_ratio/<task>`` | L_i(t) / L_i(0) |
| ``inverse_rate/<task>`` | r_i: above 1 for a slow task |
| ``grad_cosine/<a>_<b>`` | cosine between two tasks' gradients on W; below 0 they conflict |
| ``total_loss/weighted`` | Σ w_i L_i, what was trained on |
| ``total_loss/unweighted`` | Σ L_i, a yardstick that does not move |
| ``total_loss/unweighted_epoch`` | the same, mean over the epoch's batches |
| ``task_loss_epoch/<task>`` | L_i, mean over the epoch's batches that have the task |
| ``val_total_loss``, ``test_total_loss`` | Σ L_i of an evaluation, mean over its batches |
| ``val_task_loss/<task>``, ``test_task_loss/<task>`` | L_i of an evaluation likewise |

Means are by batch size and over all ranks. Where no steps are logged (``log_every_n_steps=0``) an epoch's means stand under the
names without ``_epoch``. For EarlyStopping, ModelCheckpoint and ReduceLROnPlateau the epoch's mean is there as
``total_loss/unweighted`` in any case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_gradnorm.task_names import task_tag

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTED, UNWEIGHTED = "total_loss/weighted", "total_loss/unweighted"

# the tags that have one value per task and step
PER_TASK = ("loss_weight", "task_loss", "grad_norm", "target_norm", "loss_ratio", "inverse_rate")

# chart → the tags on it, as TensorBoard's Custom Scalars takes them: regular expressions, so any task's name will do
CHARTS = {
    "loss weights": ["^loss_weight/"],
    "weighted gradient norms and their targets": ["^grad_norm/", "^target_norm/"],
    "loss ratios and inverse rates": ["^loss_ratio/", "^inverse_rate/"],
    "task losses": ["^task_loss/"],
    "gradient cosines": ["^grad_cosine/"],
    "total loss": ["^total_loss/(un)?weighted$"],  # of the steps; the epochs' means are no curve beside them
}


def custom_scalars_layout(tags: Collection[str]) -> dict[str, dict[str, list[object]]]:
    """What ``SummaryWriter.add_custom_scalars`` takes: the charts of ``CHARTS`` that have a curve among these tags."""
    charts: dict[str, list[object]] = {
        chart: ["Multiline", list(of)] for chart, of in CHARTS.items() if any(re.match(one, tag) for one in of for tag in tags)
    }
    return {"loss balancing": charts}


def per_task_names(tag: str, tasks: Sequence[str]) -> list[str]:
    """``<tag>/<task>`` for each task."""
    return [f"{tag}/{task_tag(task)}" for task in tasks]


def per_task(tag: str, tasks: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """``[T]`` values → ``<tag>/<task>`` → scalar."""
    return dict(zip(per_task_names(tag, tasks), values.unbind(), strict=True))


def per_pair_names(tag: str, tasks: Sequence[str]) -> list[str]:
    """``<tag>/<a>_<b>`` for each pair, in the order of ``itertools.combinations``."""
    names: dict[str, None] = {}
    for a, b in itertools.combinations(tasks, 2):
        joint = "_"
        while (name := f"{tag}/{task_tag(a)}{joint}{task_tag(b)}") in names:  # "a_b" with "c", "a" with "b_c"
            joint += "_"
        names[name] = None
    return list(names)


def per_pair(tag: str, tasks: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """``[T, T]`` symmetric values → ``<tag>/<a>_<b>`` → scalar, each pair once."""
    pairs = itertools.combinations(range(len(tasks)), 2)
    return {name: values[i, j] for name, (i, j) in zip(per_pair_names(tag, tasks), pairs, strict=True)}


def totals(weights: Tensor, losses: Tensor) -> Mapping[str, Tensor]:
    """Σ w_i L_i and Σ L_i of two ``[T]`` vectors."""
    return {WEIGHTED: (weights * losses).sum(), UNWEIGHTED: losses.sum()}
