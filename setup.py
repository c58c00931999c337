# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Installs the package with `pip install .` and `colcon build` alike.

Everything that ROS 2 looks for (launch files, parameters, models, executables) travels as `data_files`: pip ignores
the `install_scripts` setting that colcon relies on, and colcon writes its own interpreter into entry points.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages, setup

NAME = "clustvit_ros"
# Resolved: `colcon build --symlink-install` runs this file through a link in its build folder.
ROOT = Path(__file__).resolve().parent
# A wheel has at most 40 MB: models larger than this are left to checkouts, and to what colcon installs from them.
MODEL_BYTES_IN_WHEELS = 13_000_000


def shared_files() -> Iterator[tuple[str, list[str]]]:
    """(install folder, files) of everything under share/clustvit_ros."""
    yield "share/ament_index/resource_index/packages", [f"resource/{NAME}"]
    yield f"share/{NAME}", ["package.xml"]
    folders = [
        ROOT / "launch",
        *(path for top in ("config", "models") for path in (ROOT / top, *(ROOT / top).rglob("*"))),
    ]
    for folder in folders:
        weights = folder / "model.safetensors"
        if "bdist_wheel" in sys.argv and weights.is_file() and weights.stat().st_size > MODEL_BYTES_IN_WHEELS:
            continue
        files = [str(path.relative_to(ROOT)) for path in sorted(folder.glob("*")) if path.is_file()]
        if files:
            yield f"share/{NAME}/{folder.relative_to(ROOT)}", files


setup(
    name=NAME,
    version="0.1.0",
    description="ROS 2 segmentation with ClustViT: merge strength is a live knob, a budget holds the latency",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="clustvit_ros maintainers",
    author_email="maintainers@clustvit-ros.org",
    keywords=["ROS 2", "robotics", "semantic segmentation", "vision transformer", "token merging"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    maintainer="clustvit_ros maintainers",
    maintainer_email="maintainers@clustvit-ros.org",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed"]},
    data_files=[
        *shared_files(),
        (f"lib/{NAME}", [f"scripts/ros/{name}" for name in ("clustvit-ros", "segmentation_node", "camera_node")]),
    ],
    # torch and rclpy are left to the robot: JetPack and apt bring builds that pip must not replace.
    install_requires=["setuptools", "numpy", "pyyaml", "safetensors", "simplejpeg>=1.6"],
    extras_require={
        # Linux x86-64 wheels of ROS 2 Jazzy, for machines without a ROS installation.
        "ros": ["ros-rclpy[fastrtps]==7.1.6", "ros-sensor-msgs~=5.3.6", "ros-diagnostic-msgs~=5.3.6"],
        # 2.3 is JetPack 6's oldest; earlier ones lack half precision on a CPU. `make test-oldest` holds this.
        "torch": ["torch>=2.3"],
        "opencv": ["opencv-python-headless>=4.5,<5"],
        "train": ["tqdm>=4.60", "matplotlib>=3.5", "pillow>=9"],
        # Everything that `clustvit-ros predict` needs.
        "predict": ["torch>=2.3", "opencv-python-headless>=4.5,<5", "tqdm>=4.60", "av>=10"],
        # Recorded bags without a ROS installation, and many of them on many machines.
        "bags": ["rosbags>=0.11", "opencv-python-headless>=4.5,<5", "tqdm>=4.60"],
        "fleet": ["ray[data]>=2.40"],
        # Films that browsers play (H.264).
        "video": ["av>=10"],
        "completion": ["shtab>=1.5"],
        "tensorboard": ["tensorboard>=2.10"],
        # One or the other: both packages install the same module, and the one that comes last replaces the first.
        "onnx": ["onnx>=1.15", "onnxruntime>=1.17"],
        "onnx-gpu": ["onnx>=1.15", "onnxruntime-gpu>=1.17"],
        # The fused label kernel, where PyTorch did not bring Triton along; its test needs no GPU.
        "triton": ["triton>=3.0; sys_platform == 'linux'"],
        "sim": ["panda3d>=1.10.13", "opencv-python-headless>=4.5,<5"],
        "test": [
            "pytest>=7", "pytest-timeout>=2", "pytest-rerunfailures>=12", "pytest-xdist>=3.5", "hypothesis>=6",
            "ruff>=0.6", "mypy>=1.8", "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "clustvit-ros = clustvit_ros.cli.main:main",
            # On everybody's PATH: `ros2 run` and launch files find the short names among the data files above.
            "clustvit_segmentation_node = clustvit_ros.node.node:main",
            "clustvit_camera_node = clustvit_ros.demo.camera:main",
        ],
    },
    zip_safe=True,
)
