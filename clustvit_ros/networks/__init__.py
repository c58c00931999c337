"""The networks, and model folders to load them from."""

from clustvit_ros.networks.architectures import build_network, network_config
from clustvit_ros.networks.model_folder import ModelConfig, load_config, load_segmenter, save_model
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, SegmenterOutput
from clustvit_ros.networks.vit_config import ViTConfig

__all__ = [
    "ModelConfig",
    "NetworkConfig",
    "Segmenter",
    "SegmenterOutput",
    "ViTConfig",
    "build_network",
    "load_config",
    "load_segmenter",
    "network_config",
    "save_model",
]
