"""What is wrong with a deployment, before anything hangs."""

from __future__ import annotations

import importlib.metadata
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedlora.errors import FedloraError, wrong
from simulations.deploy.certificates import (
    days_left,
    issued_by,
    names_of,
    public_of,
    read_certificate,
    read_public,
)
from simulations.deploy.connecting import listens, reach_superlink
from simulations.deploy.control import control
from simulations.deploy.layout import Place
from simulations.doctor import Check

SOON = 14.0  # days in which a certificate ends that is warned of


def check_whole(place: Place) -> list[Check]:
    """What can be seen from anywhere: files, as far as they are here, SuperLink, nodes."""
    found = [_authority(place), *_keys(place)]
    if place.superlink.is_dir():
        found += _server(place)
    reached, connection = connect(place)
    found.append(connection)
    return found + (_nodes(place) if reached else [])


def check_superlink(place: Place) -> list[Check]:
    """What the SuperLink needs before it starts: its files, and its port."""
    deployment = place.deployment
    return [_authority(place), *_server(place), *_keys(place), _free("port", deployment.port)]


def check_node(place: Place, node: int, wait: float = 0.0) -> list[Check]:
    """What a node needs before it starts, on its own machine: files, port, rows, SuperLink.

    ``wait``: seconds for the SuperLink to miss the node, if it died and is started again.
    """
    folder, deployment = place.node(node), place.deployment
    found = [
        _authority(place),
        _checked("key", lambda: _private(folder / "node.key")),
        _free("port", deployment.ports[node], "127.0.0.1"),
    ]
    if deployment.data:
        found.append(_rows(deployment.rows_of(node)))
    reached, connection = connect(place)
    found.append(connection)
    if reached and all(check.state != "fail" for check in found):
        found.append(_checked("registration", lambda: _registration(place, folder, wait)))
    return found


def connect(place: Place) -> tuple[bool, Check]:
    """Whether the SuperLink is reached, and with which version of Flower."""
    here = importlib.metadata.version("flwr")
    try:
        there = reach_superlink(place)
    except FedloraError as error:
        return False, Check("superlink", "fail", str(error))
    if here.split(".")[:2] != there.split(".")[:2]:
        line = (
            f"SuperLink at {place.deployment.plain}: found flwr {there}, allowed: {here}, as here"
        )
        return False, Check("superlink", "fail", line)
    return True, Check("superlink", "ok", f"{place.deployment.plain}, flwr {there}")


def missing_nodes(place: Place) -> list[str]:
    """One line for each node that is not connected.

    Raises:
        FedloraError: the SuperLink cannot be asked.
    """
    with control(place) as asked:
        states = asked.nodes()
    lines = []
    for node in range(place.deployment.nodes):
        state = states.get(read_public(place.public_key(node)))
        if state is None:
            lines.append(
                f"node {node}: found no registration of {place.public_key(node)}, allowed: a "
                "registered key (`fedlora deploy register DIR`)"
            )
        elif state != "online":
            lines.append(f"node {node}: found {state}, allowed: online (node-{node}/start)")
    return lines


def register(place: Place, seconds: float) -> list[int]:
    """Register the keys that are not yet, once the SuperLink answers; returns their nodes.

    Raises:
        FedloraError: it has not answered after so many seconds, or refuses.
    """
    keys = [read_public(place.public_key(node)) for node in range(place.deployment.nodes)]
    ends = time.monotonic() + seconds
    while True:
        try:
            reach_superlink(place)
            break
        except FedloraError:
            if time.monotonic() >= ends:
                raise
        time.sleep(0.2)
    with control(place) as asked:
        known = asked.nodes()
        new = [node for node, key in enumerate(keys) if key not in known]
        for node in new:
            asked.register(keys[node])
    return new


def _checked(name: str, look: Callable[[], Check | str]) -> Check:
    """A check whose errors are what was found."""
    try:
        found = look()
    except FedloraError as error:
        return Check(name, "fail", str(error))
    return found if isinstance(found, Check) else Check(name, "ok", found)


def _authority(place: Place) -> Check:
    return _checked("CA", lambda: _dated("CA", place.authority))


