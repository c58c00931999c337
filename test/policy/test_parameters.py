# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What the parameter table accepts, and what it says to the rest."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustvit_ros.engine import ENGINES
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.parameter_spec import build, parameter_table, specs_of
from clustvit_ros.policy.parameters import PARAMETERS, CameraParameters, SegmentationParameters, as_markdown_table

SPECS = {spec.name: spec for spec in PARAMETERS}


def test_defaults_are_acceptable() -> None:
    for spec in PARAMETERS:
        assert spec.coerce(spec.default) == spec.default
        assert spec.description.endswith(".")


def test_integer_is_accepted_for_a_double() -> None:
    value = SPECS["merge_threshold"].coerce(1)
    assert value == 1.0
    assert type(value) is float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("merge_threshold", 1.5, "merge_threshold: got 1.5, expected a double from 0.0 to 1.0"),
        ("merge_threshold", 7, "merge_threshold: got 7, expected a double from 0.0 to 1.0"),
        ("merge_threshold", math.nan, "merge_threshold: got nan, expected a double from 0.0 to 1.0"),
        ("merge_threshold", True, "merge_threshold: got True (bool), expected a double from 0.0 to 1.0"),
        ("merge_threshold", None, "merge_threshold: got None (NoneType), expected a double from 0.0 to 1.0"),
        ("token_capacity", -1, "token_capacity: got -1, expected an integer from 0 to 1048576 tokens"),
        ("token_capacity", 2.0, "token_capacity: got 2.0 (double), expected an integer from 0 to 1048576 tokens"),
        ("latency_budget_ms", -1, "latency_budget_ms: got -1, expected a double from 0.0 to 60000.0 ms"),
        ("latency_budget_ms", math.inf, "latency_budget_ms: got inf, expected a double from 0.0 to 60000.0 ms"),
        ("budget_reference", "now", "budget_reference: got 'now', expected one of inference, stamp"),
        ("deadline_policy", "skip", "deadline_policy: got 'skip', expected one of publish_late, drop"),
        ("min_tokens", "few", "min_tokens: got 'few' (string), expected an integer from 0 to 1048576 tokens"),
        ("recalibrate", 1, "recalibrate: got 1 (integer), expected a bool"),
        ("output_size", "10", "output_size: got '10', expected input, model or HEIGHTxWIDTH"),
        ("output_size", "0x10", "output_size: got '0x10', expected input, model or HEIGHTxWIDTH"),
        ("output_size", "99999x1", "output_size: got '99999x1', expected input, model or HEIGHTxWIDTH"),
        ("device", "gpu", "device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        ("device", "cuda:\u0661", "device: got 'cuda:\u0661', expected auto, cpu, cuda or cuda:N"),
        ("cameras", "vorn, h\u00f6he", "cameras: got 'vorn, h\u00f6he', expected names of letters, digits and _"),
        ("intensity_range", "\u0661 9", "intensity_range: got '\u0661 9', expected auto or LOW HIGH"),
        ("output_size", "1\u0662x10", "output_size: got '1\u0662x10', expected input, model or HEIGHTxWIDTH"),
        ("engine", "magic", f"engine: got 'magic', expected one of {', '.join(ENGINES)}"),
        ("autostart", "yes", "autostart: got 'yes' (string), expected a bool"),
    ],
)
def test_refusals_name_what_is_expected(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SPECS[name].coerce(value)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("class_groups", "a: x, y ; b: z{} ;{}", "a: x{}:"),
        ("merge_exempt_region", "{}0 0 1 1{};{}0.5 0 1 1 ;{}", "0 0 1 1{}x"),
        ("cameras", "a{},{}b_2", "a{}b"),
    ],
)
def test_texts_with_very_long_blanks_are_read_at_once(name: str, good: str, bad: str) -> None:
    blanks = 100_000 * " "
    start_s = time.monotonic()
    assert len(SPECS[name].parsed(good.replace("{}", blanks))) == 2
    with pytest.raises(ConfigError, match=f"^{name}: got "):
        SPECS[name].coerce(bad.replace("{}", blanks))
    assert time.monotonic() - start_s < 1.0  # 15 s and more where each blank is tried with every other


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_any_value_is_coerced_or_refused(value: object) -> None:
    for spec in PARAMETERS:
        try:
            coerced = spec.coerce(value)
        except ConfigError:
            continue
        assert type(coerced) is spec.kind


