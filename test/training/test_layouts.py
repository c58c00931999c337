# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Data sets as their authors publish them, in small made-up samples of the same layout."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.training.dataset import (
    LabelledImages,
    check_images,
    group_images,
    list_findings,
    warn_of_lonely_labels,
    warn_of_orientation,
    without,
)
from clustvit_ros.training.layouts import open_data_set

RNG = np.random.default_rng(0)


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 3:
        array = array[..., ::-1]
    assert cv2.imwrite(str(path), array)


def photo(size=(24, 32)):
    return RNG.integers(0, 256, (*size, 3), np.uint8)


def columns(values, size=(24, 32)):
    """Labels in vertical stripes of the given values."""
    values = np.asarray(values)
    return values[np.arange(size[1]) * len(values) // size[1]][None].repeat(size[0], axis=0).astype(np.uint8)


@pytest.mark.parametrize("prefix", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, prefix):
    for folder, count in (("training", 2), ("validation", 1)):
        for index in range(count):
            put(tmp_path / prefix / "images" / folder / f"ADE_{index:08}.jpg", photo())
            put(tmp_path / prefix / "annotations" / folder / f"ADE_{index:08}.png", columns([0, 1, 150]))
    data_set = open_data_set(tmp_path)
    assert len(data_set.classes) == 150 and data_set.classes.names[0] == "wall"
    data = data_set.open("train", 150)
    assert len(data) == 2 and len(data_set.open("val", 150)) == 1
    assert set(np.unique(data[0].labels)) == {255, 0, 149}
    assert (data[0].labels == columns([255, 0, 149])).all()


def test_ade20k_values_beyond_its_classes_are_named(tmp_path):
    put(tmp_path / "images/training/a.jpg", photo())
    put(tmp_path / "annotations/training/a.png", columns([3, 151]))
    with pytest.raises(DataError, match=r"a.png: label ids \[151\] have no class"):
        open_data_set(tmp_path).open("train", 150)[0]


def test_suim_colours_and_their_inaccuracies(tmp_path):
    colours = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    mask = np.array(colours, np.int16)[columns(range(8))]
    mask = np.clip(mask + RNG.integers(-90, 91, mask.shape), 0, 255).astype(np.uint8)
    for part, count in (("train_val", 8), ("TEST", 2)):
        for index in range(count):
            put(tmp_path / part / "images" / f"d_r_{index}_.jpg", photo())
            put(tmp_path / part / "masks" / f"d_r_{index}_.bmp", mask)
    data_set = open_data_set(tmp_path)
    # The order of the authors' three-bit colour code: waterbody 000, diver 001, plant 010, ... sea floor 111.
    assert (data_set.open("train", 8)[0].labels == columns(range(8))).all()
    assert data_set.classes.names[1] == "diver" and data_set.classes.colours[1] == (0, 0, 255)
    train, val = ({p.stem for p in data_set.open(split, 8).pairs} for split in ("train", "val"))
    assert len(train) == 6 and len(val) == 2 and not train & val
    assert len(data_set.open("test", 8)) == 2


def test_rumexweeds_polygons(tmp_path):
    names = ("20210806_hegnstrup/seq0/imgs/a.png", "20210806_hegnstrup/seq0/imgs/b.png")
    for name in names:
        put(tmp_path / name, photo())
    (tmp_path / "20210806_hegnstrup/seq0/annotations_seg.xml").write_text(
        '<annotations><version>1.1</version><image id="0" name="a.png" width="32" height="24">'
        '<polygon label="rumex_obtusifolius" occluded="0" points="2.0,2.0;10.0,2.0;10.0,9.0;2.0,9.0"/>'
        '<polygon label="rumex_crispus" points="20,10;29,10;29,20;20,20"/></image>'
        '<image id="1" name="b.png" width="32" height="24"/></annotations>'
    )
    (tmp_path / "dataset_splits").mkdir()
    (tmp_path / "dataset_splits/20210806_hegnstrup_random_train.txt").write_text("\n".join(names) + "\n")
    data = open_data_set(tmp_path).open("train", 3)
    first = data[0].labels
    assert first.shape == (24, 32) and first[5, 5] == 1 and first[15, 25] == 2 and first[0, 0] == 0
    assert (first == 1).sum() == 9 * 8
    assert (data[1].labels == 0).all()


def test_cityscapes(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / "leftImg8bit" / split / "aachen" / "aachen_000000_000019_leftImg8bit.png", photo())
        put(tmp_path / "gtFine" / split / "aachen" / "aachen_000000_000019_gtFine_labelIds.png",
            columns([0, 7, 8, 33, 29]))  # fmt: skip
    data = open_data_set(tmp_path).open("val", 19)
    assert (data[0].labels == columns([255, 0, 1, 18, 255])).all()


def dataset_file(root, **content):
    root.mkdir(exist_ok=True)
    classes = [{"name": "soil", "colour": [0, 0, 0]}, {"name": "weed", "colour": [255, 0, 0]}]
    splits = {name: {"images": f"{name}/rgb", "labels": f"{name}/mask"} for name in ("train", "val")}
    (root / "dataset.yaml").write_text(yaml.safe_dump({"classes": classes, "splits": splits, **content}))
    for split in ("train", "val"):
        for stem in ("a", "b"):
            put(root / split / "rgb" / f"{stem}.jpg", photo())
    return root


def test_dataset_file_with_ids(tmp_path):
    root = dataset_file(tmp_path / "d", ignore=[7, 200], label_suffix="_mask.png")
    for split in ("train", "val"):
        for stem in ("a", "b"):
            put(root / split / "mask" / f"{stem}_mask.png", columns([0, 1, 7, 200, 255]))
    data_set = open_data_set(root)
    assert data_set.classes.names == ("soil", "weed")
    assert (data_set.open("train", 2)[1].labels == columns([0, 1, 255, 255, 255])).all()
    with pytest.raises(DataError, match=r"has no split 'test', only train, val"):
        data_set.open("test", 2)
    with pytest.raises(DataError, match="has 2 classes, the model 3"):
        data_set.open("train", 3)


def test_dataset_file_with_colours_and_a_list(tmp_path):
    root = dataset_file(
        tmp_path / "d", labels="colours", ignore=[[255, 255, 255]],
        splits={"train": {"images": "train/rgb", "labels": "masks", "list": "train.txt"}},
    )  # fmt: skip
    palette = np.array([[0, 0, 0], [255, 0, 0], [255, 255, 255]], np.uint8)
    put(root / "masks" / "b.png", palette[columns([1, 0, 2])])
    (root / "train.txt").write_text("b.jpg\n")
    data = open_data_set(root).open("train", 2)
    assert [pair.stem for pair in data.pairs] == ["b"] and (data[0].labels == columns([1, 0, 255])).all()
    put(root / "masks" / "b.png", np.full((24, 32, 3), (12, 34, 56), np.uint8))
    with pytest.raises(DataError, match=r"colours of no class, such as \[\[12, 34, 56\]\]"):
        data[0]
    (root / "train.txt").write_text("")
    with pytest.raises(DataError, match="the split is empty"):
        open_data_set(root).open("train", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": []}, "classes is missing"),
        ({"splits": {}}, "splits is missing"),
        ({"labels": "colors"}, "expected one of 'ids', 'colours'"),
        ({"ignore": [300]}, r"ignore is \[300\], expected label ids"),
        ({"labels": "colours", "ignore": [3]}, "expected colours"),
        ({"labels": "colours", "ignore": [[255, 0, 0]]}, r"\[255, 0, 0\] is the colour of weed and of ignore"),
        ({"layout": "suim"}, "has its own classes and splits"),
        ({"splits": {"train": {"image": "x", "labels": "y"}}}, "unknown key 'image'; did you mean 'images'"),
        ({"spilts": {}}, "did you mean 'splits'"),
    ],
)
def test_dataset_files_that_cannot_be_used(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        open_data_set(dataset_file(tmp_path / "d", **content))


def test_everything_wrong_is_listed_at_once(tmp_path):
    root = tmp_path / "train"
    for stem in ("good", "void", "small", "sized", "ids", "broken", "mask", "lonely"):
        put(root / "images" / f"{stem}.png", photo((8, 8) if stem == "small" else (24, 32)))
        if stem != "lonely":
            put(root / "labels" / f"{stem}.png", columns([0, 1], (8, 8) if stem == "small" else (24, 32)))
    put(root / "labels" / "void.png", columns([255]))
    put(root / "labels" / "sized.png", columns([0], (24, 30)))
    put(root / "labels" / "ids.png", columns([0, 9]))
    (root / "images" / "broken.png").write_bytes(b"no image")
    (root / "labels" / "mask.png").write_bytes(b"")
    data_set = open_data_set(tmp_path)
    with pytest.raises(DataError, match="1 of 8 images have no label: lonely"):
        data_set.open("train", 3)
    data = data_set.open("train", 3, strict=False)
    findings = [*data.findings, *check_images(data, 16)]
    text = list_findings(findings, "train")
    for expected in (
        "train: 7 file(s) cannot be used", "lonely.png: the image has no label", "void.png: the labels are all void",
        "small.png: the image is (8, 8), smaller than a patch of 16 px", "sized.png: labels are (24, 30), the image",
        "ids.png: label ids [9] have no class", "broken.png: cannot be read as an image", "mask.png: cannot be read",
    ):  # fmt: skip
        assert expected in text, expected
    assert [pair.stem for pair in without(data, findings).pairs] == ["good"]


def photo_jpeg(path, orientation=1, size=(24, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    data = cv2.imencode(".jpg", photo(size))[1].tobytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])


def as_palette(path, ids):
    images = pytest.importorskip("PIL.Image", reason="needs Pillow (the 'train' extra)")
    image = images.fromarray(ids).convert("P")
    image.putdata(ids.ravel().tolist())
    image.putpalette([int(value) for value in np.random.default_rng(1).integers(0, 256, 768)])
    image.save(path)


WAYS_TO_WRITE_IDS = {
    "grey": lambda path, ids: put(path, ids),
    "palette": as_palette,
    "rgb": lambda path, ids: put(path, np.dstack([ids] * 3)),
    "rgba": lambda path, ids: cv2.imwrite(str(path), np.dstack([ids] * 3 + [np.full_like(ids, 255)])),
    "16 bits": lambda path, ids: cv2.imwrite(str(path), np.where(ids == 255, 65535, ids.astype(np.uint16))),
    "16 bits, void 255": lambda path, ids: cv2.imwrite(str(path), ids.astype(np.uint16)),
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE_IDS)
@pytest.mark.parametrize("values", [[0, 1, 2], [0, 255, 2], [0], [1, 0]])
def test_ids_are_read_however_they_are_written(tmp_path, way, values):
    put(tmp_path / "train/images/a.png", photo())
    (tmp_path / "train/labels").mkdir()
    WAYS_TO_WRITE_IDS[way](tmp_path / "train/labels/a.png", columns(values))
    data = open_data_set(tmp_path).open("train", 3)
    np.testing.assert_array_equal(data[0].labels, columns(values))


def test_what_is_no_id_is_refused(tmp_path):
    put(tmp_path / "train/images/a.png", photo())
    put(tmp_path / "train/labels/a.png", photo())
    with pytest.raises(DataError, match=r"labels/a\.png: got shape .* of colours; .*say `labels: colours`"):
        open_data_set(tmp_path).open("train", 3)[0]
    cv2.imwrite(str(tmp_path / "train/labels/a.png"), columns([0, 1]).astype(np.uint16) * 1000)
    with pytest.raises(DataError, match=r"label ids \[1000\] have no class"):
        open_data_set(tmp_path).open("train", 3)[0]


@pytest.mark.parametrize("stem", ["a", "2007.00001", "a b", "ä"])
@pytest.mark.parametrize(("image", "label"), [(".jpg", ".png"), (".JPG", ".PNG"), (".PNG", ".png"), (".Jpeg", ".Png")])
def test_files_are_found_by_stem_whatever_their_endings(tmp_path, stem, image, label):
    photo_jpeg(tmp_path / f"train/images/{stem}{image}")
    (tmp_path / f"train/images/._{stem}{image}").write_bytes(b"of macOS")
    put(tmp_path / "train/labels/x.png", columns([0, 1]))
    (tmp_path / "train/labels/x.png").rename(tmp_path / f"train/labels/{stem}{label}")
    data = open_data_set(tmp_path).open("train", 3)
    assert [pair.stem for pair in data.pairs] == [stem] and (data[0].labels == columns([0, 1])).all()


def test_images_and_labels_may_share_a_folder_and_lists_may_name_stems_with_dots(tmp_path):
    for stem in ("2007.00001", "2007.00002"):
        photo_jpeg(tmp_path / f"all/{stem}.JPG")
        put(tmp_path / f"all/{stem}_mask.png", columns([0, 1]))
    (tmp_path / "train.txt").write_text("2007.00001\n")
    (tmp_path / "val.txt").write_text("all/2007.00002.JPG\n")
    dataset_file(
        tmp_path, classes=["road", "tree"], label_suffix="_mask.png",
        splits={name: {"images": "all", "labels": "all", "list": f"{name}.txt"} for name in ("train", "val")},
    )  # fmt: skip
    data_set = open_data_set(tmp_path)
    assert [pair.stem for pair in data_set.open("train", 2).pairs] == ["2007.00001"]
    assert (data_set.open("val", 2)[0].labels == columns([0, 1])).all()


@pytest.mark.parametrize("classes", [
    ["road", "tree"], [{"name": "road"}, {"name": "tree", "color": [1, 2, 3]}],
    [{"name": "road", "colour": [1, 2, 3]}, "tree"],
])  # fmt: skip
@pytest.mark.parametrize("pattern", ["{split}/images {split}/labels", "images/{split} masks/{split}"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_short_dataset_file_is_enough(tmp_path, classes, pattern, val):
    for split in ("train", val, "test"):
        images, labels = pattern.format(split=split).split()
        photo_jpeg(tmp_path / images / "a.jpg")
        put(tmp_path / labels / "a.png", columns([0, 1, 255]))
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"classes": classes}))
    data_set = open_data_set(tmp_path)
    assert data_set.classes.names == ("road", "tree") and len(set(data_set.classes.colours)) == 2
    assert [1, 2, 3] in [list(colour) for colour in data_set.classes.colours] or classes == ["road", "tree"]
    for split in ("train", "val", "test"):
        assert (data_set.open(split, 2)[0].labels == columns([0, 1, 255])).all()


