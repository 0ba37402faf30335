"""Reaching a SuperLink, and saying in one line why it cannot be reached."""

from __future__ import annotations

import http.client
import json
import socket
import ssl

from fedlora.errors import FedloraError
from simulations.deploy.certificates import names_of, read_certificate
from simulations.deploy.layout import Place

SECONDS = 3.0  # to be connected
ANSWERS = 6.0  # seconds for a step after that: a SuperLink may have much to do
OTHER_NAME = {62, 64}  # OpenSSL's codes: host name mismatch, IP address mismatch
EXPIRED = {10}
TITLE = "SuperLink API"


class UnreachableError(FedloraError):
    """A SuperLink that does not answer as this deployment's does."""


def reach_superlink(place: Place) -> str:
    """The version of Flower that the SuperLink runs, once everything on the way is right.

    Raises:
        UnreachableError: it is not; says what, where, what was found and what is allowed.
    """
    deployment = place.deployment
    where = f"SuperLink at {deployment.plain}"
    context = trust(place)
    try:
        with (
            socket.create_connection((deployment.host, deployment.port), SECONDS) as plain,
            _patient(plain, context, deployment.host) as secure,
        ):
            return _version(secure, deployment.host, where)
    except socket.gaierror:
        raise UnreachableError(f"{where}: found no machine of that name (--hosts)") from None
    except ConnectionRefusedError:
        raise UnreachableError(
            f"{where}: found nothing that listens, allowed: a running SuperLink (superlink/start)"
        ) from None
    except ssl.SSLCertVerificationError as error:
        raise UnreachableError(f"{where}: {_refused(place, error)}") from None
    except (ssl.SSLError, ConnectionError):
        raise UnreachableError(f"{where}: {_without_tls(place)}") from None
    except TimeoutError:
        raise UnreachableError(
            f"{where}: found no answer within {ANSWERS:g} s, allowed: a SuperLink on a port that "
            "firewalls pass"
        ) from None
    except OSError as error:
        raise UnreachableError(f"{where}: cannot be reached ({error.strerror})") from None


def trust(place: Place) -> ssl.SSLContext:
    """What trusts the deployment's own authority and nobody else.

    Raises:
        ConfigError: there is no certificate.
    """
    read_certificate(place.authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=place.authority)
    return context


def listens(host: str, port: int) -> bool:
    """Whether something on this machine has a port already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def is_here(host: str) -> bool:
    """Whether a name or address is this machine's."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def _patient(plain: socket.socket, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    """TLS over a connection."""
    plain.settimeout(ANSWERS)
    return context.wrap_socket(plain, server_hostname=host)


def _version(secure: ssl.SSLSocket, host: str, where: str) -> str:
    """What the SuperLink says of itself."""
    asked = http.client.HTTPConnection(host, timeout=ANSWERS)
    asked.sock = secure
    try:
        asked.request("GET", "/openapi.json")
        told = json.loads(asked.getresponse().read())["info"]
    except (http.client.HTTPException, ValueError, KeyError, TypeError):
        told = {}
    if told.get("title") != TITLE:
        raise UnreachableError(f"{where}: found another program, allowed: Flower's SuperLink")
    return str(told["version"])


def _refused(place: Place, error: ssl.SSLCertVerificationError) -> str:
    """Why a server's certificate was not taken."""
    ours = f"one that {place.authority} has signed"
    if error.verify_code in OTHER_NAME:
        path = place.folder / "superlink" / "server.crt"
        names = f" for {', '.join(names_of(read_certificate(path)))}" if path.is_file() else ""
        return (
            f"found a certificate{names}, allowed: one for {place.deployment.host!r}, as it "
            "is reached"
        )
    if error.verify_code in EXPIRED:
        return f"found a certificate that has expired, allowed: {ours} and that holds today"
    return f"found a certificate of another CA ({error.verify_message}), allowed: {ours}"


def _without_tls(place: Place) -> str:
    """What answers where TLS does not: HTTP in the clear, or something else."""
    deployment = place.deployment
    try:
        with socket.create_connection((deployment.host, deployment.port), SECONDS) as plain:
            plain.settimeout(ANSWERS)
            plain.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            plaintext = plain.recv(5) == b"HTTP/"
    except OSError:
        plaintext = False
    found = "plaintext, without TLS" if plaintext else "something that speaks no TLS"
    return f"found {found}, allowed: TLS with a certificate of {place.authority}"
