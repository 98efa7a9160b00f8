"""What a random program is: a value that prints as the Python that makes it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace


class _Printed:
    """Prints its fields, and leaves out those that are as by default."""

    def __repr__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Piece(_Printed):
    """A map of ``[rows, width]`` to itself: a layer, a view, an operation in place, or what is done with other pieces.

    Attributes:
        kind: a name in ``pieces.PIECES``.
        option: which variant.
        inner: the pieces inside a checkpoint, a derivative, a recurrence, …
    """

    kind: str = "linear"
    option: int = 0
    inner: tuple["Piece", ...] = ()


@dataclass(frozen=True, repr=False)
class Task(_Printed):
    """One loss. Numbers of tasks and of values of the body are taken modulo how many there are.

    Attributes:
        head: pieces of its own, between the body and the prediction.
        sources: which values of the body it reads, summed, counted from the last.
        reads: an earlier task whose prediction is added to what it reads.
        derivative_of: an earlier task whose summed prediction is differentiated, with respect to the input or to a ``strain``
            that scales it; what comes out is what this task reads.
        by: with respect to what: ``"x"`` or ``"strain"``.
        same_head_as: an earlier task whose head it uses too.
        adds: an earlier task whose loss is part of its own.
        loss: a name in ``network.LOSSES``.
        size: a factor of the loss.
        weight: its factor in the total.
        in_total: whether the total holds it at all.
    """

    head: tuple[Piece, ...] = ()
    sources: tuple[int, ...] = (0,)
    reads: int | None = None
    derivative_of: int | None = None
    by: str = "x"
    same_head_as: int | None = None
    adds: int | None = None
    loss: str = "square"
    size: float = 1.0
    weight: float = 1.0
    in_total: bool = True


@dataclass(frozen=True, repr=False)
class Shared(_Printed):
    """What W is.

    Attributes:
        kind: ``"parameter"``, ``"layer"`` (that owns it), ``"several"``, ``"body"`` (all of it), ``"everything"``, ``"twice"``,
            ``"head"`` (a parameter of a head), ``"value"`` (what a piece of the body returned), ``"part"`` (of a split value).
        at: which, counted from the last of the body, modulo how many there are.
    """

    kind: str = "parameter"
    at: int = 0


@dataclass(frozen=True, repr=False)
class Hook(_Printed):
    """Somebody else's hook.

    Attributes:
        kind: ``"value"``, ``"head"``, ``"w"`` (of the tensor), ``"retain"``, ``"retain head"``, ``"module"``, ``"module pre"``,
            ``"head module"``, ``"accumulated"`` (after W's gradient has been), ``"node"``, ``"node pre"``.
        at: on which of them, modulo how many there are.
        factor: what it multiplies the gradient by; 1 leaves it as it is and returns nothing.
    """

    kind: str = "value"
    at: int = 0
    factor: float = 1.0


@dataclass(frozen=True, repr=False)
class Program(_Printed):
    """A network, its tasks, and how its backward is run.

    Attributes:
        body: what the tasks share.
        tasks: the losses.
        w: the parameters whose gradients are wanted.
        seed: of the initial parameters and the input.
        rows: size of the batch.
        width: features of every value.
        precision: ``"float64"``, ``"float32"``, or ``"bfloat16"`` under autocast.
        offset: common mean of the input.
        scale: factor of the total, as a GradScaler's or 1/N.
        join: how the predictions leave: ``"own"``, or as part of ``"cat"``, ``"stack"`` or ``"mean"`` of all.
        extras: further terms of the total: ``"w"``, ``"all"``, ``"loss"``, ``"tap"``.
        hooks: other people's.
    """

    body: tuple[Piece, ...] = (Piece(),)
    tasks: tuple[Task, ...] = (Task(), Task())
    w: Shared = Shared()
    seed: int = 0
    rows: int = 3
    width: int = 8
    precision: str = "float64"
    offset: float = 0.0
    scale: float = 1.0
    join: str = "own"
    extras: tuple[str, ...] = ()
    hooks: tuple[Hook, ...] = ()

    def ingredients(self) -> set[str]:
        """What is in it, by name: to be counted."""
        found = {f"w: {self.w.kind}", f"precision: {self.precision}", f"join: {self.join}"}
        found |= {f"extra: {extra}" for extra in self.extras}
        found |= {f"hook: {hook.kind}{', scales' if hook.factor != 1 else ''}" for hook in self.hooks}
        found |= {f"loss: {task.loss}" for task in self.tasks}
        for task in self.tasks:
            for name in ("reads", "derivative_of", "same_head_as", "adds"):
                found |= {f"task: {name}"} if getattr(task, name) is not None else set()
            found |= {"task: not in the total"} if not task.in_total else set()
            found |= {"task: weight zero or negative"} if task.weight <= 0 else set()
            found |= {"task: several sources"} if len(task.sources) > 1 else set()
            found |= {"task: tiny or huge"} if not 1e-6 < task.size < 1e6 else set()
        found |= {"rows: none"} if not self.rows else set()
        found |= {"input: large mean"} if self.offset else set()
        found |= {"backward: scaled"} if self.scale != 1 else set()
        found |= {f"piece: {piece.kind}" for piece in self.pieces()}
        return found

    def pieces(self) -> Iterator[Piece]:
        """All, the inner ones too."""
        stack = [*self.body, *(piece for task in self.tasks for piece in task.head)]
        while stack:
            piece = stack.pop()
            yield piece
            stack += piece.inner

    def holds_in_a_checkpoint(self, *kinds: str) -> bool:
        """Whether there is a piece of one of the kinds that a checkpoint runs again."""
        stack = [piece for outer in self.pieces() if outer.kind == "checkpointed" for piece in outer.inner]
        while stack:
            piece = stack.pop()
            if piece.kind in kinds:
                return True
            stack += piece.inner
        return False

    def simpler(self) -> Iterator["Program"]:
        """Programs with one thing less, for whoever looks for the least one that shows a difference."""
        for body in _simpler_pieces(self.body):
            yield replace(self, body=body)
        for i, task in enumerate(self.tasks):
            if len(self.tasks) > 1:
                yield replace(self, tasks=self.tasks[:i] + self.tasks[i + 1 :])
            for head in _simpler_pieces(task.head):
                yield replace(self, tasks=(*self.tasks[:i], replace(task, head=head), *self.tasks[i + 1 :]))
            for changed in _towards_defaults(task, leave=("head",)):
                yield replace(self, tasks=(*self.tasks[:i], changed, *self.tasks[i + 1 :]))
        for name in ("hooks", "extras"):
            held = getattr(self, name)
            for i in range(len(held)):
                yield replace(self, **{name: held[:i] + held[i + 1 :]})
        for i, hook in enumerate(self.hooks):
            for changed in _towards_defaults(hook, leave=("kind",)):
                yield replace(self, hooks=(*self.hooks[:i], changed, *self.hooks[i + 1 :]))
        if self.w.at:
            yield replace(self, w=replace(self.w, at=self.w.at - 1))
        if self.w.kind != "parameter":
            yield replace(self, w=replace(self.w, kind="parameter"))
        yield from _towards_defaults(self, leave=("body", "tasks", "w", "hooks", "extras"))


def _towards_defaults(value: object, leave: tuple[str, ...]) -> Iterator:
    for field in fields(value):
        if field.name not in leave and getattr(value, field.name) != field.default:
            yield replace(value, **{field.name: field.default})


def _simpler_pieces(pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, ...]]:
    for i, piece in enumerate(pieces):
        before, after = pieces[:i], pieces[i + 1 :]
        yield before + after
        if piece.inner:
            yield before + piece.inner + after
            for inner in _simpler_pieces(piece.inner):
                if inner:
                    yield (*before, replace(piece, inner=inner), *after)
        if piece.option:
            yield (*before, replace(piece, option=0), *after)
        if piece.kind != "linear" and not piece.inner:
            yield (*before, Piece(), *after)