def test_turned_images_are_told(tmp_path):
    pytest.importorskip("PIL", reason="needs Pillow (the 'train' extra)")
    for index, orientation in enumerate((1, 3, 6)):
        photo_jpeg(tmp_path / f"train/images/{index}.jpg", orientation)
        put(tmp_path / f"train/labels/{index}.png", columns([0, 1], (32, 24) if orientation == 6 else (24, 32)))
    data = open_data_set(tmp_path).open("train", 2)
    assert "2 image(s) are stored turned (1.jpg, 2.jpg)" in warn_of_orientation(data)
    assert warn_of_orientation(data.subset([0])) == "" and data[1].image.shape == (24, 32, 3)
    with pytest.raises(DataError, match="drawn on the turned image, whose orientation tag is not applied"):
        data[2]


LABEL_FILES = st.one_of(
    st.tuples(
        st.sampled_from([np.uint8, np.uint16, np.float32]),
        st.sampled_from([(), (1,), (3,), (4,)]),
        st.lists(st.sampled_from([0, 1, 2, 3, 127, 254, 255, 256, 1000, 65535]), min_size=1, max_size=3),
        st.sampled_from([(6, 8), (6, 8), (6, 8), (8, 6), (1, 1)]),
        st.sampled_from([".png", ".tiff", ".jpg"]),
    ),
    st.binary(max_size=40),
    st.integers(1, 60),  # a palette's file cut there
)


