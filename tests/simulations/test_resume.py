"""A run that dies anywhere and is gone on with ends as if it had not died."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from clients.client_app import app as client_app
from fedlora.errors import ConfigError, FedloraError, PrivacyError
from fedlora.faults import POINTS
from fedlora.ledger import Ledger
from fedlora.privacy import epsilon
from simulations import launch, results, server_app
from simulations.chaos_runs import LEDGER, PRIVATE, QUICK, config, tree
from simulations.cli import main
from simulations.recipe import load
from tests.simulations.resumed import Told, die, die_everywhere, run

PLAIN = [point for point in POINTS if point not in LEDGER]
HARD = (  # all that a later round could miss of an earlier one
    *("options.server=adam", "clients.number=6", "clients.fraction_train=0.5"),
    *("adapter.options.dropout=0.2", "options.server_learning_rate=0.01"),
)
CLIENTS = (
    *("privacy.unit=client", "privacy.noise_multiplier=0.3", "privacy.adaptive_clip=true"),
    *("clients.number=6", "clients.fraction_train=0.7"),
)


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, but where a test takes ``figures``."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(server_app, "curves", lambda runs, path: path.touch())


@pytest.fixture
def figures() -> None:
    """Ask for what ``quick`` leaves out."""


def test_a_run_that_dies_at_every_point_ends_the_same(
    figures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", *HARD, "rounds=5")
    die_everywhere(monkeypatch, PLAIN, 5, tmp_path / "killed", *HARD)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    resumed = json.loads((tmp_path / "killed" / "environment.json").read_text())["resumed"]
    assert len(resumed) == len(PLAIN)
    assert resumed[0]["after_round"] == 0 and resumed[-1]["after_round"] == 5


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus on its generator and hooks
def test_a_private_run_that_dies_spends_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledgers are part of the tree: the same charges, in the same order, none more."""
    points = [*LEDGER, "upload", "received", "data-after-rename"]
    run(tmp_path / "whole", *PRIVATE, "rounds=3")
    die_everywhere(monkeypatch, points, 3, tmp_path / "killed", *PRIVATE)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert [len(Ledger(tmp_path / "killed" / "ledger").charges(k)) for k in range(4)] == [3] * 4


def test_a_run_that_protects_whole_clients_dies_and_spends_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [*LEDGER, "merge", "after-record", "manifest-before-rename"]
    run(tmp_path / "whole", *CLIENTS, "rounds=3")
    die_everywhere(monkeypatch, points, 3, tmp_path / "killed", *CLIENTS)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    clips = [json.loads(line)["clip"] for line in lines(tmp_path / "killed")]
    assert len(set(clips)) == 4  # it moved in every round
    assert len(Ledger(tmp_path / "killed" / "ledger").charges(None)) == 3


