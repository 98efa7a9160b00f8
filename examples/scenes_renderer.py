"""Casts rays into the rooms of ``scenes_rooms.py``: image, class, depth and surface normal of every pixel.

Rays meet the shapes in closed form, so the truths are exact. In the camera's frame x is to the right, y up and z towards
the camera: a wall that faces it has the normal (0, 0, 1). Depth is measured along the camera's axis, as depth cameras give it.

    python examples/scenes_renderer.py        # runs/scenes/rooms.png: twelve of them
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from scenes_rooms import BALL, BOX, CEILING, CYLINDER, FLOOR, KINDS, WALL, Rooms, Rows, draw_rooms
from torch import Tensor
from torch.nn import functional as F

FIELD_OF_VIEW = 64.0  # degrees from edge to edge
AMBIENT, DIFFUSE, GLOSS = 0.45, 0.8, 0.35  # light from everywhere, from the lamp, and its reflection in an object
NOISE = 0.015  # standard deviation of what a pixel's colours add to the truth
OFF = 1e-3  # metres from its surface at which a ray to the lamp begins


@dataclass  # not frozen: Lightning moves it to the device part by part
class Views(Rows):
    """What ``N`` cameras see.

    Attributes:
        image: ``[N, 3, H, W]``, 0 to 1.
        classes: ``[N, H, W]``, place in ``CLASSES``.
        depth: ``[N, H, W]``, metres along the camera's axis.
        normals: ``[N, 3, H, W]``, of length one, in the camera's frame.
    """

    image: Tensor
    classes: Tensor
    depth: Tensor
    normals: Tensor


class Hits(NamedTuple):
    """Where ``P`` rays of each room end.

    Attributes:
        distance: ``[N, P]``, in lengths of the ray.
        point: ``[N, P, 3]``.
        normal: ``[N, P, 3]``, of length one, in the room's frame.
        classes: ``[N, P]``.
        colour: ``[N, P, 3]``, before any light falls on it.
    """

    distance: Tensor
    point: Tensor
    normal: Tensor
    classes: Tensor
    colour: Tensor


def render(rooms: Rooms, size: int = 48, draws: torch.Generator | None = None, at_once: int = 50) -> Views:
    """Square images, and the truth about them.

    Args:
        rooms: which.
        size: side of an image, in pixels.
        draws: of the images' noise; ``None`` for images without.
        at_once: rooms whose rays are held in memory.
    """
    views = Views.joined([render_at_once(rooms[i : i + at_once], size) for i in range(0, len(rooms), at_once)])
    if draws is not None:
        views.image.add_(NOISE * torch.randn(views.image.shape, generator=draws)).clamp_(0, 1)
    return views


def render_at_once(rooms: Rooms, size: int) -> Views:
    """The same without noise."""
    edge = math.tan(math.radians(FIELD_OF_VIEW / 2))
    ahead = edge * ((2 * torch.arange(size) + 1) / size - 1)
    y, x = torch.meshgrid(-ahead, ahead, indexing="ij")
    to_room = turned(rooms.heading, 1) @ turned(-rooms.tilt, 0)
    rays = torch.stack([x, y, torch.full_like(x, -1)], -1).reshape(-1, 3) @ to_room.mT  # one length is one metre of depth
    hits = cast(rooms, rooms.eye[:, None], rays)
    square = (len(rooms), -1, size, size)
    return Views(
        lit(rooms, hits, rays).mT.reshape(square).contiguous(),
        hits.classes.reshape(square)[:, 0],
        hits.distance.reshape(square)[:, 0],
        (hits.normal @ to_room).mT.reshape(square).contiguous(),
    )


def turned(angle: Tensor, axis: int) -> Tensor:
    """Matrices ``[..., 3, 3]`` that turn by an angle about an axis, as a right-handed screw does."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3).expand(*angle.shape, 3, 3).clone()
    matrix[..., first, first] = matrix[..., second, second] = angle.cos()
    matrix[..., first, second], matrix[..., second, first] = -angle.sin(), angle.sin()
    return matrix


