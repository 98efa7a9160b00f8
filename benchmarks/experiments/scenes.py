"""A U-Net for class, depth and normal of every pixel of rendered rooms, as on NYUv2 in the GradNorm paper (section 5).

The problem, the network and the methods are those of ``examples/scenes.py``; the measures are the paper's three.

    python -m benchmarks.experiments.scenes                    # three seeds: six minutes
    python -m benchmarks.experiments.scenes --quick
"""

import base64
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scenes import ANSWERS, BALANCERS, SHOWN, WeightsTaken
from scenes_figure import Outcome, draw
from scenes_problem import MEASURES, TASKS, Batches, SceneNet, load
from scenes_renderer import Views
from torch import Tensor

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.fits import STATIC, Fit, balancer_of
from benchmarks.experiments.records import Problem, Record, Records
from lightning_gradnorm.report.comparison import Better

NAME = "rendered rooms"
METHODS = (*BALANCERS, STATIC)
BETTER: Mapping[str, Better] = {name: "lower" for name, _ in MEASURES.values()}
KEPT = {"segmentation": (0, 1), "depth": (0, 0.04), "normals": (-1, 0.01)}  # answers in whole numbers: what is 0, and a unit
views = functools.cache(load)


def packed(task: str, answers: Tensor) -> str:
    """Answers as text: whole numbers from 0 to 255, compressed."""
    lowest, unit = KEPT[task]
    values = ((answers - lowest) / unit).round().clamp(0, 255).numpy().astype(np.uint8)
    return base64.b85encode(zlib.compress(values.tobytes(), 9)).decode()


def unpacked(task: str, text: str, rooms: Views) -> Tensor:
    """The answers again, in the shape of the truth about the rooms."""
    lowest, unit = KEPT[task]
    shape = (rooms.normals if task == "normals" else rooms.classes).shape
    values = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8).reshape(shape)
    return torch.tensor(values, dtype=torch.long) * unit + lowest


def fit(case: Case) -> Record:
    """One fit; all methods start from one network and see the same batches."""
    train, held_out = views()
    torch.manual_seed(case.seed)
    module = SceneNet(train.depth.mean().item(), case.steps)
    fit = Fit(case, balancer_of(case, BALANCERS))
    taken = WeightsTaken(fit.balancing, case.every)
    fit.run(module, Batches(train, case.seed), callbacks=[taken])
    answers = module.answers(held_out)
    curves = {"step": [float(step) for step in taken.weights]}
    curves |= {f"weight {task}": [weights[task] for weights in taken.weights.values()] for task in TASKS}
    record = fit.record(module.measures(held_out, answers), curves)
    if case.seed == 0 and case.method in ANSWERS:
        record.extras.update({task: packed(task, answers[task][:SHOWN]) for task in TASKS})
    return record


def outcome(record: Record, rooms: Views) -> Outcome:
    """What the figure shows of a fit."""
    curves = zip(*(record.curves[f"weight {task}"] for task in TASKS), strict=True)
    weights = {
        int(step): dict(zip(TASKS, values, strict=True)) for step, values in zip(record.curves["step"], curves, strict=True)
    }
    return Outcome(record.measures, weights, {task: unpacked(task, text, rooms) for task, text in record.extras.items()})


def draw_records(records: Records, path: Path) -> None:
    """The example's figure, if all of its methods are there."""
    found = records.of(NAME, METHODS)
    if found.keys() == set(METHODS):
        rooms = views()[1][:SHOWN]
        outcomes: dict[str, Sequence[Outcome]] = {name: [outcome(fit, rooms) for fit in found[name]] for name in METHODS}
        draw(outcomes, rooms, path)


EXPERIMENT = Experiment(
    name="scenes",
    about=__doc__ or "",
    problems={NAME: Problem(METHODS, BETTER)},
    fit=fit,
    draw=draw_records,
    steps=800,
    quick_steps=4,
    seeds=3,
    after={STATIC: "GradNorm"},
)

if __name__ == "__main__":
    main(EXPERIMENT)