@pytest.mark.parametrize("method", ["flora", "fed_sb"])
def test_a_base_that_grows_and_another_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    run(tmp_path / "whole", f"method={method}", "rounds=3")
    die_everywhere(monkeypatch, ["received", "finish"], 3, tmp_path / "killed", f"method={method}")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_systems_noise_is_charged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn and is lost may have left: the new draw costs, and still meets the target."""
    changes = ("privacy.unit=example", "privacy.epsilon=4.0", "privacy.delta=1e-3")
    changes = (*changes, "privacy.accountant=rdp", "privacy.rng=os", "rounds=2")
    die(monkeypatch, "received@2", tmp_path / "run", *changes)
    run(tmp_path / "run", *changes, resume=True)
    ledger = Ledger(tmp_path / "run" / "ledger")
    for client in range(4):
        assert epsilon(ledger.events(client), 1e-3, "rdp") <= 4
        assert len(ledger.charges(client)) == 2  # the third draw would have passed the target
    last = json.loads(lines(tmp_path / "run")[-1])
    assert not last["merged"] and len(last["failures"]) == 5


def lines(folder: Path) -> list[str]:
    return (folder / "rounds.jsonl").read_text().splitlines()


def test_a_run_that_died_before_its_first_commit_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "rounds=2")
    (said,) = [*die(monkeypatch, "mid-record@0", tmp_path / "run", "rounds=2"), "none"]
    assert said == "none"
    (said,) = run(tmp_path / "run", "rounds=2", resume=True)
    assert said == f"{tmp_path / 'run'}: goes on from the start, nothing is committed"
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


@pytest.mark.parametrize(("every", "rounds"), [(2, 2), (0, None)])
def test_commits_come_as_often_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, rounds: int | None
) -> None:
    changes = (f"launch.checkpoint={every}", "rounds=4")
    run(tmp_path / "whole", *changes)
    die(monkeypatch, "merge@4", tmp_path / "run", *changes)
    names = [path.stem for path in (tmp_path / "run").glob("checkpoint/*.json")]
    assert sorted(names) == (["round-000000", "round-000002"] if every else [])
    (said,) = run(tmp_path / "run", *changes, resume=True)
    assert said.endswith("after round 2" if rounds else "nothing is committed")
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


stateful = ClientApp()


@stateful.train()
def train(message: Message, context: Context) -> Message:
    """Train, then move the update by what this client kept of the rounds before."""
    count = int(context.state["seen"]["count"]) if "seen" in context.state else 0
    reply = client_app(message, context)
    for name, array in reply.content["arrays"].items():
        kept = context.state["own"][name].numpy() if "own" in context.state else 0
        values = array.numpy() + array.numpy().dtype.type(0.01) * kept
        reply.content["arrays"][name] = Array(values)
    context.state["own"] = ArrayRecord(dict(reply.content["arrays"].items()))
    context.state["seen"] = MetricRecord({"count": count + 1, "all": [0.1, float(count)]})
    context.state["notes"] = ConfigRecord({"raw": bytes([0, count]), "on": True, "names": ["a"]})
    return reply


@stateful.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    if "notes" in context.state:
        assert dict(context.state["notes"])["on"] is True
        assert bytes(context.state["notes"]["raw"])[1] + 1 == context.state["seen"]["count"]
        assert context.state["seen"]["all"] == [0.1, context.state["seen"]["count"] - 1]
    return client_app(message, context)


def test_what_clients_keep_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "client_app", stateful)
    changes = ("clients.number=6", "clients.fraction_train=0.5", "rounds=4")
    run(tmp_path / "whole", *changes)
    die_everywhere(
        monkeypatch, ["upload", "received", "after-commit"], 4, tmp_path / "run", *changes
    )
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    monkeypatch.setattr(launch, "client_app", client_app)
    run(tmp_path / "without", *changes)
    assert tree(tmp_path / "without") != tree(tmp_path / "whole")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds that died after round 2, and beside it the one that did not."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app, "curves", lambda runs, path: path.touch())
        die(patch, "merge@3", folder / "run", "rounds=3")
        run(folder / "whole", "rounds=3")
    return folder


@pytest.fixture
def copy(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun / "run", tmp_path / "run")
    return tmp_path / "run"


def flipped(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lied(path: Path) -> None:
    """Another clip, in a manifest that stays JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "bound": 9.0}))


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("checkpoint/round-000002.safetensors", flipped, "its sha256 is not the manifest's"),
        ("checkpoint/round-000002.safetensors", cut, r"found \d+ bytes of \d+"),
        ("checkpoint/round-000002.safetensors", Path.unlink, "cannot be read"),
        ("checkpoint/round-000002.json", cut, "cannot be read"),
        ("checkpoint/round-000002.json", lied, "its sha256 is not that of its lines"),
        ("rounds.jsonl", cut, r"found \d+ bytes of \d+"),
    ],
)
def test_a_damaged_commit_is_named_and_the_one_before_is_used(
    begun: Path, copy: Path, name: str, damage: object, why: str
) -> None:
    assert callable(damage)
    damage(copy / name)
    first, second = run(copy, "rounds=3", resume=True)
    assert re.match(rf"{copy / name}: {why}", first) and first.endswith("000002 is left out")
    assert second == f"{copy}: goes on after round 1"
    assert tree(copy) == tree(begun / "whole")


def test_without_a_whole_commit_nothing_is_invented(copy: Path) -> None:
    for path in copy.glob("checkpoint/*.safetensors"):
        flipped(path)
    with pytest.raises(ConfigError, match="found 2 commits and none whole"):
        run(copy, "rounds=3", resume=True)


def test_another_recipe_beside_the_commits_is_refused(copy: Path) -> None:
    path = copy / "config.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(ConfigError, match=r"config\.toml: found another file than the run began"):
        run(copy, "rounds=3", "seed=1", resume=True)


def test_another_base_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients.resident import resident
    from simulations.server_app import server_view

    monkeypatch.setattr(resident(server_view(config("rounds=3"))), "fingerprint", "another")
    with pytest.raises(ConfigError, match="found base another, allowed: "):
        run(copy, "rounds=3", resume=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_ledger_that_forgot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object
) -> None:
    assert callable(damage)
    die(monkeypatch, "merge@2", tmp_path / "run", *PRIVATE, "rounds=2")
    path = tmp_path / "run" / "ledger" / "client-1.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # as round 1 left it
    damage(path)
    with pytest.raises(PrivacyError, match=r"client-1\.jsonl: found \d+ bytes, and round 1 left"):
        run(tmp_path / "run", *PRIVATE, "rounds=2", resume=True)


def test_one_process_at_a_time(copy: Path) -> None:
    from simulations.resuming import alone

    with alone(copy), pytest.raises(ConfigError, match="another process runs this run now"):
        run(copy, "rounds=3", resume=True)


