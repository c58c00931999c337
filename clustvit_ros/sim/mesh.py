# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Triangles as arrays, and the few solids that the world is made of. Metres, z up.

Surface textures, computed: noise shaped in the frequency domain repeats without a seam by nature.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Mesh:
    """Triangles of one class and one texture.

    Args:
        label: class name.
        texture: name of a texture, see `textures.py`.
        points: (T, 3, 3) corners, counter-clockwise seen from outside.
        normals: (T, 3, 3) unit normals at the corners, for the light.
        uvs: (T, 3, 2) texture coordinates; the texture repeats at every whole number.
        colours: (T, 3, 3) reflectance 0..1, multiplied with the texture.
    """

    label: str
    texture: str
    points: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    colours: np.ndarray

    def moved(self, x: float, y: float, heading_rad: float = 0.0) -> Mesh:
        """Turned about z, then shifted."""
        cos, sin = np.cos(heading_rad), np.sin(heading_rad)
        turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return replace(self, points=self.points @ turn + (x, y, 0.0), normals=self.normals @ turn)


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """Meshes of one class and texture as one."""
    fields = ("points", "normals", "uvs", "colours")
    joined = (np.concatenate([getattr(mesh, name) for mesh in meshes]) for name in fields)
    return Mesh(meshes[0].label, meshes[0].texture, *joined)


def quads(
    label: str, texture: str, corners: np.ndarray, colours: np.ndarray | Colour, uvs: np.ndarray | None = None,
    texture_m: float = 1.0,
) -> Mesh:  # fmt: skip
    """Flat four-cornered faces.

    Args:
        corners: (Q, 4, 3), counter-clockwise from outside.
        colours: (Q, 4, 3), or one for all.
        uvs: (Q, 4, 2); None measures them along the sides.
        texture_m: metres that one repetition covers, where `uvs` is None.
    """
    corners = np.asarray(corners, np.float64)
    if uvs is None:
        width = np.linalg.norm(corners[:, 1] - corners[:, 0], axis=1) / texture_m
        height = np.linalg.norm(corners[:, 3] - corners[:, 0], axis=1) / texture_m
        zero = np.zeros_like(width)
        uvs = np.stack([zero, zero, width, zero, width, height, zero, height], axis=1).reshape(-1, 4, 2)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    colours = np.broadcast_to(np.asarray(colours, np.float64), corners.shape)
    pick = [[0, 1, 2], [0, 2, 3]]
    count = 2 * len(corners)
    return Mesh(
        label, texture, corners[:, pick].reshape(count, 3, 3),
        np.repeat(normals, 6, axis=0).reshape(count, 3, 3), uvs[:, pick].reshape(count, 3, 2),
        colours[:, pick].reshape(count, 3, 3),
    )  # fmt: skip


def box(
    label: str, texture: str, centre: Sequence[float], size: Sequence[float], colour: Colour, top: float = 1.0,
    texture_m: float = 1.0,
) -> Mesh:  # fmt: skip
    """A box with sides along x, y and z, whose upper face is `top` times as long and wide as the lower."""
    cx, cy, cz = centre
    half = np.asarray(size) / 2
    low = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half[:2] + (cx, cy)
    high = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half[:2] * top + (cx, cy)
    bottom = np.column_stack([low, np.full(4, cz - half[2])])
    lid = np.column_stack([high, np.full(4, cz + half[2])])
    faces = [[bottom[i], bottom[(i + 1) % 4], lid[(i + 1) % 4], lid[i]] for i in range(4)]
    return quads(label, texture, np.array([*faces, lid]), colour, texture_m=texture_m)


def prism(
    label: str, texture: str, foot: Sequence[float], radius: float, height: float, colour: Colour, sides: int = 8,
    axis: int = 2,
) -> Mesh:  # fmt: skip
    """An upright (axis 2) or lying (axis 0, 1) column from `foot` on, with its far end closed."""
    angles = np.arange(sides + 1) * (2 * np.pi / sides)
    ring = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(sides + 1)]) * radius
    top = ring + np.array([0.0, 0.0, height])
    faces = np.stack([ring[:-1], ring[1:], top[1:], top[:-1]], axis=1)
    hub = np.broadcast_to((0.0, 0.0, height), (sides, 3))
    caps = np.stack([top[:-1], top[1:], hub, hub], axis=1)
    corners = np.concatenate([faces, caps])
    corners = np.roll(corners, axis - 2, axis=2) + np.asarray(foot)
    return quads(label, texture, corners, colour)


def blob(
    label: str, texture: str, centre: Sequence[float], radii: Sequence[float], colour: Colour,
    rng: np.random.Generator | None = None, roughness: float = 0.0, shade: float = 0.0, detail: int = 1,
) -> Mesh:  # fmt: skip
    """An ellipsoid with smooth normals.

    Args:
        roughness: random change of the radius, relative.
        shade: how much darker its lowest point is, 0..1.
        detail: subdivisions of the icosahedron.
    """
    points, faces = _icosphere(detail)
    stretch = 1.0 if rng is None else 1.0 + roughness * rng.uniform(-1.0, 1.0, (len(points), 1))
    corners = (points * stretch * np.asarray(radii) + np.asarray(centre))[faces]
    normals = points[faces]
    light = 1.0 - shade * (0.5 - 0.5 * normals[..., 2:])
    uvs = np.stack([np.arctan2(normals[..., 1], normals[..., 0]) * 0.8, normals[..., 2] * 1.6], axis=2)
    # A triangle over the seam of the angle would squeeze the whole texture into itself.
    uvs[..., 0] = np.where(np.ptp(uvs[..., 0], axis=1, keepdims=True) > 2.0, uvs[..., 0] % 5.03, uvs[..., 0])
    return Mesh(label, texture, corners, normals, uvs, np.asarray(colour) * light)


