"""What random features add to the uncertainty of a forecast, without exact attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from favor_np import validation
from favor_np.progress import Progress, reporting

from ._forecast import Forecast
from ._windows import F64


@dataclass(frozen=True, eq=False)
class ErrorBars:
    """How far FAVOR+ may be from exact attention, forecast by forecast.

    Parameters
    ----------
    standard_error : ndarray, shape (L,), float64
        Of `Forecast.predicted`, in log returns: 95% of the differences from exact attention are
        within 1.96 of it, where the effective sample size is at least 80, in the mean over draws
        of the features.  All forecasts share one draw: it may hold far more of them, or fewer.
    effective_sample_size : ndarray, shape (L,), float64
        How many features a forecast rests on: at most their number, and too few below 30.
    warnings : tuple of str
        Reasons not to trust them, after the warm-up.
    """

    standard_error: F64 = field(repr=False)
    effective_sample_size: F64 = field(repr=False)
    warnings: tuple[str, ...]


@validation.own_error_state
def error_bars(result: Forecast, *, progress: bool | Progress | None = None) -> ErrorBars:
    """Estimate the errors of all forecasts from the spread between features: see `diagnose`.

    Parameters
    ----------
    result : Forecast
        From `forecast`.
    progress : bool or callable, optional
        As `stream_attention`.

    Returns
    -------
    ErrorBars

    Examples
    --------
    >>> from favor_np.forecast import compare_with_exact, error_bars, forecast, read_prices
    >>> result = forecast(read_prices())
    >>> error = abs(compare_with_exact(result).predicted - result.predicted)
    >>> inside = error < 1.96 * error_bars(result).standard_error
    >>> bool(0.9 < inside[result.warm_up :].mean() < 0.98)
    True
    """
    from favor_np.diagnostics import diagnose

    windows = result.windows
    errors, sizes = np.empty(len(result)), np.empty(len(result))
    with reporting(progress) as report:
        for start, stop, fm in result.sections:
            report("error bars", start, len(result))
            q, k, v = (x[:stop] for x in (windows.queries, windows.keys, windows.values))
            found = diagnose(q, k, v, fm, causal=True)
            errors[start:stop] = found.standard_error[start:, 0] * windows.unit[start:stop]
            sizes[start:stop] = found.effective_sample_size[start:]
        report("error bars", len(result), len(result))
    return ErrorBars(errors, sizes, found.warnings)
