"""One piece of work done beforehand, in a thread."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`work()`, begun now and fetched later.

    >>> block = Ahead(make_block)
    >>> block.get()
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None
        # A daemon: a stream that never answers must not keep a process that was told twice to end.
        self._thread = threading.Thread(target=self._run, name="text ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # raised again where it is asked for
            self._error = error

    def get(self) -> T:
        """What came of it, waited for; or what went wrong, raised here."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()
