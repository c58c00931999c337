# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The networks, and model folders to load them from."""

from clustvit_ros.networks.architectures import build_network, network_config
from clustvit_ros.networks.model_folder import ModelConfig, load_config, load_segmenter, save_model
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, SegmenterOutput
from clustvit_ros.networks.vit_config import ViTConfig

__all__ = [
    "ModelConfig", "NetworkConfig", "Segmenter", "SegmenterOutput", "ViTConfig", "build_network", "load_config",
    "load_segmenter", "network_config", "save_model",
]  # fmt: skip
