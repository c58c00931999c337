# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Panda3D's software rasteriser: camera pictures, and which triangle every pixel belongs to.

It needs neither display nor GL nor system packages. pyrender and moderngl need a GL driver, VTK one of OSMesa's, and
mitsuba's rays take seconds where this takes milliseconds. The second pass draws every triangle in the colour of its
number, without light, texture or blending. Classes and, since every triangle is flat, depth follow from it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import ConfigError
from clustvit_ros.sim.mesh import Mesh, merge
from clustvit_ros.sim.world import Thing, Weather, World

try:
    from panda3d import core as p3d
except ModuleNotFoundError as _error:
    raise ConfigError(
        "the simulated camera needs the Python package 'panda3d'; install it, or this package with its 'sim' extra"
    ) from _error

_CHUNK_M = 24.0
# Behind hedges and houses hardly anything is seen farther away, but it would cost half the time; the woods at the
# horizon are always drawn.
_STATIC_SIGHT_M = 90.0
_BACKDROP_M = 120.0
_FAR_M = 900.0
_SKY_FROM_DEG = -4.0
_NEAR_M = 0.25
_RIM = np.array([0.85, 1.15], np.float32)
# Drawn in this order; the ground is flat and below everything, so it needs no depth buffer.
_SKY_BIN, _GROUND_BIN, _SHADOW_BIN = 0, 1, 2

p3d.load_prc_file_data("", "audio-library-name null\nnotify-level-display error\nnotify-level-tinydisplay error")


@dataclass(frozen=True)
class CameraPose:
    """Where the camera is: x, y, z in metres, heading (counter-clockwise from x) and pitch (up) in radians."""

    x: float
    y: float
    z: float
    heading_rad: float
    pitch_rad: float


@dataclass
class _Placed:
    """A thing in both scenes: `faces` are its rows of the tables, the others what these hold in its frame."""

    thing: Thing
    nodes: tuple[Any, Any]
    faces: slice
    planes: np.ndarray
    corners: np.ndarray


