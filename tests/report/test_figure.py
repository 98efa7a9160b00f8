"""The figure: every task's curve is on it, whatever its values, and its name beside it."""

import math

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from lightning_gradnorm.report.figure import draw_history
from lightning_gradnorm.report.history import History
from lightning_gradnorm.report.tags import PER_TASK

KINDS = tuple(kind for kind in PER_TASK if kind != "inverse_rate")
MEASURED = ("loss_weight", "loss_ratio", "task_loss")  # by a method that needs no gradients


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a history; gives the figure behind the PNG."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure) or save(figure, path))

    def draw(history, title=""):
        path = tmp_path / "figure.png"
        draw_history(history, path, title)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return figures[-1]

    return draw


def history(tasks, value=lambda task, step: 1.5**task * (1 + step % 7), steps=50, kinds=KINDS, name="task {}".format):
    return History({f"{kind}/{name(i)}": {10 * s: value(i, s) for s in range(steps)} for i in range(tasks) for kind in kinds})


def curves(axes):
    return [line for line in axes.lines if len(line.get_xdata())]


def boxes(figure):
    """Where legend and panels stand, labels included; the figure's own corners last."""
    renderer = figure.canvas.get_renderer()
    (legend,) = figure.legends
    return legend.get_window_extent(renderer), [axes.get_tightbbox(renderer) for axes in figure.axes], figure.bbox


@pytest.mark.parametrize("tasks", [1, 3, 20, 60])
def test_every_task_is_drawn_and_named(drawn, tasks):
    figure = drawn(history(tasks), "GradNorm after 50 steps")
    assert [axes.get_title(loc="left").split(" (")[0] for axes in figure.axes] == [
        "loss weights",
        "weighted gradient norms",
        "loss ratios L(t) / L(0)",
        "task losses, unweighted",
    ]
    assert [len(curves(axes)) for axes in figure.axes] == [tasks, 2 * tasks, tasks, tasks]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"task {i}" for i in range(tasks)]
    assert figure.get_suptitle() == "GradNorm after 50 steps"
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()}
    assert len(looks) == min(tasks, 28)
    for axes in figure.axes:
        for k, line in enumerate(curves(axes)):
            assert list(line.get_xdata()) == list(range(0, 500, 10))
            assert line.get_ydata()[3] == 1.5 ** (k % tasks) * 4
            named = figure.legends[0].get_lines()[k % tasks]
            assert (line.get_color(), line.get_linestyle()) == (named.get_color(), named.get_linestyle())


def test_of_very_many_tasks_those_at_the_ends_are_named_and_the_others_grey(drawn):
    figure = drawn(history(200, value=lambda task, step: 1 + (37 * task % 200) + step, steps=5))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [f"task {i}" for i in range(200) if not 30 <= 37 * i % 200 < 170] + ["140 others, between these"]
    assert [len(curves(axes)) for axes in figure.axes] == [60, 120, 60, 60]
    for axes in figure.axes:
        (others,) = (drawn for drawn in axes.collections if len(drawn.get_segments()))
        assert len(others.get_segments()) == 140
        lowest, highest = axes.get_ylim()
        assert lowest < 1 and highest > 204, "all can be seen"
    legend, panels, whole = boxes(figure)
    assert not any(panel.overlaps(legend) for panel in panels)
    assert legend.x1 <= whole.x1


@pytest.mark.parametrize("tasks", [1, 3, 20, 60])
def test_nothing_covers_anything(drawn, tasks):
    long = "a name that nobody would want to read on a figure, of task {}".format
    for name in ("{}".format, long):
        figure = drawn(history(tasks, name=name), "GradNorm after 50 steps")
        legend, panels, whole = boxes(figure)
        assert whole.y0 <= legend.y0 and legend.x1 <= whole.x1
        for i, panel in enumerate(panels):
            assert whole.x0 <= panel.x0 and panel.width > 600, "pixels"
            assert not any(panel.overlaps(other) for other in [legend, *panels[i + 1 :]])
        assert len({text.get_text() for text in figure.legends[0].get_texts()}) == tasks


@pytest.mark.parametrize(
    "value",
    [
        lambda task, step: math.nan,
        lambda task, step: math.inf if step == 3 else 1.0 + step,
        lambda task, step: -math.inf if step == 3 else 1.0 + step,
        lambda task, step: math.nan if step % 2 else 10.0 ** (step - 20),
        lambda task, step: -(10.0 ** (step % 5)),
        lambda task, step: 0.0,
        lambda task, step: 1e-300 if task else 1e30,
        lambda task, step: 3.4e38,
    ],
    ids=["nan", "inf", "-inf", "every second", "negative", "zero", "far apart", "largest"],
)
def test_values_of_any_kind(drawn, value):
    figure = drawn(history(2, value))
    lines = [line for axes in figure.axes for line in curves(axes)]
    for line in lines:
        task = next(k for k, named in enumerate(figure.legends[0].get_lines()) if named.get_color() == line.get_color())
        assert list(line.get_ydata()) == pytest.approx([value(task, step) for step in range(50)], nan_ok=True)
    positive = all(not value(task, step) <= 0 for task in range(2) for step in range(50))
    assert all(axes.get_yscale() == "linear" for axes in figure.axes) or positive


def test_scales_are_logarithmic_where_values_differ_by_orders_of_magnitude(drawn):
    for largest, scale in ((15.0, "linear"), (25.0, "log"), (1e6, "log")):
        figure = drawn(history(2, lambda task, step, largest=largest: largest if task else 1.0))
        assert {axes.get_yscale() for axes in figure.axes} == {scale}


def test_a_single_step_can_be_seen(drawn):
    figure = drawn(history(3, steps=1))
    assert all(line.get_marker() == "o" for axes in figure.axes for line in curves(axes))
    assert all(line.get_marker() == "None" for line in curves(drawn(history(3)).axes[0]))


def test_without_gradient_norms_their_panel_is_left_out(drawn):
    figure = drawn(history(3, kinds=MEASURED))
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.axison] == [
        "loss weights",
        "loss ratios L(t) / L(0)",
        "task losses, unweighted",
    ]
    assert len(drawn(history(3, kinds=("loss_weight",))).axes) == 2


def test_tasks_that_differ_in_what_they_logged(drawn):
    points = {"loss_weight/a": {0: 1.0, 1: 2.0}, "loss_weight/b": {1: 1.0}, "task_loss/b": {1: 3.0}, "task_loss/gone": {0: 1.0}}
    figure = drawn(History(points))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [len(curves(axes)) for axes in figure.axes] == [2, 1]


@pytest.mark.parametrize("name", ["größe", "_u/_t", "$\\frac{", "$x$", "100 %", "two words"])
def test_names_stand_as_they_are(drawn, name):
    figure = drawn(history(2, name=lambda i: name if i else "_"))
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["_", name]
    assert not any(text.get_parse_math() for text in texts)


def test_pyplot_is_left_alone(drawn):
    before = pyplot.get_fignums()
    drawn(history(2))
    assert pyplot.get_fignums() == before
