"""Filling in the files that start a run on a cluster."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from fedlora.disk import writing
from fedlora.errors import ConfigError, choose
from simulations.recipe import load

KINDS = {"slurm": "slurm.sh", "kuberay": "kuberay.yaml"}


@dataclass(frozen=True)
class Machines:
    """What to ask a cluster for.

    Attributes:
        nodes: on which clients train.
        cpus: of each node.
        gpus: of each node; with any, each worker reserves one.
        memory: of each node, in GB.
        image: that the nodes run, where they are containers.
    """

    nodes: int
    cpus: int
    gpus: int
    memory: int
    image: str


def filled(kind: str, recipe: str, machines: Machines) -> str:
    """The file of a kind, for a recipe on machines.

    Raises:
        ConfigError: no such kind or recipe, or a name that would not be one word in the file.
    """
    text = (resources.files("simulations.cluster") / choose(KINDS, kind, "cluster")).read_text()
    load(recipe)
    for name, word in (("recipe", recipe), ("--image", machines.image)):
        if not re.fullmatch(r"[\w./:@+-]+", word, re.ASCII):
            raise ConfigError(f"{name}: found {word!r}, allowed: letters, digits and ./:@+-_")
    words = {
        "NODES": str(machines.nodes),
        "CPUS": str(machines.cpus),
        "GPUS": str(machines.gpus),
        "EACH": "1",
        "MEMORY": str(machines.memory),
        "RECIPE": shlex.quote(recipe),
        "IMAGE": machines.image,
        "RAY": metadata.version("ray"),
    }
    if not machines.gpus:
        text = text.replace(" --set launch.num_gpus=@EACH@", "")
        text = "".join(line for line in text.splitlines(True) if "@GPUS@" not in line)
    return re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text)


def write(kind: str, path: Path, recipe: str, machines: Machines) -> None:
    """Write the file of a kind.

    Raises:
        ConfigError: see ``filled``, or there is a file, or it cannot be written.
    """
    text = filled(kind, recipe, machines)
    if path.exists():
        raise ConfigError(f"{path}: there is one already; take it away, or name another file")
    with writing(path):
        path.write_text(text, encoding="utf-8")
