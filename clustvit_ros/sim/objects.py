# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What stands and moves in the world, around its own origin on the ground, x forward."""

from __future__ import annotations

import colorsys

import numpy as np

from clustvit_ros.sim.mesh import Colour, Mesh, blob, box, merge, prism, quads

_DARK: Colour = (0.07, 0.07, 0.08)
_GLASS: Colour = (0.20, 0.25, 0.30)


def tree(rng: np.random.Generator, colour: Colour) -> list[Mesh]:
    """Broad-leaved or conifer, 4 to 9 m."""
    tint = _varied(rng, colour, 0.12)
    trunk_m = rng.uniform(1.2, 2.2)
    trunk = prism("tree", "leaves", (0, 0, 0), rng.uniform(0.18, 0.3), trunk_m + 1.0, (0.33, 0.24, 0.17), sides=6)
    if rng.random() < 0.3:
        radius = rng.uniform(1.3, 1.9)
        cones = [
            _cone((0, 0, trunk_m * 0.6 + level * 1.5), radius * (1.0 - 0.22 * level), 2.6, _scaled(tint, 0.75))
            for level in range(4)
        ]
        return [trunk, *cones]
    radius = rng.uniform(1.3, 2.2)
    middle = trunk_m + radius * 0.8
    crown = [
        blob("tree", "leaves", (0, 0, middle), (radius, radius, radius * 0.95), tint, rng, 0.12, 0.55),
        *(
            blob(
                "tree", "leaves",
                (radius * 0.6 * np.cos(angle), radius * 0.6 * np.sin(angle), middle + rng.uniform(-0.3, 0.9)),
                (radius * rng.uniform(0.55, 0.75),) * 3, _varied(rng, tint, 0.06), rng, 0.14, 0.5,
            )
            for angle in rng.uniform(0, 2 * np.pi) + np.arange(3) * 2.1
        ),
    ]  # fmt: skip
    return [trunk, *crown]


def house(rng: np.random.Generator) -> list[Mesh]:
    """A house or barn with a gable roof; its front is +x."""
    storeys = int(rng.integers(1, 4))
    length, depth, height = 3.0 * rng.integers(3, 6), 3.0 * rng.integers(2, 4), 2.9 * storeys
    wall = _varied(
        rng, [(0.85, 0.80, 0.70), (0.78, 0.45, 0.36), (0.88, 0.86, 0.82), (0.80, 0.68, 0.45)][rng.integers(4)]
    )
    roof = _varied(rng, [(0.52, 0.22, 0.16), (0.30, 0.29, 0.31), (0.44, 0.30, 0.22)][rng.integers(3)])
    x, y = depth / 2, length / 2
    rise, over = rng.uniform(1.5, 2.6), 0.4
    walls = box("building", "wall", (0, 0, height / 2), (depth, length, height), wall, texture_m=3.0)
    slopes, gables = [], []
    for side in (-1.0, 1.0):
        eave, edge = height - 0.25, side * (x + over)
        ends = (-(y + over), y + over) if side > 0 else (y + over, -(y + over))
        slopes.append(
            [(edge, ends[0], eave), (edge, ends[1], eave), (0, ends[1], height + rise), (0, ends[0], height + rise)]
        )
        foot = [(side * x, side * y, height), (-side * x, side * y, height)]
        gables.append([*foot, (0, side * y, height + rise), (0, side * y, height + rise)])
    door = [[(x + 0.03, -0.6, 0), (x + 0.03, 0.6, 0), (x + 0.03, 0.6, 2.2), (x + 0.03, -0.6, 2.2)]]
    return [
        walls,
        quads("building", "roof", np.array(slopes), roof, texture_m=2.0),
        quads("building", "plain", np.array(gables), _scaled(wall, 0.9)),
        quads("building", "plain", np.array(door), _varied(rng, (0.35, 0.22, 0.14), 0.2)),
        box("building", "roof", (x * 0.4, y * 0.5, height + rise), (0.7, 0.7, 1.4), (0.5, 0.3, 0.25)),
    ]


def pole(rng: np.random.Generator) -> list[Mesh]:
    """A street lamp on a stout column."""
    grey = _varied(rng, [(0.62, 0.63, 0.66), (0.42, 0.45, 0.44), (0.55, 0.47, 0.38)][rng.integers(3)], 0.1)
    height = rng.uniform(4.5, 6.0)
    return [
        prism("pole", "plain", (0, 0, 0), rng.uniform(0.24, 0.3), height, grey),
        box("pole", "plain", (0.3, 0, height - 0.2), (1.1, 0.5, 0.4), _scaled(grey, 0.8)),
    ]


