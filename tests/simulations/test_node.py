"""A trainer that stays on its node: what its client app loads, that it is the same, its errors."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from clients.client_app import app as client_app
from fedlora.errors import ConfigError, FedloraError, PrivacyError
from simulations import cli_node
from simulations.cli import main
from simulations.grid import identify
from simulations.node import sources
from simulations.node.named import Named, held, keeper, read, write
from simulations.node.proxy import app as proxy
from simulations.node.trainer import Failure, Trainer
from simulations.parcels import unwrap, wrap
from tests.clients.test_personal import Federation

ROOT = Path(__file__).parent.parent.parent
NAMED = Named("127.0.0.1:1", "fedlora-node", "trainer", "secret")


@pytest.fixture(autouse=True)
def same_identity() -> Iterator[None]:
    """As our own grids take it; and none of Ray's settings stay in this process."""
    identify()
    yield
    identify()
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_NUM_REDIS_GET_RETRIES"} & os.environ.keys()


def told(records: RecordDict) -> dict[str, Any]:
    """All of a content, to be compared bit for bit."""
    return {
        name: {key: (a.dtype, tuple(a.shape), a.data) for key, a in record.items()}
        if isinstance(record, ArrayRecord)
        else dict(record)
        for name, record in records.items()
    }


def same(one: tuple[Message, Context], other: tuple[Message, Context]) -> None:
    for reply in (one[0], other[0]):
        assert not reply.has_error()
    assert told(one[0].content) == told(other[0].content)
    assert told(one[1].state) == told(other[1].state)
    assert one[1].state and one[1].node_config == other[1].node_config


