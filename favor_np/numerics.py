"""Numbers that the engines share: kinds of maps, bounds of exponents, and what 2**x is made of.

Kernels freeze them into machine code: ``kernels.jit`` counts this file among its sources.
Tables are by the bytes of a float: 4 or 8.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from favor_np.features import FeatureMap

#: The kinds of feature maps, as kernels know them.
POSITIVE, RELU, ELU = range(3)
KINDS = {"positive": POSITIVE, "relu": RELU, "elu": ELU}

LN2, LOG2E = math.log(2), math.log2(math.e)

#: Largest |log2-feature| kept: longer queries and keys are shortened to it.  The activations round
#: by adding a large number, so it stays well below 2**22 and 2**51.
FAR = {4: 2.0**20, 8: 2.0**28}
#: The same of a logit of exact attention.
EXACT_FAR = {4: FAR[4], 8: 2.0**48}
#: What is subtracted from the log2-feature of a key that takes no part, in multiples of FAR.
MASKED = 8
#: In exact attention, the exponent of a key that takes no part.  Biases stay between half of that
#: and less its own size.
HIDDEN = {4: -(2**28), 8: -(2**50)}
#: c of features that no key has reached, and of those that only pad and that no key may reach.
#: Decay raises keys by up to ``validation.LONGEST_DECAY``.  A masked key has the log2-feature minus
#: infinity, of which `nearest` makes -1.27e9 in float32: sums and differences of all these stay
#: within 32 bits.
NOTHING, UNREACHED = {4: -(2**29), 8: -(2**40)}, {4: 5 * 2**26, 8: 2**40}
#: log2-features of the keys of one chunk may pass its first key by this much (see raise_keys).
MAX_RISE = {4: 40, 8: 400}
#: Largest projection of relu and elu maps: they are no exponents, and only have to stay finite.
MAX_PROJECTION = 2.0**60

#: 1.5 * 2**mantissa, and the bits of the mantissa: adding this number rounds to an integer.
ROUNDER = {4: (12582912.0, 23), 8: (6755399441055744.0, 52)}
#: 2**f on [-1/2, 1/2] as a polynomial, the constant first: a weighted least-squares fit at
#: Chebyshev nodes with the coefficients rounded one after the other; its relative error is 0.06 of
#: half an ulp.
EXP2 = {
    4: (
        1.0,
        0.6931471824645996,
        0.24022644758224487,
        0.055503591895103455,
        0.009618841111660004,
        0.0013391136890277267,
        0.00015238006017170846,
    ),
    8: (
        1.0,
        0.6931471805599453,
        0.24022650695910133,
        0.05550410866482226,
        0.009618129107593498,
        0.0013333558146380658,
        0.00015403530457765014,
        1.5252733805508415e-05,
        1.3215435001110848e-06,
        1.0178086773687693e-07,
        7.073826046303358e-09,
        4.449955477539561e-10,
    ),
}
#: The same with a relative error of 7.5e-5, the least that four coefficients have: a twentieth of
#: what rounding to bfloat16 makes of it.
EXP2_BFLOAT16 = (0.9999280729823053, 0.6932609852797501, 0.2426111252104096, 0.055171670307334816)


def projection_limit(feature_map: FeatureMap, itemsize: int) -> float:
    """Return the norm to which longer rows are shortened before they are projected."""
    exponential = feature_map.kind == "positive"
    longest = (LOG2E if exponential else 1.0) * max(
        math.sqrt((weight**2).sum(-1).max())
        for weight in (feature_map.query_weight, feature_map.key_weight)
    )
    if exponential:
        return FAR[itemsize] / max(longest, 1e-30)
    return MAX_PROJECTION / max(longest, 1.0)


def longest_row(itemsize: int, scale: float) -> float:
    """Return the norm from which on a row of exact attention may overflow, scaled or squared."""
    return 2.0**100 / max(scale, 1.0) if itemsize == 4 else 1e150
