"""A message to the trainer of this node, and its reply, before a deadline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from flwr.app import Context, Message

from fedlora.errors import FedloraError, wrong
from simulations.node.joining import joined
from simulations.node.named import Named, read
from simulations.node.sources import sums
from simulations.node.trainer import WATCH, Failure, State
from simulations.parcels import unwrap, wrap

SECONDS = 3600.0  # for a reply, unless the node's configuration says otherwise
PATIENCE = 10.0  # seconds in which a trainer must say how it is


def ask(message: Message, context: Context) -> Message:
    """What the trainer that the node's configuration names replies; the context is as it left it.

    Raises:
        FedloraError: there is no such trainer, or it died, or did not reply in time.
        Exception: whatever the client app raised there.
    """
    path, seconds = Path(str(context.node_config["trainer"])), _seconds(message, context)
    named = read(path)
    with joined(named, f"trainer: {path}") as trainer:
        replied, left = _answer(trainer, named, message, context, seconds)
    context.state = left.state
    if isinstance(replied, Failure):
        raise replied.error()
    return replied


def _seconds(message: Message, context: Context) -> float:
    """How long to wait for a reply: no longer than a message of this kind lives.

    Raises:
        ConfigError: the node's configuration says no time.
    """
    given = context.node_config.get("trainer-seconds", SECONDS)
    if isinstance(given, (bool, str)) or not 0 < given < float("inf"):
        raise wrong("trainer-seconds", given, "seconds above 0")
    return min(float(given), message.metadata.ttl)  # not its age, which another clock measured


def _answer(
    trainer: Any, named: Named, message: Message, context: Context, seconds: float
) -> tuple[Message | Failure, Context]:  # Any: Ray's handles have no static type
    """What the trainer returns.

    Raises:
        FedloraError: it died once too often, or there is nothing within ``seconds``.
    """
    import ray

    ticket, work = uuid4().hex, wrap((message, context))
    reference = trainer.answer.remote(ticket, sums(), work)
    done, _ = ray.wait([reference], timeout=seconds)
    if not done:
        reason = _give_up(trainer, ticket, reference)
        raise FedloraError(f"trainer: no reply of {named.name!r} within {seconds:g} s; {reason}")
    try:
        return cast(tuple[Message | Failure, Context], unwrap(ray.get(reference)))
    except ray.exceptions.RayError as error:
        why = getattr(error, "cause", None) or type(error).__name__
        raise FedloraError(
            f"trainer: {named.name!r} died before it replied ({why}), also when asked again; if it "
            "ran out of memory, lower train.batch_size or model.max_length"
        ) from None


def _give_up(trainer: Any, ticket: str, reference: Any) -> str:  # Any: see ``_answer``
    """Take the message back, and end a trainer that hangs; says which of the two it was."""
    import ray

    ray.cancel(reference)
    asked = trainer.state.options(concurrency_group=WATCH).remote()
    done, _ = ray.wait([asked], timeout=PATIENCE)
    try:
        state = cast(State, ray.get(asked)) if done else None
    except ray.exceptions.RayError:
        state = None
    if state is not None and state.at != ticket:
        return "it works on others; raise trainer-seconds, or start a trainer for each node"
    ray.kill(trainer, no_restart=False)
    return "it was ended and starts again; raise trainer-seconds if it was at work"
