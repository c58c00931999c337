# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Crops: geometry, colour, repeatability, and reading ahead."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clustvit_ros.classes import Sample
from clustvit_ros.errors import ConfigError
from clustvit_ros.training.augmentation import Augmentation, ClassPlaces
from clustvit_ros.training.crops import Crops

STILL = {"scale": (1.0, 1.0), "stretch": 1.0, "rotation_deg": 0.0, "flip": False, "rare_class": 0.0}
PLAIN = {"jitter": 0.0, "hue_deg": 0.0}


def picture(height=40, width=56, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, (height, width), np.uint8)
    labels[0, 0] = 255
    return Sample(rng.integers(0, 256, (height, width, 3), np.uint8), labels, "x")


def test_a_crop_that_changes_nothing_is_the_image():
    sample = picture()
    image, labels = Augmentation((40, 56), **STILL, **PLAIN)(sample, (40, 56), np.random.default_rng(0))
    assert np.abs(image.astype(int) - sample.image).max() <= 1
    assert np.array_equal(labels, sample.labels)


def test_flips_mirror_image_and_labels():
    sample = picture()
    augment = Augmentation((40, 56), **{**STILL, "flip": True}, vertical_flip=True, **PLAIN)
    seen = set()
    for seed in range(40):
        image, labels = augment(sample, (40, 56), np.random.default_rng(seed))
        for name, view in (("", np.s_[:, :]), ("h", np.s_[:, ::-1]), ("v", np.s_[::-1]), ("hv", np.s_[::-1, ::-1])):
            if np.array_equal(labels, sample.labels[view]):
                seen.add(name)
                assert np.abs(image.astype(int) - sample.image[view]).max() <= 1
                break
        else:
            pytest.fail("a crop is no mirror image")
    assert seen == {"", "h", "v", "hv"}


def test_zoom_is_relative_to_the_input_size_and_void_lies_outside():
    labels = np.ones((40, 60), np.uint8)
    sample = Sample(np.full((40, 60, 3), 10, np.uint8), labels, "x")
    # Scale 1 shows the whole image at 80x120; a crop of 160x240 leaves three quarters of it void.
    image, crop = Augmentation((160, 240), **STILL, **PLAIN)(sample, (80, 120), np.random.default_rng(0))
    assert (crop == 1).mean() == pytest.approx(0.25, abs=0.02)
    assert set(np.unique(crop)) == {1, 255}
    assert abs(int(np.median(image[crop == 255])) - 127) <= 1


def test_rare_classes_are_sought():
    labels = np.zeros((96, 128), np.uint8)
    labels[8:16, 100:108] = 3
    sample = Sample(np.zeros((96, 128, 3), np.uint8), labels, "x")

    def share(rare_class):
        augment = Augmentation((32, 32), **{**STILL, "rare_class": rare_class}, **PLAIN)
        return np.mean([3 in augment(sample, (96, 128), np.random.default_rng(seed))[1] for seed in range(60)])

    assert share(0.0) < 0.3 < share(1.0)
    assert share(1.0) == pytest.approx(0.5, abs=0.2)  # drawn uniformly from two classes


def test_hue_and_saturation_leave_grey_alone():
    sample = Sample(np.full((8, 8, 3), 90, np.uint8), np.zeros((8, 8), np.uint8), "x")
    places = ClassPlaces(sample.labels)
    augment = Augmentation((8, 8), **STILL, jitter=0.0, hue_deg=180.0)
    images, _ = augment.cut(
        [torch.from_numpy(sample.image).permute(2, 0, 1)],
        [torch.from_numpy(sample.labels)],
        [augment.draw((8, 8), places, (8, 8), np.random.default_rng(3))],
    )
    assert (images - 90).abs().max() < 0.5
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 120
    turned, _ = augment(Sample(red, sample.labels, "x"), (8, 8), np.random.default_rng(3))
    assert np.abs(turned.astype(int) - red).max() > 20


def test_blur_and_noise_do_what_they_say():
    flat = Sample(np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64), np.uint8), "x")
    noisy = [Augmentation((64, 64), **STILL, **PLAIN, noise=10.0)(flat, (64, 64), np.random.default_rng(s))[0].std()
             for s in range(20)]  # fmt: skip
    assert min(noisy) < 0.5 and 2 < max(noisy) <= 10.5
    edge = flat.image.copy()
    edge[:, 32:] = 228
    sharpness = [
        np.abs(np.diff(Augmentation((64, 64), **STILL, **PLAIN, blur_px=3.0)(
            Sample(edge, flat.labels, "x"), (64, 64), np.random.default_rng(s))[0].astype(int), axis=1)).max()
        for s in range(20)
    ]  # fmt: skip
    assert max(sharpness) == 100 and min(sharpness) < 50


def seen_by(sample, count=40, **options):
    augment = Augmentation(sample.labels.shape, **STILL, **PLAIN, **options)
    return [augment(sample, sample.labels.shape, np.random.default_rng(s))[0].astype(int) for s in range(count)]


def flat(value, size=(48, 64)):
    return Sample(np.full((*size, 3), value, np.uint8), np.zeros(size, np.uint8), "x")


