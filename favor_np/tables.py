"""What functions keep of the tables that they made, bounded by bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: Bytes of the tables that one function keeps, if it made them of late: half of them of calls
#: before.
KEPT = 32 << 20


def kept(count: int, size: Callable[[Any], int]) -> Callable[[F], F]:
    """Keep results as `functools.lru_cache` does, the last `count` or more, up to KEPT bytes.

    What was used lies in one table and, when that is full, in another one, which goes when the
    first is full again.  So there is no order to maintain, and no lock: a thread or a signal
    handler that comes between makes a result once more, at worst.
    """

    def decorate(function: F) -> F:
        recent: dict[Any, Any] = {}
        older: dict[Any, Any] = {}
        held = 0

        @functools.wraps(function)
        def look_up(*key: Any) -> Any:
            nonlocal recent, older, held
            try:
                return recent[key]
            except KeyError:
                pass
            found = older.get(key)
            if found is None:
                found = function(*key)
            more = size(found)
            if more <= KEPT // 2:
                if held + more > KEPT // 2 or len(recent) >= count:
                    recent, older, held = {}, recent, 0
                recent[key] = found
                held += more
            return found

        def clear() -> None:
            nonlocal recent, older, held
            recent, older, held = {}, {}, 0

        look_up.cache_clear = clear  # type: ignore[attr-defined]
        return look_up  # type: ignore[return-value]

    return decorate
