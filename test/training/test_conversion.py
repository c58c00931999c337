# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labels of COCO and labelme become what the trainer reads."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.cli.main import main
from clustvit_ros.errors import ClustvitError, ConfigError, DataError
from clustvit_ros.training.conversion import convert_labels
from clustvit_ros.training.layouts import open_data_set

SIZE = (24, 32)
# A disc of radius 7 about (300, 200), three rows of 40 in the corner and a line of 200 down column 50: 469 pixels.
COCO_TEXT = "Znd0X6]WU3iIjUkL6L2N2N2O000O20N10001N2N2N4JWbi32j]VL" + 78 * "0"


def put_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))


def put_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def box(left: int, top: int, right: int, bottom: int) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def coco(*annotations: dict[str, Any], names: tuple[str, ...] = ("a.jpg",)) -> dict[str, Any]:
    images = [{"id": 7 + i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(names)]
    categories = [{"id": 0, "name": "objects"}, {"id": 44, "name": "crop"}, {"id": 3, "name": "weed"}]
    return {"images": images, "categories": categories, "annotations": [{"image_id": 7, **a} for a in annotations]}


def labels_of(out: Path, split: str = "train") -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and the labels of a split's first image, as the trainer reads them."""
    data_set = open_data_set(out)
    assert data_set.classes is not None
    return data_set.classes.names, data_set.open(split, len(data_set.classes))[0].labels


def test_coco_polygons_and_run_lengths_become_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_image(tmp_path / "train2017" / "a.jpg")
    put_image(tmp_path / "val2017" / "deep" / "a.jpg")
    rows = np.zeros(SIZE, bool)
    rows[20:22, 1:5] = True
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, rows.T.ravel(), 2]))).tolist()
    annotations = (
        {"category_id": 3, "area": 16, "segmentation": [box(4, 4, 8, 8)]},  # the smaller one lies on top
        {"category_id": 44, "area": 200, "segmentation": [box(2, 2, 22, 12), box(24, 0, 32, 3)]},
        {"category_id": 44, "area": 8, "iscrowd": 1, "segmentation": {"size": list(SIZE), "counts": runs}},
        {"category_id": 44, "bbox": [0, 0, 5, 5], "segmentation": []},
    )
    train = put_json(tmp_path / "annotations" / "instances_train2017.json", coco(*annotations))
    val = put_json(tmp_path / "annotations" / "instances_val2017.json", coco(annotations[0], names=("deep/a.jpg",)))
    out = tmp_path / "out"
    assert main(["convert-labels", str(train), str(val), "--out", str(out)]) == 0
    assert "left out: 1 box" in capsys.readouterr().out
    expected = np.full(SIZE, 2)
    expected[2:12, 2:22], expected[0:3, 24:32], expected[rows], expected[4:8, 4:8] = 0, 0, 0, 1
    names, labels = labels_of(out)
    assert names == ("crop", "weed", "background")  # as listed; what never occurs is no class
    np.testing.assert_array_equal(labels, expected)
    assert (labels_of(out, "val")[1] == 1).sum() == 16
    assert (out / "train" / "images" / "a.jpg").is_symlink() and (out / "val" / "images" / "deep_a.jpg").is_file()


def test_what_coco_says_of_one_file_in_several_places_is_taken_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_image(tmp_path / "a.jpg")
    annotations = (
        {"category_id": 3, "segmentation": [box(4, 4, 8, 8)]},
        {"image_id": 8, "category_id": 44, "segmentation": [box(10, 10, 12, 12)]},
        {"image_id": 99, "category_id": 44, "segmentation": [box(0, 0, 30, 30)]},
    )
    labels = put_json(tmp_path / "labels.json", coco(*annotations, names=("a.jpg", "a.jpg")))
    assert main(["convert-labels", str(labels), "--out", str(tmp_path / "out")]) == 0
    assert "left out: 1 annotation of no listed image" in capsys.readouterr().out
    expected = np.full(SIZE, 2)
    expected[4:8, 4:8], expected[10:12, 10:12] = 1, 0
    np.testing.assert_array_equal(labels_of(tmp_path / "out")[1], expected)
    assert len(list((tmp_path / "out" / "train" / "images").iterdir())) == 1