@functools.cache
def _icosphere(detail: int) -> tuple[np.ndarray, np.ndarray]:
    golden = (1 + 5**0.5) / 2
    points: list[tuple[float, float, float]] = [
        (-1, golden, 0), (1, golden, 0), (-1, -golden, 0), (1, -golden, 0), (0, -1, golden), (0, 1, golden),
    ]  # fmt: skip
    points += [(0, -1, -golden), (0, 1, -golden), (golden, 0, -1), (golden, 0, 1), (-golden, 0, -1), (-golden, 0, 1)]
    faces = [(0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11), (1, 5, 9), (5, 11, 4), (11, 10, 2), (10, 7, 6)]
    faces += [(7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9), (4, 9, 5), (2, 4, 11), (6, 2, 10)]
    faces += [(8, 6, 7), (9, 8, 1)]
    vertices = [np.array(point) / np.linalg.norm(point) for point in points]
    for _ in range(detail):
        middles: dict[tuple[int, int], int] = {}

        def middle(a: int, b: int, middles: dict[tuple[int, int], int] = middles) -> int:
            key = (min(a, b), max(a, b))
            if key not in middles:
                point = vertices[a] + vertices[b]
                vertices.append(point / np.linalg.norm(point))
                middles[key] = len(vertices) - 1
            return middles[key]

        split = []
        for a, b, c in faces:
            ab, bc, ca = middle(a, b), middle(b, c), middle(c, a)
            split += [(a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca)]
        faces = split
    return np.array(vertices), np.array(faces)


SIZE_PX = 128
TEXTURES = ("plain", "asphalt", "grass", "soil", "leaves", "wall", "roof", "cloud")


def make_textures(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One set of textures: name -> (SIZE_PX, SIZE_PX, 3) float32 factors around 0..1 for the surface's colour."""
    return {
        "plain": _grey(np.ones((SIZE_PX, SIZE_PX))),
        "asphalt": _grey(0.84 + 0.07 * noise(rng, 0.2) + 0.05 * noise(rng, 1.4)),
        "grass": _tinted(rng, 0.78 + 0.13 * noise(rng, 0.3) + 0.09 * noise(rng, 1.2), (0.05, 0.02, 0.03)),
        "soil": _tinted(rng, _furrows(rng), (0.03, 0.02, 0.02)),
        "leaves": _tinted(rng, 0.70 + 0.20 * noise(rng, 0.7) + 0.10 * noise(rng, 0.1), (0.04, 0.02, 0.03)),
        "wall": _wall(rng), "roof": _roof(rng), "cloud": _cloud(rng),
    }  # fmt: skip


def noise(rng: np.random.Generator, exponent: float, size: int = SIZE_PX) -> np.ndarray:
    """Seamless noise of mean 0 and deviation 1 whose amplitude falls with frequency ** -exponent: (size, size)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * frequency**-exponent
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(size, size))
    return field / field.std()


def _furrows(rng: np.random.Generator) -> np.ndarray:
    wave = np.sin(np.arange(SIZE_PX) * (2 * np.pi * 4 / SIZE_PX))[None]
    return 0.76 + 0.09 * wave + 0.08 * noise(rng, 0.5) + 0.06 * noise(rng, 1.3)


def _wall(rng: np.random.Generator) -> np.ndarray:
    """One storey, one window wide: plaster or bricks around a window with a frame."""
    size = SIZE_PX
    texture = _grey(0.90 + 0.03 * noise(rng, 0.4) + 0.04 * noise(rng, 1.6))
    if rng.random() < 0.5:
        rows = np.arange(size) // 8
        joints = (np.arange(size) % 8 == 0)[:, None] | ((np.arange(size)[None] + 8 * (rows % 2)[:, None]) % 16 == 0)
        texture[joints] *= 0.82
    left, right, low, high = size * 34 // 100, size * 66 // 100, size * 32 // 100, size * 78 // 100
    texture[low - 4 : high + 4, left - 4 : right + 4] = 1.0
    glass = np.linspace(0.22, 0.5, high - low)[:, None, None] * np.array([0.75, 0.9, 1.1])
    texture[low:high, left:right] = glass
    texture[low:high, size // 2 - 1 : size // 2 + 2] = 0.95
    texture[(low + high) // 2 : (low + high) // 2 + 3, left:right] = 0.95
    return texture.astype(np.float32)


def _roof(rng: np.random.Generator) -> np.ndarray:
    row = np.arange(SIZE_PX) % 16
    shade = 1.0 - 0.25 * (row < 3)[:, None] - 0.10 * (np.arange(SIZE_PX) % 16 < 2)[None]
    return _grey(0.85 * shade + 0.05 * noise(rng, 0.6))


def _cloud(rng: np.random.Generator) -> np.ndarray:
    """Alpha of the clouds, in all three channels."""
    return _grey(np.clip(0.3 + 0.45 * noise(rng, 1.7), 0.0, 1.0))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(values, 0.0, 1.0)[..., None], 3, axis=2).astype(np.float32)


def _tinted(rng: np.random.Generator, values: np.ndarray, spread: tuple[float, float, float]) -> np.ndarray:
    tint = np.stack([amount * noise(rng, 1.0) for amount in spread], axis=2)
    return np.clip(values[..., None] + tint, 0.0, 1.0).astype(np.float32)