def test_settings_follow_the_parameters() -> None:
    parameters = build(SegmentationParameters, {"output_size": "200x400", "merge_threshold": 0, "token_capacity": 9})
    settings = parameters.settings((64, 96), confidence=False, clusters=True)
    assert settings.output_size == (200, 400)
    assert (settings.merge_threshold, settings.token_capacity) == (0.0, 9)
    assert (settings.confidence, settings.clusters) == (False, True)
    assert parameters.cameras == ("",)
    named = build(SegmentationParameters, {"cameras": ["front", "rear"], "class_groups": "a: x, y; b: z"})
    assert (named.cameras, named.class_groups) == (("front", "rear"), (("a", ("x", "y")), ("b", ("z",))))
    assert SegmentationParameters().settings((64, 96), True, False).output_size is None
    model_sized = build(SegmentationParameters, {"output_size": "model"})
    assert model_sized.settings((64, 96), True, False).output_size == (64, 96)


def test_markdown_has_one_row_per_parameter() -> None:
    rows = as_markdown_table().splitlines()
    assert len(rows) == len(PARAMETERS) + 2
    assert rows[2:] == parameter_table(SegmentationParameters).splitlines()[2:]
    row = next(row for row in rows if "`merge_threshold`" in row)
    assert "| double | `0.5` | 0.0 to 1.0 | yes |" in row


@pytest.mark.parametrize("name", ["segment", "low_latency", "balanced", "best_quality"])
def test_shipped_parameter_files_are_complete_and_acceptable(name: str) -> None:
    import yaml

    from clustvit_ros.paths import share_dir

    content = yaml.safe_load((share_dir() / "config" / f"{name}.yaml").read_text())
    values = content["/**"]["ros__parameters"]
    assert set(SPECS) - set(values) == {"autostart", "recalibrate", "scripted_latency_ms"}
    parameters = build(SegmentationParameters, values)
    assert (parameters == SegmentationParameters()) is (name == "segment")


def test_a_source_may_be_an_integer() -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    from clustvit_ros.demo.camera import CameraNodeParameters

    source = next(spec for spec in specs_of(CameraNodeParameters) if spec.name == "source")
    assert source.coerce(0) == "0"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rotate", 90, "rotate: got 90, expected one of 0, 180 degrees"),
        ("rotate", "180", "rotate: got '180' (string), expected one of 0, 180 degrees"),
        ("intensity_range", "9 9", "expected auto or LOW HIGH with LOW below HIGH, at most 65535"),
        ("intensity_range", "0 65536", "expected auto or LOW HIGH with LOW below HIGH, at most 65535"),
        ("intensity_range", "7", "intensity_range: got '7', expected auto or LOW HIGH"),
    ],
)
def test_pictures_are_turned_and_scaled_in_the_ways_there_are(name: str, value: object, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(SegmentationParameters, {name: value})
    assert text in str(error.value)


def test_a_camera_has_its_own_orientation() -> None:
    node = build(SegmentationParameters, {"rotate": 180, "merge_exempt_region": "0.7 0 1 0.5"})
    assert node.exempt_region == (pytest.approx((0.0, 0.5, 0.3, 1.0)),)
    assert build(CameraParameters, {}).over(node) is node
    upright = build(CameraParameters, {"rotate": 0}).over(node)
    assert (upright.rotate, upright.merge_threshold) == (0, 0.5)
    assert upright.exempt_region == node.merge_exempt_region
    with pytest.raises(ConfigError, match=r"merge_threshold: got -0\.5, expected 0 to 1, or -1: the node's"):
        build(CameraParameters, {"merge_threshold": -0.5})
    both = build(CameraParameters, {"rotate": 180, "merge_threshold": 0.25}).over(upright)
    assert (both.rotate, both.merge_threshold) == (180, 0.25)
