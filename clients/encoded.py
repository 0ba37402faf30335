"""Encoded rows that stay in memory for the next round."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from clients.local import Rows
from fedlora.tasks.task import Task


class Encoded:
    """The encoded rows that were used last, so many, each while its task is the same."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: OrderedDict[Hashable, tuple[Task, Rows]] = OrderedDict()

    def rows(self, key: Hashable, task: Task, encode: Callable[[], Rows]) -> Rows:
        """What ``encode`` made of the task for this key, now or before."""
        if key not in self._rows or self._rows[key][0] is not task:
            self._rows[key] = task, encode()
            if len(self._rows) > self._limit:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key][1]
