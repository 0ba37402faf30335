"""A process as Flower starts for each message: the thin client app, and what it came to.

``python -m tests.simulations.proxied IN OUT`` reads pickled messages with their contexts, and
writes for each the reply, or the exception's class and text, and the context.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

HEAVY = {"torch", "transformers", "peft", "opacus"}


def run(work: list[tuple[Message, Context]], patience: float) -> dict[str, Any]:
    from simulations.node import asking, proxy

    asking.PATIENCE = patience
    done: list[Any] = []
    for message, context in work:
        try:
            done.append((proxy.app(message, context), context))
        except Exception as error:
            done.append(((str(type(error)), str(error)), context))
    return {"done": done, "heavy": HEAVY & sys.modules.keys(), "ray": "ray" in sys.modules}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_bytes(pickle.dumps(run(*pickle.loads(source.read_bytes()))))
