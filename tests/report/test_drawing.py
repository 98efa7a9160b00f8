"""What the figure is made of: places of names, smooth lines, shares, colours, sparklines."""

import itertools
import math
import random

import pytest

from lightning_gradnorm.report.history import Curve, History
from lightning_gradnorm.report.palette import styles
from lightning_gradnorm.report.shares import shares_of
from lightning_gradnorm.report.smoothing import smoothed, thinned
from lightning_gradnorm.report.sparkline import in_plain_letters, sparklines
from lightning_gradnorm.report.spreading import spread

# -- places of names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heights", "placed"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.55, 0.5], [0.575, 0.475]),
        ([0.0, 0.0, 0.9], [0.0, 0.1, 0.9]),
        ([1.0, 1.0, 1.0], [0.8, 0.9, 1.0]),
        ([0.5] * 11, [i / 10 for i in range(11)]),
        ([], []),
    ],
)
def test_names_are_as_near_to_their_curves_as_can_be(heights, placed):
    assert spread(heights, 0.1, 0.0, 1.0) == pytest.approx(placed)


def test_names_that_do_not_all_fit_are_spread_evenly():
    assert spread([0.3, 0.1, 0.2], 0.9, 0.0, 1.0) == pytest.approx([1.0, 0.0, 0.5])


def test_no_other_places_are_nearer():
    draw = random.Random(7)
    for _ in range(100):
        heights = [draw.uniform(0, 1) for _ in range(draw.randint(2, 5))]
        placed = spread(heights, 0.12, 0.0, 1.0)
        order = sorted(range(len(heights)), key=heights.__getitem__)
        gaps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
        assert min(gaps) > 0.12 - 1e-9
        far = sum((a - b) ** 2 for a, b in zip(heights, placed, strict=True))
        for _ in range(50):
            other = [place + draw.gauss(0, 0.03) for place in placed]
            fits = all(other[b] - other[a] >= 0.12 for a, b in itertools.pairwise(order)) and 0 <= min(other) <= max(other) <= 1
            assert not fits or sum((a - b) ** 2 for a, b in zip(heights, other, strict=True)) >= far - 1e-9


# -- smooth lines ------------------------------------------------------------------------------------------------------


def test_a_smooth_line_is_the_mean_of_its_neighbours():
    curve = Curve(list(range(40)), [float(i % 2) for i in range(40)])
    smooth = smoothed(curve)
    assert smooth.steps == curve.steps
    assert smooth.values[10] == pytest.approx(2 / 5)
    assert smooth.values[11] == pytest.approx(3 / 5)
    assert smooth.values[0] == pytest.approx(1 / 3), "the first three"
    assert smooth.values[-1] == pytest.approx(2 / 3)


def test_on_a_logarithmic_axis_it_is_the_geometric_mean():
    curve = Curve(list(range(40)), [10.0 ** (i % 2) for i in range(40)])
    assert smoothed(curve, in_logarithms=True).values[10] == pytest.approx(10 ** (2 / 5))


def test_what_is_not_finite_is_left_out_of_the_means():
    values = [float(i % 2) for i in range(40)]
    values[10], values[20:30] = math.nan, [math.inf] * 10
    smooth = smoothed(Curve(list(range(40)), values)).values
    assert smooth[10] == pytest.approx(0.5)
    assert smooth[25] == math.inf, "nothing else is there"


def test_few_points_and_quiet_curves_stay_as_they_are():
    for values in ([0.0, 1.0] * 5, [2.0**i for i in range(40)], [1.0] * 40, [math.nan] * 40):
        curve = Curve(list(range(len(values))), values)
        assert smoothed(curve) is curve


@pytest.mark.parametrize("count", [1, 400, 401, 50_000])
def test_a_long_curve_is_thinned_to_what_can_be_seen(count):
    thin = thinned(Curve(list(range(count)), [float(i) for i in range(count)]))
    assert len(thin.steps) == min(count, 400)
    assert (thin.steps[0], thin.steps[-1]) == (0, count - 1)
    assert thin.values == [float(step) for step in thin.steps]


# -- shares ------------------------------------------------------------------------------------------------------------


def test_shares_of_weighted_norms_and_of_the_norms_behind_them():
    points = {"loss_weight/a": {0: 1.0, 5: 4.0}, "loss_weight/b": {0: 1.0, 5: 0.5}, "loss_weight/c": {5: 1.0}}
    points |= {"grad_norm/a": {0: 1.0, 5: 2.0}, "grad_norm/b": {0: 3.0, 5: 2.0}, "grad_norm/c": {5: math.nan}}
    before, after = shares_of(History(points))
    assert after == {"a": ([0, 5], [0.25, 0.5]), "b": ([0, 5], [0.75, 0.5]), "c": ([0, 5], [0.0, 0.0])}
    assert before == {"a": ([0, 5], [0.25, 1 / 9]), "b": ([0, 5], [0.75, 8 / 9]), "c": ([0, 5], [0.0, 0.0])}


def test_without_norms_there_are_no_shares():
    assert shares_of(History({"loss_weight/a": {0: 1.0}})) == ({}, {})
    assert shares_of(History({"loss_weight/a": {0: 1.0}, "grad_norm/a": {0: 0.0}})) == ({}, {})


# -- colours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 16, 17, 40, 60])
def test_every_task_has_a_look_of_its_own_that_is_seen_on_white(count):
    looks = styles([f"t{i}" for i in range(count)])
    assert len(set(looks.values())) == count
    for look in looks.values():
        red, green, blue = (int(look.colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.78


def test_a_task_keeps_its_colour_when_others_come_after_it():
    assert styles(["a", "b"])["b"] == styles(["a", "b", "c"])["b"]


# -- sparklines --------------------------------------------------------------------------------------------------------


def test_a_weights_way_on_one_scale_for_all():
    steps = list(range(10))
    ways = sparklines(
        {"up": Curve(steps, [2.0**i for i in steps]), "still": Curve(steps, [1.0] * 10), "late": Curve([5, 9], [512.0, 1.0])}
    )
    assert ways == {"up": "▁▁▂▃▄▅▆▇██", "still": "▁▁▁▁▁▁▁▁▁▁", "late": "     ████▁"}
    assert in_plain_letters(ways["up"]) == "__.-:=+*##"


def test_what_hardly_moves_is_flat():
    (way,) = sparklines({"a": Curve([0, 9], [1.0, 1.02])}).values()
    assert len(set(way)) <= 2
    assert abs("▁▂▃▄▅▆▇█".index(way[0]) - "▁▂▃▄▅▆▇█".index(way[-1])) <= 1


def test_of_one_step_there_is_no_way():
    assert sparklines({"a": Curve([3], [1.0])}) == {}
    assert sparklines({}) == {}
    assert sparklines({"a": Curve([0, 1], [math.nan, -1.0])}) == {}
