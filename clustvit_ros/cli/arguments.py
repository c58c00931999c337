"""Types of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import re


def parse_size(text: str) -> tuple[int, int]:
    """A size such as "512x512": HEIGHTxWIDTH -> (height, width)."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, e.g. 512x512")
    return int(found[1]), int(found[2])


def parse_batch(text: str) -> int | None:
    """A batch size, or None for "dynamic"."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive count or dynamic")
    return int(text)


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names separated by commas")
    return names


def parse_counts(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive whole numbers separated by commas")
    return tuple(int(part) for part in parts)


def parse_fractions(text: str) -> tuple[float, ...]:
    """Numbers above 0 and up to 1, separated by commas."""
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = ()
    if not fractions or not all(0.0 < fraction <= 1.0 for fraction in fractions):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers above 0 and up to 1 separated by commas")
    return fractions
