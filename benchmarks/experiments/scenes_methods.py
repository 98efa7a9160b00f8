"""The rendered rooms of ``scenes.py`` again, with every method that asks for nothing, each at its defaults.

python -m benchmarks.experiments.scenes_methods            # five seeds
python -m benchmarks.experiments.scenes_methods --quick
"""

import torch
from scenes_problem import TASKS, Batches, SceneNet

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.fits import Fit
from benchmarks.experiments.records import Problem, Record
from benchmarks.experiments.scenes import BETTER, NAME, views
from benchmarks.suite.every_method import ASKING_NOTHING, balancer

METHODS = tuple(ASKING_NOTHING)


def unmade() -> list[str]:
    """The methods that want a package which is not there: their records are shown as they are."""
    found = []
    for method in METHODS:
        try:
            balancer(method, TASKS)
        except ImportError:
            found.append(method)
    return found


def fit(case: Case) -> Record:
    """One fit; all methods start from one network and see the same batches."""
    train, held_out = views()
    torch.manual_seed(case.seed)
    module = SceneNet(train.depth.mean().item(), case.steps)
    fit = Fit(case, balancer(case.method, TASKS))
    fit.run(module, Batches(train, case.seed), callbacks=())
    return fit.record(module.measures(held_out, module.answers(held_out)))


EXPERIMENT = Experiment(
    name="scenes_methods",
    about=__doc__ or "",
    problems={NAME: Problem(METHODS, BETTER, unmade())},
    fit=fit,
    steps=800,
    quick_steps=4,
    seeds=5,
)

if __name__ == "__main__":
    main(EXPERIMENT)