class Renderer:
    """Draws a world.

    Args:
        world: what to draw.
        classes: their order gives the labels; "sky" is where nothing is.
        size: (height, width) in pixels.
        focal_px: focal length of the pinhole camera; its centre is the picture's.
    """

    def __init__(self, world: World, classes: ClassSet, size: tuple[int, int], focal_px: float) -> None:
        self._world, self._size, self._focal_px = world, size, focal_px
        self._class_of_face = [np.array([classes.names.index("sky")], np.uint8)]
        self._planes = [np.array([[0.0, 0.0, 0.0, 1.0]])]
        self._corners = [np.zeros((1, 3, 3))]
        self._count = 1
        self._ids = {name: index for index, name in enumerate(classes.names)}
        self._engine = p3d.GraphicsEngine()
        pipe = p3d.GraphicsPipeSelection.get_global_ptr().make_pipe("TinyOffscreenGraphicsPipe", "p3tinydisplay")
        if pipe is None:
            raise ConfigError("this build of panda3d lacks its software renderer p3tinydisplay; install it from PyPI")
        self._scenes = tuple(p3d.NodePath(name) for name in ("picture", "faces"))
        self._targets = tuple(self._open(pipe, scene) for scene in self._scenes)
        self._textures = {name: _texture(pixels) for name, pixels in world.textures.items()}
        self._placed: list[_Placed] = []
        self._distant: list[tuple[tuple[Any, Any], float, float]] = []
        self._build(world)
        self._class_table = np.concatenate(self._class_of_face)
        self._plane_table = np.concatenate(self._planes).astype(np.float32)
        self._corner_table = np.concatenate(self._corners).astype(np.float32)
        height, width = size
        u = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / focal_px
        v = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / focal_px
        self._rays = np.stack([*np.meshgrid(u, v), np.ones(size, np.float32)], axis=2)  # right, down, forward

    def close(self) -> None:
        """Free the buffers."""
        self._engine.remove_all_windows()

    def render(self, pose: CameraPose, time_s: float, want_faces: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw one moment.

        Returns:
            (H, W, 3) uint8 BGR picture, and (H, W) int32 triangle numbers (0 is sky) or None.
        """
        self._place_things(pose, time_s)
        self._targets[1][0].set_active(want_faces)
        for _, camera, _ in self._targets:
            camera.set_pos(pose.x, pose.y, pose.z)
            camera.set_hpr(np.degrees(pose.heading_rad) - 90.0, np.degrees(pose.pitch_rad), 0.0)
        self._sky.set_pos(pose.x, pose.y, 0.0)
        self._engine.render_frame()
        picture = cv2.cvtColor(self._read(0), cv2.COLOR_BGRA2BGR)
        if not want_faces:
            return picture, None
        return picture, self._read(1).view("<u4")[..., 0].astype(np.int32) & 0xFFFFFF

    def labels(self, faces: np.ndarray) -> np.ndarray:
        """Class of every pixel: (H, W) uint8."""
        return np.take(self._class_table, faces)

    def depth(self, faces: np.ndarray, pose: CameraPose, step: int = 1, bounded: bool = True) -> np.ndarray:
        """Distance along the optical axis: (H, W) float32 in metres, infinite for the sky.

        Args:
            step: take every so many-th row and column only.
            bounded: see to it that no pixel on a triangle's rim gets a depth far from the triangle, or below zero.

        Each pixel's ray meets the plane n x = d of its triangle at (d - n c) / (n r), c the camera, r the ray.
        """
        faces = faces[::step, ::step]
        planes = np.take(self._plane_table, faces, axis=0)
        axes = _optical_axes(pose).astype(np.float32)
        position = np.array([pose.x, pose.y, pose.z], np.float32)
        offsets = planes[..., 3] - planes[..., :3] @ position
        slopes = np.einsum("hwc,hwc->hw", planes[..., :3], self._rays[::step, ::step] @ axes)
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = offsets / slopes
        if bounded:
            self._bound(depth, faces, position, axes[2])
        depth[faces == 0] = np.inf
        return depth

    def _bound(self, depth: np.ndarray, faces: np.ndarray, position: np.ndarray, forward: np.ndarray) -> None:
        # A pixel on the rim of a triangle can belong to it though its centre's ray meets the plane elsewhere: if the
        # triangle is seen edge-on, anywhere. So no point lies far outside of its triangle's depths.
        reach = self._corner_table @ forward - position @ forward
        nearest = np.maximum(np.minimum(np.minimum(reach[:, 0], reach[:, 1]), reach[:, 2]), np.float32(_NEAR_M))
        farthest = np.maximum(np.maximum(reach[:, 0], reach[:, 1]), reach[:, 2])
        np.maximum(depth, np.take(nearest, faces) * _RIM[0], out=depth)
        np.minimum(depth, np.take(farthest, faces) * _RIM[1], out=depth)

    def points(self, depth: np.ndarray) -> np.ndarray:
        """Points of a depth map: (H, W, 3) float32, x right, y down, z forward; NaN for the sky."""
        return self._rays * np.where(np.isfinite(depth), depth, np.float32(np.nan))[..., None]

    def _open(self, pipe: Any, scene: Any) -> tuple[Any, Any, Any]:
        properties = p3d.FrameBufferProperties()
        properties.set_rgba_bits(8, 8, 8, 8)
        properties.set_depth_bits(24)
        height, width = self._size
        buffer = self._engine.make_output(
            pipe, scene.name, 0, properties, p3d.WindowProperties.size(width, height), p3d.GraphicsPipe.BF_refuse_window
        )
        texture = p3d.Texture(scene.name)
        buffer.add_render_texture(texture, p3d.GraphicsOutput.RTM_copy_ram)
        buffer.set_clear_color((0, 0, 0, 1))
        lens = p3d.PerspectiveLens()
        lens.set_film_size(width, height)
        lens.set_focal_length(self._focal_px)
        lens.set_near_far(_NEAR_M, _FAR_M)
        camera = scene.attach_new_node(p3d.Camera("camera", lens))
        buffer.make_display_region().set_camera(camera)
        return buffer, camera, texture

    def _read(self, index: int) -> np.ndarray:
        pixels = np.frombuffer(self._targets[index][2].get_ram_image(), np.uint8)
        return pixels.reshape(*self._size, 4)[::-1]

    def _build(self, world: World) -> None:
        weather = world.weather
        self._sky = self._scenes[0].attach_new_node(_sky())
        sky = _sky_pixels(weather, world.textures["cloud"])
        self._sky.set_texture(_texture(sky, repeat_v=False))
        _flat(self._sky, _SKY_BIN, 0)
        for order, (_, mesh) in enumerate((mesh.texture, mesh) for mesh in world.ground):
            for node in self._add(mesh, self._scenes, weather)[0]:
                _flat(node, _GROUND_BIN, order)
        if world.shadows:
            shadow = _vertices(np.concatenate(world.shadows), None, None, alpha=weather.shadow)
            node = self._scenes[0].attach_new_node(shadow)
            node.set_transparency(p3d.TransparencyAttrib.M_alpha)
            _flat(node, _SHADOW_BIN, 0)
        for mesh in _chunks(world.static):
            nodes, _ = self._add(mesh, self._scenes, weather)
            x, y = (float(value) for value in mesh.points[..., :2].reshape(-1, 2).mean(axis=0))
            if x * x + y * y < _BACKDROP_M**2:
                self._distant.append((nodes, x, y))
        for thing in world.things:
            parents = tuple(scene.attach_new_node("thing") for scene in self._scenes)
            first = self._count
            for mesh in thing.meshes:
                self._add(mesh, parents, weather, turning=thing.moves)
            if thing.moves:
                blot = _vertices(_footprint(thing.meshes), None, None, alpha=min(weather.shadow + 0.1, 1.0))
                node = parents[0].attach_new_node(blot)
                node.set_transparency(p3d.TransparencyAttrib.M_alpha)
                _flat(node, _SHADOW_BIN, first)
            count = len(thing.meshes)
            planes, corners = (np.concatenate(rows[-count:]) for rows in (self._planes, self._corners))
            self._placed.append(_Placed(thing, parents, slice(first, self._count), planes, corners))

    def _add(self, mesh: Mesh, parents: tuple[Any, Any], weather: Weather, turning: bool = False) -> tuple[Any, slice]:
        faces = len(mesh.points)
        rows = slice(self._count, self._count + faces)
        numbers = np.arange(rows.start, rows.stop)
        self._count = rows.stop
        if self._count >= 1 << 24:
            raise ConfigError(f"sim: the world has {self._count} triangles, expected fewer than {1 << 24}")
        nodes = tuple(
            parent.attach_new_node(node)
            for parent, node in zip(
                parents,
                (
                    _vertices(mesh.points, _lit(mesh, weather, turning), mesh.uvs),
                    _vertices(mesh.points, _code(numbers), None),
                ),
                strict=True,
            )
        )
        nodes[0].set_texture(self._textures[mesh.texture])
        for node in nodes:
            # Panda3D would draw in the order of addresses in memory, and what is equally far would differ by run.
            node.set_bin("fixed", rows.start)
        normals = np.cross(mesh.points[:, 1] - mesh.points[:, 0], mesh.points[:, 2] - mesh.points[:, 0])
        offsets = np.einsum("fc,fc->f", normals, mesh.points[:, 0])
        self._planes.append(np.column_stack([normals, offsets]))
        self._corners.append(mesh.points)
        self._class_of_face.append(np.full(faces, self._ids[mesh.label], np.uint8))
        return nodes, rows

    def _place_things(self, pose: CameraPose, time_s: float) -> None:
        for nodes, x, y in self._distant:
            for node in nodes:
                if (x - pose.x) ** 2 + (y - pose.y) ** 2 < _STATIC_SIGHT_M**2:
                    node.show()
                else:
                    node.hide()
        for placed in self._placed:
            x, y, heading = placed.thing.place(time_s)
            near = (x - pose.x) ** 2 + (y - pose.y) ** 2 < placed.thing.sight_m**2
            for node in placed.nodes:
                if near:
                    node.show()
                else:
                    node.hide()
                if placed.thing.moves and near:
                    node.set_pos_hpr(x, y, 0.0, np.degrees(heading), 0.0, 0.0)
            if placed.thing.moves and near:
                cos, sin = np.cos(heading), np.sin(heading)
                turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
                normals = placed.planes[:, :3] @ turn
                offsets = placed.planes[:, 3] + normals @ (x, y, 0.0)
                self._plane_table[placed.faces] = np.column_stack([normals, offsets])
                self._corner_table[placed.faces] = placed.corners @ turn + (x, y, 0.0)


def _optical_axes(pose: CameraPose) -> np.ndarray:
    """Rows: the camera's right, down and forward in world coordinates."""
    cos_h, sin_h = np.cos(pose.heading_rad), np.sin(pose.heading_rad)
    cos_p, sin_p = np.cos(pose.pitch_rad), np.sin(pose.pitch_rad)
    forward = np.array([cos_h * cos_p, sin_h * cos_p, sin_p])
    right = np.array([sin_h, -cos_h, 0.0])
    return np.stack([right, np.cross(forward, right), forward])


def _lit(mesh: Mesh, weather: Weather, turning: bool) -> np.ndarray:
    """Colours under the weather's light, which is baked in: (T, 3, 3). What turns is lit from above."""
    sun = np.array([0.0, 0.0, 1.0]) * 0.8 if turning else weather.sun
    direct = np.maximum(mesh.normals @ sun, 0.0)[..., None]
    # Half of the sky is hidden from a wall, and all of it from what faces down.
    ambient = 0.72 + 0.28 * mesh.normals[..., 2:]
    return np.clip(mesh.colours * (weather.skylight * ambient + weather.sunlight * direct), 0.0, 1.0)


def _code(numbers: np.ndarray) -> np.ndarray:
    """Triangle numbers as colours: (T, 3, 3) floats that become the number's three bytes."""
    code = np.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], axis=1) / 255.0
    return np.repeat(code[:, None], 3, axis=1)


