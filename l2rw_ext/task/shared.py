"""State of the whole process that steps change while they run."""

from __future__ import annotations

import abc
import threading
from typing import Any


class Shared(abc.ABC):
    """A change that the first step to enter makes and the last to leave undoes, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    @abc.abstractmethod
    def change(self) -> None:
        """Make the change."""

    @abc.abstractmethod
    def put_back(self) -> None:
        """Undo it."""

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self.change()
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.put_back()
