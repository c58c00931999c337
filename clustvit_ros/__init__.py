"""ClustViT semantic segmentation for ROS 2 (arXiv 2510.01948); importing this alone loads neither torch nor rclpy."""

__version__ = "0.1.0"