def _vertices(points: np.ndarray, colours: np.ndarray | None, uvs: np.ndarray | None, alpha: float = 1.0) -> Any:
    """Separate triangles as a node: points (T, 3, 3), colours (T, 3, 3) 0..1 or black, uvs (T, 3, 2) or none."""
    layout = [("xyz", "<f4", 3), ("rgba", "u1", 4)] + ([("uv", "<f4", 2)] if uvs is not None else [])
    array = p3d.GeomVertexArrayFormat()
    array.add_column(p3d.InternalName.get_vertex(), 3, p3d.Geom.NT_float32, p3d.Geom.C_point)
    array.add_column(p3d.InternalName.get_color(), 4, p3d.Geom.NT_uint8, p3d.Geom.C_color)
    if uvs is not None:
        array.add_column(p3d.InternalName.get_texcoord(), 2, p3d.Geom.NT_float32, p3d.Geom.C_texcoord)
    vertex_format = p3d.GeomVertexFormat.register_format(p3d.GeomVertexFormat(array))
    rows = np.zeros(points.shape[0] * 3, layout)
    rows["xyz"] = points.reshape(-1, 3)
    if colours is not None:
        rows["rgba"][:, :3] = np.rint(colours.reshape(-1, 3) * 255.0)
    rows["rgba"][:, 3] = round(255 * alpha)
    if uvs is not None:
        rows["uv"] = uvs.reshape(-1, 2)
    data = p3d.GeomVertexData("triangles", vertex_format, p3d.Geom.UH_static)
    data.unclean_set_num_rows(len(rows))
    memoryview(data.modify_array(0)).cast("B")[:] = rows.tobytes()
    triangles = p3d.GeomTriangles(p3d.Geom.UH_static)
    triangles.add_next_vertices(len(rows))
    geometry = p3d.Geom(data)
    geometry.add_primitive(triangles)
    node = p3d.GeomNode("triangles")
    node.add_geom(geometry)
    return node


