"""Whether the readers agree with the oracle on a program, and with each other, and leave the step as it was."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradnorm.gradients import IncompleteBackwardError, UnreachedSharedLayerError
from tests.random_programs.description import Program
from tests.random_programs.running import DTYPES, READERS, Left, Read, Truth, reached_by, run_plainly, run_read, truth

# How far a number may be from the exact one, relative to the exact norm; and how many times the error of the plain
# ``autograd.grad`` in the same precision (which is all that there is where the exact gradient cancels).
RELATIVE = {"float64": 1e-7, "float32": 1e-4, "bfloat16": 2e-2}
TIMES_PLAIN = {"float64": 100.0, "float32": 4.0, "bfloat16": 4.0}


@dataclass
class Verdict:
    """What came of a program.

    Attributes:
        outcome: ``"agreed"``, ``"refused"`` (as the oracle says), ``"DIFFERENT"``, or ``"no program"``: it does not run
            plainly.
        differences: (reader, what of it) → in words.
        notes: reader → how it read, for the counts.
    """

    outcome: str
    differences: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Expected:
    """The oracle's word on a program.

    Attributes:
        exact: reader → gradients that it may give, ``[T, |W|]``; none where they are not judged.
        noise: per task, the error of plain autograd in the program's precision, ``[T]``.
        refusals: (kind of error, what its message holds): one of them has to be raised, if there are any.
        may_refuse: likewise, need not.
    """

    exact: dict[str, list[Tensor]]
    noise: Tensor
    refusals: list[tuple[type[Exception], str]]
    may_refuse: dict[str, list[tuple[type[Exception], str]]]


def check(program: Program) -> Verdict:
    """Run a program in every way and compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = run_plainly(program)
            expected = expect(program)
        except (RuntimeError, ValueError, LookupError) as error:  # torch's, or there is no W
            return Verdict("no program", notes=[f"no program: {type(error).__name__}: {str(error)[:60]}"])
        verdict = Verdict("refused" if expected.refusals else "agreed")
        for reader in READERS:
            for what, words in _differences(program, reader, plain, expected, verdict.notes):
                verdict.outcome = "DIFFERENT"
                verdict.differences[reader, what] = words
    return verdict


def expect(program: Program) -> Expected:
    """Gradients or refusals, by plain torch alone."""
    judged, own = _hooks_that_count(program)
    exact, noise, here = _exact(program, own)
    # The joint backward brings what hooks on a task's own part make of its gradient; the other way sees no hook.
    without = _exact(program, set())[0] if own else exact
    choices = {reader: [exact] for reader in READERS} | {"per task": [without], "audited": [exact, without]}
    return Expected(
        choices if judged else {reader: [] for reader in READERS}, noise, _refusals(program, here), _may_refuse(program, here)
    )


def _exact(program: Program, scaling: set[int]) -> tuple[Tensor, Tensor, Truth]:
    """Gradients, in float64 where the precision allows; their rounding errors in the program's own; and these themselves."""
    here = truth(program, DTYPES[program.precision], scaling.__contains__)
    if program.precision == "float64":
        exact, other = here, truth(program, torch.float32, scaling.__contains__)
    else:
        wide = truth(program, torch.float64, scaling.__contains__, half=False)
        exact, other = (wide, here) if program.precision == "float32" else (here, wide)
    noise = torch.linalg.vector_norm(exact.rows - other.rows, dim=1)
    # Of what the program's own precision cannot hold, anything may be read.
    noise = noise.nan_to_num(0, 0, 0) if program.precision == "float64" else noise.nan_to_num(torch.inf, torch.inf, torch.inf)
    if program.precision == "float64":
        noise = noise * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return exact.rows, noise, here


def _noise_of_seeds(program: Program, exact: Tensor) -> Tensor:
    """The rounding errors with the total's own factors before each loss: a sum that comes to 0 with 1 may not with 1/3."""
    _, own = _hooks_that_count(program)
    seeded = truth(program, DTYPES[program.precision], own.__contains__, seeded=True)
    return torch.linalg.vector_norm(exact - seeded.rows, dim=1).nan_to_num(0, 0, 0)


def _hooks_that_count(program: Program) -> tuple[bool, set[int]]:
    """Whether norms can be judged at all, and the hooks that scale and lie on a task's own part of the graph."""
    if program.holds_in_a_checkpoint("spectral_norm"):
        return False, set()  # its power iteration goes on as it is run again: another network, in each backward
    scaling = [number for number, hook in enumerate(program.hooks) if hook.factor != 1]
    if not scaling:
        return True, set()
    if program.w.kind == "value" and any(program.hooks[number].kind == "value" for number in scaling):
        return False, set()  # it may be on W itself
    derivatives = any(task.derivative_of is not None for task in program.tasks) or any(
        piece.kind == "differentiated" for piece in program.pieces()
    )
    modules = any("module" in program.hooks[number].kind for number in scaling)
    own = {number for number, tasks in reached_by(program).items() if len(tasks) == 1}
    return not (derivatives or modules), own.intersection(scaling)


