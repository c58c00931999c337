# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""One world per seed: a road in a closed loop, what grows and stands beside it, what moves on it, and its weather."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from clustvit_ros.sim.mesh import Colour, Mesh, blob, make_textures, quads
from clustvit_ros.sim.objects import house, person, pole, tree, vehicle

ROAD_HALF_WIDTH_M = 2.8
_VERGE_M = 4.0
_STEP_M = 4.0
_TREE_LINE_M = 58.0
_SIGHT_M = {"pole": 16.0, "person": 16.0, "vehicle": 36.0}


@dataclass(frozen=True)
class Weather:
    """Light and air.

    Args:
        sun: unit vector towards the sun.
        sunlight, skylight: (r, g, b) factors of direct and ambient light.
        zenith, horizon: colours of the sky, 0..1; the horizon's is the haze's as well.
        clouds: how much of the sky they cover, 0..1.
        haze_per_m: extinction; 0.01 leaves 37 % of the contrast at 100 m.
        shadow: opacity of cast shadows.
    """

    sun: np.ndarray
    sunlight: np.ndarray
    skylight: np.ndarray
    zenith: np.ndarray
    horizon: np.ndarray
    clouds: float
    haze_per_m: float
    shadow: float


@dataclass
class Thing:
    """An object with a place of its own, drawn only up to `sight_m` from the camera.

    Args:
        meshes: in its own coordinates for one that moves, else in the world's.
        place: seconds -> (x, y, heading in radians); a constant for one that stands.
        moves: its place changes.
        sight_m: metres.
    """

    meshes: list[Mesh]
    place: Callable[[float], tuple[float, float, float]]
    moves: bool
    sight_m: float


class Route:
    """A closed smooth curve, by arc length.

    Args:
        rng: decides its shape.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        angle = np.linspace(0.0, 2 * np.pi, 2001)
        radius = np.full_like(angle, 72.0)
        for wave, most in ((2, 8.0), (3, 4.5), (4, 1.8)):
            radius += rng.uniform(-most, most) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
        points = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
        self._points = points
        self._s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        headings = np.unwrap(np.arctan2(*np.gradient(points, axis=0).T[::-1]))
        self._headings = headings
        self.length_m = float(self._s[-1])

    def at(self, s: np.ndarray | float, left_m: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and heading at `s` metres along the road and `left_m` to its left."""
        s = np.asarray(s, np.float64)
        laps, rest = np.divmod(s, self.length_m)
        heading = np.interp(rest, self._s, self._headings) + laps * (self._headings[-1] - self._headings[0])
        x = np.interp(rest, self._s, self._points[:, 0]) - np.sin(heading) * left_m
        y = np.interp(rest, self._s, self._points[:, 1]) + np.cos(heading) * left_m
        return x, y, heading


