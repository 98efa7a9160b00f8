"""The figure: every task's curve is on it, whatever its values, and its name where the curve ends."""

import itertools
import math
import random

import pytest
from matplotlib import pyplot, rc_context, rcParams, style
from matplotlib.colors import to_hex

from lightning_gradnorm.report.comparison import Comparison, Run
from lightning_gradnorm.report.figure import draw_history, picture_of
from lightning_gradnorm.report.history import History
from lightning_gradnorm.report.palette import GREY
from lightning_gradnorm.report.sheet import Sheet
from lightning_gradnorm.report.tags import PER_TASK

KINDS = tuple(kind for kind in PER_TASK if kind != "inverse_rate")
MEASURED = ("loss_weight", "loss_ratio", "task_loss")  # by a method that needs no gradients
WEIGHTS, BEFORE, AFTER, RATIOS, LOSSES = range(5)
TITLES = [
    "loss weights",
    "gradient shares, unweighted",
    "gradient shares, weighted",
    "loss ratios, L(t) / L(0)",
    "losses, unweighted",
]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a history; gives the figure behind the PNG."""
    figures = []
    render = Sheet.rendered
    monkeypatch.setattr(Sheet, "rendered", lambda sheet: figures.append(sheet.figure) or render(sheet))

    def draw(history, title=""):
        path = tmp_path / "figure.png"
        draw_history(history, path, title)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return figures[-1]

    return draw


def history(tasks, value=lambda task, step: 1.5**task * (1 + step % 7), steps=50, kinds=KINDS, name="task {}".format):
    """Norms are such that the shares of 1, 2, 3, … tasks are as 1 : 2 : 3, whatever the values."""
    points = {f"{kind}/{name(i)}": {10 * s: value(i, s) for s in range(steps)} for i in range(tasks) for kind in kinds}
    norms = ("grad_norm", "target_norm")
    return History(
        points
        | {
            f"{kind}/{name(i)}": dict.fromkeys(range(0, 10 * steps, 10), i + 1.0)
            for i in range(tasks)
            for kind in norms
            if kind in kinds
        }
    )


def titles(figure):
    return [axes.get_title(loc="left").partition(" (")[0] for axes in figure.axes]


def curves(axes):
    """Task → its line; without the faint raw ones."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def raw(axes):
    return [line for line in axes.lines if line.get_label() == "_raw"]


def names(axes):
    return {text.get_text(): text for text in axes.texts}


def colours(axes):
    return {task: to_hex(line.get_color()).upper() for task, line in curves(axes).items()}


def bands(axes):
    return {band.get_label(): band for band in axes.collections if not band.get_label().startswith("_")}


@pytest.mark.parametrize("tasks", [1, 3, 16, 20, 60])
def test_every_task_is_drawn_and_named_at_its_end_in_its_colour(drawn, tasks):
    figure = drawn(history(tasks), "GradNorm after 50 steps")
    every = {f"task {i}" for i in range(tasks)}
    assert titles(figure) == TITLES
    assert "GradNorm after 50 steps" in {text.get_text() for text in figure.texts}
    first = colours(figure.axes[WEIGHTS])
    assert first.keys() == every
    assert len({(line.get_color(), line.get_linestyle()) for line in curves(figure.axes[WEIGHTS]).values()}) == tasks
    for axes in figure.axes:
        whole = axes is figure.axes[WEIGHTS] or tasks <= 20
        assert names(axes).keys() == (every if whole else set())
        assert all(to_hex(text.get_color()).upper() == first[task] for task, text in names(axes).items())
    for kind in (WEIGHTS, RATIOS, LOSSES):
        assert colours(figure.axes[kind]) == first
        for line in curves(figure.axes[kind]).values():
            assert list(line.get_xdata()) == list(range(0, 500, 10))
    for kind in (BEFORE, AFTER):
        assert {task: to_hex(band.get_facecolor()[0]).upper() for task, band in bands(figure.axes[kind]).items()} == first


def test_raw_values_stand_faint_behind_a_smooth_line_and_a_quiet_curve_is_left_as_it_is(drawn):
    figure = drawn(history(2, lambda task, step: 1 + step % 2))
    for kind in (WEIGHTS, RATIOS, LOSSES):
        axes = figure.axes[kind]
        assert len(raw(axes)) == 2
        assert all(line.get_alpha() < 0.3 for line in raw(axes))
        for behind, line in zip(raw(axes), curves(axes).values(), strict=True):
            assert list(behind.get_ydata()) == [1.0, 2.0] * 25
            assert max(line.get_ydata()[3:-3]) - min(line.get_ydata()[3:-3]) < 0.3
    figure = drawn(history(2, lambda task, step: 2.0 ** (step / 10)))
    assert not raw(figure.axes[WEIGHTS])
    assert list(curves(figure.axes[WEIGHTS])["task 0"].get_ydata()) == [2.0 ** (step / 10) for step in range(50)]


