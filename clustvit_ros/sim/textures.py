"""Surface textures, computed: noise shaped in the frequency domain repeats without a seam by nature."""

from __future__ import annotations

import numpy as np

SIZE_PX = 128
TEXTURES = ("plain", "asphalt", "grass", "soil", "leaves", "wall", "roof", "cloud")


def make_textures(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One set of textures: name -> (SIZE_PX, SIZE_PX, 3) float32 factors around 0..1 for the surface's colour."""
    return {
        "plain": _grey(np.ones((SIZE_PX, SIZE_PX))),
        "asphalt": _grey(0.84 + 0.07 * noise(rng, 0.2) + 0.05 * noise(rng, 1.4)),
        "grass": _tinted(rng, 0.78 + 0.13 * noise(rng, 0.3) + 0.09 * noise(rng, 1.2), (0.05, 0.02, 0.03)),
        "soil": _tinted(rng, _furrows(rng), (0.03, 0.02, 0.02)),
        "leaves": _tinted(rng, 0.70 + 0.20 * noise(rng, 0.7) + 0.10 * noise(rng, 0.1), (0.04, 0.02, 0.03)),
        "wall": _wall(rng),
        "roof": _roof(rng),
        "cloud": _cloud(rng),
    }


def noise(rng: np.random.Generator, exponent: float, size: int = SIZE_PX) -> np.ndarray:
    """Seamless noise of mean 0 and deviation 1 whose amplitude falls with frequency ** -exponent: (size, size)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * frequency**-exponent
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(size, size))
    return field / field.std()


def _furrows(rng: np.random.Generator) -> np.ndarray:
    wave = np.sin(np.arange(SIZE_PX) * (2 * np.pi * 4 / SIZE_PX))[None]
    return 0.76 + 0.09 * wave + 0.08 * noise(rng, 0.5) + 0.06 * noise(rng, 1.3)


def _wall(rng: np.random.Generator) -> np.ndarray:
    """One storey, one window wide: plaster or bricks around a window with a frame."""
    size = SIZE_PX
    texture = _grey(0.90 + 0.03 * noise(rng, 0.4) + 0.04 * noise(rng, 1.6))
    if rng.random() < 0.5:
        rows = np.arange(size) // 8
        joints = (np.arange(size) % 8 == 0)[:, None] | ((np.arange(size)[None] + 8 * (rows % 2)[:, None]) % 16 == 0)
        texture[joints] *= 0.82
    left, right, low, high = size * 34 // 100, size * 66 // 100, size * 32 // 100, size * 78 // 100
    texture[low - 4 : high + 4, left - 4 : right + 4] = 1.0
    glass = np.linspace(0.22, 0.5, high - low)[:, None, None] * np.array([0.75, 0.9, 1.1])
    texture[low:high, left:right] = glass
    texture[low:high, size // 2 - 1 : size // 2 + 2] = 0.95
    texture[(low + high) // 2 : (low + high) // 2 + 3, left:right] = 0.95
    return texture.astype(np.float32)


def _roof(rng: np.random.Generator) -> np.ndarray:
    row = np.arange(SIZE_PX) % 16
    shade = 1.0 - 0.25 * (row < 3)[:, None] - 0.10 * (np.arange(SIZE_PX) % 16 < 2)[None]
    return _grey(0.85 * shade + 0.05 * noise(rng, 0.6))


def _cloud(rng: np.random.Generator) -> np.ndarray:
    """Alpha of the clouds, in all three channels."""
    return _grey(np.clip(0.3 + 0.45 * noise(rng, 1.7), 0.0, 1.0))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(values, 0.0, 1.0)[..., None], 3, axis=2).astype(np.float32)


def _tinted(rng: np.random.Generator, values: np.ndarray, spread: tuple[float, float, float]) -> np.ndarray:
    tint = np.stack([amount * noise(rng, 1.0) for amount in spread], axis=2)
    return np.clip(values[..., None] + tint, 0.0, 1.0).astype(np.float32)
