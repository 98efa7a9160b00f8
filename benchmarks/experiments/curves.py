"""What the experiments' figures share: a colour per method, the mean and range of several seeds' curves."""

from collections.abc import Sequence

from _common import BLACK, BLUE, GREEN, ORANGE, PURPLE, draw_runs
from matplotlib.axes import Axes

from benchmarks.experiments.records import Record

SKY, VERMILION, GREY = "#56B4E9", "#D55E00", "#777777"
COLOURS = {
    "equal": ORANGE,
    "GradNorm": BLUE,
    "GradNorm static": PURPLE,
    "GradNorm, all W": SKY,
    "GradNorm, Σw = T": PURPLE,
    "GradNorm, Σw = T, β₂ = 0.99": VERMILION,
    "annealing": GREEN,
    "self-adaptive": GREY,
    "uncertainty": GREEN,
    "DWA": VERMILION,
    "AMNL": SKY,
    "fixed 1/σ²": BLACK,
    "hand-scaled": BLACK,
}


def draw_curve(axes: Axes, fits: Sequence[Record], values: str | Sequence[Sequence[float]], **line: object) -> None:
    """Mean over the seeds as a line, their range as a band, of a curve of the records or of values given for each."""
    runs = [fit.curves[values] for fit in fits] if isinstance(values, str) else values
    draw_runs(axes, fits[0].curves["step"], runs, **line)
