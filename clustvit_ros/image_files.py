"""Image files in folders, for data sets and demo cameras alike."""

from __future__ import annotations

from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Files of a folder that are taken for images, whatever the case."""


def list_images(folder: Path) -> list[Path]:
    """The image files of an existing folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
