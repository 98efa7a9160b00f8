"""Rooms with balls, boxes and cylinders on their floors, drawn at random, for ``scenes_renderer.py``.

Lengths are in metres; x goes to the right, y up and −z ahead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

CLASSES = ("floor", "wall", "ceiling", "ball", "box", "cylinder")
FLOOR, WALL, CEILING, BALL, BOX, CYLINDER = range(len(CLASSES))
KINDS = (BALL, BALL, BOX, BOX, CYLINDER, CYLINDER)  # of a room's objects, each of which may be missing


class Rows:
    """A dataclass of tensors that have a row per room."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows: slice | Sequence[int]) -> "Rows":
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Rooms(Rows):
    """``N`` rooms, each with ``K`` objects, of the ``KINDS``.

    Attributes:
        there: ``[N, K]``, whether the object is.
        centre: ``[N, K, 3]``.
        half: ``[N, K, 3]``, half of the object's width, height and length.
        turn: ``[N, K]``, radians about the vertical.
        colour: ``[N, K, 3]``, red, green and blue from 0 to 1.
        bands: ``[N, K]``, the share of its light that every other of the object's bands keeps.
        low, high: ``[N, 3]``, corners of the room.
        surfaces: ``[N, 4, 3]``, colours of the floor's tiles, two in turn, of the walls and of the ceiling.
        tile: ``[N]``, side of a tile.
        lamp: ``[N, 3]``, a point.
        eye: ``[N, 3]``, the camera.
        heading, tilt: ``[N]``, the camera's, in radians: to the left, and down.
    """

    there: Tensor
    centre: Tensor
    half: Tensor
    turn: Tensor
    colour: Tensor
    bands: Tensor
    low: Tensor
    high: Tensor
    surfaces: Tensor
    tile: Tensor
    lamp: Tensor
    eye: Tensor
    heading: Tensor
    tilt: Tensor


def draw_rooms(count: int, draws: torch.Generator) -> Rooms:
    """Rooms 4 to 6 metres wide and up to 7 deep; the objects do not touch, and the camera looks down at them."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draws)

    objects = len(KINDS)
    low = torch.stack([between(-3.0, -2.0), torch.zeros(count), between(-7.0, -5.0)], 1)
    high = torch.stack([between(2.0, 3.0), between(2.4, 3.0), torch.full((count,), 0.5)], 1)
    balls, cylinders = (torch.tensor(KINDS) == kind for kind in (BALL, CYLINDER))
    half = between(0.24, 0.42, objects, 3)
    half[..., 1] *= 1.4
    half[:, balls] = half[:, balls, :1]
    half[:, cylinders, 2] = half[:, cylinders, 0]
    cells = torch.rand(count, 9, generator=draws).argsort(1)[:, :objects]  # three by three, ahead of the camera
    centre = torch.stack([(cells % 3 - 1) * 1.35, half[..., 1], -1.9 - (cells // 3) * 1.35], -1)
    centre[..., 0::2] += between(-0.07, 0.07, objects, 2)
    hues = between(0, 1, objects, 1) + torch.tensor([0, 1 / 3, 2 / 3])
    pale = between(0.15, 0.4, objects, 1)
    surfaces = between(0.5, 0.8, 4, 1) + between(-0.12, 0.12, 4, 3)
    surfaces[:, 1] *= between(0.5, 0.9, 1)
    surfaces[:, 3] = between(0.85, 1, 1)
    return Rooms(
        there=between(0, 1, objects) < 0.8,
        centre=centre,
        half=half,
        turn=between(0, math.pi, objects),
        colour=pale + (1 - pale) * (0.5 + 0.5 * torch.cos(2 * math.pi * hues)),
        bands=between(0.4, 1.6, objects).clamp(max=1),
        low=low,
        high=high,
        surfaces=surfaces,
        tile=between(0.4, 0.9),
        lamp=torch.stack([between(-1.5, 1.5), high[:, 1] - 0.3, between(-3.5, -0.5)], 1),
        eye=torch.stack([between(-0.4, 0.4), between(1.2, 1.7), between(-0.2, 0.3)], 1),
        heading=between(-0.2, 0.2),
        tilt=between(0.2, 0.45),
    )
