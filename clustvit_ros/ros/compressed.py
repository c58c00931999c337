"""CompressedImage messages to arrays: `compressed_images`, which needs no ROS, under the name that the node uses."""

from clustvit_ros.compressed_images import compressed_size, decode_compressed

__all__ = ["compressed_size", "decode_compressed"]
