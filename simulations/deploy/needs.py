"""Whether what a recipe needs is on this machine: data, and the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora.errors import FedloraError
from fedlora.models import fingerprint, load_model
from fedlora.tasks import load_task
from fedlora.tasks.task import Task
from simulations.deploy.layout import Place
from simulations.deploy.submitting import check_number
from simulations.doctor import Check
from simulations.recipe import load


def check_needs(
    recipe: str, settings: Sequence[str], place: Place, node: int | None
) -> list[Check]:
    """The recipe's data and model, both loaded; a node with rows of its own needs only the model.

    Raises:
        ConfigError: the recipe itself is wrong, or for another number of nodes.
    """
    config = load(recipe).resolve(None, settings)
    check_number(config, place)
    known: list[Task] = []

    def data() -> str:
        known.append(load_task(config.task))
        return f"{config.task.name}, {len(known[0].train)} training examples"

    def model() -> str:
        if known:
            base = load_model(config.model, len(known[0].label_names), known[0].objective)
        else:
            base = load_model(config.model, 2, "classify")
        return f"{config.model.name}, fingerprint {fingerprint(base.module)}"

    looks: dict[str, Callable[[], str]] = {"task": data, "model": model}
    if node is not None and place.deployment.data:
        del looks["task"]
    found = []
    for name, look in looks.items():
        try:
            found.append(Check(name, "ok", look()))
        except FedloraError as error:
            found.append(Check(name, "fail", str(error)))
    return found