def test_gamma_leaves_black_and_white_alone():
    assert all((image == value).all() for value in (0, 255) for image in seen_by(flat(value), gamma=2.0))
    greys = [int(image[0, 0, 0]) for image in seen_by(flat(128), gamma=2.0)]
    assert 64 <= min(greys) < 80 and 170 < max(greys) <= 181  # 255 * (128 / 255) ** 2 and ** 0.5


def test_white_balance_shifts_red_against_blue():
    ratios = [image[0, 0, 0] / image[0, 0, 2] for image in seen_by(flat(100), white_balance=0.4)]
    assert 0.63 <= min(ratios) < 0.75 and 1.3 < max(ratios) <= 1.45  # 0.8 ** 2 and 1.2 ** 2
    assert all(abs(image[0, 0, 1] - 100) <= 1 for image in seen_by(flat(100), white_balance=0.4))


def test_a_shadow_darkens_one_side_of_an_edge():
    images = seen_by(flat(200), shadow=0.5)
    shaded = [image for image in images if image.min() < 195]
    assert 10 <= len(shaded) <= 30  # half of them
    assert all(image.max() <= 200 and image.min() >= 0.3 * 200 - 1 for image in shaded)
    assert sum(image.max() >= 198 for image in shaded) > len(shaded) / 2  # most edges run through the crop
    assert all((np.ptp(image, axis=2) == 0).all() for image in shaded)


def test_jpeg_leaves_flat_colours_and_blurs_noise():
    red = flat(0)
    red.image[..., 0] = 200
    assert all(np.abs(image - red.image).max() <= 4 for image in seen_by(red, jpeg_quality=30))
    changed = [np.abs(image - picture(48, 64).image).mean() for image in seen_by(picture(48, 64), jpeg_quality=30)]
    assert 10 <= sum(change > 2 for change in changed) <= 30 and max(changed) > 10


def test_one_class_of_the_next_crop_is_pasted_a_rare_one_rather():
    labels = torch.zeros(3, 40, 50, dtype=torch.int64)
    labels[1, :2, :2], labels[1, 2:4, :], labels[2] = 4, 255, 3  # a rare class, void, and a foreign crop
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 40, 50)
    augment = Augmentation((40, 50), paste=0.5)
    seen = []
    for seed in range(60):
        pasted, ids = augment.paste_classes(images, labels, [True, True, False], np.random.default_rng(seed))
        taken = pasted[0, 0] == 1.0
        assert (pasted[2] == 2.0).all() and (ids[2] == 3).all()  # does not take part, nor is it pasted
        assert torch.equal(ids[0][taken], labels[1][taken]) and not (ids[0][~taken]).any()
        assert not (taken & (labels[1] == 255)).any()
        seen.append(int(taken.sum()))
    assert set(seen) == {0, 4, 40 * 50 - 4 - 100} and 18 <= seen.count(4) <= 42 and seen.count(0) > 15


def test_what_is_pasted_hangs_on_the_place_in_the_run_alone():
    samples = [picture(40, 56, seed=index) for index in range(4)]

    def drawn(paste, epoch):
        augment = Augmentation((24, 32), paste=paste)
        crops = Crops(samples.__getitem__, 4, augment, (40, 56), 7, torch.device("cpu"))
        return next(iter(crops.batches(epoch, [[(0, 2), (1, 0), (2, 1)]])))

    assert torch.equal(drawn(1.0, 3).labels, drawn(1.0, 3).labels)
    assert not torch.equal(drawn(1.0, 3).labels, drawn(0.0, 3).labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.5}, "gamma is 0.5, expected at least 1"),
        ({"jpeg_quality": 99}, "jpeg_quality is 99, expected 1 to 95, or 0 for none"),
        ({"shadow": -0.1}, "shadow is -0.1, expected 0 to 1"),
        ({"crop_size": (0, 5)}, "crop_size"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"stretch": 0.5}, "stretch"),
        ({"jitter": 1.5}, "jitter"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**{"crop_size": (8, 8), **change})


def batches_of(cache_bytes, sizes=((40, 56), (48, 64), (400, 560))):
    samples = [picture(*size, seed=index) for index, size in enumerate(sizes)]
    augment = Augmentation((24, 32), noise=5.0, blur_px=1.0)
    crops = Crops(samples.__getitem__, len(samples), augment, (40, 56), 7, torch.device("cpu"), cache_bytes)
    places = [[(0, 2), (1, 0)], [(2, 1), (3, 2)], [(4, 0), (5, 1)]]
    return crops, list(crops.batches(3, places))


def test_read_ahead_equals_kept_in_memory():
    (cached, first), (read, second) = batches_of(1 << 30), batches_of(0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.names == b.names
    assert torch.equal(cached.pixel_counts(5), read.pixel_counts(5))


def test_a_crop_depends_on_its_place_alone():
    crops, whole = batches_of(1 << 30)
    (alone,) = crops.batches(3, [[(3, 2)]])
    torch.testing.assert_close(alone.images[0], whole[1].images[1], rtol=0, atol=1e-4)
    (other_epoch,) = crops.batches(4, [[(3, 2)]])
    assert not torch.equal(alone.images, other_epoch.images)