def test_another_version_is_told_of(
    begun: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = results._version

    def newer(name: str) -> str | None:
        return "9.9" if name == "fedlora" else version(name)

    monkeypatch.setattr(results, "_version", newer)
    _, said = run(copy, "rounds=3", resume=True)
    assert "fedlora was 0.1.0 and is 9.9; what follows may differ" in said
    assert tree(copy) == tree(begun / "whole")


def test_a_full_disk_is_one_line_and_the_last_commit_stands(tmp_path: Path) -> None:
    """Files may grow to 4 kB, which the records may, and a commit's tensors may not."""
    run(tmp_path / "whole", "rounds=3")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(FedloraError, match=r"round-000000\.safetensors: \d+ bytes could not"):
            run(folder, "rounds=3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((folder / "checkpoint").iterdir())
    run(folder, "rounds=3", resume=True)
    assert tree(folder) == tree(tmp_path / "whole")


def test_the_command_goes_on_and_says_when_nothing_is_left(
    begun: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--resume", str(copy)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(copy)
    assert f"{copy}: goes on after round 2" in printed.err
    assert tree(copy) == tree(begun / "whole")
    (copy / "checkpoint").mkdir()  # as if it had died over taking it away
    (copy / "checkpoint" / "round-000003.json").touch()
    assert main(["run", "--resume", str(copy), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"fedlora: {copy}: finished already\n"
    assert json.loads(printed.out)["folder"] == str(copy)
    assert tree(copy) == tree(begun / "whole")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seed", "1"], "seed: found 1, allowed: 0, with which the run in"),
        (["--rounds", "4"], "rounds: found 4, allowed: 3, with which"),
        (["--set", "launch.threads=2"], "launch.threads: found 2, allowed: 1"),
        (["--method", "lora_fair"], "method: found 'lora_fair', allowed: 'fedavg'"),
        (["--set", "options.server=adam"], "options.server: found 'adam', allowed: None"),
        (["digits"], "adapter."),
        (["--out", "elsewhere"], "--resume: found --out beside it, allowed: not both"),
        (["--dry-run"], "--resume: found --dry-run beside it"),
        (["--profile"], "--resume: found --profile beside it"),
    ],
)
def test_only_the_run_that_began_is_gone_on_with(
    begun: Path, argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    assert main(["run", *argv, "--resume", str(begun / "run")]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and expected in printed.err
    assert before == {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}


def test_the_same_recipe_may_be_named_again(copy: Path) -> None:
    sets = [word for change in QUICK for word in ("--set", change)]
    assert main(["run", "tiny", *sets, "--rounds", "3", "--resume", str(copy)]) == 0


def test_clients_may_go_on_elsewhere(copy: Path, begun: Path) -> None:
    sets = ["launch.workers=2", "launch.resources.site=1", "launch.placement=pack"]
    assert main(["run", *(w for s in sets for w in ("--set", s)), "--resume", str(copy)]) == 0
    assert tree(copy) == tree(begun / "whole")


@pytest.mark.parametrize("content", [None, "", "seed = ["])
def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "config.toml").write_text(content)
    assert main(["run", "--resume", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert ("cannot be read" if content else "found no run") in printed
    assert len(printed.splitlines()) == 1


def test_a_comparison_goes_on_where_it_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(folder: Path, resume: bool, *changes: str) -> list[str]:
        told = Told()
        sets, methods = [*QUICK, "rounds=1", *changes], ["fedavg", "ffa_lora", "median"]
        launch.compare(load("tiny"), methods, [0], sets, folder, told, resume=resume)
        return told.notes

    compare(tmp_path / "whole", False)
    shutil.copytree(tmp_path / "whole" / "fedavg-seed0", tmp_path / "run" / "fedavg-seed0")
    die(monkeypatch, "merge@1", tmp_path / "run" / "ffa_lora-seed0", "method=ffa_lora", "rounds=1")
    (tmp_path / "run" / "median-seed0").mkdir()
    (tmp_path / "run" / "median-seed0" / ".config.toml.part").touch()  # died over its first file
    kept = (tmp_path / "run" / "fedavg-seed0" / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match="--resume: found no folder"):
        compare(tmp_path / "elsewhere", True)
    with pytest.raises(ConfigError, match=r"train\.steps: found 3, allowed: 2"):
        compare(tmp_path / "run", True, "train.steps=3")
    said = compare(tmp_path / "run", True)
    assert [note.rpartition("/")[2] for note in said] == [
        "fedavg-seed0: finished already",
        "ffa_lora-seed0: goes on after round 0",
    ]
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    assert (tmp_path / "run" / "fedavg-seed0" / "summary.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("merg@3", "did you mean 'merge'"), ("merge", "POINT@ROUND"), ("merge@x", "POINT@ROUND")],
)
def test_a_fault_that_there_is_not_is_refused(
    fault: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.faults.armed", fault)
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "run")


def test_commits_are_two_and_go_at_the_end(begun: Path) -> None:
    kept = sorted(path.name for path in (begun / "run" / "checkpoint").iterdir())
    assert kept == [
        *("round-000001.json", "round-000001.safetensors"),
        *("round-000002.json", "round-000002.safetensors"),
    ]
    assert not (begun / "whole" / "checkpoint").exists()
