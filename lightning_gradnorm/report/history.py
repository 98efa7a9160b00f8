"""What a log folder holds of a run: our tags over the steps, out of TensorBoard's event files or Lightning's CSV."""

import csv
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_gradnorm.folders import Folder
from lightning_gradnorm.report.tags import PER_TASK

LOGS = _EVENTS, _TABLE = "events.out.tfevents.*", "metrics.csv"
_HELD_OUT = re.compile(r"(?i)(val|valid|validation|test|eval|dev|held[-_]?out)([-_/.]|$)")  # how such a metric's name begins


class Curve(NamedTuple):
    """One tag's values.

    Attributes:
        steps: in increasing order, each once.
        values: as many.
    """

    steps: list[int]
    values: list[float]


class History:
    """Tag → curve, of the tags in ``report.tags``.

    Args:
        curves: tag → step → value.
        notes: what a reader should know of how it was read.
    """

    def __init__(self, curves: Mapping[str, Mapping[int, float]], notes: tuple[str, ...] = ()) -> None:
        ours = {tag: points for tag, points in curves.items() if tag.partition("/")[0] in PER_TASK and points}
        self._curves = {tag: Curve(sorted(points), [points[step] for step in sorted(points)]) for tag, points in ours.items()}
        self.held_out: dict[str, float] = {
            tag: points[max(points)] for tag, points in sorted(curves.items()) if _HELD_OUT.match(tag) and points
        }
        """Held-out metric → its last value."""
        self.notes = notes

    def in_order_of(self, tasks: Sequence[str]) -> "History":
        """The same with the tasks in this order, those that are not named after the others: a CSV's columns are sorted."""
        place = {task: number for number, task in enumerate(tasks)}
        ordered = sorted(self._curves.items(), key=lambda item: place.get(item[0].partition("/")[2], len(place)))
        again = History({tag: dict(zip(*curve, strict=True)) for tag, curve in ordered}, self.notes)
        again.held_out = self.held_out
        return again

    def of(self, kind: str) -> dict[str, Curve]:
        """Task → curve, for one of the tags of ``PER_TASK``; in the order of logging."""
        return {tag.partition("/")[2]: curve for tag, curve in self._curves.items() if tag.partition("/")[0] == kind}

    @property
    def tasks(self) -> tuple[str, ...]:
        """As they stand in the tags."""
        return tuple(self.of("loss_weight"))


def read_history(folder: str | Path, *, needs_weights: bool = True) -> History:
    """Read a log folder, also one behind a URL: its event files if it has any, else its ``metrics.csv``.

    Args:
        folder: where they are.
        needs_weights: whether logs without ``loss_weight/…`` are an error.

    Raises:
        FileNotFoundError: if there is no such folder, or neither kind of file in it.
        ValueError: if a file cannot be read, or holds none of our tags; the message says which and what to do.
    """
    place = Folder(folder)
    if not place.exists():
        raise FileNotFoundError(f"There is no log folder {folder}. Give the one that the table at the end of fit named.")
    if events := place.find(_EVENTS):
        with place.here(*sorted(events, key=_as_written)) as files:
            history = _of_events(files)
    elif place.has(_TABLE):
        with place.here(_TABLE) as (table,):
            history = History(_of_csv(table))
    else:
        inside = sorted({str(place.path(os.path.dirname(path))) for path in place.find(_EVENTS, _TABLE, below=True)})
        hint = f" Below it, these have: {', '.join(inside[:5])}." if inside else ""
        raise FileNotFoundError(
            f"{folder} holds neither TensorBoard event files nor Lightning's metrics.csv.{hint} Give a folder that a "
            "TensorBoardLogger or CSVLogger wrote."
        )
    if needs_weights and not history.tasks:
        raise ValueError(
            f"{folder} has logs, but no loss_weight/… among them: no balancing callback logged there, or the run was "
            "shorter than log_every_n_steps. Add GradNormCallback() to the Trainer (mode='monitor' changes no weight), or give "
            "another folder."
        )
    return history


def _is_wanted(tag: str) -> bool:
    return tag.partition("/")[0] in PER_TASK or _HELD_OUT.match(tag) is not None


def _as_written(name: str) -> list[str | int]:
    """Sorts event files as they were begun: a process numbers those of one second, and 10 comes after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _of_events(files: list[Path]) -> History:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    curves: dict[str, dict[int, float]] = {}
    notes = []
    for file in files:
        whole, records = _records(file)
        read = 0
        for event in LegacyEventFileLoader(str(file)).Load() if records else ():
            read += 1
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                for points in curves.values():  # a writer with purge_step: what was logged from there on does not count
                    for step in [step for step in points if step >= event.step]:
                        del points[step]
            for value in event.summary.value:
                number = _number_of(value) if _is_wanted(value.tag) else None
                if number is not None:
                    curves.setdefault(value.tag, {})[event.step] = number  # of a step logged twice, the later
        if not read and file.stat().st_size:
            raise ValueError(
                f"{file} is not a TensorBoard event file, or its beginning is damaged. Move it out of the folder; the other "
                "files can be read without it."
            )
        if read < records:
            notes.append(f"{file.name} is damaged after {read} of {records} records: read up to there.")
        elif not whole:
            notes.append(f"{file.name} ends in the middle of a record, as after a killed run: read up to there.")
    return History(curves, tuple(notes))


def _number_of(value: Any) -> float | None:
    """Of one value of an event, if it is a number: images, histograms, texts and PR curves have names like metrics'."""
    from tensorboard.util.tensor_util import make_ndarray

    if value.HasField("simple_value"):
        return float(value.simple_value)
    array = make_ndarray(value.tensor) if value.HasField("tensor") else None
    return float(array.item()) if array is not None and array.size == 1 and array.dtype.kind in "fiu" else None


def _records(file: Path) -> tuple[bool, int]:
    """Whether the file ends with a whole record, and how many there are: length, checksum, content, checksum each."""
    size, position, count = file.stat().st_size, 0, 0
    with file.open("rb") as stream:
        while position + 12 <= size:
            stream.seek(position)
            (length,) = struct.unpack("<Q", stream.read(8))
            position += length + 16
            if position > size:
                break
            count += 1
    return position == size, count


def _of_csv(file: Path) -> dict[str, dict[int, float]]:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            header, *lines = list(csv.reader(stream)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV file ({error}). Give a folder that a CSVLogger wrote.") from error
    if "step" not in header:
        raise ValueError(f"{file} has no column 'step', so it is not what Lightning's CSVLogger writes. Give its folder.")
    curves: dict[str, dict[int, float]] = {}
    ours = [tag for tag in header if _is_wanted(tag)]
    for number, line in enumerate(lines, start=2):
        row = dict(zip(header, line, strict=False))
        try:
            if len(line) not in (0, len(header)):
                raise ValueError(f"{len(line)} values for {len(header)} columns")
            for tag in filter(row.get, ours):
                curves.setdefault(tag, {})[int(row["step"])] = float(row[tag])
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}. Mend or delete that line.") from error
    return curves
