"""What `fedlora deploy init` writes."""

from __future__ import annotations

import stat
import subprocess
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from simulations.cli import main
from simulations.deploy.certificates import issued_by, names_of, public_of, read_certificate
from simulations.deploy.certificates import read_public as public
from simulations.deploy.layout import find
from tests.simulations.deployed import deployment


def test_certificates_are_for_the_names_that_nodes_use(tmp_path: Path) -> None:
    hosts = "--hosts=lab.example.org,a.example.org,a.example.org"
    assert main(["deploy", "init", str(tmp_path / "lab"), "--nodes=2", hosts, "--days=40"]) == 0
    place = find(tmp_path / "lab")
    server, authority = (
        read_certificate(path) for path in (place.superlink / "server.crt", place.authority)
    )
    assert set(names_of(server)) == {"lab.example.org", "localhost", "127.0.0.1", "::1"}
    assert issued_by(server, authority)
    assert public_of(server) == public(place.superlink / "server.key")
    span = server.not_valid_after_utc - server.not_valid_before_utc
    assert span == timedelta(days=41)  # one for clocks that differ
    assert place.deployment.hosts == ("a.example.org", "a.example.org")


def test_keys_are_what_flower_reads(tmp_path: Path) -> None:
    place = deployment(tmp_path / "lab")
    seen = set()
    for node in range(2):
        folder = place.node(node)
        private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
        shared = load_ssh_public_key((place.folder / "nodes" / f"{node}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        assert private.public_key() == shared
        assert (place.superlink / "nodes" / f"{node}.pub").read_bytes() == (
            folder / "node.pub"
        ).read_bytes()
        seen.add(public(folder / "node.key"))
    assert len(seen) == 2


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    place = deployment(tmp_path / "lab")
    keys = list(place.folder.rglob("*.key"))
    assert len(keys) == 4  # the CA's, the server's, two nodes'
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    outside = [place.superlink, place.node(0), place.node(1)]
    assert not [path for part in outside for path in part.rglob("ca.key")]


def test_scripts_are_sound_and_offline(tmp_path: Path) -> None:
    place = deployment(tmp_path / "lab", data="/srv/rows/{node}.csv")
    starts = sorted(place.folder.rglob("start"))
    assert len(starts) == 3
    for start in starts:
        assert subprocess.run(["sh", "-n", str(start)]).returncode == 0
        assert start.stat().st_mode & 0o111
        environment = (start.parent / "environment").read_text()
        for setting in (
            "FLWR_TELEMETRY_ENABLED=0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
            "FLWR_HOME=$here/flower",
        ):
            assert setting in environment
        assert (
            f"ExecStart=/opt/fedlora/{start.parent.name}/start"
            in (start.parent / f"fedlora-{start.parent.name}.service").read_text()
        )
    superlink, second = (
        (place.superlink / "start").read_text(),
        (place.node(1) / "start").read_text(),
    )
    for option in (
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        f"--host 127.0.0.1 --port {place.deployment.port}",
    ):
        assert option in superlink
    for word in ("partition-id=1", "num-partitions=2", "data='/srv/rows/1.csv'", "/ledger'"):
        assert word in second
    assert "trainer" not in second


TRAINER = """#!/bin/sh
[ "$1" = node ] || exit 0
trap 'echo ended >> trainer.log; exit 0' TERM
[ -n "$LAZY" ] && exit 2
echo "$@" > trainer.log
echo {} > "$3"
while :; do sleep 0.1; done
"""
SUPERNODE = """#!/bin/sh
for word in "$@"; do echo "$word"; done > supernode.log
exit 3
"""


@pytest.mark.parametrize("lazy", ["", "yes"], ids=["ready", "cannot start"])
def test_a_trainer_stands_beside_its_node(tmp_path: Path, lazy: str) -> None:
    """It starts first and ends with its node; a node without it does not start."""
    assert main(["deploy", "init", str(tmp_path / "lab"), "--nodes=1", "--trainer"]) == 0
    part, programs = tmp_path / "lab" / "node-0", tmp_path / "programs"
    programs.mkdir()
    for name, text in (("fedlora", TRAINER), ("flower-supernode", SUPERNODE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (part / "environment").write_text(f"PATH={programs}:$PATH\nLAZY={lazy}\nexport PATH LAZY\n")
    (part / "trainer.json").write_text("of a trainer that was killed")
    assert subprocess.run([part / "start"]).returncode == (1 if lazy else 3)
    assert (part / "supernode.log").exists() == (not lazy)
    if not lazy:
        config = (part / "supernode.log").read_text().splitlines()[-1]
        assert f"trainer='{part}/trainer.json'" in config
        started, ended = (part / "trainer.log").read_text().splitlines()
        assert started == f"node --state {part}/trainer.json --name node-0"
        assert ended == "ended"


def test_scripts_refuse_plaintext_at_once(tmp_path: Path) -> None:
    place = deployment(tmp_path / "lab")
    for part in (place.superlink, place.node(0)):
        for option in ("--insecure", "--insec"):
            done = subprocess.run([part / "start", option], capture_output=True, text=True)
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert f"found {option}, allowed: TLS alone" in line


def test_flower_itself_knows_the_superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.cli.flower_config import read_superlink_connection

    place = deployment(tmp_path / "lab")
    monkeypatch.setenv("FLWR_HOME", str(place.folder / "flower"))
    connection = read_superlink_connection(None)
    assert connection.address == place.deployment.address
    assert connection.root_certificates == str(place.authority)
    assert not connection.insecure


def test_addresses_of_ip_version_6_are_in_brackets(tmp_path: Path) -> None:
    assert main(["deploy", "init", str(tmp_path / "lab"), "--nodes=1", "--hosts=fd00::7"]) == 0
    place = find(tmp_path / "lab")
    assert place.deployment.address == "[fd00::7]:9092"
    assert "fd00::7" in names_of(read_certificate(place.superlink / "server.crt"))
    assert "--host :: " in (place.superlink / "start").read_text()


def test_the_description_survives_reading_and_writing(tmp_path: Path) -> None:
    place = deployment(tmp_path / "lab", data="/srv/{node}")
    again = find(place.folder)
    assert again == place
    part = find(place.node(1))
    assert part.deployment.part == "node-1"
    assert part.node(1) == part.folder
    table = tomllib.loads((place.folder / "deployment.toml").read_text())
    assert table["data"] == "/srv/{node}"


def test_a_deployment_is_never_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = deployment(tmp_path / "lab")
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    assert main(["deploy", "init", str(place.folder), "--nodes=2"]) == 2
    assert "never written over" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in place.folder.rglob("*") if p.is_file()}
    assert not [path for path in tmp_path.iterdir() if path != place.folder]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--nodes=0"], "--nodes: found 0, allowed: 1 to 1000"),
        (["--nodes=2", "--port=0"], "--port: found 0, allowed: 1 to 65533"),
        (["--nodes=2", "--port=65534"], "--port: found 65534, allowed: 1 to 65533"),
        (["--nodes=2", "--days=0"], "--days: found 0, allowed: at least 1"),
        (["--nodes=2", "--hosts=a,b"], "--hosts: found '2 hosts', allowed: the SuperLink's alone"),
        (["--nodes=1", "--hosts=a b"], "--hosts: found 'a b', allowed: names of machines"),
        (["--nodes=1", "--hosts=a:1"], "--hosts: found 'a:1', allowed: names of machines"),
        (["--nodes=1", "--hosts=10.0.0.300"], "--hosts: found '10.0.0.300', allowed: names of"),
        (["--nodes=1", "--hosts="], "--hosts: found '', allowed: names of machines"),
        (["--nodes=1", "--data=rows.csv"], "--data: found 'rows.csv', allowed: an absolute path"),
        (["--nodes=1", "--data=/a'b"], "allowed: an absolute path on the nodes, without quotes"),
        (
            ["--nodes=2", "--data=/rows.csv"],
            "--data: found '/rows.csv', allowed: a path with {node}",
        ),
    ],
)
def test_what_cannot_be_deployed_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert main(["deploy", "init", str(tmp_path / "lab"), *options]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