def test_run_lengths_in_coco_s_text_form(tmp_path: Path) -> None:
    put_image(tmp_path / "a.jpg", (427, 640))
    content = coco({"category_id": 3, "segmentation": {"size": [427, 640], "counts": COCO_TEXT}})
    content["images"][0] |= {"height": 427, "width": 640}
    out = tmp_path / "out"
    convert_labels([put_json(tmp_path / "labels.json", content)], out, background="void")
    expected = np.zeros((427, 640), np.uint8)
    cv2.circle(expected, (300, 200), 7, 1, -1)
    expected[:3, 600:] = expected[100:300, 50] = 1
    np.testing.assert_array_equal(labels_of(out)[1] == 0, expected == 1)


def test_panoptic_pngs(tmp_path: Path) -> None:
    put_image(tmp_path / "val2017" / "a.jpg")
    ids = np.zeros(SIZE, np.int64)
    ids[:10], ids[10:20] = 70_000, 300
    segments = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    folder = tmp_path / "annotations"
    (folder / "panoptic_val2017").mkdir(parents=True)
    cv2.imwrite(str(folder / "panoptic_val2017" / "a.png"), segments[..., ::-1])
    info = [{"id": 70_000, "category_id": 44}, {"id": 300, "category_id": 3}]
    path = put_json(folder / "panoptic_val2017.json", coco({"file_name": "a.png", "segments_info": info}))
    convert_labels([path], tmp_path / "out", background="void")
    names, labels = labels_of(tmp_path / "out", "val")
    assert names == ("crop", "weed")
    np.testing.assert_array_equal(labels, np.repeat([0, 1, IGNORE_INDEX], [10, 10, 4])[:, None].repeat(32, axis=1))


def labelme(*shapes: dict[str, Any], image: str = "a.jpg") -> dict[str, Any]:
    return {"shapes": list(shapes), "imagePath": image, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}


def test_labelme_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "field"
    mask = base64.b64encode(cv2.imencode(".png", np.full((3, 4), 255, np.uint8))[1].tobytes()).decode()
    shapes = (
        {"label": "weed", "points": [[2, 2], [22, 2], [22, 12], [2, 12]], "shape_type": "polygon"},
        {"label": "crop ", "points": [[8, 8], [4, 4]], "shape_type": "rectangle"},  # later ones lie on top
        {"label": "crop", "points": [[26, 8], [26, 11]], "shape_type": "circle"},
        {"label": "weed", "points": [[1, 20], [4, 22]], "shape_type": "mask", "mask": mask},
        {"label": "__ignore__", "points": [[28, 20], [32, 24]], "shape_type": "rectangle"},
        {"label": "weed", "points": [[1, 1]], "shape_type": "point"},
    )
    for index in range(10):
        put_image(folder / f"{index}.jpg")
        put_json(folder / f"{index}.json", labelme(*shapes, image=f"C:\\photos\\{index}.jpg"))
    done = convert_labels([folder], tmp_path / "out", copy=True)
    assert (done.counts, dict(done.left_out)) == ({"train": 9, "val": 1}, {"point": 10})
    names, labels = labels_of(tmp_path / "out")
    assert names == ("crop", "weed", "background")
    assert (labels[4:8, 4:8] == 0).all() and labels[3, 3] == 1 and labels[0, 0] == 2
    assert (labels[20:23, 1:5] == 1).all() and (labels[20:, 28:] == IGNORE_INDEX).all()
    assert abs((labels[:, 23:] == 0).sum() - np.pi * 9) < 4
    assert not (tmp_path / "out" / "train" / "images" / "0.jpg").is_symlink()


