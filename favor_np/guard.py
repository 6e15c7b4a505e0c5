"""One call at a time changes an object; one that did not end is noticed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

A = TypeVar("A")
T = TypeVar("T")


class Guard:
    """Makes the calls that change an object one after the other, and tells if one did not end.

    Threads wait for each other.  A signal handler cannot wait for the call that it interrupts: if
    that one changes the object, the handler gets the error.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._forks = _forks
        #: Where changes begin and end: an odd number of them means that one has not ended.
        self.ends = 0

    def __reduce__(self) -> Any:
        """Copy and pickle a guard that is free: the copy is another object's."""
        return Guard, (self.name,)

    @property
    def lock(self) -> Any:
        """The lock; in the child of a fork a new one: who holds the old one may not be there."""
        if self._forks != _forks:
            with _fork_lock:
                if self._forks != _forks:
                    self._lock, self._forks = threading.RLock(), _forks
        return self._lock

    def whole(self) -> int:
        """Return `ends`; an error if a change has not ended, with the lock in our hands."""
        if self.ends % 2:
            raise RuntimeError(
                f"this {self.name} is spoiled: a call that changed it was interrupted, so go on "
                "from a copy or a file (or that call is still running, and this one comes from "
                "a signal handler)"
            )
        return self.ends

    def change(self, function: Callable[[A], T], given: A, spoils: bool = True) -> T:
        """Return ``function(given)``, which changes the object, and spoils it if interrupted.

        Without `spoils` it is not: what the function has done by then does no harm.
        """
        lock = self._lock if self._forks == _forks else self.lock
        try:  # half the time of a with statement, and as safe: this begins before the lock is taken
            lock.acquire()
            ends = self.ends
            if ends % 2:
                self.whole()
            self.ends = ends + 1
            try:
                result = function(given)
            except BaseException:
                if not spoils:
                    self.ends = ends
                raise
            self.ends = ends + 2
            return result
        finally:
            try:  # noqa: SIM105 (a function would cost more)
                lock.release()
            except RuntimeError:  # the interrupt came while another thread had it
                pass

    def read(self, function: Callable[..., T], *args: Any, shared: bool = False) -> T:
        """Return ``function(*args)``, which reads the object, as it is between two changes.

        With `shared` other threads read, too; if the object was changed meanwhile, it is read anew.
        """
        if shared:
            with self.lock:
                before = self.whole()
            result = function(*args)
            if self.ends == before:
                return result
        while True:
            with self.lock:
                before = self.whole()
                result = function(*args)
                if self.ends == before:  # else a signal handler has changed it
                    return result


#: Forks between the first process and this one.
_forks = 0
_fork_lock = threading.RLock()


def _count_fork() -> None:
    global _forks, _fork_lock
    _forks, _fork_lock = _forks + 1, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)
