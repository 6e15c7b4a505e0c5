"""Series and frames of pandas, polars, Arrow and xarray, workbooks and columnar files, as tables.

Cells become texts, so that what is decided about a text file is decided about these as well.
None of the libraries is imported before an object of it, or a file for it, is there.
"""

from __future__ import annotations

import decimal
import io
import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PriceError
from .numbers import F64
from .table import Table, tabulate

Column = tuple[str, list[str]]

INSTALL = "pip install 'favor_np[files]'"


def table_of(values: Any) -> Table | None:
    """The table of a series or frame with names or times; None for plain numbers.

    Raises
    ------
    PriceError
        If there are no rows or columns.
    TypeError
        If the values are no real numbers.
    """
    library = type(values).__module__.partition(".")[0]
    columns = _COLUMNS[library](values) if library in _COLUMNS else None
    if not columns:
        return None
    rows = list(zip(*(cells for _, cells in columns), strict=True))
    if not rows:
        raise PriceError("no rows")
    lines = np.arange(1, len(rows) + 1)
    return Table([title for title, _ in columns], rows, lines, separator=",")


def real_numbers(values: Any) -> F64:
    """An array of float64, or a `TypeError` where something else than real numbers is given."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise TypeError("prices must not be masked; fill the gaps with NaN: they are dropped")
    array = np.asarray(values)
    if array.dtype == object:
        array = np.array([_real(item) for item in array.flat], np.float64).reshape(array.shape)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"prices must be real numbers, got {array.dtype}")
    return array.astype(np.float64)


def _real(item: Any) -> float:
    if item is None:
        return np.nan
    if isinstance(item, bool) or not isinstance(item, (numbers.Real, decimal.Decimal)):
        raise TypeError(f"prices must be real numbers, got {type(item).__name__} {item!r}")
    return float(item)


# ----------------------------------------------------------------------------------------
# Libraries
# ----------------------------------------------------------------------------------------


def _pandas(values: Any) -> list[Column] | None:
    import pandas as pd

    if isinstance(values, pd.Series):
        if isinstance(values.index, pd.RangeIndex):
            return None
        title = "price" if values.name is None else str(values.name)
        _refuse_others(values.to_numpy())
        return [*_index(values.index), (title, _cells(_naive_pandas(values)))]
    if not isinstance(values, pd.DataFrame):
        return None
    if not len(values.columns):
        raise PriceError("a frame without columns")
    names = [name if isinstance(name, tuple) else (name,) for name in values.columns]
    telling = [i for i in range(len(names[0])) if len({name[i] for name in names}) > 1] or [0]
    titles = [" ".join(str(name[i]) for i in telling if str(name[i])) for name in names]
    body = [_cells(_naive_pandas(values.iloc[:, i])) for i in range(len(titles))]
    return [*_index(values.index), *zip(titles, body, strict=True)]


def _index(index: Any) -> list[Column]:
    """Columns of an index, none where it only counts the rows."""
    import pandas as pd

    if isinstance(index, pd.RangeIndex):
        return []
    if isinstance(index, pd.MultiIndex):
        levels = [index.get_level_values(i) for i in range(index.nlevels)]
        return [column for level in levels for column in _index(level)]
    if isinstance(index, pd.PeriodIndex):
        index = index.to_timestamp()
    unnamed = "time" if index.dtype.kind == "M" else "index"
    title = unnamed if index.name is None else str(index.name)
    return [(title, _cells(_naive_pandas(index.to_series())))]


def _naive_pandas(values: Any) -> Any:
    """Without zone, in UTC, or by their local date where they are days."""
    if getattr(values.dtype, "tz", None) is None:
        return values.to_numpy()
    local = values.dt.tz_localize(None)
    if (local.dropna() == local.dropna().dt.normalize()).all():
        return local.to_numpy()
    return values.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy()


def _polars(values: Any) -> list[Column] | None:
    import polars as pl

    def naive(column: Any) -> Any:
        if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone is not None:
            local = column.dt.replace_time_zone(None)
            if (local.dt.truncate("1d") != local).any():
                local = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
            column = local
        return column.to_numpy()

    if isinstance(values, pl.LazyFrame):
        values = values.collect()
    if not isinstance(values, pl.DataFrame):
        return None
    return [(title, _cells(naive(values[title]))) for title in values.columns]


def _arrow(values: Any) -> list[Column] | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    def naive(column: Any) -> Any:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_timestamp(column.type) and column.type.tz is not None:
            local = pc.local_timestamp(column)
            if pc.all(pc.equal(pc.floor_temporal(local, unit="day"), local)).as_py():
                column = local
        if pa.types.is_decimal(column.type):
            column = column.cast(pa.string())  # as a float it is not always the nearest
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return array.to_numpy(zero_copy_only=False)

    if not isinstance(values, (pa.Table, pa.RecordBatch)):
        return None
    columns = zip(values.column_names, values.columns, strict=True)
    return [(title, _cells(naive(column))) for title, column in columns]


def _xarray(values: Any) -> list[Column] | None:
    import xarray as xr

    if isinstance(values, xr.DataArray):
        if values.ndim != 1 or values.dims[0] not in values.coords:
            return None
        _refuse_others(values.values)
        title = "price" if values.name is None else str(values.name)
        return [
            (str(values.dims[0]), _cells(values[values.dims[0]].values)),
            (title, _cells(values.values)),
        ]
    if not isinstance(values, xr.Dataset):
        return None
    dims = [dim for dim in values.dims if values.sizes[dim] > 1]
    if len(dims) != 1:
        raise PriceError(f"a Dataset of one dimension is expected, got {dict(values.sizes)}")
    found = {**values.coords, **values.data_vars}
    return [(str(k), _cells(v.values)) for k, v in found.items() if v.dims == (dims[0],)]


_COLUMNS: dict[str, Callable[[Any], list[Column] | None]]
_COLUMNS = {"pandas": _pandas, "polars": _polars, "pyarrow": _arrow, "xarray": _xarray}


def _refuse_others(array: npt.NDArray[Any]) -> None:
    if array.dtype.kind in "cMmb":
        raise TypeError(f"prices must be real numbers, got {array.dtype}")


def _cells(array: npt.NDArray[Any]) -> list[str]:
    """Texts that read as what was there, "" for what is missing."""
    if array.dtype.kind == "M":
        texts = np.datetime_as_string(array).tolist()
        return ["" if text == "NaT" else text for text in texts]
    if array.dtype.kind == "f":
        return ["" if math.isnan(x) else repr(x) for x in array.astype(np.float64).tolist()]
    if array.dtype.kind == "c":
        raise TypeError(f"prices must be real numbers, got {array.dtype}")
    return [_cell(item) for item in array.tolist()]


def _cell(item: Any) -> str:
    text = str(item)
    if text in ("None", "nan", "NaT", "<NA>"):
        return ""
    return text.removesuffix(" 00:00:00") if hasattr(item, "isoformat") else text


# ----------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------


def read_frame(kind: str, data: bytes) -> Table:
    """The table of a workbook, or of a parquet or feather file.

    Raises
    ------
    PriceError
        If it cannot be read, or the library that can is not installed.
    """
    try:
        if kind == "xlsx":
            return _workbook(data)
        table = table_of(_columnar(kind, data))
    except ImportError:
        needed = "openpyxl" if kind == "xlsx" else "pandas with pyarrow, or polars"
        raise PriceError(f"to read .{kind} files needs {needed}: {INSTALL}") from None
    except PriceError:
        raise
    except Exception as error:  # noqa: BLE001 - each library has errors of its own
        raise PriceError(f"a .{kind} file that cannot be read ({error})") from None
    if table is None:
        raise PriceError("no columns")
    return table


def _columnar(kind: str, data: bytes) -> Any:
    try:
        import pandas as pd

        read = pd.read_parquet if kind == "parquet" else pd.read_feather
        return read(io.BytesIO(data))
    except ImportError:
        import polars as pl

        return (pl.read_parquet if kind == "parquet" else pl.read_ipc)(io.BytesIO(data))


def _workbook(data: bytes) -> Table:
    """The first sheet that has rows."""
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of styles and extensions
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        for sheet in book.worksheets:
            cells = [[_cell(item) for item in row] for row in sheet.iter_rows(values_only=True)]
            lines = [i + 1 for i, row in enumerate(cells) if any(row)]
            if len(lines) > 1:
                break
        else:
            raise PriceError("no rows in any sheet")
    table = tabulate([_ended(cells[i - 1]) for i in lines], np.array(lines, np.intp))
    if len(book.worksheets) > 1:
        table.said.append(f"sheet {sheet.title!r} of {len(book.worksheets)} read")
    return table


def _ended(row: Sequence[str]) -> list[str]:
    """A row without the empty cells that a sheet has on the right of all others."""
    cells = list(row)
    while cells and not cells[-1]:
        cells.pop()
    return cells
