"""The actor that keeps a node's model, and runs the client app for whoever hands it a message.

Its module is imported by all who call it, so the heavy libraries are imported when it is made.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.errors import FedloraError, wrong
from simulations.node.sources import check_same
from simulations.parcels import Parcel, unwrap, wrap

APP = "clients.client_app:app"
WATCH = "watch"  # the concurrency group in which a busy trainer still says how it is


@dataclass(frozen=True)
class State:
    """How a trainer is.

    Attributes:
        process: its number.
        answered: how many messages it has replied to.
        at: the ticket of the message that it works on, if any.
        seconds: for how long it has.
        trouble: why it cannot work; empty if it can.
    """

    process: int
    answered: int
    at: str
    seconds: float
    trouble: str


@dataclass(frozen=True)
class Failure:
    """An exception of the client app, without the libraries that its class may need.

    Attributes:
        module, name: of its class.
        text: what it says.
        trace: how it came about.
    """

    module: str
    name: str
    text: str
    trace: str

    @staticmethod
    def of(error: Exception) -> Failure:
        """What is told of an exception."""
        kind = type(error)
        trace = "".join(traceback.format_exception(error))
        return Failure(kind.__module__, kind.__qualname__, str(error), trace)

    def error(self) -> Exception:
        """An exception that Flower words as the one it stands for, with its trace as a note."""
        if self.module == FedloraError.__module__:
            kind: type[Exception] = getattr(import_module(self.module), self.name)
        else:
            told = {"__module__": self.module, "__qualname__": self.name}
            kind = type(self.name.rpartition(".")[2], (Exception,), told)
        error = kind(self.text)
        error.add_note(f"in the trainer:\n{self.trace}")
        return error


class Trainer:
    """The client app with its resident model, for the messages of one node."""

    def __init__(self, threads: int, gpus: float) -> None:
        """Import what training takes and set this process's torch threads.

        Where that cannot be, ``state`` says why; an actor that failed here would never be made
        again.
        """
        self._answered, self._at, self._since, self._trouble = 0, "", 0.0, ""
        self._threads = threads
        try:
            self._app = _app(threads, gpus)
        except (FedloraError, ImportError, OSError) as error:
            self._trouble = f"{type(error).__name__}: {error}"

    def answer(self, ticket: str, sources: Mapping[str, str], work: Parcel) -> Parcel:
        """The app's reply to a message, or its failure, and the context as it left it.

        Args:
            ticket: by which ``state`` names this message.
            sources: sums of the caller's Fedlora.
            work: the message and the context.
        """
        message, context = cast(tuple[Message, Context], unwrap(work))
        self._at, self._since = ticket, time.monotonic()
        try:
            return wrap((self._reply(message, context, sources), context))
        finally:
            self._at = ""
            self._answered += 1

    def state(self) -> State:
        """How it is, also while it trains."""
        at = self._at
        seconds = time.monotonic() - self._since if at else 0.0
        return State(os.getpid(), self._answered, at, seconds, self._trouble)

    def _reply(
        self, message: Message, context: Context, sources: Mapping[str, str]
    ) -> Message | Failure:
        """What the app says to a message."""
        import torch

        try:
            if self._trouble:
                raise FedloraError(f"trainer: {self._trouble}")
            check_same(sources)
            torch.set_num_threads(self._threads)
            return self._app(message, context)
        except Exception as error:
            return Failure.of(error)


def _app(threads: int, gpus: float) -> ClientApp:
    """The client app, in a process made ready for it.

    Raises:
        ConfigError: there is no GPU, and one was asked for.
    """
    import torch

    from simulations.grid import identify
    from simulations.heap import keep_heap

    torch.set_num_threads(threads)
    keep_heap()
    identify()
    if gpus and not torch.cuda.is_available():
        raise wrong("--gpus", gpus, "0, since torch sees no GPU")
    module, _, name = APP.partition(":")
    return cast(ClientApp, getattr(import_module(module), name))
