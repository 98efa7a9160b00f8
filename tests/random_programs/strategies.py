"""Draws programs; what comes first in each choice is what hypothesis shrinks to."""

from hypothesis import strategies as st

from tests.random_programs.description import Hook, Piece, Program, Shared, Task
from tests.random_programs.operations import AROUND, OPERATIONS
from tests.random_programs.pieces import PIECES

_LAYERS = sorted(set(PIECES) - set(OPERATIONS), key=list(PIECES).index)
_options = st.integers(0, 5)
_numbers = st.integers(0, 3)
_layers = st.builds(Piece, st.sampled_from(_LAYERS), _options)
_linears = st.builds(Piece, st.just("linear"), _options)
_convolutions = st.builds(Piece, st.sampled_from(["conv_of_one_place", "conv1d"]), _options)
_operations = st.builds(Piece, st.sampled_from(sorted(OPERATIONS)), _options)
_simple = st.one_of(_linears, _operations, _operations, _layers, _layers)


def _around(inner: st.SearchStrategy[Piece]) -> st.SearchStrategy[Piece]:
    return st.builds(
        lambda kind, inner: Piece(kind, inner=tuple(inner)),
        st.sampled_from(sorted(AROUND)),
        st.lists(inner, min_size=1, max_size=3),
    )


_pieces = st.one_of(_simple, _simple, _simple, _around(st.one_of(_simple, _simple, _around(_simple))))


def pieces_but_for(*kinds: str) -> st.SearchStrategy[Piece]:
    """Pieces of any kind, but neither these nor others that hold them."""

    def holds(piece: Piece) -> bool:
        return piece.kind in kinds or any(map(holds, piece.inner))

    return _pieces.filter(lambda piece: not holds(piece))


_rare = st.sampled_from([False] * 7 + [True])
_maybe_earlier = st.one_of(st.none(), st.none(), st.none(), st.none(), st.none(), _numbers)


@st.composite
def _tasks(draw: st.DrawFn) -> Task:
    return Task(
        head=tuple(draw(st.lists(_pieces, max_size=2))),
        sources=tuple(draw(st.lists(st.sampled_from([0] * 8 + [1, 2, 3]), min_size=1, max_size=2))),
        reads=draw(_maybe_earlier),
        derivative_of=draw(_maybe_earlier),
        by=draw(st.sampled_from(["x", "strain"])),
        same_head_as=draw(_maybe_earlier),
        adds=draw(_maybe_earlier),
        loss=draw(
            st.sampled_from(
                ["square", "square", "absolute", "sum", "huber", "classes", "logsumexp", "column", "row", "through w", "of w"]
            )
        ),
        size=draw(st.sampled_from([1.0, 1.0, 1.0, 1e3, 1e-3]))
        if not draw(_rare)
        else draw(st.sampled_from([1e20, 1e-20, 1e12])),
        weight=draw(st.sampled_from([1.0, 1.0, 0.3, 2.0, 1e-3, -1.0]))
        if not draw(_rare)
        else draw(st.sampled_from([1.0] * 5 + [0.0])),
        in_total=draw(st.sampled_from([True] * 60 + [False])),
    )


_hooks = st.builds(
    Hook,
    st.sampled_from(
        [
            "value",
            "head",
            "w",
            "retain",
            "retain head",
            "module",
            "module pre",
            "head module",
            "accumulated",
            "node",
            "node pre",
        ]
    ),
    _numbers,
    st.sampled_from([1.0, 1.0, 0.1]),
)
_shared = st.builds(
    Shared,
    st.sampled_from(
        ["parameter", "layer", "layer", "layer", "several", "body", "everything", "twice", "body", "value", "part", "head"]
    ),
    st.integers(0, 5),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program. Not every one can be run: an operation in place may spoil what the backward needs."""
    shared = draw(st.one_of(_linears, _convolutions, _layers))
    body = [*draw(st.lists(_pieces, max_size=3)), shared, *draw(st.lists(_pieces, max_size=2))]
    return Program(
        body=tuple(body),
        tasks=tuple(draw(st.lists(_tasks(), min_size=1, max_size=4))),
        w=draw(_shared),
        seed=draw(st.integers(0, 99)),
        rows=draw(st.sampled_from([3, 2, 3, 4, 2, 5, 16, 1, 40])) if not draw(_rare) else 0,
        width=draw(st.sampled_from([8, 16, 32])),
        precision=draw(st.sampled_from(["float64", "float32", "float32", "bfloat16"])),
        offset=draw(st.sampled_from([0.0, 1e3, 100.0])) if draw(_rare) else 0.0,
        scale=draw(st.sampled_from([1.0, 1.0, 65536.0, 1 / 3, 2.0**-20])),
        join=draw(st.sampled_from(["own", "own", "own", "cat", "stack", "mean"])),
        extras=draw(st.sampled_from([(), ("w",), ("all",), ("loss",), ("tap",), ("w", "loss"), ("all", "tap")]))
        if draw(_rare)
        else (),
        hooks=tuple(draw(st.lists(_hooks, max_size=3))) if draw(st.booleans()) else (),
    )
