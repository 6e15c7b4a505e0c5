"""One call at a time changes an object; one that did not end is noticed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

A = TypeVar("A")
T = TypeVar("T")
#: For how many seconds a change waits for a reader to go first: not for ever, as it may come from a
#: signal handler that has interrupted what the reader waits for.
COURTESY = 0.1


class Guard:
    """Makes the calls that change an object one after the other, and tells if one did not end.

    Threads wait for each other, and changes for readers that came before them: Python's lock alone
    may be kept by a thread that takes it again and again.  A signal handler cannot wait for the
    call that it interrupts: if that one changes the object, the handler gets the error.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.RLock()
        #: Held by a reader that waits for the lock; readers behind it, and changes, wait for this.
        self._next = threading.RLock()
        self._awaited = False
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
                    self._next = threading.RLock()
                    self._lock, self._forks = threading.RLock(), _forks
        return self._lock

    def _take(self) -> None:
        """Take the lock to read; if it is not free, before any change that comes from now on."""
        lock = self.lock
        if not lock.acquire(blocking=False):
            with self._next:
                self._awaited = True
                lock.acquire()
                self._awaited = False

    def _let_readers_in(self) -> None:
        """Wait until the reader that waits for the lock has it."""
        if self._next.acquire(timeout=COURTESY):
            self._next.release()

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
            if self._awaited:
                self._let_readers_in()
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
            try:  # noqa: SIM105 (interrupts come where functions begin)
                lock.release()
            except RuntimeError:  # the interrupt came while another thread had it
                pass

    def read(self, function: Callable[..., T], *args: Any, shared: bool = False) -> T:
        """Return ``function(*args)``, which reads the object, as it is between two changes.

        With `shared` other threads read, too; if the object was changed meanwhile, it is read anew.
        """
        lock = self.lock
        while True:
            try:
                self._take()
                before = self.whole()
                if not shared:
                    result = function(*args)
                    if self.ends == before:  # else a signal handler has changed it
                        return result
            finally:
                try:  # noqa: SIM105 (interrupts come where functions begin)
                    lock.release()
                except RuntimeError:
                    pass
            if shared:
                result, shared = function(*args), False
                if self.ends == before:
                    return result


#: Forks between the first process and this one.
_forks = 0
_fork_lock = threading.RLock()


def _count_fork() -> None:
    global _forks, _fork_lock
    _forks, _fork_lock = _forks + 1, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)
