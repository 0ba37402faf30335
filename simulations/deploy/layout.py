"""What a deployment is, and where its files lie."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from fedlora.errors import ConfigError, wrong
from simulations.deploy.certificates import address_of

FILE = "deployment.toml"
DATA = "{node}"  # in a path of rows: the number of the node


@dataclass(frozen=True)
class Deployment:
    """The machines of a deployment.

    Attributes:
        host: name or IP address by which nodes reach the SuperLink.
        port: of the SuperLink.
        ports: of each node's own app processes, which only they use.
        hosts: of the nodes, for the README; empty where they were not named.
        data: path of a node's own rows, with ``{node}`` for its number; empty deals out a task's.
        trainer: whether a resident trainer stands beside each node.
        part: what a folder holds: the ``whole``, ``superlink``, or ``node-K`` alone.
    """

    host: str
    port: int
    ports: tuple[int, ...]
    hosts: tuple[str, ...] = ()
    data: str = ""
    trainer: bool = False
    part: str = "whole"

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len(self.ports)

    @property
    def address(self) -> str:
        """Host and port as URLs have them."""
        found = address_of(self.host)
        return f"[{self.host}]:{self.port}" if found and found.version == 6 else self.plain

    @property
    def plain(self) -> str:
        """Host and port as people write them."""
        return f"{self.host}:{self.port}"

    def rows_of(self, node: int) -> str:
        """The path of a node's own rows on its machine, or nothing."""
        return self.data.replace(DATA, str(node))

    def to_toml(self) -> str:
        """As ``deployment.toml`` holds it."""
        return tomli_w.dumps(asdict(self))


@dataclass(frozen=True)
class Place:
    """A deployment's folder, or the part of it that was copied to a machine."""

    folder: Path
    deployment: Deployment

    @property
    def authority(self) -> Path:
        """The certificate by which the SuperLink is known."""
        return self.folder / "ca.crt"

    @property
    def superlink(self) -> Path:
        """The folder of what the SuperLink's machine needs.

        Raises:
            ConfigError: this is a part without it.
        """
        return self._part("superlink")

    def node(self, number: int) -> Path:
        """The folder of what a node's machine needs.

        Raises:
            ConfigError: there is no such node, or this is another part.
        """
        if not 0 <= number < self.deployment.nodes:
            raise wrong("--node", number, f"0 to {self.deployment.nodes - 1}, the nodes there are")
        return self._part(f"node-{number}")

    def public_key(self, number: int) -> Path:
        """Where a node's public key lies; the SuperLink's part has those of all too."""
        if self.deployment.part.startswith("node-"):
            return self.node(number) / "node.pub"
        return self.folder / "nodes" / f"{number}.pub"

    def _part(self, name: str) -> Path:
        """The folder of one part."""
        if self.deployment.part == "whole":
            return self.folder / name
        if self.deployment.part != name:
            raise ConfigError(
                f"{self.folder}: found the part {self.deployment.part!r} of a deployment, "
                f"allowed: {name!r}, or the whole"
            )
        return self.folder


def find(folder: Path) -> Place:
    """The deployment in a folder.

    Raises:
        ConfigError: there is none, or its description is broken.
    """
    path = folder / FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        table |= {name: tuple(table[name]) for name in ("ports", "hosts")}
        return Place(folder.resolve(), Deployment(**table))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder}: found no deployment (no {FILE}); `fedlora deploy init` makes one"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read as a deployment: {error}") from None
