"""All problems of the suite, by name."""

from benchmarks.suite import data, data_files, equations, fluids, more_equations, tables
from benchmarks.suite.problem import Problem

EQUATIONS: tuple[type[Problem], ...] = (
    equations.Helmholtz,
    equations.KleinGordon,
    fluids.AllenCahn,
    fluids.Burgers,
    fluids.BurgersInverse,
    fluids.Cavity,
    more_equations.Reaction,
    more_equations.Advection,
    more_equations.Transport,
    more_equations.Wave,
    more_equations.Elliptic,
    more_equations.Heat,
)
DATA: tuple[type[Problem], ...] = (
    data.Digits,
    data.Pairs,
    data.ToyOfTwo,
    data.ToyOfTen,
    tables.Regressions,
    tables.Tabular,
    data_files.TurbofanOne,
    data_files.TurbofanTwo,
    data_files.Assays,
)
PROBLEMS: dict[str, type[Problem]] = {problem.name: problem for problem in (*EQUATIONS, *DATA)}
