"""The rendered rooms are what closed forms say, and the example on them trains and shows what came of it."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_gradnorm.weights_file import read_weights
from tests.test_examples import is_drawn

rendered = pytest.mark.parametrize("example", ["scenes_renderer"], indirect=True)
trained = pytest.mark.parametrize("example", ["scenes"], indirect=True)
FLOOR, WALL, BALL, BOX, CYLINDER = 0, 1, 3, 4, 5
SLOT = {BALL: 0, BOX: 2, CYLINDER: 4}  # a place for the first object of each kind
EYE, SIZE = 1.5, 49  # metres above the floor; an odd number of pixels has one in the middle
MIDDLE = (0, SIZE // 2, SIZE // 2)


def one_room(renderer: ModuleType, *objects: tuple[int, float], **changes: Any) -> Any:
    """A room, 6 m wide and 3 m high, its far wall 6 m ahead of the camera; an object is a kind and how far ahead it stands."""
    room = renderer.draw_rooms(1, torch.Generator().manual_seed(0))
    parts = vars(room) | {
        "there": torch.zeros(1, 6, dtype=torch.bool),
        "low": torch.tensor([[-3.0, 0.0, -6.0]]),
        "high": torch.tensor([[3.0, 3.0, 0.5]]),
        "eye": torch.tensor([[0.0, EYE, 0.0]]),
        "heading": torch.zeros(1),
        "tilt": torch.zeros(1),
        "turn": torch.zeros(1, 6),
        "half": torch.full((1, 6, 3), 0.5),
    }
    for kind, ahead in objects:
        parts["there"][0, SLOT[kind]] = True
        parts["centre"][0, SLOT[kind]] = torch.tensor([0.0, EYE, -ahead])
    return renderer.Rooms(**(parts | changes))


def directions(renderer: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y at which the pixels' rays meet the plane one metre ahead."""
    edge = math.tan(math.radians(renderer.FIELD_OF_VIEW / 2))
    along = torch.tensor([edge * ((2 * i + 1) / SIZE - 1) for i in range(SIZE)])
    return along.expand(SIZE, SIZE), -along[:, None].expand(SIZE, SIZE)


