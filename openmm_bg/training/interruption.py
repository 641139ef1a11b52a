"""Ctrl-C and SIGTERM while training: a wish that the loop meets between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """Notes the signals.

    Parameters
    ----------
    insist
        A second signal raises KeyboardInterrupt at once. Not so where several processes train: `torchrun` sends each of
        them the signals that it gets itself, and one that left in the middle of a step would take the others along.

    Attributes
    ----------
    requested : bool
        Whether a signal came since the last `listening` began.
    """

    def __init__(self, insist: bool = True) -> None:
        self.insist = insist
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside; outside the main thread Python allows no handlers, and nothing happens."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and self.insist:
            raise KeyboardInterrupt
        self.requested = True
