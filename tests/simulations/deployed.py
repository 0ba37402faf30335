"""A stand-in for a SuperLink, and ports that nobody has."""

from __future__ import annotations

import json
import random
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo

from simulations.deploy.creating import create, plan
from simulations.deploy.layout import Place


def free_port(following: int) -> int:
    """A port of this machine that is free, as are so many after it."""
    while True:
        first = random.randrange(20_000, 32_000)
        if all(_free(first + more) for more in range(following + 1)):
            return first


def deployment(folder: Path, nodes: int = 2, data: str = "", days: int = 30) -> Place:
    """A new deployment on this machine, on free ports."""
    return create(folder, plan(nodes, [], free_port(nodes), data, trainer=False), days)


@contextmanager
def stand_in(
    place: Place, states: Mapping[bytes, str] | None = None, tls: bool = True, version: str = ""
) -> Iterator[None]:
    """Something that answers at the deployment's address as a SuperLink that knows these keys."""
    from importlib import metadata

    info = {"title": "SuperLink API", "version": version or metadata.version("flwr")}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(json.dumps({"info": info}).encode(), "application/json")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            known = (states or {}).items()
            nodes = [NodeInfo(public_key=key, status=state) for key, state in known]
            listed = ListNodesResponse(nodes_info=nodes)
            self.answer(listed.SerializeToString(), "application/x-protobuf")

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # who is refused hangs up

    server = Quiet((place.deployment.host, place.deployment.port), Answers)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = (place.superlink / "server.crt", place.superlink / "server.key")
        context.load_cert_chain(*files)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