def test_shares_sum_to_one_before_and_after(drawn):
    points = {f"loss_weight/{task}": {0: weight, 1: weight} for task, weight in (("a", 4.0), ("b", 0.5))}
    points |= {f"grad_norm/{task}": {0: norm, 1: norm} for task, norm in (("a", 1.0), ("b", 1.0))}
    figure = drawn(History(points))
    ends = {}
    for kind in (1, 2):
        ends[kind] = {task: band.get_paths()[0].vertices[:, 1] for task, band in bands(figure.axes[kind]).items()}
        assert figure.axes[kind].get_ylim() == (0.0, 1.0)
    assert (ends[1]["b"].min(), ends[1]["b"].max()) == pytest.approx((0, 2 / 2.25)), "norms 1/4 and 2 as they are"
    assert (ends[1]["a"].min(), ends[1]["a"].max()) == pytest.approx((2 / 2.25, 1))
    assert (ends[2]["b"].min(), ends[2]["b"].max()) == pytest.approx((0, 0.5)), "alike once weighted"


def test_bands_fill_the_panel_also_where_one_of_them_alone_is_smoothed(drawn):
    draw, points = random.Random(0), {}
    for step in range(200):
        quiet = 0.1 if step < 100 else 0.8
        restless = (1 - quiet) * draw.uniform(0.2, 0.8)
        for task, norm in (("a", restless), ("b", quiet), ("c", 1 - restless - quiet)):
            points.setdefault(f"grad_norm/{task}", {})[step] = norm
            points.setdefault(f"loss_weight/{task}", {})[step] = 1.0
    figure = drawn(History(points))
    for kind in (1, 2):
        top = figure.axes[kind].lines[-1].get_ydata()
        assert (min(top), max(top)) == pytest.approx((1.0, 1.0))


def test_targets_are_drawn_where_they_differ(drawn):
    alike = {f"target_norm/task {i}": dict.fromkeys(range(0, 500, 10), 2.0) for i in range(3)}
    points = history(3)
    everything = {f"{kind}/{task}": dict(zip(*c, strict=True)) for kind in KINDS for task, c in points.of(kind).items()}
    for targets, dashed in (({}, 2), (alike, 0)):
        figure = drawn(History(everything | targets))
        lines = [line for line in figure.axes[AFTER].lines if line.get_linestyle() == "--"]
        assert len(lines) == dashed
        assert ("dashed" in figure.axes[AFTER].get_title(loc="left")) == bool(dashed)
    figure = drawn(History(everything))
    levels = sorted(line.get_ydata()[-1] for line in figure.axes[AFTER].lines if line.get_linestyle() == "--")
    assert levels == pytest.approx([3 / 6, 5 / 6]), "the last task at the bottom"


def test_of_very_many_tasks_those_at_the_ends_are_named_and_the_others_grey(drawn):
    figure = drawn(history(200, value=lambda task, step: 1 + (37 * task % 200) + step, steps=5))
    named = {f"task {i}" for i in range(200) if not 30 <= 37 * i % 200 < 170}
    assert names(figure.axes[WEIGHTS]).keys() == named
    assert any("dark: the largest weights" in text.get_text() for text in figure.texts)
    for kind in (WEIGHTS, RATIOS, LOSSES):
        grey = {task for task, colour in colours(figure.axes[kind]).items() if colour == GREY}
        assert len(grey) == 140
        assert not grey & named
        lowest, highest = figure.axes[kind].get_ylim()
        assert lowest < 1 and highest > 204, "all can be seen"
    assert set(bands(figure.axes[AFTER])) == named | {"140 others"}


