"""Trainings drawn at random."""

from hypothesis import strategies as st

from tests.random_programs.strategies import pieces_but_for
from tests.random_programs.training import Training

_pieces = pieces_but_for("complex_linear", "fourier", "embedding", "function")  # "64-true" leaves complex numbers as they are

_pieces_with_gradients = pieces_but_for("complex_linear", "fourier", "embedding", "function", "held_back")


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    tasks = draw(st.integers(2, 4))
    manual = draw(st.booleans()) and draw(st.booleans())
    settings = {
        "alpha": draw(st.sampled_from([0.12, 0.0, 1.5])),
        "lr": draw(st.sampled_from([0.025, 0.3])),
        "update": draw(st.sampled_from(["average", "average", "paper"])),
        "update_every": draw(st.sampled_from([1, "auto", 2, 3])),
        "initial_losses": draw(st.sampled_from(["first", "first", 3])),
    }
    settings |= draw(st.sampled_from([{}, {"residuals": ["task0"]}])) if settings["update"] == "average" else {}
    given = draw(st.sampled_from([True, True, True, False]))  # W is not found while tasks, or their gradients, are to come
    pieces = _pieces if given else _pieces_with_gradients
    missing = st.lists(st.integers(0, 2**tasks - 1), min_size=1, max_size=3)
    absent = tuple(draw(missing)) if given and draw(st.booleans()) else (0,)
    return Training(
        below=tuple(draw(st.lists(_pieces, max_size=2))),
        above=tuple(draw(st.lists(pieces, max_size=2))),
        heads=tuple(tuple(draw(st.lists(pieces, max_size=2))) for _ in range(tasks)),
        losses=tuple(draw(st.sampled_from(["square", "absolute", "huber", "logsumexp"])) for _ in range(tasks)),
        sizes=tuple(draw(st.sampled_from([1.0, 0.01, 10.0, 3.0])) for _ in range(tasks)),
        absent=absent,
        precision=draw(st.sampled_from(["64-true", "64-true", "32-true", "bf16-mixed", "scaler"])) if not manual else "64-true",
        batches=draw(st.integers(1, 7)),
        epochs=draw(st.integers(1, 3)),
        accumulate=draw(st.integers(1, 4)),
        limit=draw(st.sampled_from([9, 9, 3])),
        clip=draw(st.sampled_from([None, None, ("norm", 0.5), ("value", 0.01)])),
        manual=manual,
        settings=tuple(sorted(settings.items())),
        weights_optimizer=draw(st.sampled_from(["own", "own", "adam", "sgd"])),
        optimizer=draw(st.sampled_from(["sgd", "adam"])),
        engine=draw(st.sampled_from(["auto", "joint", "per_task"])),
        resumed_after=draw(st.sampled_from([0, 0, 1, 2])),
        validates=draw(st.booleans()),
        given=given,
        seed=draw(st.integers(0, 99)),
    )