@dataclass
class World:
    """Everything that a renderer needs.

    Args:
        seed: what it was made from.

    Attributes:
        route: the road.
        ground: flat parts, to be painted in this order.
        shadows: (triangles of 3 corners, 3) polygons on the ground.
        static: what stands, in world coordinates.
        things: what stands or moves and is only drawn nearby.
        textures: by name, see `textures.py`.
    """

    seed: int
    route: Route = field(init=False)
    weather: Weather = field(init=False)
    ground: list[Mesh] = field(init=False, default_factory=list)
    shadows: list[np.ndarray] = field(init=False, default_factory=list)
    static: list[Mesh] = field(init=False, default_factory=list)
    things: list[Thing] = field(init=False, default_factory=list)
    textures: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        # A stream for each concern, so that a change to one leaves the others as they are.
        route, weather, textures, palette, lots, traffic = (
            np.random.default_rng(child) for child in np.random.SeedSequence(self.seed).spawn(6)
        )
        self.route = Route(route)
        self.weather = _draw_weather(weather)
        self.textures = make_textures(textures)
        self._grass = _hsv(palette, (0.20, 0.30), (0.40, 0.70), (0.50, 0.72))
        self._soil = _hsv(palette, (0.045, 0.085), (0.35, 0.60), (0.42, 0.62))
        self._crop = _hsv(palette, (0.13, 0.38), (0.45, 0.80), (0.62, 0.88))
        self._leaf = _hsv(palette, (0.19, 0.36), (0.40, 0.75), (0.36, 0.55))
        self._lay_ground(palette)
        for side in (-1.0, 1.0):
            self._lay_lots(lots, side)
        self._lay_road(palette)
        self._plant_tree_line(lots)
        self._add_traffic(traffic)

    def _lay_ground(self, rng: np.random.Generator) -> None:
        """Grass as far as one sees, finer near the road; colours drift, or the texture's repetition would show."""
        edges = np.concatenate([[-600.0, -300.0, -180.0], np.arange(-132.0, 133.0, 6.0), [180.0, 300.0, 600.0]])
        drift = (
            1.0
            + 0.12 * rng.uniform(-1, 1, (len(edges), len(edges), 1))
            + 0.05 * rng.uniform(-1, 1, (len(edges),) * 2 + (3,))
        )
        colours = np.clip(drift * self._grass, 0.0, 1.0)
        y, x = np.meshgrid(edges, edges, indexing="ij")
        points = np.stack([x, y, np.zeros_like(x)], axis=2)
        self.ground.append(_grid("grass", "grass", points, colours, 3.0))

    def _lay_road(self, rng: np.random.Generator) -> None:
        grey = np.full(3, rng.uniform(0.30, 0.46)) * (1.0 + rng.uniform(-0.06, 0.06, 3))
        count = round(self.route.length_m / _STEP_M)
        s = np.arange(count + 1) * (self.route.length_m / count)
        lefts = np.linspace(-ROAD_HALF_WIDTH_M, ROAD_HALF_WIDTH_M, 5)
        drift = 1.0 + 0.08 * rng.uniform(-1, 1, (count + 1, 5, 1))
        drift[-1] = drift[0]
        self.ground.append(self._strip("road", "asphalt", s, lefts, drift * grey, 2.0))
        white = np.clip(np.full(3, rng.uniform(0.6, 0.85)) + rng.uniform(-0.05, 0.05, 3), 0, 1)
        if rng.random() < 0.8:
            for left in (-ROAD_HALF_WIDTH_M + 0.25, ROAD_HALF_WIDTH_M - 0.25):
                self.ground.append(self._strip("road", "asphalt", s, np.array([left - 0.08, left + 0.08]), white, 2.0))
            for start in np.arange(0.0, self.route.length_m - 4.0, 8.0):
                dash = np.array([start, start + 3.0])
                self.ground.append(self._strip("road", "asphalt", dash, np.array([-0.08, 0.08]), white, 2.0))

    def _strip(
        self, label: str, texture: str, s: np.ndarray, lefts: np.ndarray, colours: np.ndarray, texture_m: float
    ) -> Mesh:
        """A flat surface along the road: `s` by `lefts` corners."""
        grid_s, grid_left = np.meshgrid(s, lefts, indexing="ij")
        x, y, _ = self.route.at(grid_s, grid_left)
        # Seen from above, from right to left and forward is counter-clockwise.
        return _grid(
            label, texture, np.stack([x, y, np.zeros_like(x)], axis=2)[:, ::-1],
            np.broadcast_to(colours, (*x.shape, 3))[:, ::-1], texture_m, np.stack([grid_left, grid_s], axis=2)[:, ::-1],
        )  # fmt: skip

    def _lay_lots(self, rng: np.random.Generator, side: float) -> None:
        """What lies beside the road, one piece of land after another."""
        depth_m = 22.0 if side > 0 else 32.0  # the loop turns left: less room inside
        s = float(rng.uniform(0.0, 4.0))
        last = ""
        while s < self.route.length_m - 14.0:
            length = min(float(rng.uniform(18.0, 40.0)), self.route.length_m - s)
            kinds = ("field", "ploughed", "houses", "meadow", "wood")
            chances = np.array([0.30, 0.18, 0.24, 0.13, 0.15]) * [kind != last for kind in kinds]
            last = kinds[rng.choice(5, p=chances / chances.sum())]
            lot = {
                "field": self._lay_field, "ploughed": self._lay_ploughed, "houses": self._build_houses,
                "meadow": self._plant_meadow, "wood": self._plant_wood,
            }[last]  # fmt: skip
            lot(rng, side, s, length, depth_m)
            self._plant_hedge(rng, side, s + length + 1.0, depth_m)
            s += length + 2.0
        for at in np.arange(rng.uniform(0, 10), self.route.length_m - 8, rng.uniform(14, 22)):
            self._stand(pole(rng), at + rng.uniform(-2, 2), side * rng.uniform(3.3, 3.6), -side * np.pi / 2, "pole")

    def _lay_ploughed(self, rng: np.random.Generator, side: float, s: float, length: float, depth_m: float) -> None:
        along = np.linspace(s, s + length, max(round(length / _STEP_M), 1) + 1)
        across = side * np.linspace(_VERGE_M + rng.uniform(0, 1), depth_m, 6)
        colour = np.asarray(self._soil) * rng.uniform(0.85, 1.15)
        drift = 1.0 + 0.08 * rng.uniform(-1, 1, (len(along), 6, 1))
        self.ground.append(self._strip("soil", "soil", along, np.sort(across), np.clip(drift * colour, 0, 1), 2.4))

    def _lay_field(self, rng: np.random.Generator, side: float, s: float, length: float, depth_m: float) -> None:
        """Soil with crop rows along the road."""
        self._lay_ploughed(rng, side, s, length, depth_m)
        height, width, spacing = rng.uniform(0.5, 0.9), rng.uniform(0.8, 1.05), rng.uniform(1.2, 1.5)
        along = np.linspace(s, s + length, round(length / 1.6) + 1)
        for left in np.arange(_VERGE_M + 0.9, depth_m - 0.5, spacing):
            # Cross-section of a row: foot, shoulder, shoulder, foot.
            offsets = side * left + np.array([-0.5, -0.32, 0.32, 0.5]) * width
            heights = height * np.array([0.0, 1.0, 1.0, 0.0])
            grid_s, grid_left = np.meshgrid(along, offsets, indexing="ij")
            bumps = rng.uniform(-1, 1, (len(along), 1))
            x, y, _ = self.route.at(grid_s, grid_left + 0.05 * bumps)
            z = np.broadcast_to(heights, x.shape) * (1.0 + 0.18 * bumps)
            z[[0, -1]] = 0.0
            shade = np.array([0.55, 1.0, 1.0, 0.55])[None, :, None] * (
                1.0 + 0.12 * rng.uniform(-1, 1, (len(along), 1, 1))
            )
            colours = np.clip(shade * self._crop, 0, 1)
            points = np.stack([x, y, z], axis=2)
            self.static.append(
                _grid("crop", "leaves", points[:, ::-1], colours[:, ::-1], 1.2,
                      np.stack([np.broadcast_to([0.0, 0.5, 1.2, 1.7], x.shape), grid_s], axis=2)[:, ::-1])
            )  # fmt: skip

    def _build_houses(self, rng: np.random.Generator, side: float, s: float, length: float, depth_m: float) -> None:
        at = s + 8.0
        while at < s + length - 6.0:
            back = rng.uniform(11.0, 15.0)
            self._stand(house(rng), at, side * back, -side * np.pi / 2 + rng.uniform(-0.15, 0.15))
            if rng.random() < 0.5:
                self._stand(tree(rng, self._leaf), at + 7.5, side * rng.uniform(8.0, 14.0), 0.0)
            at += rng.uniform(15.0, 19.0)
        if rng.random() < 0.7:
            # Parked on the verge, along the road.
            heading = np.pi * (rng.random() < 0.5) + rng.uniform(-0.1, 0.1)
            self._stand(vehicle(rng), s + length * rng.uniform(0.3, 0.8), side * 4.6, heading, "vehicle")

    def _plant_meadow(self, rng: np.random.Generator, side: float, s: float, length: float, depth_m: float) -> None:
        for _ in range(rng.integers(4, 9)):
            self._stand(tree(rng, self._leaf), s + rng.uniform(0, length), side * rng.uniform(8, depth_m), 0.0)

    def _plant_wood(self, rng: np.random.Generator, side: float, s: float, length: float, depth_m: float) -> None:
        for left in np.arange(9.0, min(depth_m, 22.0), 4.5):
            for at in np.arange(s + 2, s + length - 1, 5.0):
                self._stand(tree(rng, self._leaf), at + rng.uniform(-1, 1), side * (left + rng.uniform(-1, 1)), 0.0)

    def _plant_hedge(self, rng: np.random.Generator, side: float, s: float, depth_m: float) -> None:
        """Bushes across, higher than the camera: every piece of land ends in sight, as in hedgerow country."""
        left, size = _VERGE_M + 1.2, 1.0
        while left < depth_m:
            x, y, _ = (float(value) for value in self.route.at(s + rng.uniform(-0.3, 0.3), side * left))
            radius, height = size * rng.uniform(1.0, 1.3), rng.uniform(1.25, 1.6)
            bush = blob("tree", "leaves", (0, 0, height * 0.85), (radius, radius, height), self._leaf, rng, 0.1, 0.5)
            self.static.append(bush.moved(x, y))
            self.shadows.append(self._cast(self.static[-1]))
            # Farther from the road, fewer and larger ones do.
            left += 1.7 * size
            size = min(size * 1.12, 2.0)

    def _plant_tree_line(self, rng: np.random.Generator) -> None:
        """Woods that close the horizon, as an uneven wall outside the loop."""
        angle = np.linspace(0, 2 * np.pi, 161)
        radius = 84.0 + _TREE_LINE_M + rng.uniform(-4, 4, 161)
        radius[-1] = radius[0]
        top = 8.0 + 3.0 * rng.uniform(-1, 1, 161) + 2.0 * np.sin(3 * angle)
        top[-1] = top[0]
        ring = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
        low = np.column_stack([ring, np.zeros(161)])
        high = np.column_stack([ring * 1.01, top])
        corners = np.stack([low[1:], low[:-1], high[:-1], high[1:]], axis=1)
        shade = np.array([0.6, 0.6, 1.0, 1.0])[None, :, None] * np.asarray(self._leaf)
        self.static.append(quads("tree", "leaves", corners, np.broadcast_to(shade, (160, 4, 3)), texture_m=6.0))

    def _add_traffic(self, rng: np.random.Generator) -> None:
        length = self.route.length_m
        count = int(rng.integers(5, 9))
        offset = rng.uniform(0, length)
        speed = rng.uniform(2.5, 5.0)
        for index in range(count):
            # One speed for all on the lane that comes towards the camera: nobody runs into anybody.
            start = offset + (index + rng.uniform(-0.3, 0.3)) * length / count
            self._move(vehicle(rng), start, -speed, 1.6, "vehicle")
        for _ in range(int(rng.integers(26, 38))):
            walk = rng.uniform(0.6, 1.4) * rng.choice([-1.0, 1.0])
            left = rng.choice([-1.0, 1.0]) * rng.uniform(3.0, 3.6)
            self._move(person(rng), rng.uniform(0, length), walk, left, "person")

    def _stand(self, meshes: list[Mesh], s: float, left_m: float, turn_rad: float, kind: str = "") -> None:
        x, y, heading = (float(value) for value in self.route.at(s, left_m))
        placed = [mesh.moved(x, y, heading + turn_rad) for mesh in meshes]
        for mesh in placed:
            self.shadows.append(self._cast(mesh))
        if kind:
            self.things.append(Thing(placed, lambda _t: (x, y, 0.0), False, _SIGHT_M[kind]))
        else:
            self.static.extend(placed)

    def _move(self, meshes: list[Mesh], s: float, speed_m_per_s: float, left_m: float, kind: str) -> None:
        route = self.route  # and not self: a cycle would keep the whole world in memory after its use

        def place(time_s: float) -> tuple[float, float, float]:
            x, y, heading = route.at(s + speed_m_per_s * time_s, left_m)
            return float(x), float(y), float(heading) + (np.pi if speed_m_per_s < 0 else 0.0)

        self.things.append(Thing(meshes, place, True, _SIGHT_M[kind]))

    def _cast(self, mesh: Mesh) -> np.ndarray:
        """The shadow of a (nearly convex) mesh on the ground: (T, 3, 3) triangles."""
        points = mesh.points.reshape(-1, 3)
        flat = points[:, :2] - points[:, 2:] * self.weather.sun[:2] / self.weather.sun[2]
        hull = cv2.convexHull(flat.astype(np.float32)).reshape(-1, 2)
        corners = np.column_stack([hull, np.zeros(len(hull))])
        fan = np.stack([np.broadcast_to(corners[0], corners[1:-1].shape), corners[1:-1], corners[2:]], axis=1)
        return fan


