"""Who is next, when several cameras wait for one engine.

Stride scheduling (Waldspurger and Weihl, MIT/LCS/TM-528, 1995): every turn costs a camera the inverse of its weight,
and the camera that has spent least is next. So under overload turns, and with them the age of the newest mask, divide
as the weights say, whatever the frame rates are. Among equals the one whose masks have been older lately goes first:
cameras that are triggered together would otherwise be served in the same order for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from clustvit_ros.errors import ConfigError

# Share of the remembered ages that the next turn leaves.
_MEMORY = 0.95


class FairScheduler:
    """Weighted turns among cameras; pure, and deterministic.

    Args:
        weights: camera -> its share of turns relative to the others'; the order decides between equals.

    Raises:
        ConfigError: no camera, or a weight that is not positive.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ConfigError("cameras: got none to schedule, expected at least one")
        self._weights: dict[str, float] = {}
        for camera, weight in weights.items():
            self.set_weight(camera, weight)
        self._due = dict.fromkeys(weights, 0.0)
        self._ages = dict.fromkeys(weights, 0.0)
        self._now = 0.0

    def set_weight(self, camera: str, weight: float) -> None:
        """Change a camera's share from its next turn on.

        Raises:
            ConfigError: the weight is not positive.
        """
        if not weight > 0.0:
            raise ConfigError(f"{camera}.weight: got {weight}, expected more than 0")
        self._weights[camera] = weight

    def choose(self, waiting: Collection[str]) -> str:
        """Give the next turn to one of the cameras that have a frame waiting.

        Args:
            waiting: at least one camera.
        """
        for camera in waiting:
            # A camera that had nothing to offer has no claim on the turns that it missed.
            self._due[camera] = max(self._due[camera], self._now)
        chosen = min(
            (camera for camera in self._weights if camera in waiting),
            key=lambda camera: (round(self._due[camera], 9), -self._ages[camera]),
        )
        self._take_turn(chosen)
        return chosen

    def join(self, camera: str) -> None:
        """A camera shares the turn of another, in one batch: it pays as for a turn of its own."""
        self._due[camera] = max(self._due[camera], self._now)
        self._take_turn(camera)

    def served(self, camera: str, age_ms: float) -> None:
        """Remember how old a camera's mask was when it was published.

        Args:
            camera: whose turn it was.
            age_ms: milliseconds since the frame arrived.
        """
        self._ages[camera] = _MEMORY * self._ages[camera] + self._weights[camera] * age_ms

    def _take_turn(self, camera: str) -> None:
        self._now = max(self._now, self._due[camera])
        self._due[camera] += 1.0 / self._weights[camera]
