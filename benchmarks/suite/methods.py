"""The methods of the suite, each as plain settings, so that others can be given on the command line without code."""

import importlib
from collections.abc import Mapping
from typing import Any

import lightning_gradnorm
from benchmarks.suite.members import Member, NormsOn
from benchmarks.suite.problem import Kind, Problem
from lightning_gradnorm import LossBalancer

Spec = Mapping[str, Any]
"""The settings of a method: ``"class"``, a balancer's name in the package, and its arguments.

``"norms_on"``, if it is there, says where gradients are compared: ``"shared"`` (the problem's W, the default), ``"matrices"``
or ``"all"``. An argument that has a ``"class"`` itself, by a dotted path, is an object: that class, called with the rest. Words
that begin with ``$`` stand for what the problem has: ``"$residual"``, its first residual; ``"$residuals"``, a list of all;
``"$tasks"``, how many tasks; ``"$steps/400"``, a share of the training, a whole number of steps; ``"$raised*10"``, weights of
10 on the tasks that are raised by hand and 1 on the others; ``"$trivial"``, one over the loss of the best constant prediction.
A method that wants what a problem does not have is not tried on it.
"""


def everywhere(spec: Spec) -> dict[Kind, Spec]:
    """The same settings on equations and on data."""
    return {"equation": spec, "data": spec}


METHODS: dict[str, dict[Kind, Spec]] = {
    "plain": everywhere({"class": "EqualWeights"}),
    "annealing": {
        "equation": {"class": "LearningRateAnnealing", "reference": "$residual", "norms_on": "matrices"},
        "data": {"class": "LearningRateAnnealing", "form": "norm", "update_every": 10},
    },
    "hand 10": everywhere({"class": "FixedWeights", "weights": "$raised*10"}),
    "hand 100": everywhere({"class": "FixedWeights", "weights": "$raised*100"}),
    "1/trivial loss": {"data": {"class": "FixedWeights", "weights": "$trivial"}},
    "GradNorm": everywhere({"class": "GradNorm"}),
    "NTK": {"equation": {"class": "NTKWeighting", "norms_on": "all"}},
    "GradNorm, residuals": {"equation": {"class": "GradNorm", "residuals": "$residuals"}},
}
REFERENCES = ("plain", "annealing", "hand 10", "hand 100")  # "hand 1" is the plain sum


def obstacle(spec: Spec, problem: type[Problem]) -> str:
    """Why a method of these settings is not tried on the problem; empty if it is."""
    words, needs = [value for value in spec.values() if isinstance(value, str)], balancer_class("", spec).needs
    if spec.get("when") == "same step":
        return "acts in a step's own backward, and a stack has one for all members"
    if "kpis" in needs:
        return "needs a key performance indicator of every task"
    if "ntk_traces" in needs and not problem.residuals:
        return "needs residuals of single points"
    if any(word.startswith("$residual") for word in words) and not problem.residuals:
        return "names a residual, and there is none"
    if "$trivial" in words and problem.kind == "equation":
        return "asks for the best constant prediction, and there is nothing to predict"
    return ""


def filled(value: object, problem: Problem, steps: int) -> Any:
    """A setting's value: an object made, or what the problem has in the place of a word that begins with ``$``."""
    if isinstance(value, Mapping) and "class" in value:
        module, _, name = value["class"].rpartition(".")
        settings = {key: filled(one, problem, steps) for key, one in value.items() if key != "class"}
        return getattr(importlib.import_module(module), name)(**settings)
    if not (isinstance(value, str) and value.startswith("$")):
        return value
    word, _, factor = value[1:].partition("*")
    word, _, parts = word.partition("/")
    if word == "residual":
        return problem.residuals[0]
    if word == "residuals":
        return list(problem.residuals)
    if word == "tasks":
        return len(problem.tasks)
    if word == "steps":
        return max(round(steps / float(parts)), 1)
    if word == "raised":
        return {task: float(factor) if task in problem.raised else 1.0 for task in problem.tasks}
    if word == "trivial":
        return {task: 1 / loss for task, loss in problem.trivial_losses().items()}
    raise ValueError(f"{value!r} stands for nothing; benchmarks/suite/methods.py says which words do.")


def by_kind(name: str, spec: Mapping[str, Any]) -> dict[Kind, Spec]:
    """Kind → settings, of settings as they are given: for both kinds, or for each by its name.

    Raises:
        ValueError: if a class is no balancer.
    """
    kinds = everywhere(spec) if "class" in spec else {kind: spec[kind] for kind in everywhere({}) if kind in spec}
    for settings in [*kinds.values()] or [spec]:
        balancer_class(name, settings)
    return kinds


def balancer_class(name: str, spec: Spec) -> type[LossBalancer]:
    """What ``"class"`` names."""
    cls = getattr(lightning_gradnorm, str(spec.get("class")), None)
    if not (isinstance(cls, type) and issubclass(cls, LossBalancer)):
        raise ValueError(f"Method {name!r}: {spec.get('class')!r} is no balancer of lightning_gradnorm.")
    return cls


def member(name: str, spec: Spec, problem: Problem, steps: int) -> Member:
    """One training of the problem by the method, before its first step.

    Args:
        name: of the method.
        spec: its settings.
        problem: of the training's seed.
        steps: of the whole training.

    Raises:
        ValueError: if the class is no balancer, or a word stands for nothing.
    """
    settings = {key: filled(value, problem, steps) for key, value in spec.items() if key not in ("class", "norms_on")}
    cls = balancer_class(name, spec)
    norms_on: NormsOn = spec.get("norms_on", "shared")
    return Member(name, problem.seed, cls(**settings), norms_on)
