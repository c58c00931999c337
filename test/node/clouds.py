# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Clouds and depth images of any layout, and labelled points as a consumer reads them."""

from __future__ import annotations

import numpy as np
from sensor_msgs.msg import Image, PointCloud2, PointField
from std_msgs.msg import Header

SIZE = (24, 32)
SECOND_NS = 1_000_000_000
LABELLED = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("label", "<u4"), ("confidence", "<f4")])


def header(stamp_ns: int, frame_id: str = "camera") -> Header:
    result = Header(frame_id=frame_id)
    result.stamp.sec, result.stamp.nanosec = divmod(stamp_ns, SECOND_NS)
    return result


def scene(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Positions of a plane with holes; NaN with a payload of its own, which must survive."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    z = (3.0 + 0.05 * rows + rng.normal(0.0, 0.01, size)).astype(np.float32)
    points = np.stack([z * (columns - 15.5) / 40, z * (rows - 11.5) / 40, z], axis=-1).astype(np.float32)
    points[:3] = np.array([0x7FC01234], np.uint32).view(np.float32)
    return points


def cloud(
    positions: np.ndarray, kind: str = "<f4", offsets: tuple[int, ...] = (0, 4, 8), step: int = 12, padding: int = 0,
    stamp_ns: int = SECOND_NS, frame_id: str = "camera",
) -> PointCloud2:  # fmt: skip
    """A cloud of any layout; what no field covers is garbage."""
    dtype = np.dtype({"names": list("xyz"), "formats": [kind] * 3, "offsets": offsets, "itemsize": step})
    height, width = positions.shape[:2]
    rows = np.full((height, width * step + padding), 0xAB, np.uint8)
    stored = np.ndarray((height, width), dtype, rows.data, 0, (rows.strides[0], step))
    for axis, name in enumerate("xyz"):
        stored[name] = positions[..., axis]
    datatype = PointField.FLOAT64 if kind.endswith("8") else PointField.FLOAT32
    message = PointCloud2(
        header=header(stamp_ns, frame_id), height=height, width=width, point_step=step, row_step=rows.shape[1],
        is_bigendian=kind.startswith(">"), is_dense=False,
        fields=[
            PointField(name=name, offset=offset, datatype=datatype, count=1)
            for name, offset in zip("xyz", offsets, strict=True)
        ],
    )  # fmt: skip
    message.data.frombytes(rows.data.cast("B"))
    return message


def depth_image(z: np.ndarray, encoding: str, stamp_ns: int = SECOND_NS, order: str = "<") -> Image:
    values = np.nan_to_num(z * 1000.0).round().astype(f"{order}u2") if encoding == "16UC1" else z.astype(f"{order}f4")
    message = Image(
        header=header(stamp_ns), height=z.shape[0], width=z.shape[1], encoding=encoding, step=values[0].nbytes,
        is_bigendian=order == ">",
    )  # fmt: skip
    message.data.frombytes(values.tobytes())
    return message


def labelled(message: PointCloud2) -> np.ndarray:
    """The points of an output, (H, W)."""
    assert [(each.name, each.offset) for each in message.fields] == [
        ("x", 0), ("y", 4), ("z", 8), ("label", 12), ("confidence", 16)
    ]  # fmt: skip
    assert (message.point_step, message.row_step) == (20, 20 * message.width)
    return np.frombuffer(message.data, LABELLED).reshape(message.height, message.width)


def positions_of(message: PointCloud2) -> np.ndarray:
    points = labelled(message)
    return np.stack([points["x"], points["y"], points["z"]], axis=-1)
