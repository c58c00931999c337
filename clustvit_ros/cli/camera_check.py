"""What a running camera publishes, judged as the node's input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from clustvit_ros.cli.findings import Finding, Level
from clustvit_ros.dds import node_environment

_LARGEST_AGE_S = 1.0
_MAX_SUGGESTIONS = 5


def check_camera(topic: str, seconds: float, max_pixels: int, required: bool) -> list[Finding]:
    """Listen to `topic` in a process of its own.

    Args:
        topic: name of an image topic.
        seconds: how long to listen.
        max_pixels: the node's `max_image_pixels`.
        required: the user named the topic, so that no camera there is a failure.
    """
    command = [sys.executable, "-m", "clustvit_ros.demo.topic_probe", topic, str(seconds), str(max_pixels)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60.0 + 3 * seconds, check=False,
            env=node_environment(os.environ),
        )  # fmt: skip
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return [Finding("camera", Level.FAIL, "the topic could not be examined in time", f"run `{' '.join(command)}`")]
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return [Finding("camera", Level.FAIL, f"the topic could not be examined: {said}", f"run `{' '.join(command)}`")]
    return judge_camera(found, required)


def judge_camera(found: dict[str, Any], required: bool) -> list[Finding]:
    """Findings about what `ros.topic_probe` saw."""
    topic, publishers = found["topic"], found["publishers"]
    if not publishers:
        others = ", ".join(found.get("image_topics", [])[:_MAX_SUGGESTIONS])
        elsewhere = f"images are on {others}: remap with image_topic:=<topic>" if others else "start the camera driver"
        level = Level.FAIL if required else Level.WARN
        remedy = f"{elsewhere}; name a topic with --topic; check ROS_DOMAIN_ID on both sides"
        return [Finding("camera", level, f"nobody publishes on {topic}", remedy)]
    kinds = sorted({publisher["type"] for publisher in publishers})
    wrong = [kind for kind in kinds if kind not in ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")]
    if wrong:
        remedy = "remap `image` to a topic of sensor_msgs/msg/Image"
        return [Finding("camera", Level.FAIL, f"{topic} carries {', '.join(wrong)}", remedy)]
    findings = []
    if len(publishers) > 1:
        names = ", ".join(publisher["node"] for publisher in publishers)
        remedy = "stop all but one of them, or the node sees their frames mixed"
        findings.append(Finding("camera", Level.WARN, f"{topic} has {len(publishers)} publishers: {names}", remedy))
    qos = ", ".join(sorted({f"{p['reliability'].lower()}, {p['durability'].lower()}" for p in publishers}))
    findings.append(
        Finding("camera QoS", Level.OK, f"{topic} offers {qos}; the node asks for best effort, volatile, which matches")
    )
    if not found["messages"]:
        remedy = (
            "check that the camera runs (ros2 topic hz), that its driver has this package's DDS profile, and that "
            "/dev/shm has room"
        )
        return [*findings, Finding("camera", Level.FAIL, f"nothing arrives on {topic}, though it is published", remedy)]
    if found["errors"]:
        remedy = "set the driver's encoding, or convert with image_proc; the README lists the encodings"
        text = f"{topic} cannot be segmented: {found['errors'][0]}"
        return [*findings, Finding("camera", Level.FAIL, text, remedy)]
    height, width = found["size"]
    rate = f" at {found['rate_hz']:.1f} Hz" if "rate_hz" in found else ""
    text = f"{width}x{height} {found['encoding']}{rate} on {topic}"
    if "CompressedImage" in kinds[0]:
        text += "; start the node with image_transport:=compressed and the topic's name without /compressed"
    findings.append(Finding("camera", Level.OK, text))
    if not found["stamped"]:
        remedy = "configure the driver to stamp its images: consumers synchronise on stamps"
        findings.append(Finding("camera stamps", Level.WARN, "images come without a time stamp", remedy))
    elif abs(found["age_s"]) > _LARGEST_AGE_S:
        remedy = "synchronise the clocks (chrony, ptp), or set use_sim_time where a bag is replayed"
        text = f"images are {found['age_s']:.1f} s old when they arrive"
        findings.append(Finding("camera stamps", Level.WARN, text, remedy))
    return findings
