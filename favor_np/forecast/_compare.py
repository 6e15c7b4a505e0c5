"""The same forecasts by exact attention: what the approximation costs and what it saves."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from favor_np import measure, validation
from favor_np.progress import PATIENCE, Progress, reporting

from ._forecast import Forecast, attend
from ._maps import PREFIX, sections
from ._windows import F32, F64

PART = 0.4  # share of the time limit that a part takes, where the whole would exceed it
TRIAL_ROWS = 4096
LONG, ENOUGH = 0.25, 0.05  # seconds: a call that is its own average, and all calls of a shorter one


@dataclass(frozen=True, eq=False)
class ExactComparison:
    """FAVOR+ beside exact attention on the same windows; no time has compilation in it.

    Parameters
    ----------
    predicted : ndarray, shape (rows,), float64
        Exact forecasts, for the first `rows` of the forecast.
    rows : int
        How many were computed: all, or the part that the time limit allowed.
    seconds : float
        Time for the whole sequence; extrapolated from the part (it grows with the square of
        the length) where `extrapolated`.
    measured_seconds : float
        Time for `rows`.
    extrapolated : bool
        Whether only a part was measured.
    peak_bytes : int
        Peak of the memory that `rows` took, results included.
    matrix_bytes : int
        What the float32 matrix of all weights would take, if it were stored.
    correlation : float
        Between FAVOR+ and exact forecasts, after the warm-up (NaN if they do not vary).
    rmse : float
        Root mean square of their difference, in log returns.
    spread : float
        Standard deviation of the exact forecasts, to judge `rmse` by.
    favor_seconds : float
        Time of FAVOR+ for the whole sequence.
    favor_peak_bytes : int
        Peak of the memory it took, results included.
    calibration_seconds : float
        Time of the calibration before it; 0 where there was none.
    """

    predicted: F64
    rows: int
    seconds: float
    measured_seconds: float
    extrapolated: bool
    peak_bytes: int
    matrix_bytes: int
    correlation: float
    rmse: float
    spread: float
    favor_seconds: float
    favor_peak_bytes: int
    calibration_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster FAVOR+ is, but for the calibration."""
        return self.seconds / self.favor_seconds

    @property
    def pays_from(self) -> int:
        """Windows from which on FAVOR+ is faster, with the calibration.

        Its time grows with the length, that of exact attention with the square of the length.
        """
        total = math.sqrt(self.matrix_bytes / 4)
        square, linear = self.seconds / total**2, self.favor_seconds / total
        root = math.sqrt(linear**2 + 4 * square * self.calibration_seconds)
        return math.ceil((linear + root) / (2 * square))


@validation.own_error_state
def compare_with_exact(
    result: Forecast,
    *,
    max_seconds: float = 10.0,
    num_threads: int | None = None,
    progress: bool | Progress | None = None,
) -> ExactComparison:
    """Compute the forecasts by exact attention, as far as the time allows, and measure both.

    Time and memory are measured here, in the caller's process, by running FAVOR+ and exact
    attention several times; `forecast` itself measures nothing.  Times are medians.

    Parameters
    ----------
    result : Forecast
        A forecast by FAVOR+.
    max_seconds : float
        Where exact attention would take longer, only a first part of the sequence is computed,
        in less than half of this time, and the time of the whole is extrapolated.
    num_threads : int, optional
        Threads of both.
    progress : bool or callable, optional
        As `stream_attention`.

    Returns
    -------
    ExactComparison

    Examples
    --------
    >>> from favor_np.forecast import compare_with_exact, forecast, read_prices
    >>> result = forecast(read_prices())
    >>> exact = compare_with_exact(result)
    >>> exact.rows == len(result), exact.correlation > 0.98
    (True, True)
    """
    from favor_np.exact import exact_attention

    reported = reporting(progress)
    windows = result.windows

    def exact(rows: int) -> F32:
        part = slice(0, rows)
        return exact_attention(
            windows.queries[part],
            windows.keys[part],
            windows.values[part],
            causal=True,
            scale=result.scale,
            num_threads=num_threads,
        )

    rows = total = len(result)
    guess = 0.0
    if total > TRIAL_ROWS:
        compiled(exact, TRIAL_ROWS)
        start = time.perf_counter()
        exact(TRIAL_ROWS)
        guess = (time.perf_counter() - start) * (total / TRIAL_ROWS) ** 2
        if guess > max_seconds:
            rows = max(TRIAL_ROWS, int(total * math.sqrt(PART * max_seconds / guess)))
            guess = PART * max_seconds
    with reported as report:
        if guess > PATIENCE:  # one call: a bar cannot move
            report(f"exact attention, about {guess:.0f} s", 0, rows)
        out, seconds, peak = timed(exact, rows)
        report("exact attention", rows, rows)
    # Not before: threads of NumPy's products, of the calibration, still spin for a while.
    _, favor_seconds, favor_peak = timed(
        lambda count: attend(windows, result.sections, count, num_threads), total
    )

    predicted = out[:, 0].astype(np.float64) * windows.unit[:rows]
    judged = slice(result.warm_up, rows)
    error = result.predicted[judged] - predicted[judged]
    spread = float(np.std(predicted[judged]))
    varies = min(spread, float(np.std(result.predicted[judged]))) > 0
    pair = (result.predicted[judged], predicted[judged])
    return ExactComparison(
        predicted=predicted,
        rows=rows,
        seconds=seconds * (total / rows) ** 2,
        measured_seconds=seconds,
        extrapolated=rows < total,
        peak_bytes=peak,
        matrix_bytes=4 * total**2,
        correlation=float(np.corrcoef(*pair)[0, 1]) if varies else math.nan,
        rmse=float(np.sqrt(np.mean(error**2))),
        spread=spread,
        favor_seconds=favor_seconds,
        favor_peak_bytes=favor_peak,
        calibration_seconds=_calibration_seconds(result),
    )


def _calibration_seconds(result: Forecast) -> float:
    if len(result.sections) == 1:
        return 0.0
    start = time.perf_counter()
    sections(result.windows, result.sections[0].feature_map, result.calibration)
    return time.perf_counter() - start


def timed(run: Callable[[int], F32], rows: int) -> tuple[F32, float, int]:
    """Result, median seconds and peak bytes of ``run(rows)``, after short runs that compile it."""
    compiled(run, rows)
    results: list[F32] = []
    seconds: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        results[:] = [run(rows)]
        seconds.append(time.perf_counter() - start)

    peak = measure.peak_memory(call)
    while seconds[0] < LONG and (len(seconds) < 3 or (sum(seconds) < ENOUGH and len(seconds) < 9)):
        call()
    return results[0], statistics.median(seconds), peak


def compiled(run: Callable[[int], F32], rows: int) -> None:
    """Run what up to `rows` rows need, so that no time has compilation in it."""
    from favor_np.cpu.tuning import MIN_SHARED_LENGTH  # from there on another kernel runs

    for some in (64, MIN_SHARED_LENGTH):
        run(min(rows, PREFIX + some))