def cast(rooms: Rooms, start: Tensor, rays: Tensor) -> Hits:
    """From ``[N, P or 1, 3]`` along ``[N, P, 3]`` to the first surface."""
    exits = torch.where(rays > 0, rooms.high[:, None] - start, rooms.low[:, None] - start) / rays
    distance, axis = torch.where(rays == 0, math.inf, exits).min(-1)
    thing = torch.full_like(axis, -1)
    for i, entry in entries(rooms, start, rays):
        thing[entry < distance] = i
        distance = torch.minimum(distance, entry)
    point = start + distance[..., None] * rays
    inwards = -F.one_hot(axis, 3) * rays.sign()
    classes = torch.where(axis != 1, WALL, torch.where(rays[..., 1] < 0, FLOOR, CEILING))
    tiles = torch.div(point[..., 0::2], rooms.tile[:, None, None], rounding_mode="floor").sum(-1).remainder(2).long()
    surface = torch.where(classes == FLOOR, tiles, classes + 1)
    hits = Hits(distance, point, inwards, classes, rooms.surfaces.gather(1, surface[..., None].expand(-1, -1, 3)))
    for i, kind in enumerate(KINDS):
        room, ray = torch.nonzero(thing == i, as_tuple=True)
        local = in_frame(rooms, i, point - rooms.centre[:, None, i])[room, ray]
        normal = (local_normal(kind, local) / rooms.half[room, i]).unsqueeze(1) @ turned(rooms.turn[room, i], 1).mT
        hits.normal[room, ray] = F.normalize(normal.squeeze(1), dim=-1)
        hits.classes[room, ray] = kind
        dark = (4 * local[:, 1:2]).floor().remainder(2) == 0
        hits.colour[room, ray] = rooms.colour[room, i] * torch.where(dark, rooms.bands[room, i, None], 1)
    return hits


def entries(rooms: Rooms, start: Tensor, rays: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Per object, where the rays enter it: ``[N, P]``, infinite where they miss it, or begin in it or beyond.

    In its own frame an object is where |p| ≤ 1 (a ball), where each |p_i| ≤ 1 (a box), or where |(p_x, p_z)| ≤ 1 and
    |p_y| ≤ 1 (a cylinder): a ray is inside from the last of these parts that it enters to the first that it leaves.
    """
    for i, kind in enumerate(KINDS):
        origin, ray = in_frame(rooms, i, start - rooms.centre[:, None, i]), in_frame(rooms, i, rays)
        parts = []
        if kind != BOX:
            o, d = (vector[..., :: 1 if kind == BALL else 2] for vector in (origin, ray))
            a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
            root = (b * b - a * c).sqrt()  # not a number where the ray misses; nor is anything that follows
            parts.append(((-b - root) / a, (-b + root) / a))
        if kind != BALL:
            for axis in (1,) if kind == CYLINDER else (0, 1, 2):
                ends = (-1 - origin[..., axis]) / ray[..., axis], (1 - origin[..., axis]) / ray[..., axis]
                parts.append((torch.minimum(*ends), torch.maximum(*ends)))
        near, far = torch.stack([part[0] for part in parts]).amax(0), torch.stack([part[1] for part in parts]).amin(0)
        yield i, torch.where((near < far) & (near > 0) & rooms.there[:, i, None], near, math.inf)


def in_frame(rooms: Rooms, i: int, vectors: Tensor) -> Tensor:
    """Vectors of the room ``[N, P, 3]`` in the frame of object i, in halves of its size."""
    return vectors @ turned(rooms.turn[:, i], 1) / rooms.half[:, None, i]


def local_normal(kind: int, local: Tensor) -> Tensor:
    """Outwards, of any length, at points ``[..., 3]`` of an object's surface in its frame."""
    if kind == BALL:
        return local
    if kind == BOX:
        return F.one_hot(local.abs().argmax(-1), 3) * local.sign()
    cap = (local[..., 1:2].abs() > local[..., 0::2].norm(dim=-1, keepdim=True)).to(local)
    upright = local.new_tensor([0, 1, 0])
    return local * (cap * upright + (1 - cap) * (1 - upright))


def lit(rooms: Rooms, hits: Hits, rays: Tensor) -> Tensor:
    """Colours ``[N, P, 3]``, 0 to 1: light from everywhere, and from the lamp where nothing is between, less with distance."""
    to_lamp = rooms.lamp[:, None] - hits.point
    distance = to_lamp.norm(dim=-1)
    shaded = torch.zeros_like(distance, dtype=torch.bool)
    for _, entry in entries(rooms, hits.point + OFF * hits.normal, to_lamp):
        shaded |= entry < 1
    towards = F.normalize(to_lamp, dim=-1)
    lamp = torch.where(shaded, 0, 1 / (1 + (distance / 4).square()))
    diffuse = (towards * hits.normal).sum(-1).clamp(min=0)
    between = F.normalize(towards - F.normalize(rays, dim=-1), dim=-1)
    gloss = torch.where(hits.classes > CEILING, GLOSS, 0) * (between * hits.normal).sum(-1).clamp(min=0) ** 40
    return (hits.colour * (AMBIENT + DIFFUSE * lamp * diffuse)[..., None] + (lamp * gloss)[..., None]).clamp(0, 1)


def main(path: Path = Path("runs/scenes/rooms.png")) -> None:
    from _common import plt

    draws = torch.Generator().manual_seed(0)
    views = render(draw_rooms(12, draws), 160)
    rows = [torch.cat(list(views.image[i : i + 6]), 2) for i in (0, 6)]
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.imsave(path, torch.cat(rows, 1).permute(1, 2, 0).numpy())
    print(path)


if __name__ == "__main__":
    main()