@pytest.mark.parametrize("tasks", [1, 3, 20, 60])
@pytest.mark.parametrize("name", ["{}".format, "a name that nobody would want to read on a figure, of task {}".format])
def test_nothing_covers_anything(drawn, tasks, name):
    figure = drawn(history(tasks, value=lambda task, step: 5.0, name=name), "GradNorm after 50 steps")
    renderer = figure.canvas.get_renderer()
    panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
    whole = figure.bbox
    for i, panel in enumerate(panels):
        assert whole.x0 <= panel.x0 and panel.x1 <= whole.x1 + 1
        assert whole.y0 <= panel.y0 and panel.y1 <= whole.y1
        assert figure.axes[i].get_window_extent().width > 300, "pixels"
        assert not any(panel.overlaps(other) for other in panels[i + 1 :])
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent(renderer) for text in axes.texts), key=lambda box: box.y0)
        middles = [(box.y0 + box.y1) / 2 for box in boxes]
        sizes = {text.get_fontsize() for text in axes.texts}
        assert all(above - below > 0.99 * min(sizes) / 72 * figure.dpi for below, above in itertools.pairwise(middles))
    assert len(names(figure.axes[WEIGHTS])) == tasks


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
    finite = [value(task, step) for task in range(2) for step in range(50) if math.isfinite(value(task, step))]
    for kind in (figure.axes[0], *figure.axes[-2:]):
        lowest, highest = kind.get_ylim()
        assert kind.get_yscale() == "linear" or min(finite) > 0
        assert all(lowest <= one <= highest for one in finite)
        assert names(kind).keys() == ({"task 0", "task 1"} if finite else set())


def test_scales_are_logarithmic_where_values_differ_by_orders_of_magnitude(drawn):
    for largest, scale in ((4.0, "linear"), (6.0, "log"), (1e6, "log")):
        figure = drawn(history(2, lambda task, step, largest=largest: largest if task else 1.0))
        assert {figure.axes[kind].get_yscale() for kind in (RATIOS, LOSSES)} == {scale}
        assert figure.axes[WEIGHTS].get_yscale() == "log", "the weights' always is"
    figure = drawn(history(2, lambda task, step: 1.0 + 0.001 * step))
    lowest, highest = figure.axes[WEIGHTS].get_ylim()
    assert highest / lowest == pytest.approx(4), "what hardly moves is seen to"


def test_a_single_step_can_be_seen(drawn):
    figure = drawn(history(3, steps=1))
    for kind in (WEIGHTS, RATIOS, LOSSES):
        assert all(line.get_marker() == "o" for line in curves(figure.axes[kind]).values())
    assert all(line.get_marker() == "None" for line in curves(drawn(history(3)).axes[0]).values())


def test_without_gradient_norms_their_panels_are_left_out(drawn):
    assert titles(drawn(history(3, kinds=MEASURED))) == [TITLES[WEIGHTS], TITLES[RATIOS], TITLES[LOSSES]]
    assert titles(drawn(history(3, kinds=("loss_weight",)))) == [TITLES[WEIGHTS]]


def test_tasks_that_differ_in_what_they_logged(drawn):
    points = {"loss_weight/a": {0: 1.0, 1: 2.0}, "loss_weight/b": {1: 1.0}, "task_loss/b": {1: 3.0}, "task_loss/gone": {0: 1.0}}
    figure = drawn(History(points))
    assert names(figure.axes[0]).keys() == {"a", "b"}
    assert [len(curves(axes)) for axes in figure.axes] == [2, 2]
    assert colours(figure.axes[1]) == {"b": colours(figure.axes[0])["b"], "gone": GREY}


@pytest.mark.parametrize("name", ["größe", "_u/_t", "$\\frac{", "$x$", "100 %", "two words"])
def test_names_stand_as_they_are(drawn, name):
    figure = drawn(history(2, name=lambda i: name if i else "_"))
    assert names(figure.axes[0]).keys() == {"_", name}
    assert not any(text.get_parse_math() for text in figure.axes[0].texts)


@pytest.mark.parametrize(
    "settings",
    [
        dict(style.library["dark_background"]),
        {"text.usetex": True},
        {"figure.autolayout": True},
        {"figure.constrained_layout.use": True},
        {"savefig.dpi": 10},
    ],
    ids=["dark", "TeX", "autolayout", "constrained layout", "coarse files"],
)
def test_what_the_user_has_set_for_his_own_figures_stays_with_those(settings, tmp_path):
    comparison = Comparison({"error": "lower"}, [Run(name, 0, {"error": 1.0}, None, {}) for name in "ab"], "a")
    plain = picture_of(history(3), "title").png
    comparison.draw(tmp_path / "plain.png")
    with rc_context(settings):
        before = dict(rcParams)
        assert picture_of(history(3), "title").png == plain
        comparison.draw(tmp_path / "set.png")
        assert dict(rcParams) == before
    assert (tmp_path / "set.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_the_users_font_is_taken_it_may_have_letters_that_others_have_not():
    with rc_context({"font.family": "DejaVu Serif"}):
        other = picture_of(history(3)).png
    assert picture_of(history(3)).png != other


def test_pyplot_is_left_alone(drawn):
    before = pyplot.get_fignums()
    drawn(history(2))
    assert pyplot.get_fignums() == before