def _texture(pixels: np.ndarray, repeat_v: bool = True) -> Any:
    height, width = pixels.shape[:2]
    texture = p3d.Texture()
    texture.setup_2d_texture(width, height, p3d.Texture.T_unsigned_byte, p3d.Texture.F_rgb)
    # BGR, lowest row first.
    texture.set_ram_image(np.rint(pixels[::-1, :, ::-1] * 255).astype(np.uint8).tobytes())
    texture.set_minfilter(p3d.SamplerState.FT_linear_mipmap_nearest)
    texture.set_magfilter(p3d.SamplerState.FT_linear)
    if not repeat_v:
        texture.set_wrap_v(p3d.SamplerState.WM_clamp)
    return texture


def _flat(node: Any, layer: int, order: int) -> None:
    """Paint in order, whatever the depth."""
    node.set_depth_test(False)
    node.set_depth_write(False)
    node.set_bin("background", (layer << 24) + order)


def _chunks(meshes: list[Mesh]) -> list[Mesh]:
    """What lies together and looks the same is drawn together, and left out together when it is out of view."""
    groups: dict[tuple[str, str, int, int], list[Mesh]] = {}
    for mesh in meshes:
        x, y = mesh.points[..., :2].reshape(-1, 2).mean(axis=0) // _CHUNK_M
        groups.setdefault((mesh.label, mesh.texture, int(x), int(y)), []).append(mesh)
    return [merge(group) for group in groups.values()]


