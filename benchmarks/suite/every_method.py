"""The methods of ``every_method.yaml``: all that ``compare`` has, as it makes them, and others of TorchJD's."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml

from benchmarks.suite.methods import Spec, balancer_class, filled
from benchmarks.suite.problem import Problem
from lightning_gradnorm import LossBalancer

FILE = Path(__file__).with_suffix(".yaml")
SPECS: dict[str, Spec] = yaml.safe_load(FILE.read_text(encoding="utf-8"))


def asks_for_nothing(name: str) -> bool:
    """Whether the method wants to know nothing of the problem but its losses and the layer that they share."""
    spec = SPECS[name]
    words = any(str(value).startswith("$") for value in spec.values())
    return not words and not {"kpis", "ntk_traces"} & set(balancer_class(name, spec).needs)


ASKING_NOTHING: list[str] = list(filter(asks_for_nothing, SPECS))
ANYWHERE: list[str] = [name for name in ASKING_NOTHING if SPECS[name].get("when") != "same step"]
"""Those of them that need no one place where the tasks meet."""


def balancer(name: str, tasks: Sequence[str], **more: Any) -> LossBalancer:
    """A method that asks for nothing.

    Args:
        name: of the method, out of ``ASKING_NOTHING``.
        tasks: the names of the losses.
        more: settings that go before its own.

    Raises:
        ImportError: if it wants a package that is not there.
    """
    problem = cast(Problem, SimpleNamespace(tasks=tasks))
    settings = {key: filled(value, problem, 1) for key, value in SPECS[name].items() if key != "class"}
    return balancer_class(name, SPECS[name])(**settings | more)
