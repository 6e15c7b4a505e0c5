"""The maps that are compared: plain, antithetic, and those that know earlier queries and keys."""

from __future__ import annotations

import dataclasses

from favor_np.features import Calibration, FeatureMap, feature_map

from ._data import Tokens


@dataclasses.dataclass(frozen=True)
class Method:
    """How a map is made: `calibration` is a method of `FeatureMap.calibrate`, or ""."""

    name: str
    calibration: str = ""
    center: bool = True
    antithetic: bool = True
    projection: str = "orthogonal"

    def feature_map(self, tokens: Tokens, features: int, seed: int) -> FeatureMap:
        """Draw a map of a number of features; it knows nothing of `tokens` but the known ones."""
        fm = feature_map(
            "positive",
            dim=tokens.q.shape[-1],
            num_features=features,
            projection=self.projection,
            antithetic=self.antithetic,
            scale=tokens.scale,
            rng=seed,
        )
        if self.calibration == "center":
            a, b = tokens.known_q.mean(-2), tokens.known_k.mean(-2)
            return dataclasses.replace(fm, calibration=Calibration(a, b, None, 0 * a))
        if self.calibration:
            known = tokens.known_q, tokens.known_k
            return fm.calibrate(*known, method=self.calibration, center=self.center)
        return fm


#: The map that `feature_map` makes if nothing else is asked for.
DEFAULT = Method("antithetic")
METHODS = (
    Method("FAVOR+ iid", projection="iid", antithetic=False),
    Method("FAVOR+", antithetic=False),
    DEFAULT,
    Method("centred", "center"),
    Method("FAVOR++ oprf", "oprf"),
    Method("FAVOR# sderf", "sderf"),
    Method("FAVOR# saderf", "saderf"),
    Method("FAVOR# aderf", "aderf"),
    Method("saderf+sderf", "saderf+sderf"),
    Method("aderf+sderf", "aderf+sderf"),
    Method("spherical", "spherical"),
    Method("auto", "auto"),
    Method("auto uncentred", "auto", center=False),
)