@settings(max_examples=60, deadline=None)
@given(content=LABEL_FILES, colours=st.booleans())
def test_whatever_a_label_file_is_gives_ids_of_classes_or_an_error(tmp_path_factory, content, colours):
    folder = tmp_path_factory.mktemp("any")
    put(folder / "train" / "images" / "a.png", photo((6, 8)))
    label = folder / "train" / "labels" / "a.png"
    label.parent.mkdir()
    if isinstance(content, tuple):
        dtype, channels, values, size, suffix = content
        pixels = np.resize(np.array(values), (*size, *channels)).astype(dtype)
        try:
            label.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
        except cv2.error:
            return  # no such file
    elif isinstance(content, bytes):
        label.write_bytes(content)
    else:
        images = pytest.importorskip("PIL.Image", reason="needs Pillow (matplotlib)")
        images.fromarray(columns([0, 1, 2], (6, 8))).convert("P").save(label)
        label.write_bytes(label.read_bytes()[: -content or None])
    kind = "labels: colours\n" if colours else ""
    (folder / "dataset.yaml").write_text(
        f"classes: [{{name: a, colour: [0, 0, 0]}}, {{name: b, colour: [1, 1, 1]}}]\n{kind}"
    )
    try:
        labels = open_data_set(folder).open("train", 2)[0].labels
    except (ConfigError, DataError) as error:
        assert "a.png" in str(error)
    else:
        assert labels.shape == (6, 8) and labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 1, 255}


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.floats() | st.text(max_size=5) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_dataset_yaml_says_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("described")
    for name in ("rgb", "masks"):
        put(folder / name / "a.png", np.zeros((6, 8, 3) if name == "rgb" else (6, 8), np.uint8))
    content = {
        "classes": [{"name": "a", "colour": [0, 0, 0]}, "b"], "labels": "ids", "ignore": [7], "label_suffix": ".png",
        "splits": {"train": {"images": "rgb", "labels": "masks", "list": ""}}, "group": "a", "root": ".",
        "layout": "folders",
    }  # fmt: skip
    for _ in range(data.draw(st.integers(1, 3))):
        place, key = content, data.draw(st.sampled_from(sorted(content)))
        while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else range(len(place))))
        place[key] = data.draw(YAML_VALUES)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(content))
    try:
        data_set = open_data_set(folder)
        for split in data_set.splits:
            images = data_set.open(split, len(data_set.classes))
            check_images(images)
            group_images(images, data_set.group)
    except (ConfigError, DataError) as error:
        assert str(error)


def test_labels_that_no_image_has_are_told(tmp_path):
    """Whose image is gone, has a name of no image or lies in a folder below; those of other splits have one."""
    for kind in ("images", "labels"):
        (tmp_path / kind / "below").mkdir(parents=True)
    for stem in ("a", "b", "c", "d"):
        cv2.imwrite(str(tmp_path / "labels" / f"{stem}.png"), np.zeros((8, 8), np.uint8))
    for name in ("a.jpg", "b.JPG", "below/d.jpg"):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "images" / "c.gif").write_bytes(b"GIF89a")
    data = LabelledImages(tmp_path / "images", tmp_path / "labels", 2)
    assert "2 label(s) have no image (c.png, d.png) and teach nothing" in warn_of_lonely_labels(data)
    assert warn_of_lonely_labels(data.subset([0])) == warn_of_lonely_labels(data)
