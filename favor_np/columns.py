"""Arrays of pandas, polars, Arrow and PyTorch that NumPy alone would not read, or not rightly.

NumPy makes NaN of what stands for no number there, and objects of columns that only may have such.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Packages whose arrays `values` looks at.
LIBRARIES = ("pandas", "polars", "pyarrow", "torch")


def values(name: str, value: Any) -> Any:
    """Return what NumPy reads rightly; refuse what has missing values."""
    library = type(value).__module__.partition(".")[0]
    missing = False
    if library == "pandas" and hasattr(value, "isna"):
        kinds = list(value.dtypes) if value.ndim == 2 else [value.dtype]
        if any(hasattr(kind, "numpy_dtype") for kind in kinds):  # columns that may lack numbers
            missing = bool(value.isna().to_numpy().any())
            if not missing:
                numbers = [getattr(kind, "numpy_dtype", kind) for kind in kinds]
                value = value.to_numpy(np.result_type(*numbers))
    elif library == "polars" and hasattr(value, "null_count"):
        count = value.null_count()
        missing = (count if isinstance(count, int) else sum(count.row(0))) > 0
    elif library == "pyarrow":
        columns = getattr(value, "columns", [value])
        missing = any(getattr(column, "null_count", 0) for column in columns)
        if hasattr(value, "to_numpy_ndarray"):
            value = value.to_numpy_ndarray()
        elif hasattr(getattr(value, "type", None), "list_size") and not missing:
            rows = value.combine_chunks() if hasattr(value, "combine_chunks") else value
            inner = rows.flatten()
            missing, size = inner.null_count > 0, rows.type.list_size
            value = np.asarray(inner).reshape(len(rows), size)
    if missing:
        raise TypeError(f"{name} has missing values, which stand for no numbers: fill them")
    if library == "torch" and str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()  # NumPy has no bfloat16
    return value
