"""The settings of a forecast: their defaults, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass

from favor_np import validation

from ._maps import CALIBRATIONS

TARGETS = ("return", "volatility")


@dataclass(frozen=True)
class Setting:
    """What is predicted from what, and how: `forecast` says what each of them means."""

    target: str = "return"
    window: int = 32
    horizon: int = 1
    num_features: int = 192  # the fewest with error bars that hold: docs/forecast.md
    calibration: str = "auto"
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is of a wrong type or out of range; make numbers of NumPy Python's."""
        validation.choice("target", self.target, TARGETS)
        validation.choice("calibration", self.calibration, CALIBRATIONS)
        vars(self).update(
            window=validation.integer("window", self.window),
            horizon=validation.integer("horizon", self.horizon),
            num_features=validation.integer("num_features", self.num_features, minimum=2),
            scale=None if self.scale is None else validation.positive_float("scale", self.scale),
            seed=validation.integer("seed", self.seed, minimum=0),
        )