def _footprint(meshes: list[Mesh]) -> np.ndarray:
    points = np.concatenate([mesh.points.reshape(-1, 3) for mesh in meshes])[:, :2]
    hull = cv2.convexHull((points * 1.12).astype(np.float32)).reshape(-1, 2)
    corners = np.column_stack([hull, np.zeros(len(hull))])
    return np.stack([np.broadcast_to(corners[0], corners[1:-1].shape), corners[1:-1], corners[2:]], axis=1)


def _sky() -> Any:
    """A dome around the camera; the texture runs four times around it, and once from below the horizon to the top."""
    turns, rows = np.linspace(0, 2 * np.pi, 33), np.linspace(0, 1, 13)
    turn, row = np.meshgrid(turns, rows)
    height = np.radians(_SKY_FROM_DEG + (90.0 - _SKY_FROM_DEG) * row**2)
    points = 300.0 * np.stack([np.cos(turn) * np.cos(height), np.sin(turn) * np.cos(height), np.sin(height)], axis=2)
    uvs = np.stack([turn * (4 / (2 * np.pi)), row], axis=2)

    def corners(values: np.ndarray) -> np.ndarray:
        around = [values[:-1, :-1], values[:-1, 1:], values[1:, 1:], values[1:, :-1]]
        cells = np.stack(around, axis=2).reshape(-1, 4, values.shape[2])
        return cells[:, [[0, 2, 1], [0, 3, 2]]].reshape(-1, 3, values.shape[2])

    points = corners(points)
    return _vertices(points, np.ones_like(points), corners(uvs))


def _sky_pixels(weather: Weather, cloud: np.ndarray) -> np.ndarray:
    """The sky's texture: horizon's colour to zenith's from row 0 (top) down, clouds over it."""
    size = cloud.shape[0]
    row = 1.0 - np.arange(size)[:, None, None] / (size - 1)
    height = np.radians(_SKY_FROM_DEG + (90.0 - _SKY_FROM_DEG) * row**2)
    blend = np.clip(np.sin(height) * 1.9, 0, 1) ** 0.65
    sky = weather.horizon * (1 - blend) + weather.zenith * blend
    white = 0.35 * weather.horizon + 0.65 * np.clip(weather.skylight + weather.sunlight, 0, 1)
    # Clouds fade towards the horizon and the top, where the texture would show that it is wrapped.
    cover = (
        np.clip((cloud - 1.0 + weather.clouds) * 1.6, 0, 0.85)
        * np.clip(row * 5 - 1.2, 0, 1)
        * np.clip(5 - 5 * row, 0, 1)
    )
    return sky * (1 - cover) + white * cover
