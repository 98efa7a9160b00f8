"""``EpochMeans`` against sums by hand."""

import io
from dataclasses import InitVar, dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm.callbacks.epoch_means import EpochMeans, batch_size_of

TASKS = ("a", "b", "größe")
BATCH = st.tuples(
    st.lists(st.sampled_from(TASKS), min_size=1, max_size=3, unique=True),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3),
    st.integers(1, 64),
)


def take(means, batches):
    for tasks, losses, size in batches:
        means.add({task: torch.tensor(loss) for task, loss in zip(tasks, losses, strict=False)}, size)


def by_hand(batches):
    rows = [(dict(zip(tasks, losses, strict=False)), size) for tasks, losses, size in batches]
    total = sum(size * sum(losses.values()) for losses, size in rows) / sum(size for _, size in rows)
    of = {task: [(losses[task], size) for losses, size in rows if task in losses] for task in TASKS}
    return total, {
        task: sum(loss * size for loss, size in row) / sum(size for _, size in row) for task, row in of.items() if row
    }


def assert_means(found, batches):
    total, tasks = by_hand(batches)
    assert found.total == pytest.approx(total, rel=1e-12, abs=1e-9)
    assert found.tasks == pytest.approx(tasks, rel=1e-12, abs=1e-9)


@given(st.lists(BATCH, min_size=1, max_size=12), st.data())
def test_means_are_by_batch_size_and_survive_a_safe_load(batches, data):
    means, stop = EpochMeans(), data.draw(st.integers(0, len(batches)))
    means.begin(3)
    take(means, batches[:stop])
    file = io.BytesIO()
    torch.save(means.state_dict(), file)
    file.seek(0)
    resumed = EpochMeans()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.begin(3)
    take(resumed, batches[stop:])
    assert_means(resumed.means(), batches)
    take(means, batches[stop:])
    assert resumed.means() == means.means()


@given(st.lists(BATCH, max_size=5), st.lists(BATCH, min_size=1, max_size=5))
def test_ranks_add_up(here, there):
    first, second = EpochMeans(), EpochMeans()
    take(first, here)
    take(second, there)
    handed = []
    second.means(lambda mine: handed.append(mine) or [mine])
    assert_means(first.means(lambda mine: [mine, *handed]), here + there)


def test_an_empty_epoch_has_no_means_and_a_new_one_starts_anew():
    means = EpochMeans()
    assert means.means() is None
    assert not means
    means.begin(0)
    means.add({"a": torch.tensor(1.0)})
    means.begin(0)
    assert means.means().tasks == {"a": 1.0}
    means.begin(1)
    assert means.means() is None
    means.add({"a": torch.tensor(2.0)})
    means.reset()
    means.begin(1)
    assert means.means() is None


def test_a_state_is_a_copy():
    means = EpochMeans()
    means.add({"a": torch.tensor(1.0)})
    state = means.state_dict()
    means.add({"a": torch.tensor(3.0)})
    other = EpochMeans()
    other.load_state_dict(state)
    assert (means.means().total, other.means().total) == (2.0, 1.0)


def test_sums_are_as_wide_as_they_can_be():
    means = EpochMeans()
    for _ in range(1000):
        means.add({"a": torch.tensor(0.1, dtype=torch.bfloat16)})
    assert means.means().total == pytest.approx(torch.tensor(0.1, dtype=torch.bfloat16).item(), rel=1e-12)


@dataclass
class Rows:
    name: str
    x: torch.Tensor


@dataclass
class Stacked:
    rows: InitVar[list]
    x: torch.Tensor = field(init=False)
    later: torch.Tensor = field(init=False)

    def __post_init__(self, rows):
        self.x = torch.stack(rows)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ([torch.zeros(4, 2), torch.zeros(7)], 4),
        ({"id": "x", "y": (torch.zeros(3),)}, 3),
        (Rows("n", torch.zeros(6)), 6),
        (Stacked([torch.zeros(2)] * 3), 3),
        (Rows, 1),
        (torch.tensor(1.0), 1),
        ("text", 1),
        (None, 1),
        ([], 1),
        (torch.zeros(0, 3), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Stacked) else str(value),
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch, size):
    assert batch_size_of(batch) == size
