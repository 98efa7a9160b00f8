"""What ``docs/scale.md`` can say of the rows that ``benchmarks/scale.py`` has written."""

import json
from pathlib import Path
from typing import Any

from lightning_gradnorm.balancers.schedule import is_measured, widening
from lightning_gradnorm.report.table import markdown_rows

FILE = Path(__file__).parents[1] / "results" / "scale" / "scale.json"
_SCALARS = 2  # beside a task's gradient: its loss, and how many micro-batches had it


class Scaling:
    """The rows, as tables."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))

    @property
    def machine(self) -> str:
        """Where it was measured."""
        return str(self.found["machine"])

    @property
    def packed(self) -> str:
        """Peak of packing for the collective, in gradients of W, of three tasks."""
        return f"{self.found['packed']:.0f}"

    def tasks(self) -> str:
        """Times of a step, and what logging makes, by the number of tasks."""
        columns = [
            "tasks", "plain step, ms", "neither measured nor logged", "measured", "per task", "tags", "a written step",
            "in the event file", "figure",
        ]  # fmt: skip
        rows = []
        for row in self.found["tasks"]:
            plain = row["plain_seconds"]
            extra = row["measured_seconds"] - plain
            rows.append(
                [
                    str(row["tasks"]),
                    f"{1e3 * plain:.2f}",
                    f"{1e3 * (row['unmeasured_seconds'] - plain):+.2f} ms",
                    f"{1e3 * extra:+.2f} ms",
                    f"{1e3 * extra / row['tasks']:.2f} ms",
                    f"{row['tags']:,}",
                    f"{1e3 * row['written_seconds']:+.0f} ms",
                    f"{row['written_bytes'] / 1024:.1f} KiB",
                    f"{row['figure_seconds']:.1f} s",
                ]
            )
        return markdown_rows(columns, rows)

    def weights(self) -> str:
        """Memory beyond the plain step, by the size of W."""
        columns = ["entries of W", "Gram form", "a product per task", 'norm_of="features"']
        rows = [
            [f"{row['entries']:,}", *(f"{max(row[name], 0):.2f}" for name in ("gram", "products", "features"))]
            for row in self.found["weights"]
        ]
        return markdown_rows(columns, rows)

    def graph(self) -> str:
        """The walk, by the number of nodes."""
        columns = ["nodes", "plain step, ms", "walk, W the last layer, ms", "W all parameters, ms", "µs per node"]
        rows = []
        for row in self.found["graph"]:
            times = [1e3 * row[f"{name}_seconds"] for name in ("plain", "last", "all")]
            per_node = f"{1e3 * times[1] / row['nodes']:.1f} – {1e3 * times[2] / row['nodes']:.1f}"
            rows.append([f"{row['nodes']:,}", *(f"{value:.1f}" for value in times), per_node])
        return markdown_rows(columns, rows)

    def steps(self) -> str:
        """A long run, by how far it has come."""
        rows = [
            [f"{row['steps']:,}", f"{1e3 * row['seconds']:.3f}", f"{row['bytes'] / 2**20:.0f}", f"{row['objects']:,}"]
            for row in self.found["steps"]
        ]
        return markdown_rows(["steps", "ms per step", "MiB resident", "Python objects"], rows)

    @staticmethod
    def measured(of: int) -> int:
        """How many of so many steps ``update_every="auto"`` measures."""
        return sum(is_measured(step, widening(step)) for step in range(of))

    def collective(self, tasks: int, entries: int, of: int = 100_000) -> str:
        """Bytes of an update's collective, and of a step on average, as a row."""
        size = 4 * tasks * (entries + _SCALARS)
        return f"{_bytes(size)} | {_bytes(size * self.measured(of) / of)}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError("there is a last unit")
