"""Forecasts of price series by causal attention over their own past, without training.

The query at time t is the window of returns that ends at t, the keys are the windows before
it, the values are what followed each of them; the forecast is their softmax-weighted mean,
by FAVOR+ in linear time.  Nothing here ever looks ahead.
"""

from typing import Any as _Any

from ._backtest import Backtest as Backtest
from ._backtest import Samples as Samples
from ._backtest import backtest as backtest
from ._backtest import samples as samples
from ._baselines import EWMA as EWMA
from ._baselines import GARCH as GARCH
from ._baselines import HAR as HAR
from ._baselines import Constant as Constant
from ._compare import ExactComparison as ExactComparison
from ._compare import compare_with_exact as compare_with_exact
from ._error_bars import ErrorBars as ErrorBars
from ._error_bars import error_bars as error_bars
from ._evaluate import ReturnEvaluation as ReturnEvaluation
from ._evaluate import VolatilityEvaluation as VolatilityEvaluation
from ._evaluate import evaluate as evaluate
from ._forecast import Forecast as Forecast
from ._forecast import forecast as forecast
from ._inputs import inputs as inputs
from ._intervals import Intervals as Intervals
from ._intervals import conformal_intervals as conformal_intervals
from ._live import LiveForecast as LiveForecast
from ._live import Replay as Replay
from ._live import Tick as Tick
from ._live import replay as replay
from ._next import NextStep as NextStep
from ._next import Precedent as Precedent
from ._performer import PerformerForecaster as PerformerForecaster
from ._prices import PriceError as PriceError
from ._prices import Prices as Prices
from ._prices import read_prices as read_prices
from ._scores import DieboldMariano as DieboldMariano
from ._scores import diebold_mariano as diebold_mariano
from ._scores import qlike as qlike
from ._simulate import simulated_minutes as simulated_minutes
from ._trading import Trading as Trading
from ._volatility import FavorHAR as FavorHAR


def __getattr__(name: str) -> _Any:
    """Find what is no longer documented, but works for one release."""
    if name == "plot":
        from ._plot import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
