"""Stands in for vision_msgs where it is not installed: put the folder above on PYTHONPATH."""
