"""Rounds under Flower's deployment: with the trainer that stays, without it, and of an echo."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.errors import FedloraError
from simulations.bench_measured import row
from simulations.bench_pairs import Row, Tell
from simulations.node.loopback import loopback
from simulations.node.proxy import app as proxy

NODES = 2
SIDES = ("echo", "trainer", "alone")
CHANGES = (f"clients.number={NODES}", "clients.split=iid")
RECIPES = {"minilm": "quickstart", "tiny": "tiny"}  # by model, of which all else stays
OVER_ECHO = 1.5  # allowed: of an echo's round
PATIENCE = 600.0  # seconds for a round


class Sides(ClientApp):
    """Does as a message asks: ``echo``, or train by the ``trainer`` or ``alone``."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply."""
        ask = cast(ConfigRecord, message.content["config"])
        if ask["side"] == "echo":
            return Message(RecordDict(dict(message.content)), reply_to=message)
        if ask["side"] == "alone":  # on a copy, since Flower keeps the context for the next message
            context = copy.copy(context)
            context.node_config = {**context.node_config}
            del context.node_config["trainer"]
        return proxy(message, context)


client = Sides()
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of each side in turn; their seconds go where the run config says."""
    from clients.resident import resident
    from simulations.recipe import load
    from strategies import FedAvg

    told = json.loads(Path(str(context.run_config["told"])).read_text(encoding="utf-8"))
    config = load(RECIPES[told["model"]]).resolve("fedavg", CHANGES)
    here = resident(config.client())
    ask = ConfigRecord({"fedlora": config.client().model_dump_json(), "base": here.fingerprint})
    strategy = FedAvg(min_available_nodes=NODES, min_train_nodes=NODES)
    arrays, seconds = ArrayRecord(here.first), {side: list[float]() for side in SIDES}
    for number in range(-1, told["pairs"]):  # what comes before the first pair does not count
        for side in SIDES:
            ask["side"] = side
            messages = list(strategy.configure_train(number + 2, arrays, ask, grid))
            started = time.perf_counter()
            replies = list(grid.send_and_receive(messages, timeout=PATIENCE))
            took = time.perf_counter() - started
            wrong = [str(reply.error) for reply in replies if reply.has_error()]
            if wrong or len(replies) != NODES:
                seconds = {"wrong": [f"{side}: {len(replies)} replies {wrong}"]}  # type: ignore
                break
            if number >= 0:
                seconds[side].append(took)
    Path(told["out"]).write_text(json.dumps(seconds), encoding="utf-8")


def deploy(pairs: int, tell: Tell, model: str = "minilm") -> list[Row]:
    """A SuperLink and two SuperNodes with a trainer each: rounds of each side, turn by turn.

    Raises:
        FedloraError: a part of it did not start, or a round went wrong.
    """
    with TemporaryDirectory(prefix="fedlora-") as name, loopback(Path(name)) as here:
        for node in range(NODES):
            tell(f"starting: trainer {node + 1} of {NODES}")
            state = here.trainer(f"trainer-{node}")
            config: dict[str, str | int] = {
                "partition-id": node,
                "num-partitions": NODES,
                "trainer": str(state),
            }
            here.supernode(f"supernode-{node}", config)
        out, told = here.folder / "seconds.json", here.folder / "told.json"
        told.write_text(json.dumps({"model": model, "pairs": pairs, "out": str(out)}))
        tell(f"{model}: {pairs} pairs and one before")
        apps = (f"{__name__}:{app}" for app in ("server", "client"))
        said = here.submit(here.bundle("bench", *apps), [f'told="{told}"'])
        if not out.exists():
            raise FedloraError(f"bench: the run failed: {' '.join(said.split())[-500:]}")
        seconds = json.loads(out.read_text(encoding="utf-8"))
    if "wrong" in seconds:
        raise FedloraError(f"bench: a round went wrong: {seconds['wrong'][0]}")
    echo, trained, alone = (seconds[side] for side in SIDES)
    name = f"{model}, {NODES} nodes: round"
    return [
        row(f"{name} with the trainer, over an echo's", trained, echo, "s", OVER_ECHO),
        row(f"{name} without it, over an echo's", alone, echo, "s"),
        row(f"{name} with the trainer, over one without", trained, alone, "s"),
    ]
