"""From a path to text, or to the cells of a workbook or a columnar file."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import PriceError, listed, quote

MOST = 2**28  # bytes that a file may unpack to, whatever its size ...
RATIO = 100  # ... and, above that, times its size
FRAMES = {b"PAR1": "parquet", b"ARROW1": "feather", b"FEA1": "feather"}
PACKED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
DAMAGED = (lzma.LZMAError, zlib.error, zipfile.BadZipFile)
NOT_TEXT = {
    b"\xd0\xcf\x11\xe0": "an old workbook (.xls)",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "a data base",
    b"%PDF": "a PDF document",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd",
    b"7z\xbc\xaf": "a file packed by 7z",
}


def load(name: str) -> bytes:
    """The bytes of a file, or of standard input for "-"."""
    if name == "-":
        return sys.stdin.buffer.read()
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        raise PriceError("a web address; download the file first, and name that")
    return Path(name).read_bytes()


def contents(data: bytes) -> str | tuple[str, bytes]:
    """The text of a file, or the kind of a file that is none, with its bytes, unpacked."""
    if not data.strip():
        raise PriceError("the file is empty")
    for magic, kind in FRAMES.items():
        if data.startswith(magic):
            return kind, data
    if data.startswith(b"PK\x03\x04"):
        with _unpacking(), zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if "xl/workbook.xml" in names:
                _check_size(sum(item.file_size for item in archive.infolist()), len(data))
                return "xlsx", data
            names = [n for n in names if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if len(names) != 1:
                found = listed(names) if names else "none"
                raise PriceError(f"an archive with one file is expected, this one has {found}")
            with archive.open(names[0]) as inner:
                return contents(_limited(inner, len(data)))
    for magic, opener in PACKED.items():
        if data.startswith(magic):
            with _unpacking(), opener(io.BytesIO(data)) as inner:
                return contents(_limited(inner, len(data)))
    return _decoded(data)


@contextlib.contextmanager
def _unpacking() -> Iterator[None]:
    """What goes wrong with a packed file, as an error of one line."""
    try:
        yield
    except PriceError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, *DAMAGED) as error:
        raise PriceError(f"a packed file that cannot be unpacked ({error})") from None


def _limited(inner: IO[bytes], size: int) -> bytes:
    data = inner.read(max(MOST, RATIO * size) + 1)
    _check_size(len(data), size)
    return data


def _check_size(unpacked: int, size: int) -> None:
    if unpacked > max(MOST, RATIO * size):
        raise PriceError(f"a packed file of {size:,} bytes that unpacks to more than {RATIO} times")


def _decoded(data: bytes) -> str:
    for magic, kind in NOT_TEXT.items():
        if data.startswith(magic):
            raise PriceError(f"{kind}, a binary file, not delimited text")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    elif data[1:2] == b"\x00" and data[3:4] in (b"\x00", b""):
        encodings = ["utf-16-le"]
    elif data[:1] == b"\x00" and data[2:3] in (b"\x00", b""):
        encodings = ["utf-16-be"]
    else:
        encodings = ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
            return _checked(text)
    raise PriceError("a binary file, not delimited text")


def _checked(text: str) -> str:
    start = text.lstrip()[:200]
    if re.match(r'\{\s*("|\}|$)|\[\s*([\[{"\d-]|\]|$)', start):
        raise PriceError("JSON, not a table; write times and prices as a CSV file first")
    if re.match(r"<(!doctype|html|\?xml|table|!--)", start, re.IGNORECASE):
        raise PriceError(
            f"a web page or XML, not a table ({quote(start)}); was the download refused?"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
