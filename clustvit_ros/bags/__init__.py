"""Recorded bags: reading them as far as they go, and labelling their images, one bag or many at once; without ROS."""

from __future__ import annotations

from clustvit_ros.bags.labelling import LabelOptions, LabelReport, label_bag
from clustvit_ros.bags.reading import BagReader, Topic, find_bags

__all__ = ["BagReader", "LabelOptions", "LabelReport", "Topic", "find_bags", "label_bag"]