def _draw_weather(rng: np.random.Generator) -> Weather:
    """Clear, overcast, hazy or low sun."""
    kind = rng.choice(4, p=[0.4, 0.2, 0.2, 0.2])
    elevation = np.radians(rng.uniform(14.0, 24.0) if kind == 3 else rng.uniform(32.0, 65.0))
    azimuth = rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    warm = np.array([1.0, 0.80, 0.58]) if kind == 3 else np.array([1.0, 0.96, 0.88])
    exposure = rng.uniform(0.85, 1.15)
    strength = {0: 0.85, 1: 0.18, 2: 0.45, 3: 0.85}[int(kind)] * exposure
    blue = np.array([0.80, 0.92, 1.10])
    skylight = {0: 0.52 * blue, 1: np.full(3, 0.82), 2: np.full(3, 0.68), 3: 0.46 * blue}[int(kind)] * exposure
    zenith = {0: (0.25, 0.48, 0.86), 1: (0.62, 0.65, 0.70), 2: (0.60, 0.68, 0.78), 3: (0.36, 0.50, 0.76)}[int(kind)]
    horizon = {0: (0.72, 0.82, 0.92), 1: (0.76, 0.78, 0.80), 2: (0.80, 0.83, 0.86), 3: (0.95, 0.80, 0.64)}[int(kind)]
    return Weather(
        sun, warm * strength, skylight,
        np.clip(np.array(zenith) * rng.uniform(0.85, 1.1), 0, 1),
        np.clip(np.array(horizon) * rng.uniform(0.92, 1.05), 0, 1),
        clouds={0: rng.uniform(0.3, 0.9), 1: 0.35, 2: 0.2, 3: rng.uniform(0.2, 0.7)}[int(kind)],
        haze_per_m={0: 0.0025, 1: 0.004, 2: rng.uniform(0.007, 0.015), 3: 0.004}[int(kind)],
        shadow={0: 0.42, 1: 0.10, 2: 0.22, 3: 0.42}[int(kind)],
    )  # fmt: skip


def _grid(
    label: str, texture: str, points: np.ndarray, colours: np.ndarray, texture_m: float,
    metric: np.ndarray | None = None,
) -> Mesh:  # fmt: skip
    """Quads between the (rows, columns, 3) points; the texture follows `metric` (rows, columns, 2), else x and y."""

    def cells(values: np.ndarray) -> np.ndarray:
        around = [values[:-1, :-1], values[:-1, 1:], values[1:, 1:], values[1:, :-1]]
        return np.stack(around, axis=2).reshape(-1, 4, values.shape[2])

    uvs = (points[..., :2] if metric is None else metric) / texture_m
    return quads(label, texture, cells(points), cells(colours), cells(uvs))


def _hsv(rng: np.random.Generator, *ranges: tuple[float, float]) -> Colour:
    hue, saturation, value = (float(rng.uniform(*limits)) for limits in ranges)
    return colorsys.hsv_to_rgb(hue, saturation, value)