def test_rectangles_of_four_corners_and_what_a_file_is_called(tmp_path: Path) -> None:
    """As forks of labelme write them, and browsers and cameras name pictures."""
    names = ("a.JFIF", "b.jpe", "drive/" + "\u753b" * 83 + ".JPG")
    for name in names:
        put_image(tmp_path / "in" / "picture.jpg")
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / "picture.jpg").rename(tmp_path / "in" / name)
        shape = {"label": "crop", "points": [[4, 8], [12, 8], [12, 20], [4, 20]], "shape_type": "rectangle"}
        put_json(tmp_path / "in" / Path(name).with_suffix(".json"), labelme(shape, image=Path(name).name))
    put_image(tmp_path / "in" / "c.png")
    (tmp_path / "in" / "c.png").rename(tmp_path / "in" / "c.ppm")
    put_json(tmp_path / "in" / "c.json", labelme(shape, image="c.ppm"))
    done = convert_labels([tmp_path / "in"], tmp_path / "out", val_every=0)
    assert done.counts == {"train": 3} and "c.ppm cannot be trained on, expected .jpg, .jpeg" in done.problems[0]
    assert len(open_data_set(tmp_path / "out").open("train", 2)) == 3
    assert (labels_of(tmp_path / "out")[1] == 0).sum() == 12 * 8


@pytest.mark.parametrize("tag", [2, 3, 4])
def test_pictures_that_are_stored_turned_are_told(tmp_path: Path, tag: int) -> None:
    """Nothing says whether their labels are drawn on what is stored, or on what viewers show."""
    tags = Image.Exif()
    tags[0x0112] = tag
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.jpg", exif=tags)
    put_image(tmp_path / "b.jpg")
    for name in ("a", "b"):
        shape = {"label": "crop", "points": [[0, 0], [9, 9]], "shape_type": "rectangle"}
        put_json(tmp_path / f"{name}.json", labelme(shape, image=f"{name}.jpg"))
    done = convert_labels([tmp_path], tmp_path / "out", val_every=0)
    assert done.counts == {"train": 1} and "a.jpg is stored turned or mirrored" in done.problems[0]


def test_classes_are_chosen_and_ordered(tmp_path: Path) -> None:
    put_image(tmp_path / "a.jpg")
    shapes = [{"label": name, "points": [[x, 0], [x + 8, 8]], "shape_type": "rectangle"}
              for x, name in ((0, "road"), (8, "kerb"), (16, "grass"))]  # fmt: skip
    put_json(tmp_path / "a.json", labelme(*shapes))
    convert_labels([tmp_path], tmp_path / "out", classes=["road", "grass"], background="void")
    names, labels = labels_of(tmp_path / "out")
    assert names == ("road", "grass") and labels[0, [0, 8, 16, 24]].tolist() == [0, IGNORE_INDEX, 1, IGNORE_INDEX]
    for background in ("kerb", "", "\x1b[2J"):
        with pytest.raises(ConfigError, match="names must be"):
            convert_labels([tmp_path], tmp_path / "other", background=background)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="--classes: lane do not occur; there are grass, kerb, road"):
        convert_labels([tmp_path], tmp_path / "other", classes=["lane"])


