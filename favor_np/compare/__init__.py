"""Random features beside exact softmax attention: error, time and memory, measured here and now.

Errors are those of every kind of map on queries and keys that no map has seen: what is calibrated
knows earlier ones only.
"""

from ._compare import Comparison as Comparison
from ._compare import CostRow as CostRow
from ._compare import ErrorRow as ErrorRow
from ._compare import Setting as Setting
from ._compare import WindowRow as WindowRow
from ._compare import compare as compare
from ._compare import crossing as crossing