@rendered
@pytest.mark.parametrize("kind", [BALL, BOX, CYLINDER])
def test_an_object_straight_ahead_is_nearer_by_half_its_size_and_faces_the_camera(example, kind):
    views = example.render(one_room(example, (kind, 3.0)), SIZE)
    assert views.classes[MIDDLE] == kind
    assert views.depth[MIDDLE].item() == pytest.approx(2.5, abs=1e-5)
    torch.testing.assert_close(views.normals[0, :, SIZE // 2, SIZE // 2], torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)


@rendered
def test_every_pixel_of_a_ball_is_where_its_quadratic_equation_says(example):
    views = example.render(one_room(example, (BALL, 3.0)), SIZE)
    x, y = directions(example)
    squared = x * x + y * y + 1
    inside = 9 - squared * (9 - 0.25)  # of the root of t² (x² + y² + 1) − 6 t + 9 − r² = 0, a quarter
    seen = views.classes[0] == BALL
    assert torch.equal(seen, inside > 0) and seen.sum() > 50
    depth = (3 - inside.sqrt()) / squared
    torch.testing.assert_close(views.depth[0][seen], depth[seen], atol=1e-4, rtol=0)
    normals = torch.stack([depth * x, depth * y, 3 - depth]) / 0.5
    torch.testing.assert_close(views.normals[0][:, seen], normals[:, seen], atol=1e-3, rtol=0)


@rendered
@pytest.mark.parametrize(("heading", "tilt"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (-0.2, 0.3)])
def test_floor_and_far_wall_are_planes(example, heading, tilt):
    views = example.render(one_room(example, heading=torch.tensor([heading]), tilt=torch.tensor([tilt])), SIZE)
    x, y = directions(example)
    up = torch.tensor([0, math.cos(tilt), math.sin(tilt)])  # in the camera's frame
    towards = torch.tensor([-math.sin(heading), -math.cos(heading) * math.sin(tilt), math.cos(heading) * math.cos(tilt)])
    rays = torch.stack([x, y, -torch.ones_like(x)])
    for name, normal, away in ((FLOOR, up, EYE), (WALL, towards, 6.0)):
        seen = (views.classes[0] == name) & ((views.normals[0] * normal[:, None, None]).sum(0) > 0.99)
        assert seen.sum() > 100
        torch.testing.assert_close(views.normals[0][:, seen], normal[:, None].expand(-1, int(seen.sum())), atol=1e-5, rtol=0)
        expected = away / -(rays * normal[:, None, None]).sum(0)
        torch.testing.assert_close(views.depth[0][seen], expected[seen], atol=1e-4, rtol=1e-5)


@rendered
@pytest.mark.parametrize(("first", "second"), [(BALL, BOX), (BOX, CYLINDER), (CYLINDER, BALL)])
def test_the_nearer_object_hides_the_other(example, first, second):
    for near, far in ((first, second), (second, first)):
        views = example.render(one_room(example, (near, 2.0), (far, 4.0)), SIZE)
        assert views.classes[MIDDLE] == near and views.depth[MIDDLE].item() == pytest.approx(1.5, abs=1e-5)


@rendered
def test_between_camera_and_surface_there_is_nothing_and_behind_it_there_is(example):
    """An oracle that knows nothing of rays: whether a point is in the room's air, by the shapes' inequalities."""
    rooms = example.draw_rooms(12, torch.Generator().manual_seed(3))
    views = example.render(rooms, SIZE)
    x, y = directions(example)
    seen = 0

    def filled(points: torch.Tensor, room: int) -> torch.Tensor:
        full = ((points < rooms.low[room]) | (points > rooms.high[room])).any(-1)
        for i, kind in enumerate(example.KINDS):
            angle = rooms.turn[room, i].item()
            away = points - rooms.centre[room, i]
            p, q = away[..., 0], away[..., 2]
            own = math.cos(angle) * p - math.sin(angle) * q, away[..., 1], math.sin(angle) * p + math.cos(angle) * q
            a, b, c = (part.abs() / half for part, half in zip(own, rooms.half[room, i], strict=True))
            inside = {
                BALL: a**2 + b**2 + c**2 < 1,
                BOX: (a < 1) & (b < 1) & (c < 1),
                CYLINDER: (a**2 + c**2 < 1) & (b < 1),
            }[kind]
            full |= inside & rooms.there[room, i]
        return full

    for room in range(len(rooms)):
        heading, tilt = rooms.heading[room].item(), rooms.tilt[room].item()
        right = torch.tensor([math.cos(heading), 0, -math.sin(heading)])
        ahead = torch.tensor([-math.sin(heading) * math.cos(tilt), -math.sin(tilt), -math.cos(heading) * math.cos(tilt)])
        rays = x[..., None] * right + y[..., None] * torch.linalg.cross(right, ahead) + ahead
        ends = views.depth[room, ..., None] * rays
        for share in (0.05, 0.3, 0.6, 0.8, 0.9, 0.97, 0.9995):
            assert not filled(rooms.eye[room] + share * ends, room).any()
        normal = views.normals[room].movedim(0, -1) @ torch.stack([right, torch.linalg.cross(right, ahead), -ahead])
        behind = rooms.eye[room] + ends - 2e-3 * normal
        assert filled(behind, room).all()
        seen += len(views.classes[room].unique())
    assert seen > 50


@rendered
def test_normals_have_length_one_and_are_upright_on_the_surface_that_the_depths_describe(example):
    draws = torch.Generator().manual_seed(5)
    rooms = example.draw_rooms(10, draws)
    rooms.there[:] = torch.tensor([True, False] * 3)  # one object of a kind: one class and one normal are one surface
    rooms.half[:] = 0.3 + 0.15 * torch.rand(10, 6, 3, generator=draws)  # a ball need not be round, nor a cylinder
    views = example.render(rooms, SIZE)
    torch.testing.assert_close(views.normals.norm(dim=1), torch.ones(10, SIZE, SIZE))
    x, y = directions(example)
    points = views.depth[:, None] * torch.stack([x, y, -torch.ones_like(x)])
    assert ((views.normals * points).sum(1) < 0).all(), "a surface that is seen faces the camera"
    for axis in (-1, -2):
        (here, there), (first, second), (one, other) = (
            (part.narrow(axis, 0, SIZE - 2), part.narrow(axis, 2, SIZE - 2)) for part in (points, views.normals, views.classes)
        )
        chord = F.normalize(there - here, dim=1)
        middle = views.normals.narrow(axis, 1, SIZE - 2)
        same = (one == other) & (one == views.classes.narrow(axis, 1, SIZE - 2)) & ((first * second).sum(1) > 0.97)
        assert (one[same] >= BALL).sum() > 500
        assert (chord * middle).sum(1)[same].abs().max() < 0.02


@rendered
def test_what_the_lamp_does_not_reach_has_the_light_from_everywhere_alone(example):
    high = torch.tensor([[0.0, 2.9, -3.0]])
    room = one_room(example, (BALL, 3.0), lamp=high, tilt=torch.tensor([0.4]))
    with_ball, without = (
        example.render(room, SIZE),
        example.render(one_room(example, lamp=high, tilt=torch.tensor([0.4])), SIZE),
    )
    x, y = directions(example)
    floor = with_ball.classes[0] == FLOOR
    points = with_ball.depth[0] * torch.stack([x, y * math.cos(0.4) - math.sin(0.4), -y * math.sin(0.4) - math.cos(0.4)])
    from_below = (points[0] ** 2 + (points[2] + 3) ** 2).sqrt()  # the lamp is 1.4 m above the ball, and 2.9 m above the floor
    radius = 2.9 * math.tan(math.asin(0.5 / 1.4))
    dark, bright = floor & (from_below < radius - 0.03), floor & (from_below > radius + 0.03)
    assert dark.sum() > 20 and bright.sum() > 200
    assert torch.equal(with_ball.image[0][:, bright], without.image[0][:, bright])
    colours = (example.AMBIENT * room.surfaces[0, :2]).T
    torch.testing.assert_close(
        (with_ball.image[0][:, dark, None] - colours[:, None]).abs().amax(0).amin(-1), torch.zeros(int(dark.sum()))
    )


@rendered
def test_images_do_not_depend_on_how_many_are_cast_at_once(example):
    rooms = example.draw_rooms(5, torch.Generator().manual_seed(1))
    together, apart = (example.render(rooms, 16, torch.Generator().manual_seed(2), at_once) for at_once in (5, 2))
    for name, part in vars(together).items():
        torch.testing.assert_close(part, getattr(apart, name))
    clean = example.render(rooms, 16)
    assert (together.image - clean.image).std().item() == pytest.approx(example.NOISE, rel=0.1)


@pytest.mark.parametrize("example", ["scenes_problem"], indirect=True)
def test_a_view_in_the_mirror_is_the_view_of_the_mirrored_room(example):
    rooms = example.draw_rooms(4, torch.Generator().manual_seed(1))
    sides = torch.tensor([-1.0, 1.0, 1.0])
    parts = vars(rooms) | {name: sides * getattr(rooms, name) for name in ("centre", "lamp", "eye")}
    parts |= {"turn": -rooms.turn, "heading": -rooms.heading}
    parts |= {
        "low": torch.minimum(sides * rooms.low, sides * rooms.high),
        "high": torch.maximum(sides * rooms.low, sides * rooms.high),
    }
    expected, found = example.render(type(rooms)(**parts)), example.mirrored(example.render(rooms))
    assert (expected.classes != found.classes).float().mean() < 1e-3  # an edge may fall on either side of a pixel's middle
    same = expected.classes == found.classes
    torch.testing.assert_close(expected.depth[same], found.depth[same], atol=1e-3, rtol=0)
    assert ((expected.normals * found.normals).sum(1)[same] > 0.999).float().mean() > 0.999


@pytest.mark.parametrize("example", ["scenes_problem"], indirect=True)
def test_the_measures_are_the_papers(example):
    views, _ = example.load(6, 1)
    net = example.SceneNet(3.0, 1)
    whole = torch.tensor(10.0).deg2rad()
    across = F.normalize(torch.linalg.cross(views.normals, views.normals.roll(1, 1), dim=1), dim=1)
    answers = {
        "segmentation": torch.zeros_like(views.classes),
        "depth": views.depth + 0.5,
        "normals": whole.cos() * views.normals + whole.sin() * across,
    }
    overlap = (views.classes == 0).float().mean().item() / 6  # the floor's; nothing of the other five classes is found
    expected = {"100 − mIoU": 100 * (1 - overlap), "depth RMSE, m": 0.5, "mean angle, °": 10.0}
    assert net.measures(views, answers) == pytest.approx(expected, rel=1e-4)
    best = {"segmentation": views.classes, "depth": views.depth, "normals": views.normals}
    assert net.measures(views, best) == pytest.approx(dict.fromkeys(expected, 0), abs=0.05)


@pytest.mark.slow
@trained
def test_the_example_trains_four_methods_from_one_start_and_draws_what_came_of_it(example, tmp_path, capsys, monkeypatch):
    starts, drawn = [], []
    plain, draw = example.SceneNet.task_losses, example.draw

    def noting(self, batch, batch_idx):
        if self.global_step == 0:
            starts.append([*(parameter.detach().clone() for parameter in self.parameters()), *vars(batch).values()])
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(example.SceneNet, "task_losses", noting)
    monkeypatch.setattr(example, "draw", lambda outcomes, *args: drawn.append(outcomes) or draw(outcomes, *args))
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    (outcomes,) = drawn
    for method in example.METHODS:
        assert method.split()[-1] in printed
        assert all(math.isfinite(value) for value in outcomes[method][0].measures.values())
    assert is_drawn(tmp_path / "scenes.png")
    assert len(starts) == len(example.METHODS)
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))
    static = outcomes["GradNorm static"][0].weights
    written = read_weights(tmp_path / "GradNorm" / "seed_0" / "loss_weights.yaml", "mean")
    assert list(static) == [1, 2, 3, 4]
    assert all(weights == pytest.approx(written) for weights in static.values())
    assert set(outcomes["equal"][0].weights[4].values()) == {1.0}
