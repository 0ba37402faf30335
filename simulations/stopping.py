"""Ends that were asked for: Ctrl-C and SIGTERM stop a command within seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from simulations.descendants import adopt, end_descendants

Listener = Callable[[int, FrameType | None], Any] | signal.Handlers  # Any: nobody looks at it
GRACE = 4.0  # seconds for a command to end by itself; what was committed is safe either way
SIGNALS: dict[signal.Signals, Listener] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@dataclass
class Heard:
    """The signal that asked a command to stop.

    Attributes:
        number: SIGINT as long as none has come.
    """

    number: int = signal.SIGINT
    _timer: threading.Timer | None = None

    @property
    def code(self) -> int:
        """The exit code by which shells know it: 130 or 143."""
        return 128 + self.number

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Stop the command; at once if it has been asked before.

        Raises:
            KeyboardInterrupt: always.
        """
        if self._timer is not None:
            self._leave()
        self.number = number
        self._timer = threading.Timer(GRACE, self._leave)
        self._timer.daemon = True
        self._timer.start()
        raise KeyboardInterrupt

    def end(self) -> None:
        """End the process here: what the interpreter would tidy up takes seconds with Ray."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave()

    def _leave(self) -> None:
        """End the process, and all that it has started."""
        end_descendants()
        os._exit(self.code)

    def forget(self) -> None:
        """The command has ended."""
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def hearing() -> Iterator[Heard]:
    """Let the first signal raise, and a second one or ``GRACE`` seconds end the process.

    What it has started ends with it. Signals that are ignored, or that somebody else listens to,
    are left alone.
    """
    heard, before = Heard(), {}
    if threading.current_thread() is threading.main_thread():
        before = {n: usual for n, usual in SIGNALS.items() if signal.getsignal(n) is usual}
    for number in before:
        signal.signal(number, heard.hear)
    adopt(True)
    try:
        yield heard
    finally:
        adopt(False)
        heard.forget()
        for number, usual in before.items():
            signal.signal(number, usual)


@contextmanager
def still_hearing() -> Iterator[None]:
    """Leave it to whom it was to listen to signals, whatever a library sets up inside."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, listener in before.items():
            if listener is not None:  # None is not Python's to put back
                signal.signal(number, listener)
