"""What `fedlora deploy check` finds, one thing wrong at a time."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from pathlib import Path

import pytest

from simulations.cli import main
from simulations.deploy import connecting
from simulations.deploy.certificates import issue, read_public
from simulations.deploy.connecting import is_here
from simulations.deploy.layout import Place, find
from tests.simulations.deployed import deployment, stand_in


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return deployment(tmp_path / "lab", data=str(tmp_path / "rows-{node}.csv"))


def known(place: Place, state: str = "online") -> dict[bytes, str]:
    return {read_public(place.public_key(node)): state for node in range(2)}


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and the lines that say what is wrong."""
    code = main(["deploy", "check", *arguments, "--json"])
    checks = json.loads(capsys.readouterr().out)
    return code, [check["detail"] for check in checks if check["state"] == "fail"]


def test_all_is_well(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(place, known(place)):
        assert found(capsys, str(place.folder)) == (0, [])
    assert found(capsys, str(place.superlink), "--superlink") == (0, [])
    Path(place.deployment.rows_of(1)).write_text("text,label\n")
    with stand_in(place, known(place, "registered")):
        assert found(capsys, str(place.node(1)), "--node=1") == (0, [])
        assert main(["deploy", "check", str(place.node(1)), "--node=1", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_no_superlink(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,) = found(capsys, str(place.folder))
    assert code == 1
    assert line == (
        f"SuperLink at 127.0.0.1:{place.deployment.port}: found nothing that listens, allowed: "
        "a running SuperLink (superlink/start)"
    )


def test_plaintext(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(place, tls=False):
        code, (line,) = found(capsys, str(place.folder))
    assert code == 1
    assert "found plaintext, without TLS, allowed: TLS with a certificate of" in line


def test_something_else_on_the_port(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "ANSWERS", 0.5)
    with socket.create_server(("127.0.0.1", place.deployment.port)):
        code, (line,) = found(capsys, str(place.folder))  # it never answers
        assert "found no answer within 0.5 s" in line
        code, (line,) = found(capsys, str(place.superlink), "--superlink")
    assert code == 1
    assert line == f"port {place.deployment.port} of this machine: found taken, allowed: a free one"


def test_another_authority(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, _ = issue(["127.0.0.1"], 30)
    with stand_in(place, known(place)):
        (place.node(0) / "ca.crt").write_bytes(other.public)
        Path(place.deployment.rows_of(0)).write_text("text,label\n")
        code, (line,) = found(capsys, str(place.node(0)), "--node=0")
    assert code == 1
    assert "found a certificate of another CA" in line
    assert str(place.node(0) / "ca.crt") in line


def test_a_certificate_for_another_name(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Reached by a name that its certificate does not hold."""
    path = place.folder / "deployment.toml"
    path.write_text(path.read_text().replace('host = "127.0.0.1"', 'host = "127.0.0.2"'))
    moved = find(place.folder)
    with stand_in(moved, known(place)):
        code, lines = found(capsys, str(place.folder))
    assert code == 1
    offered, reached = lines
    assert "found 'localhost" not in reached
    assert "allowed: '127.0.0.2', as nodes reach it, among them" in offered
    assert "allowed: one for '127.0.0.2', as it is reached" in reached


def reissued(place: Place, days: int) -> None:
    """Another CA and server, for so many days."""
    authority, server = issue(["127.0.0.1"], days)
    place.authority.write_bytes(authority.public)
    (place.superlink / "server.crt").write_bytes(server.public)
    (place.superlink / "server.key").write_bytes(server.private)


def test_certificates_that_have_expired(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    reissued(place, -1)
    with stand_in(place, known(place)):
        code, lines = found(capsys, str(place.folder))
    assert code == 1
    authority, server, reached = lines
    assert str(place.authority) in authority
    assert "expired on" in server
    assert "found a certificate that has expired" in reached


def test_certificates_that_end_soon(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    reissued(place, 3)
    with stand_in(place, known(place)):
        assert main(["deploy", "check", str(place.folder)]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line[:4] == "warn"]
    assert len(warned) == 2
    assert all("in 3 days" in line for line in warned)


def test_keys_that_do_not_fit(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(place.folder / "ca.key", place.superlink / "server.key")
    shutil.copy(place.node(0) / "node.key", place.node(1) / "node.key")
    code, (key, node) = found(capsys, str(place.folder), "--superlink")
    assert code == 1
    assert "found another key than that of server.crt" in key
    assert f"{place.node(1) / 'node.key'}: found 'another key'" in node


def test_a_certificate_that_another_authority_signed(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.authority.write_bytes(issue(["127.0.0.1"], 30)[0].public)
    code, (line,) = found(capsys, str(place.folder), "--superlink")
    assert code == 1
    assert "found another CA's" in line


def test_two_nodes_with_one_key(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(place.public_key(0), place.public_key(1))
    code, (line,) = found(capsys, str(place.folder), "--superlink")
    assert code == 1
    assert line.endswith("1.pub: found 'the key of 0.pub', allowed: its own key")


def test_a_key_that_others_may_read(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.superlink / "server.key").chmod(0o644)
    code, (line,) = found(capsys, str(place.folder), "--superlink")
    assert code == 1
    assert "found 'mode 0644', allowed: 0600" in line


def test_an_unregistered_key(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    Path(place.deployment.rows_of(1)).write_text("text,label\n")
    states = {read_public(place.public_key(0)): "online"}
    with stand_in(place, states):
        code, (line,) = found(capsys, str(place.node(1)), "--node=1")
        assert code == 1
        assert f"found the key of {place.node(1) / 'node.key'} not registered" in line
        code, (line,) = found(capsys, str(place.folder))
    assert code == 1
    assert line.startswith("node 1: found no registration of")


def test_a_node_that_the_superlink_has_not_missed_yet(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second one with its key would wait for ever; after a crash, the first is soon missed."""
    Path(place.deployment.rows_of(1)).write_text("text,label\n")
    states, node = known(place), [str(place.node(1)), "--node=1"]
    with stand_in(place, states):
        assert found(capsys, *node) == (0, [])
        code, (line,) = found(capsys, *node, "--wait=0.1")
        assert code == 1
        assert "counts the node of" in line
        key = read_public(place.public_key(1))
        threading.Timer(0.5, states.update, [{key: "offline"}]).start()
        assert found(capsys, *node, "--wait=60") == (0, [])


def test_nodes_that_are_away(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(place, known(place, "offline")):
        code, lines = found(capsys, str(place.folder))
    assert code == 1
    assert lines == [
        f"node {node}: found offline, allowed: online (node-{node}/start)" for node in range(2)
    ]


def test_another_version_of_flower(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(place, known(place), version="1.12.0"):
        code, (line,) = found(capsys, str(place.folder))
    assert code == 1
    assert "found flwr 1.12.0, allowed:" in line


def test_rows_that_are_not_there(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Path(place.deployment.rows_of(0))
    with stand_in(place, known(place)):
        code, (line,) = found(capsys, str(place.node(0)), "--node=0")
        assert (code, line) == (1, f"{rows}: found nothing, allowed: this node's rows (--data)")
        rows.touch()
        code, (line,) = found(capsys, str(place.node(0)), "--node=0")
    assert (code, line) == (1, f"{rows}: found an empty file, allowed: this node's rows")


def test_a_nodes_port_that_is_taken(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    Path(place.deployment.rows_of(0)).write_text("text,label\n")
    taken = place.deployment.ports[0]
    with stand_in(place, known(place)), socket.create_server(("127.0.0.1", taken)):
        code, (line,) = found(capsys, str(place.node(0)), "--node=0")
    assert (code, line) == (1, f"port {taken} of this machine: found taken, allowed: a free one")


def test_quiet_says_what_is_wrong_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.superlink / "server.key").chmod(0o644)
    assert main(["deploy", "check", str(place.superlink), "--superlink", "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("fedlora: ")


def test_data_and_models_that_a_recipe_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = deployment(tmp_path / "other")
    needs = [str(place.folder), "--superlink", "--recipe=tiny", "--set=clients.number=2"]
    assert found(capsys, *needs) == (0, [])
    code, (line,) = found(capsys, *needs, "--set=model.name=no/where")
    assert code == 1
    assert "model.name: cannot load 'no/where'" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["deploy", "check", "{}/nothing"], "found no deployment (no deployment.toml)"),
        (["deploy", "check", "{}/lab", "--node=2"], "--node: found 2, allowed: 0 to 1"),
        (["deploy", "check", "{}/lab/node-1", "--node=0"], "found the part 'node-1' of a"),
        (["deploy", "check", "{}/lab", "--node=0", "--superlink"], "found --superlink beside it"),
        (["deploy", "check", "{}/lab", "--set", "a=1"], "--set: found no --recipe"),
        (["deploy", "chekc"], "did you mean 'check'?"),
        (["deploy", "run", "{}/lab", "tiny"], "clients.number: found 4, allowed: 2, the nodes"),
        (["deploy", "run", "{}/lab", "tiny", "--wait=-1"], "--wait: found -1.0, allowed: 0 to"),
        (
            ["deploy", "run", "{}/lab", "tiny", "--set", "clients.number=2"],
            "found nothing that listens",
        ),
        (["deploy", "register", "{}/lab", "--wait=0"], "found nothing that listens"),
    ],
)
def test_bad_input_is_one_line(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["port = ", "ports = 3\nhosts = []", "ports = []\nhosts = []"])
def test_a_broken_description_is_named(
    place: Place, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (place.folder / "deployment.toml").write_text(text)
    assert main(["deploy", "check", str(place.folder)]) == 2
    assert "deployment.toml: cannot be read as a deployment" in capsys.readouterr().err


def test_this_machine_is_known_by_its_addresses() -> None:
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert not is_here("192.0.2.1")  # of the range for documents
    assert not is_here("no-such-host.invalid")
