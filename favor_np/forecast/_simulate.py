"""A long series that anyone can make again: simulated prices of one-minute steps."""

from __future__ import annotations

import numpy as np

from favor_np import validation

from ._prices import Prices

ROWS = 262_800  # half a year of minutes, around the clock
COMPONENTS, SPACING, FASTEST = (
    10,
    2.5,
    0.3,
)  # of the volatility: how many, and how often they change
CALM, WILD = 0.6, 1.4  # the two values of a component
STEP = 5e-4  # standard deviation of a step's log return


def simulated_minutes(rows: int = ROWS, *, seed: int = 0) -> Prices:
    """Simulate prices a minute apart, with clusters of volatility from minutes to weeks.

    Returns are independent normal numbers times a volatility, so their direction cannot be
    forecast, but their size can.  The variance is a product of ten components, each 0.6 or 1.4.
    At every step component k is drawn anew with probability 1 - 0.7**(2.5**-k), k = 0 ... 9: the
    first after three minutes in the mean, the last after a week.

    Parameters
    ----------
    rows : int
        Prices; the default is half a year, around the clock.
    seed : int
        Of the simulation.

    Returns
    -------
    Prices
        From 2026-01-01 on.

    Notes
    -----
    The Markov-switching multifractal of Calvet and Fisher 2004, "How to forecast long-run
    volatility: regime switching and the estimation of multifractal processes" (Journal of Financial
    Econometrics 2), which is found hard to tell from exchange rates.

    Examples
    --------
    >>> from favor_np.forecast import simulated_minutes
    >>> simulated_minutes(1000)
    <Prices 'simulated minutes': 1,000, 2026-01-01 00:00 to 2026-01-01 16:39, step 1 minute>
    """
    rows = validation.integer("rows", rows, minimum=2)
    rng = np.random.default_rng(validation.integer("seed", seed, minimum=0))
    variance = np.full(rows - 1, STEP**2)
    for component in range(COMPONENTS):
        change = rng.random(rows - 1) < 1 - (1 - FASTEST) ** (SPACING**-component)
        spell = np.cumsum(change)
        variance *= rng.choice([CALM, WILD], spell[-1] + 1)[spell]
    steps = np.sqrt(variance) * rng.standard_normal(rows - 1)
    return Prices(
        100 * np.exp(np.concatenate([[0.0], np.cumsum(steps)])),
        np.datetime64("2026-01-01T00:00") + np.arange(rows),
        name="simulated minutes",
        rows=rows,
        order="ascending",
    )
