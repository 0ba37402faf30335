"""A client app for chaos: numbers instead of training, and the faults that a message asks for."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import cast

import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.records import arrays_in, configs_in
from fedlora.seeds import numpy_generator

APP = "simulations.chaos_clients:app"
SHAPES = {"m.q.lora_A.weight": (4, 16), "m.q.lora_B.weight": (16, 4), "m.head.bias": (3,)}
FIRST_TRIES = 0.1  # the share of first tries that fail where they do

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The arrays plus random numbers of this client, round and number of earlier rounds.

    Entries of the message's configuration, all optional: ``run`` (a name: another one forgets
    earlier rounds), ``seconds`` (of work), ``jitter`` (up to so many more, unseeded), ``dies``,
    ``sleeps`` and ``spoils`` (clients that kill their worker each time, never end, or send no
    numbers), ``fails`` (a folder: a tenth of the clients kill their worker the first time, and
    leave their mark there).
    """
    ask = configs_in(message.content)["config"]
    client = int(cast(int, context.node_config["partition-id"]))
    server_round = int(cast(int, ask["server-round"]))
    time.sleep(float(cast(float, ask.get("seconds", 0.0))))
    time.sleep(random.SystemRandom().random() * float(cast(float, ask.get("jitter", 0.0))))
    if client in cast(list[int], ask.get("sleeps", [])):
        time.sleep(1e6)
    if client in cast(list[int], ask.get("dies", [])) or _fails(ask, client, server_round):
        os.kill(os.getpid(), signal.SIGKILL)
    done = _count(context, str(ask.get("run", "")))
    rng = numpy_generator(0, "chaos", client, "round", server_round, "after", done)
    given = arrays_in(message.content)["arrays"]
    trained = {
        key: Array((array.numpy() + rng.standard_normal(array.shape)).astype(numpy.float32))
        for key, array in given.items()
    }
    if client in cast(list[int], ask.get("spoils", [])):
        trained = {key: Array(numpy.full_like(a.numpy(), numpy.nan)) for key, a in given.items()}
    content = RecordDict(
        {
            "arrays": ArrayRecord(trained),
            "metrics": MetricRecord({"num-examples": client + 1, "process": os.getpid()}),
            "reply": ConfigRecord({"client": client, "round": server_round}),
        }
    )
    return Message(content, reply_to=message)


def _fails(ask: ConfigRecord, client: int, server_round: int) -> bool:
    """Whether this is a first try that must fail; it is noted down."""
    folder = ask.get("fails")
    if not isinstance(folder, str):
        return False
    mark = Path(folder) / f"{server_round}-{client}"
    drawn = float(numpy_generator(0, "fails", client, "round", server_round).random())
    if drawn >= FIRST_TRIES or mark.exists():
        return False
    mark.touch()
    return True


def _count(context: Context, run: str) -> int:
    """How many rounds this client has done in this run, from its state, where they are counted."""
    state = context.state.get("chaos")
    known = isinstance(state, ConfigRecord) and state["run"] == run
    done = int(cast(int, cast(ConfigRecord, state)["done"])) if known else 0
    context.state["chaos"] = ConfigRecord({"run": run, "done": done + 1})
    return done


def first_arrays() -> ArrayRecord:
    """What a run starts from."""
    return ArrayRecord({key: Array(numpy.zeros(s, numpy.float32)) for key, s in SHAPES.items()})
