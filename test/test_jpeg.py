# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""JPEGs as cameras, recorders and phones write them, and damaged on their way."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from clustvit_ros.compressed_images import decode_compressed
from clustvit_ros.errors import DataError, ImageError
from clustvit_ros.images import read_image

ROOT = Path(__file__).resolve().parents[1]
MAX_PIXELS = 1 << 22
_SAMPLING = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
             cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)  # fmt: skip


def decode(data: bytes) -> np.ndarray:
    return decode_compressed(SimpleNamespace(format="rgb8; jpeg compressed bgr8", data=data), MAX_PIXELS)


def as_opencv(data: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flags), cv2.COLOR_BGR2RGB)


def encode(pixels: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", pixels, options)[1].tobytes()


@functools.lru_cache(maxsize=1)
def photographs() -> list[np.ndarray]:
    """The inputs on the models' cards: the first of four columns of three pictures."""
    found = []
    for path in sorted((ROOT / "models").glob("*/example.jpg")):
        card = cv2.imread(str(path))
        height, width = card.shape[0] // 3, card.shape[1] // 4
        found += [card[row * height + 24 : (row + 1) * height - 8, 8 : width - 8] for row in range(3)]
    return found


def picture(size: tuple[int, int] = (640, 480)) -> np.ndarray:
    return cv2.resize(photographs()[0], size, interpolation=cv2.INTER_AREA)


def frames(pictures: Sequence[Path | np.ndarray], count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """JPEGs of many qualities, kinds of subsampling and sizes, of windows into pictures."""
    for index in range(count):
        chosen = pictures[int(rng.integers(len(pictures)))]
        pixels = cv2.imread(str(chosen)) if isinstance(chosen, Path) else chosen
        height, width = (int(side * rng.uniform(0.6, 1.0)) for side in pixels.shape[:2])
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in
                     zip(pixels.shape[:2], (height, width), strict=True))  # fmt: skip
        size = ((640, 480), (640, 360), (848, 480), (1280, 720))[index % 4]
        pixels = cv2.resize(pixels[top : top + height, left : left + width], size, interpolation=cv2.INTER_AREA)
        quality = int(rng.choice([50, 75, 80, 90, 95]))
        yield encode(
            pixels, cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _SAMPLING[index % 3],
            cv2.IMWRITE_JPEG_OPTIMIZE, int(index % 5 == 4),
        )  # fmt: skip


def damages(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """A file as it is after five kinds of damage."""
    scan = data.index(b"\xff\xda") + 14
    at = int(rng.integers(scan, len(data) - 1100))
    yield data[:at] + data[at + 1024 :]
    yield data[: len(data) * 2 // 3] + b"\xff\xd9"
    yield data[:at] + bytes(512) + data[at + 512 :]
    yield data[:at]
    yield data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]


def accepted_wrong(pictures: Sequence[Path | np.ndarray], count: int, seed: int) -> tuple[int, int]:
    """Damaged files, and those of them that were accepted though more than 1 % of the pixels are others."""
    rng = np.random.default_rng(seed)
    total = wrong = 0
    for data in frames(pictures, count, rng):
        intact = decode(data)
        np.testing.assert_array_equal(intact, as_opencv(data))
        for damaged in damages(data, rng):
            total += 1
            try:
                decoded = decode(damaged)
            except ImageError:
                continue
            if decoded.shape != intact.shape:
                wrong += 1
            else:
                # Eight levels are what noise and compression do.
                wrong += (cv2.absdiff(decoded, intact).max(axis=2) > 8).mean() > 0.01
    return total, wrong


def test_damage_is_told_from_pictures() -> None:
    total, wrong = accepted_wrong(photographs(), 100, seed=1)
    assert total == 500 and wrong <= 0.01 * total


@pytest.mark.slow
def test_damage_is_told_from_pictures_of_cameras(camvid_dir: Path) -> None:
    pictures = [path for folder in ("camvid/val", "cwfid/train", "ycor/val", "labelmefacade/train")
                for path in sorted((camvid_dir.parent / folder / "images").iterdir())]  # fmt: skip
    total, wrong = accepted_wrong(pictures, 500, seed=1)
    assert total == 2500 and wrong <= 0.015 * total


@pytest.mark.parametrize("kind", ["progressive", "optimised", "grey", "restart", "4:1:1", "odd size"])
def test_sound_jpegs_decode_as_opencv_decodes_them(kind: str) -> None:
    data = {
        "progressive": lambda: encode(picture(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "optimised": lambda: encode(picture(), cv2.IMWRITE_JPEG_OPTIMIZE, 1),
        "grey": lambda: encode(cv2.cvtColor(picture(), cv2.COLOR_BGR2GRAY)),
        "restart": lambda: encode(picture(), cv2.IMWRITE_JPEG_RST_INTERVAL, 7),
        "4:1:1": lambda: encode(
            picture(), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411
        ),
        "odd size": lambda: encode(picture((637, 473))),
    }[kind]()
    np.testing.assert_array_equal(decode(data), as_opencv(data))


def test_cmyk_decodes_as_opencv_decodes_it() -> None:
    images = pytest.importorskip("PIL.Image", reason="needs Pillow (matplotlib)")
    file = io.BytesIO()
    images.fromarray(picture()[..., ::-1]).convert("CMYK").save(file, "JPEG")
    np.testing.assert_array_equal(decode(file.getvalue()), as_opencv(file.getvalue()))


def test_a_usb_camera_s_frame_without_huffman_tables_decodes() -> None:
    whole = encode(picture(), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422)
    frame = bytearray(whole[:2] + b"\xff\xe0\x00\x10AVI1" + bytes(10))
    position = 2
    while whole[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(whole[position + 2 : position + 4], "big")
        frame += whole[position:end] if whole[position + 1] not in (0xC4, 0xE0) else b""
        position = end
    np.testing.assert_array_equal(decode(bytes(frame + whole[position:])), as_opencv(whole))


@pytest.mark.parametrize("behind", [b"\0" * 64, b"\xff" * 32, b"trailer of a driver", b"\xff\xd9", b"\xff\xd8\xff\xe0"])
def test_bytes_behind_the_end_marker_do_not_matter(behind: bytes) -> None:
    data = encode(picture())
    np.testing.assert_array_equal(decode(data + behind), decode(data))


def test_a_preview_in_the_header_is_no_end() -> None:
    data, preview = encode(picture()), encode(picture((160, 120)))
    exif = b"Exif\0\0" + preview
    inside = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    np.testing.assert_array_equal(decode(inside), decode(data))
    with pytest.raises(ImageError, match="truncated"):
        decode(inside[: len(inside) // 2])


def test_a_preview_does_not_hide_that_the_end_is_missing() -> None:
    data = encode(picture())
    with pytest.raises(ImageError, match="without its end, it was truncated"):
        decode(data[:-2])


def test_odd_bytes_before_restart_markers_are_kept_to_their_interval() -> None:
    """Webcams of Logitech write such frames."""
    row = encode(picture(), cv2.IMWRITE_JPEG_RST_INTERVAL, 20)
    second = row.index(b"\xff\xd1", row.index(b"\xff\xda"))
    np.testing.assert_array_equal(decode(row[:second] + b"\x55\x55\x55" + row[second:]), decode(row))
    third = row.index(b"\xff\xd2", second)
    with pytest.raises(ImageError, match="damaged 640x480 image"):
        decode(row[:second] + row[third:])


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("levels", [8, -30])
def test_a_shift_from_a_block_on_is_damage_and_a_straight_edge_is_none(where: str, levels: int) -> None:
    from clustvit_ros.jpeg import find_shift, read_jpeg_header

    header = read_jpeg_header(memoryview(encode(picture())))
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.uniform(80, 180, (24, 32, 3)), (640, 480), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(coarse + rng.normal(0, 4, coarse.shape), 40, 210).astype(np.uint8)
    assert not find_shift(pixels, header)
    row = {"first": 3, "middle": 15, "last": 26}[where] * 16
    straight = pixels.copy()
    straight[row:] = (straight[row:].astype(int) + levels).astype(np.uint8)
    assert not find_shift(straight, header)
    stair = straight.copy()
    stair[row : row + 16, :272] = pixels[row : row + 16, :272]
    found = find_shift(stair, header)
    assert found is not None and (found.row, found.column) == (row // 16, 17)
    barred = pixels.copy()
    barred[:48], barred[-48:] = 0, 0
    assert not find_shift(barred, header)


def test_a_damaged_picture_of_a_data_set_is_named(tmp_path: Path) -> None:
    data = encode(picture())
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 1024 :])
    with pytest.raises(DataError, match=r"a\.jpg: a damaged 640x480 image that cannot .*; replace"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "b.jpg"), as_opencv(data))


def test_a_picture_of_a_data_set_that_only_looks_damaged_is_told_once_and_used(
    tmp_path: Path, stair_jpeg: Callable[[int, int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    data = stair_jpeg(5, 9)
    (tmp_path / "a.jpg").write_bytes(data)
    for _ in range(2):
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), as_opencv(data))
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/a.jpg: looks damaged (from some block on")
    with pytest.raises(ImageError, match="from some block on"):
        decode(data)


@pytest.mark.parametrize("name", ["montana_usa__IMG_9747", "boston_street_april__p1010224"])
def test_a_roof_along_the_blocks_is_no_damage(name: str, camvid_dir: Path) -> None:
    (path,) = (camvid_dir.parent / "labelmefacade/train/images").glob(f"*{name}.jpg")
    np.testing.assert_array_equal(decode(path.read_bytes()), as_opencv(path.read_bytes()))
    again = encode(cv2.imread(str(path))[4:], cv2.IMWRITE_JPEG_QUALITY, 50)
    np.testing.assert_array_equal(decode(again), as_opencv(again))


def test_files_and_messages_ignore_orientation_alike(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = encode(picture())
    turned = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (640, 480, 3)
    (tmp_path / "a.jpg").write_bytes(turned)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), decode(data))
    np.testing.assert_array_equal(decode(turned), decode(data))


def test_without_simplejpeg_jpegs_still_decode_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from clustvit_ros import jpeg

    data = encode(picture())
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    jpeg._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip install simplejpeg"):
        np.testing.assert_array_equal(decode(data), as_opencv(data))