def _server(place: Place) -> Iterator[Check]:
    """The server's certificate: how long, for whom, by whom, and whose key it speaks for."""
    path, host = place.superlink / "server.crt", place.deployment.host
    dated = _checked("certificate", lambda: _dated("certificate", path))
    yield dated
    if not path.is_file() or dated.state == "fail":
        return
    certificate = read_certificate(path)

    def names() -> str:
        held = names_of(certificate)
        if host not in held:
            raise wrong(
                f"{path}: names", ", ".join(held), f"{host!r}, as nodes reach it, among them"
            )
        return ", ".join(held)

    def key() -> str:
        private = path.with_suffix(".key")
        _private(private)
        if read_public(private) != public_of(certificate):
            raise FedloraError(f"{private}: found another key than that of {path.name}")
        return "fits its certificate"

    def issuer() -> str:
        if not issued_by(certificate, read_certificate(place.authority)):
            raise FedloraError(
                f"{path}: found another CA's, allowed: one that {place.authority} signed"
            )
        return "signed by the CA"

    yield _checked("names", names)
    yield _checked("server key", key)
    yield _checked("issuer", issuer)


def _keys(place: Place) -> Iterator[Check]:
    """The public keys that the SuperLink is to know."""

    def keys() -> str:
        found = [read_public(place.public_key(node)) for node in range(place.deployment.nodes)]
        for node, key in enumerate(found):
            if found.index(key) != node:
                first = place.public_key(found.index(key))
                raise wrong(str(place.public_key(node)), f"the key of {first.name}", "its own key")
            own = place.folder / f"node-{node}" / "node.key"
            if own.is_file() and read_public(own) != key:
                raise wrong(str(own), "another key", f"that of {place.public_key(node)}")
        return f"{len(found)} nodes'"

    yield _checked("keys", keys)


def _nodes(place: Place) -> list[Check]:
    try:
        missing = missing_nodes(place)
    except FedloraError as error:
        return [Check("nodes", "fail", str(error))]
    if not missing:
        return [Check("nodes", "ok", f"{place.deployment.nodes} connected")]
    return [Check("nodes", "fail", line) for line in missing]


def _registration(place: Place, folder: Path, wait: float) -> Check:
    """Whether the SuperLink knows the node's key and would let it in.

    Flower's node waits for ever where it is not let in, and says so in its log alone.
    """
    where, key = f"SuperLink at {place.deployment.plain}", read_public(folder / "node.key")
    ends = time.monotonic() + wait
    while True:
        with control(place) as asked:
            state = asked.nodes().get(key)
        if state != "online" or time.monotonic() >= ends:
            break
        time.sleep(1.0)
    if state is None:
        raise FedloraError(
            f"{where}: found the key of {folder / 'node.key'} not registered, allowed: a "
            "registered one (`fedlora deploy register DIR`, there)"
        )
    if state == "online":
        line = f"{where}: counts the node of {folder / 'node.key'} as connected"
        return Check("registration", "fail" if wait else "warn", f"{line} after {wait:g} s")
    return Check("registration", "ok", state)


def _dated(name: str, path: Path) -> Check:
    """How long a certificate holds."""
    certificate = read_certificate(path)
    left, ends = days_left(certificate), certificate.not_valid_after_utc
    until = f"{ends:%Y-%m-%d}"
    if left <= 0:
        return Check(
            name, "fail", f"{path}: found one that expired on {until}, allowed: a valid one"
        )
    if left <= SOON:
        return Check(name, "warn", f"{path}: expires on {until}, in {left:.0f} days")
    return Check(name, "ok", f"holds until {until}")


def _private(path: Path) -> str:
    """That a private key is one, and nobody else's to read."""
    read_public(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise wrong(str(path), f"mode {mode:04o}", "0600, readable by its owner alone")
    return "readable by its owner alone"


def _free(name: str, port: int, host: str = "") -> Check:
    """That nobody else listens where a program of this machine is to."""
    if listens(host, port):
        return Check(name, "fail", f"port {port} of this machine: found taken, allowed: a free one")
    return Check(name, "ok", f"{port} is free")


def _rows(path: str) -> Check:
    """That a node's own rows are there."""
    if not os.path.exists(path):
        return Check("data", "fail", f"{path}: found nothing, allowed: this node's rows (--data)")
    if not os.access(path, os.R_OK):
        return Check("data", "fail", f"{path}: cannot be read by this user (--data)")
    if os.path.isfile(path) and not os.path.getsize(path):
        return Check("data", "fail", f"{path}: found an empty file, allowed: this node's rows")
    return Check("data", "ok", path)
