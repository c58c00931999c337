"""The networks, and model folders to load them from."""

from clustvit_ros.modeling.architectures import NetworkConfig, build_network, network_config
from clustvit_ros.modeling.model_folder import ModelConfig, load_config, load_segmenter, save_model
from clustvit_ros.modeling.segmenter import Segmenter, SegmenterOutput

__all__ = [
    "ModelConfig",
    "NetworkConfig",
    "Segmenter",
    "SegmenterOutput",
    "build_network",
    "load_config",
    "load_segmenter",
    "network_config",
    "save_model",
]
