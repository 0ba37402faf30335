"""``fedlora node``: keep a trainer on this machine until a signal ends it."""

from __future__ import annotations

import math
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click

from fedlora.errors import ConfigError, FedloraError, wrong
from fedlora.faults import check_armed
from simulations.node import joining
from simulations.node.named import Named, held, read, write
from simulations.node.trainer import WATCH, State, Trainer

RETRIES = 2  # of a message whose trainer died over it
STARTS = 300.0  # seconds for a trainer to start
PULSE = 2.0  # seconds between two looks at the trainer
FREED = 10.0  # seconds for a name to be free again


class KilledError(FedloraError):
    """A trainer that Ray will not make again."""


@dataclass(frozen=True)
class Wanted:
    """What a trainer is to be.

    Attributes:
        name: of the actor.
        cpus, gpus: what it takes of its Ray; a share of a GPU is one.
        threads: of torch.
    """

    name: str
    cpus: float
    gpus: float
    threads: int

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: the option that cannot.
        """
        if self.name.split() != [self.name]:
            raise wrong("--name", self.name, "a name without spaces")
        for option, number in (("--cpus", self.cpus), ("--gpus", self.gpus)):
            if not 0 <= number < math.inf or (number > 1 and number != int(number)):
                raise wrong(option, number, "from 0, and above 1 whole")
        if self.threads < 1:
            raise wrong("--threads", self.threads, "a whole number from 1")

    def check_room(self, has: Mapping[str, float]) -> None:
        """Refuse what this machine's part of a Ray does not hold, rather than wait for it.

        Raises:
            ConfigError: the option that asks for too much.
        """
        for option, kind, number in (("--cpus", "CPU", self.cpus), ("--gpus", "GPU", self.gpus)):
            if number > has.get(kind, 0):
                allowed = f"what that Ray has on this machine, {has.get(kind, 0):g} {kind}"
                raise wrong(option, number, allowed)

    def make(self) -> Any:  # Any: Ray's handles have no static type
        """A fresh actor on this machine; Ray makes it again whenever its process dies.

        Raises:
            ConfigError: there is one of that name.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote: Any = ray.remote
        kind = remote(concurrency_groups={WATCH: 1})(Trainer)
        this = ray.get_runtime_context().get_node_id()
        options = kind.options(
            name=self.name,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=RETRIES,
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(this, soft=False),
        )
        end = time.monotonic() + FREED
        while True:
            try:
                return options.remote(self.threads, self.gpus)
            except ValueError:
                if time.monotonic() > end:
                    allowed = "a name that no trainer in that Ray has"
                    raise wrong("--name", self.name, allowed) from None
            time.sleep(0.5)


def keep(
    state: Path, name: str | None, address: str | None, cpus: float, gpus: float, threads: int
) -> None:
    """Keep a trainer, in a Ray of its own or in the one at ``address``, until a signal ends it.

    ``state`` is written when the trainer is ready, and is gone before the trainer is.

    Raises:
        ConfigError: an option cannot be.
        FedloraError: the trainer cannot start, or its Ray has ended.
    """
    wanted = Wanted(
        name if name is not None else f"trainer-{socket.gethostname()}", cpus, gpus, threads
    )
    wanted.check()
    check_armed()
    if not state.parent.is_dir() or state.is_dir():
        raise wrong("--state", str(state), "a file in a folder that exists")
    with held(state):
        before = _before(state)
        token = "" if address else secrets.token_hex(32)
        if address:
            joining.join(Named(address, joining.NAMESPACE, wanted.name), "--address")
        else:
            joining.start(max(1, math.ceil(cpus)), math.ceil(gpus), token)
        named = Named(joining.here(), joining.NAMESPACE, wanted.name, token)
        try:
            if before is not None and before.address == named.address:
                end(before)  # whoever kept it was killed
            wanted.check_room(joining.resources())
            _serve(state, named, wanted)
        finally:
            joining.leave()


def end(named: Named) -> None:
    """Kill a trainer of the Ray that this process is in, if it is there, for good."""
    import ray

    with suppress(ConfigError, ray.exceptions.RayError):
        ray.kill(joining.trainer(named, "node"))


def pulse(trainer: Any, seconds: float) -> State | None:  # Any: see ``Wanted.make``
    """How a trainer is; None if it does not say within ``seconds``.

    Raises:
        KilledError: somebody killed it for good.
        FedloraError: its Ray has ended.
    """
    import ray

    asked = trainer.state.options(concurrency_group=WATCH).remote()
    done, _ = ray.wait([asked], timeout=seconds)
    try:
        return cast(State, ray.get(asked)) if done else None
    except ray.exceptions.ActorDiedError:
        raise KilledError("node: the trainer was killed for good") from None
    except ray.exceptions.RayError as error:
        reason = type(error).__name__
        raise FedloraError(f"node: the trainer's Ray does not answer ({reason})") from None


def _before(state: Path) -> Named | None:
    """What the file said that somebody left here; the file goes."""
    found = None
    with suppress(ConfigError):
        found = read(state)
    state.unlink(missing_ok=True)
    return found


def _serve(state: Path, named: Named, wanted: Wanted) -> None:
    """Make the trainer, say so, look after it until a signal comes, and end it."""
    trainer = wanted.make()
    try:
        process = _started(trainer).process
        write(state, named)
        click.echo(f"trainer {named.name!r} is ready: {state}")
        while True:
            time.sleep(PULSE)
            try:
                found = pulse(trainer, PULSE)
            except KilledError:
                trainer = wanted.make()
                found = _started(trainer)
            if found is not None and found.process != process:
                place = f"{found.process} has its place"
                click.echo(f"trainer: process {process} died, {place}", err=True)
                process = found.process
    finally:
        state.unlink(missing_ok=True)
        end(named)


def _started(trainer: Any) -> State:  # Any: see ``Wanted.make``
    """A trainer's first words.

    Raises:
        FedloraError: it cannot work, or does not start.
    """
    found = pulse(trainer, STARTS)
    if found is None:
        raise FedloraError(f"node: the trainer has not started within {STARTS:g} s")
    if found.trouble:
        raise FedloraError(f"node: the trainer cannot work: {found.trouble}")
    return found