def vehicle(rng: np.random.Generator) -> list[Mesh]:
    """A car, a van or a tractor."""
    paint = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.25, 0.95))
    kind = rng.random()
    if kind < 0.2:
        paint = [(0.75, 0.14, 0.08), (0.1, 0.42, 0.14), (0.1, 0.25, 0.6)][rng.integers(3)]
        parts = [
            box("vehicle", "plain", (0.9, 0, 1.15), (1.9, 0.9, 0.8), paint),
            box("vehicle", "plain", (-0.6, 0, 1.2), (1.3, 1.5, 0.8), _scaled(paint, 0.9)),
            box("vehicle", "plain", (-0.6, 0, 2.05), (1.2, 1.4, 1.1), _GLASS, 0.85),
            box("vehicle", "plain", (-0.6, 0, 2.65), (1.3, 1.5, 0.14), paint),
        ]
        return [merge(parts + _wheels(-0.75, 0.8, 0.85) + _wheels(1.35, 0.55, 0.75))]
    length, width, height, body, cabin = (4.3, 1.8, 1.5, 0.55, 0.55) if kind < 0.75 else (5.0, 2.0, 2.3, 0.75, 0.92)
    split = 0.28 + height * body
    top = height + 0.05
    parts = [
        box("vehicle", "plain", (0, 0, (0.28 + split) / 2), (length, width, split - 0.28), paint, 0.97),
        box(
            "vehicle", "plain", (-0.15, 0, (split + top) / 2), (length * cabin, width * 0.92, top - split), _GLASS, 0.8
        ),
        box("vehicle", "plain", (-0.15, 0, top + 0.02), (length * cabin * 0.82, width * 0.76, 0.06), paint),
        box("vehicle", "plain", (length / 2 - 0.02, 0, 0.72), (0.08, width * 0.9, 0.18), (0.95, 0.93, 0.8)),
        box("vehicle", "plain", (0.02 - length / 2, 0, 0.78), (0.08, width * 0.9, 0.18), (0.7, 0.08, 0.06)),
    ]
    return [merge(parts + _wheels(-length * 0.3, 0.34, width / 2 - 0.1) + _wheels(length * 0.3, 0.34, width / 2 - 0.1))]


def person(rng: np.random.Generator) -> list[Mesh]:
    """Somebody on foot, legs apart."""
    size = rng.uniform(1.0, 1.12)
    jacket = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 0.95), rng.uniform(0.4, 0.95))
    trousers = _varied(rng, [(0.15, 0.18, 0.3), (0.25, 0.22, 0.2), (0.4, 0.36, 0.28)][rng.integers(3)])
    skin = [(0.85, 0.64, 0.52), (0.55, 0.38, 0.28), (0.36, 0.24, 0.18)][rng.integers(3)]
    parts = [
        box("person", "plain", (0.1, 0.13, 0.43), (0.26, 0.25, 0.86), trousers),
        box("person", "plain", (-0.1, -0.13, 0.43), (0.26, 0.25, 0.86), _scaled(trousers, 0.9)),
        box("person", "plain", (0, 0, 1.15), (0.36, 0.56, 0.66), jacket, 0.85),
        box("person", "plain", (0.06, 0.34, 1.1), (0.22, 0.16, 0.66), _scaled(jacket, 0.9)),
        box("person", "plain", (-0.06, -0.34, 1.1), (0.22, 0.16, 0.66), _scaled(jacket, 0.9)),
        blob("person", "plain", (0, 0, 1.64), (0.16, 0.15, 0.19), skin),
    ]
    whole = merge(parts)
    whole.points[...] *= size
    return [whole]


def _wheels(x: float, radius: float, y: float) -> list[Mesh]:
    tyres = []
    for foot, thickness in ((y - 0.12, 0.24), (0.12 - y, -0.24)):
        tyre = prism("vehicle", "plain", (x, foot, radius), radius, abs(thickness), _DARK, sides=10, axis=1)
        if thickness < 0:
            tyre.points[..., 1] = 2 * foot - tyre.points[..., 1]
            tyre.points[...] = tyre.points[:, ::-1].copy()
            tyre.normals[..., 1] *= -1.0
        tyres.append(tyre)
    return tyres


def _cone(foot: tuple[float, float, float], radius: float, height: float, colour: Colour, sides: int = 9) -> Mesh:
    angles = np.arange(sides + 1) * (2 * np.pi / sides)
    ring = np.column_stack([np.cos(angles) * radius, np.sin(angles) * radius, np.zeros(sides + 1)])
    tip = np.broadcast_to((0.0, 0.0, height), (sides, 3))
    corners = np.stack([ring[:-1], ring[1:], tip, tip], axis=1) + np.asarray(foot)
    shades = np.broadcast_to(np.array([0.65, 0.65, 1.0, 1.0])[:, None], (4, 3)) * np.asarray(colour)
    uvs = np.stack([np.arange(sides) * 0.5, np.zeros(sides)], axis=1)[:, None] + [
        [0, 0], [0.5, 0], [0.25, 1], [0.25, 1],
    ]  # fmt: skip
    return quads("tree", "leaves", corners, np.broadcast_to(shades, (sides, 4, 3)), uvs)


def _varied(rng: np.random.Generator, colour: Colour, amount: float = 0.08) -> Colour:
    red, green, blue = np.clip(np.asarray(colour) * (1.0 + rng.uniform(-amount, amount, 3)), 0.0, 1.0)
    return float(red), float(green), float(blue)


def _scaled(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
