"""Who may do what beside whom, among the threads of a process that share a model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Making is done by one thread at a time, computing by many; while one listens to routed calls no other computes.

    sarac tells the routed calls of all threads to whoever listens, and takes them the long way meanwhile: another thread's
    numbers would differ in their last bits. What a CUDA graph replays calls nothing, and is no computing in this sense.
    """

    def __init__(self) -> None:
        self.making = threading.RLock()
        self._changed = threading.Condition()
        self._computing = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run models here. Whoever holds this waits for no other turn."""
        with self._changed:
            self._computing += 1
        try:
            yield
        finally:
            with self._changed:
                self._computing -= 1
                self._changed.notify_all()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Be the only thread that makes or computes."""
        with self.making, self._changed:
            self._changed.wait_for(lambda: not self._computing)
            yield  # a thread that is to compute waits for the condition's lock
