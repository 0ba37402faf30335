"""What chaos does and how much of it: the lines of its table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: what was done.
        injected: how often.
        survived: how often everything went on as it should.
        seen: what was seen, in words and figures.
    """

    name: str
    injected: int
    survived: int
    seen: str

    @property
    def held(self) -> bool:
        """Whether it was survived each time, and tried at all."""
        return self.survived == self.injected > 0


@dataclass(frozen=True)
class Size:
    """How much chaos.

    Attributes:
        clients, rounds, workers: where workers are killed, one each round.
        pools: numbers of workers that must not matter.
        order_rounds: of each of those runs.
        methods: rules that hostile uploads go to; none is all of them.
        payloads: into the decoder.
        points: fault points of runs that are killed or find no room; none is all of them.
        kill_rounds: of runs that are killed at each point in each round.
        signals: at random times.
        disk_rounds: of runs whose disk gives out at each point of the last round.
        soak: minutes of rounds with a fault every few seconds.
    """

    clients: int = 20
    rounds: int = 50
    workers: int = 2
    pools: tuple[int, ...] = (1, 2, 4)
    order_rounds: int = 5
    methods: tuple[str, ...] = ()
    payloads: int = 100_000
    points: tuple[str, ...] = ()
    kill_rounds: int = 5
    signals: int = 20
    disk_rounds: int = 2
    soak: float = 30.0


QUICK = Size(
    clients=6,
    rounds=3,
    pools=(1, 2),
    order_rounds=2,
    methods=("fedavg", "rolora"),
    payloads=2000,
    points=("mid-step", "merge", "data-mid-write", "manifest-before-rename"),
    kill_rounds=1,
    signals=2,
    disk_rounds=1,
    soak=0.5,
)