def _refusals(program: Program, found: Truth) -> list[tuple[type[Exception], str]]:
    if found.detached:
        return [(ValueError, f"The loss of task {found.detached[0]!r} is detached from the network")]
    refusals: list[tuple[type[Exception], str]] = []
    tapped = "tap" in program.extras  # a further term of the total is made of the last loss
    missing = [
        f"task{i}" for i, task in enumerate(program.tasks) if not (task.in_total or (tapped and i + 1 == len(program.tasks)))
    ]
    if missing:
        refusals.append((ValueError, f"not built from the tapped loss of {', '.join(f'task {name!r}' for name in missing)}"))
    unreached = [f"task{i}" for i, reached in enumerate(found.reached) if not reached]
    if unreached:
        names = ", ".join(f"task {name!r}" for name in unreached)
        refusals.append((UnreachedSharedLayerError, f"The loss of {names} does not reach the shared layer"))
    return refusals


def _may_refuse(program: Program, found: Truth) -> dict[str, list[tuple[type[Exception], str]]]:
    """Reader → what it may refuse instead of reading it."""
    nothing = [(UnreachedSharedLayerError, "does not reach the shared layer")] if any(found.without) else []
    unseen = [(IncompleteBackwardError, "the weight 0, so nothing of its gradient is in the backward")]
    zero = not all(task.weight for task in program.tasks)
    return {reader: nothing + (unseen if zero and reader != "per task" else []) for reader in READERS}


def _differences(program: Program, reader: str, plain: Left, expected: Expected, notes: list[str]) -> Iterator[tuple[str, str]]:
    try:
        read, left = run_read(program, reader)
    except Exception as error:
        allowed = expected.refusals + expected.may_refuse[reader]
        if not any(isinstance(error, kind) and words in str(error) for kind, words in allowed):
            said = "not refused by the oracle" if not expected.refusals else f"the oracle: {expected.refusals[0][1]}"
            yield "error", f"{type(error).__name__}: {str(error)[:160]} ({said})"
        notes.append(f"{reader}: {type(error).__name__}")
        return
    notes.append(f"{reader}: {read.how}")
    if expected.refusals:
        yield "error", f"none, and the oracle: {expected.refusals[0][1]}"
        return
    # A derivative is taken again where a checkpoint is run again, and runs modules' hooks in the forward pass.
    again = program.holds_in_a_checkpoint("differentiated") and any("module" in hook.kind for hook in program.hooks)
    left_behind = ((words.partition(":")[0], words) for words in plain.differences(left))
    yield from ((what, words) for what, words in left_behind if not (again and what == "counts"))
    if read.words:
        yield "words", read.words[0]
    choices = [list(_numbers(program, read, exact, expected.noise)) for exact in expected.exact[reader]]
    if choices and all(choices):  # then it is worth asking what rounding alone does
        exact = expected.exact[reader][0]
        choices.append(list(_numbers(program, read, exact, expected.noise.maximum(_noise_of_seeds(program, exact)))))
    if choices:
        yield from min(choices, key=len)


def _numbers(program: Program, read: Read, exact: Tensor, noise: Tensor) -> Iterator[tuple[str, str]]:
    """Norms, gradients and cosines against the exact ones."""
    norms = torch.linalg.vector_norm(exact, dim=1)
    if not read.cotangents.isfinite().all():
        return  # 0 · ∞
    allowed = RELATIVE[program.precision] * norms + TIMES_PLAIN[program.precision] * noise
    off = (read.norms.double() - norms).abs()
    if _beyond(off, allowed, norms):
        yield "norms", f"{read.norms.tolist()}, exactly {norms.tolist()}, of which {noise.tolist()} is rounding"
    if read.flat is not None and read.flat.shape != exact.shape:
        yield "flat", f"shape {tuple(read.flat.shape)}, should be {tuple(exact.shape)}"
    elif read.flat is not None:
        off = torch.linalg.vector_norm(read.flat.double() - exact, dim=1)
        if _beyond(off, allowed, norms):
            yield "flat", f"off by {off.tolist()}, norms {norms.tolist()}, of which {noise.tolist()} is rounding"
    if read.cosines is None:
        return
    unit = exact / norms.unsqueeze(1)
    uncertain = allowed / norms  # of the angle
    off = (read.cosines.double() - unit @ unit.T).abs()
    known = (uncertain < 0.1) & (norms > 0) & norms.isfinite()
    wrong = (~(off <= 2 * (uncertain + uncertain.unsqueeze(1)))) & known & known.unsqueeze(1)
    if wrong.any():
        yield "cosines", f"{read.cosines.tolist()}, exactly {(unit @ unit.T).tolist()}"


def _beyond(off: Tensor, allowed: Tensor, norms: Tensor) -> bool:
    """Where the exact norm is not finite, whatever is not finite will do."""
    return bool(torch.where(norms.isfinite(), ~(off.nan_to_num(torch.inf) <= allowed), off.isfinite()).any())


def least(program: Program, verdict: Verdict) -> tuple[Program, Verdict]:
    """A program as simple as can be that shows one of the same differences."""
    key = next(iter(verdict.differences))
    for _ in range(200):
        for simpler in program.simpler():
            found = check(simpler)
            if key in found.differences:
                program, verdict = simpler, found
                break
        else:
            break
    return program, verdict