def proxied(
    folder: Path, work: list[tuple[Message, Context]], patience: float = 60.0
) -> dict[str, Any]:
    source, target = folder / "in.pickle", folder / "out.pickle"
    source.write_bytes(pickle.dumps((work, patience)))
    command = [sys.executable, "-m", "tests.simulations.proxied", str(source), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = pickle.loads(target.read_bytes())
    return found


def named_by(context: Context, path: Path, **others: float) -> Context:
    """A context whose node names a trainer."""
    context = copy.deepcopy(context)
    context.node_config = {**context.node_config, "trainer": str(path), **others}
    return context


def test_the_proxy_loads_nothing_heavy() -> None:
    script = (
        "import sys; from simulations.node.proxy import app; small = set(sys.modules)\n"
        "import simulations.node.asking, simulations.node.trainer\n"
        "heavy = {'torch', 'transformers', 'peft', 'opacus', 'ray'}\n"
        "print(sorted(heavy & small), sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[] []", done.stdout + done.stderr


def test_without_a_trainer_it_is_the_client_app_in_this_process(tmp_path: Path) -> None:
    fed = Federation(tmp_path)
    message, context = fed.messages(1, fed.first)[0], fed.context(0)
    expected = copy.deepcopy(context)
    same((proxy(message, context), context), (client_app(message, expected), expected))


def test_a_trainer_gives_what_the_client_app_gives(tmp_path: Path) -> None:
    fed, trainer = Federation(tmp_path), Trainer(1, 0.0)
    message, context = fed.messages(1, fed.first)[1], fed.context(1)
    context.run_config = {"recipe": "tiny"}
    parcel = trainer.answer("a ticket", sources.sums(), wrap((message, context)))
    reply, left = unwrap(parcel)
    assert not context.state and left.run_config == context.run_config
    same((reply, left), (client_app(message, context), context))
    found = trainer.state()
    assert (found.process, found.answered, found.at, found.trouble) == (os.getpid(), 1, "", "")


def test_an_app_may_have_fewer_sources_but_no_others() -> None:
    """Flower's bundle leaves out what no app imports."""
    here = dict(sources.sums())
    assert {"clients/client_app.py", "fedlora/wire.py"} <= here.keys()
    del here["fedlora/auditing.py"]
    sources.check_same(here)
    mended = "0" * 64
    with pytest.raises(
        ConfigError, match=r"source fedlora/wire\.py: found '0{10}', allowed: [0-9a-f]{10}"
    ):
        sources.check_same({**here, "fedlora/wire.py": mended})
    with pytest.raises(ConfigError, match=r"source clients/new\.py: .* allowed: no such file"):
        sources.check_same({**here, "clients/new.py": mended})


def test_errors_are_told_as_flower_tells_them(tmp_path: Path) -> None:
    """By ``str(type(error))`` and ``str(error)``, whatever library the class is from."""
    for error in (PrivacyError("so"), KeyError("x"), pickle.PicklingError("no"), OSError(5, "io")):
        again = Failure.of(error).error()
        assert (str(type(again)), str(again)) == (str(type(error)), str(error))
        assert isinstance(again, FedloraError) == isinstance(error, FedloraError)
    fed = Federation(tmp_path)
    (message, context), trainer = (fed.messages(1, fed.first)[0], fed.context(0)), Trainer(1, 0.0)
    message.content["config"] = ConfigRecord({})
    failure, _ = unwrap(trainer.answer("", sources.sums(), wrap((message, context))))
    with pytest.raises(FedloraError) as here:
        client_app(message, context)
    assert (str(here.type), str(here.value)) == (str(type(failure.error())), str(failure.error()))


def test_other_source_code_is_refused(tmp_path: Path) -> None:
    fed = Federation(tmp_path)
    work = wrap((fed.messages(1, fed.first)[0], fed.context(0)))
    others = {**sources.sums(), "fedlora/wire.py": "0123456789" * 6}
    failure, _ = unwrap(Trainer(1, 0.0).answer("", others, work))
    assert str(failure.error()).startswith(
        "trainer: the app's source fedlora/wire.py: found '0123456789', allowed:"
    )


def test_a_trainer_without_its_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--gpus: found 1.0, allowed: 0" in Trainer(1, 1.0).state().trouble


def test_state_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    fed = Federation(tmp_path)
    message, context = fed.messages(1, fed.first)[0], named_by(fed.context(0), path)

    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            proxy(message, context)
        assert "\n" not in str(error.value) and not context.state
        return str(error.value)

    assert "No such file" in refused()
    for text in (
        "{",
        "[]",
        '{"address": "127.0.0.1:1"}',
        '{"address": "a", "namespace": "n", "name": 1}',
    ):
        path.write_text(text)
        assert f"trainer: found {str(path)!r}, allowed: the file of a running" in refused()
    write(path, NAMED)
    assert (read(path), path.stat().st_mode & 0o777) == (NAMED, 0o600)
    assert [each.name for each in tmp_path.glob("*trainer*")] == [path.name]
    assert "nobody answers at 127.0.0.1:1 (Connection refused)" in refused()
    write(path, Named("nowhere", "n", "t"))
    assert "found 'nowhere', allowed: the host:port" in refused()
    for seconds in (0, -1.0, "soon", True, float("nan")):
        context.node_config["trainer-seconds"] = seconds
        assert f"trainer-seconds: found {seconds!r}, allowed: seconds above 0" in refused()


def test_one_process_keeps_a_trainer(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    assert keeper(path) is None
    with held(path):
        assert keeper(path) == os.getpid()
        with (
            pytest.raises(ConfigError, match=f"whose trainer process {os.getpid()} keeps"),
            held(path),
        ):
            pass
    assert keeper(path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--name", "a b"], "--name: found 'a b', allowed: a name without spaces"),
        (["--cpus", "-1"], "--cpus: found -1.0, allowed: from 0"),
        (["--gpus", "1.5"], "--gpus: found 1.5, allowed: from 0, and above 1 whole"),
        (["--threads", "0"], "--threads: found 0, allowed: a whole number from 1"),
        (["--stop"], "No such file"),
        (["--status"], "No such file"),
        (["--stop", "--status"], "found --stop and --status, allowed: one of them"),
        (["--address", "127.0.0.1:1"], "--address: nobody answers at 127.0.0.1:1"),
        (["--state", "missing/folder/file"], "allowed: a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["node", "--state", str(tmp_path / "trainer.json"), *arguments]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_commands_of_the_readme_parse() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("& ") for line in text.splitlines() if line.startswith("fedlora node")]
    assert len(lines) == 3
    for line in lines:
        context = cli_node.node.make_context("node", shlex.split(line)[2:])
        assert context.params["state"] == Path("/srv/fedlora/trainer.json")


def test_flower_is_given_the_proxy() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = table["tool"]["flwr"]["app"]["components"]["clientapp"].partition(":")
    assert getattr(importlib.import_module(module), name) is proxy


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Path, psutil.Process]]:
    """A state file, and the process of ``fedlora node`` that keeps its trainer."""
    state = tmp_path / "trainer.json"
    command = [sys.executable, "-m", "simulations.cli", "node", "--state", str(state)]
    with (tmp_path / "node.out").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        until(lambda: state.exists() or process.poll() is not None, 300)
        assert state.exists(), (tmp_path / "node.out").read_text()
        yield state, psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def until(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.1)


def actor(keeping: psutil.Process) -> psutil.Process:
    """The trainer's process."""
    (found,) = [each for each in keeping.children(True) if each.name().startswith("ray::Trainer")]
    return found


@pytest.mark.ray
def test_a_resident_trainer(tmp_path: Path, node: tuple[Path, psutil.Process]) -> None:
    """The same bits through a process of its own; killed it comes back, and nothing waits."""
    (state, keeping), fed = node, Federation(tmp_path, "clients.number=2")
    ours, theirs = fed.context(0), named_by(fed.context(0), state)
    address = read(state).address
    assert address.startswith("127.0.0.1:")
    listening = {
        c.laddr.ip
        for each in [keeping, *keeping.children(True)]
        for c in each.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }
    assert all(ip in ("127.0.0.1", "::ffff:127.0.0.1", "::1") for ip in listening) and listening

    first, second = (fed.messages(number, fed.first)[0] for number in (1, 2))
    broken = copy.deepcopy(first)
    broken.content["config"] = ConfigRecord({})
    other = tmp_path / "other.json"
    write(other, Named(address, read(state).namespace, "nobody", read(state).token))
    work = [(first, theirs), (broken, theirs), (first, named_by(theirs, other))]
    found = proxied(tmp_path, work)
    assert (found["heavy"], found["ray"]) == (set(), True)
    reply, theirs = found["done"][0]
    expected = client_app(first, ours)
    ours.node_config = dict(theirs.node_config)
    same((reply, theirs), (expected, ours))
    assert found["done"][1][0][0] == "<class 'fedlora.errors.WireError'>"
    assert "is the server a Fedlora server?" in found["done"][1][0][1]
    assert "found 'nobody', allowed: the name of a trainer" in found["done"][2][0][1]

    killed = actor(keeping)
    killed.kill()
    theirs = copy.deepcopy(theirs)
    ((reply, theirs),) = proxied(tmp_path, [(second, theirs)])["done"]
    expected = client_app(second, ours)
    same((reply, theirs), (expected, ours))
    assert actor(keeping).pid != killed.pid

    keeping.terminate()
    keeping.wait(30)
    assert (
        not state.exists() and f"process {killed.pid} died" in (tmp_path / "node.out").read_text()
    )
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_trainer_in_a_ray_that_runs(tmp_path: Path) -> None:
    """It takes what there is room for and a name of its own, and leaves that Ray as it was."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    fed, state = Federation(tmp_path, "clients.number=2"), tmp_path / "trainer.json"
    message, context = fed.messages(1, fed.first)[0], fed.context(0)
    command = [sys.executable, "-m", "simulations.cli", "node", "--address", cluster.address]
    refused = [*command, "--state", str(tmp_path / "other.json")]
    keeping = subprocess.Popen([*command, "--state", str(state), "--name", "t"], cwd=ROOT)
    try:
        until(lambda: state.exists() or keeping.poll() is not None, 120)
        assert read(state).token == ""
        for options, line in (
            (["--cpus", "3"], "--cpus: found 3.0, allowed: what that Ray has on this machine, 2"),
            (["--name", "t"], "--name: found 't', allowed: a name that no trainer"),
        ):
            done = subprocess.run([*refused, *options], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 2 and line in done.stderr
        (found,) = proxied(tmp_path, [(message, named_by(context, state))])["done"]
        same(found, (client_app(message, context), named_by(context, state)))
        keeping.terminate()
        keeping.wait(30)
        assert not state.exists()
        done = subprocess.run(
            [*refused, "--name", "t", "--gpus", "1"], cwd=ROOT, capture_output=True
        )
        assert b"--gpus: found 1.0, allowed: what that Ray has on this machine, 0" in done.stderr
    finally:
        keeping.kill()
        keeping.wait()
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.deploy
def test_what_hangs_is_ended(tmp_path: Path, node: tuple[Path, psutil.Process]) -> None:
    """In time, with one line; and who has another token gets none either."""
    (state, keeping), fed = node, Federation(tmp_path, "clients.number=2")
    message, named = fed.messages(1, fed.first)[0], read(state)
    other = tmp_path / "other.json"
    write(other, Named(named.address, named.namespace, named.name, "0" * len(named.token)))
    (((_, text), _),) = proxied(tmp_path, [(message, named_by(fed.context(0), other))])["done"]
    assert text.startswith(f"trainer: {other}: no Ray at {named.address}")

    hung = actor(keeping)
    hung.send_signal(signal.SIGSTOP)
    late = named_by(fed.context(0), state, **{"trainer-seconds": 1.0})
    (((_, text), _),) = proxied(tmp_path, [(message, late)], patience=1.0)["done"]
    assert "no reply of" in text and "within 1 s; it was ended and starts again" in text
    until(lambda: not hung.is_running(), 30)
    assert not hung.is_running()
    again = proxied(tmp_path, [(message, named_by(fed.context(0), state))])["done"]
    same(again[0], (client_app(message, (ours := fed.context(0))), named_by(ours, state)))

    number = keeping.pid
    os.kill(number, signal.SIGKILL)  # it leaves its file behind
    keeping.wait(30)
    (((_, text), _),) = proxied(tmp_path, [(message, named_by(fed.context(0), state))])["done"]
    assert f"nobody answers at {named.address}" in text and keeper(state) is None
    assert main(["node", "--stop", "--state", str(state)]) == 0 and not state.exists()