def test_what_train_would_refuse_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        put_image(tmp_path / "in" / f"{index}.jpg", SIZE if index else (20, 32))
        shape = {"label": "rare" if index == 1 else "usual", "points": [[0, 0], [32, 24]], "shape_type": "rectangle"}
        put_json(tmp_path / "in" / f"{index}.json", labelme(shape, image=f"{index}.jpg"))
    assert main(["convert-labels", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--val-every", "2"]) == 1
    error = capsys.readouterr().err
    assert "0.json: labelled as (24, 32), the image is (20, 32)" in error
    assert "no pixel of rare in training images" in error


@pytest.mark.parametrize(
    ("count", "val_every", "counts"), [(3, 10, {"train": 2, "val": 1}), (1, 10, {"train": 1}), (3, 0, {"train": 3})]
)
def test_few_images_leave_one_for_validation(
    tmp_path: Path, count: int, val_every: int, counts: dict[str, int]
) -> None:
    shape = {"label": "road", "points": [[0, 0], [32, 24]], "shape_type": "rectangle"}
    for index in range(count):
        put_image(tmp_path / "in" / f"{index}.jpg", SIZE)
        put_json(tmp_path / "in" / f"{index}.json", labelme(shape, image=f"{index}.jpg"))
    assert convert_labels([tmp_path / "in"], tmp_path / "out", val_every=val_every).counts == counts


def test_escape_codes_in_names_stay_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = coco({"category_id": 3, "segmentation": [box(0, 0, 9, 9)]}, names=("\x1b[2J.jpg",))
    assert main(["convert-labels", str(put_json(tmp_path / "a.json", content)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert r"its image \x1b[2J.jpg is not in" in error and "\x1b" not in error


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is no JSON"),
        ("[]", "got list at the top level"),
        ("{}", "categories' is missing"),
        (json.dumps(coco(names=())), "lists no images"),
        (json.dumps(coco({"category_id": 9, "segmentation": [[0]]})), r"categories \[9\], which"),
        (json.dumps(labelme()), "pass its folder"),
        (json.dumps(coco({"category_id": 3, "segmentation": []}, names=("b.jpg",))), "b.jpg is not in .* --images"),
        (json.dumps(coco({"category_id": 3, "bbox": [0, 0, 5, 5]})), "0 classes have labelled areas.* boxes alone"),
        (json.dumps(coco({"category_id": 3, "segmentation": [[0, 0, 1]]})), "its labels cannot be read"),
        (json.dumps(coco({"category_id": 3, "segmentation": [[0, 0, 1e30, 1, 1, 1]]})), "points that no image has"),
        (json.dumps(coco({"category_id": 3, "segmentation": {"size": [24, 32], "counts": [3]}})), "do not add up"),
        (json.dumps(coco({"category_id": 3, "segmentation": {"size": [24, 32], "counts": "\u20ac"}})), "no COCO text"),
    ],
)  # fmt: skip
def test_bad_files_are_told_in_a_sentence(tmp_path: Path, content: str, problem: str) -> None:
    put_image(tmp_path / "a.jpg")
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DataError, match=problem):
        convert_labels([tmp_path / "labels.json"], tmp_path / "out")


def test_names_of_images_lead_nowhere_else(tmp_path: Path) -> None:
    put_image(tmp_path / "secret" / "x.jpg")
    content = coco({"category_id": 3, "segmentation": [box(0, 0, 9, 9)]}, names=("../secret/x.jpg", "..secret_x.jpg"))
    put_image(tmp_path / "in" / "..secret_x.jpg")
    convert_labels([put_json(tmp_path / "in" / "train.json", content)], tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert found == ["train/labels/secret_x.png", "train/labels/secret_x_2.png"]


_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_a_label_file_holds_is_converted_or_told(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    put_image(folder / "a.jpg")
    runs = {"size": list(SIZE), "counts": [5, 10, 753]}
    content = data.draw(st.sampled_from([
        coco({"category_id": 3, "area": 4, "segmentation": [box(0, 0, 9, 9)]},
             {"category_id": 44, "segmentation": runs}),
        labelme({"label": "weed", "points": [[0, 0], [9, 9]], "shape_type": "rectangle"},
                {"label": "crop", "points": [[0, 0], [9, 9]], "shape_type": "mask", "mask": "AAAA"}),
    ]))  # fmt: skip
    content = copy.deepcopy(content)
    is_labelme = "shapes" in content
    for _ in range(data.draw(st.integers(1, 2))):
        place: Any = content
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
            if not place[key] or not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(_VALUES)
    put_json(folder / "a.json", content)
    try:
        done = convert_labels([folder if is_labelme else folder / "a.json"], folder / "out")
    except ClustvitError as error:
        assert str(error)
        return
    data_set = open_data_set(folder / "out")
    assert len(data_set.open("train", len(done.classes))[0].labels) == SIZE[0]
