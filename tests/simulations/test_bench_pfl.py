"""The bench beside pfl-research, without pfl: what is written for it, its model, what is refused.

No test looks at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from fedlora.errors import ConfigError, FedloraError
from fedlora.tasks import TASKS
from simulations import bench_peer, bench_pfl, peer_pfl
from simulations.bench_peer import environment_of, speaking
from simulations.bench_pfl import check_agreement, check_versions, compared
from simulations.bench_pfl_ours import LENGTH, Subject, bench_texts, ready, rounds, write
from simulations.cli import main

SMALL = Subject("small", "tiny_bert", (("hidden", 32), ("layers", 1)), users=3, steps=2)
UNEVEN = Subject("small", "tiny_bert", (("hidden", 32), ("layers", 1)), users=3, uneven=True)

# The peer without pfl: its model, users, loss and optimiser, and a loop in place of pfl's.
LOOP = """
import json, sys
from pathlib import Path
import torch
from peft import get_peft_model_state_dict
from simulations import peer_pfl

folder, scale = Path(sys.argv[2]), float(sys.argv[1])

def make():
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    module = peer_pfl.adapted(folder, task)
    moving = [p for p in module.parameters() if p.requires_grad]
    everybody = peer_pfl.users(folder, task["batch_size"])

    def do():
        start = [p.detach().clone() for p in moving]
        total = [torch.zeros_like(p) for p in moving]
        for batches in everybody:
            with torch.no_grad():
                [p.copy_(q) for p, q in zip(moving, start)]
            optimizer = peer_pfl.sgd(moving, task["learning_rate"] * scale)
            for batch in batches:
                optimizer.zero_grad()
                peer_pfl.loss(module, **batch).backward()
                optimizer.step()
            [t.add_(p.detach() - q) for t, p, q in zip(total, moving, start)]
        with torch.no_grad():
            [p.copy_(q + t / len(everybody)) for p, q, t in zip(moving, start, total)]
        return sum(map(len, everybody))

    return do, lambda: get_peft_model_state_dict(module)

peer_pfl.serve(make)
"""


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    TASKS.pop("bench_texts", None)


def quiet(text: str) -> None:
    """Nobody listens."""


def loop(tmp_path: Path, scale: float = 1.0) -> list[str]:
    """The command of a peer that trains with ``scale`` times the learning rate."""
    script = tmp_path / "loop.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(bench_peer.ROOT)!r})\n{LOOP}")
    return [sys.executable, "-P", str(script), str(scale)]


def test_the_peers_model_starts_where_ours_does(tmp_path: Path) -> None:
    first = write(SMALL, tmp_path)
    task = json.loads((tmp_path / "task.json").read_text(encoding="utf-8"))
    module = peer_pfl.adapted(tmp_path, task)
    theirs = get_peft_model_state_dict(module)
    assert theirs.keys() == first.keys()
    assert all(torch.equal(theirs[key], first[key]) for key in first)
    moving = [p for p in module.parameters() if p.requires_grad]
    assert sum(p.numel() for p in moving) == sum(value.numel() for value in first.values())
    dropping = [m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropping and not any(dropping) and module.training
    weights = peer_pfl.load_file(tmp_path / "weights.safetensors")
    weights.popitem()
    peer_pfl.save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        peer_pfl.adapted(tmp_path, task)


def test_users_are_what_our_engine_draws_in_round_1(tmp_path: Path) -> None:
    write(UNEVEN, tmp_path)
    everybody = peer_pfl.users(tmp_path, UNEVEN.batch_size)
    assert [len(batches) for batches in everybody] == [UNEVEN.steps] * UNEVEN.users
    seen: list[Tensor] = []
    module = ready(UNEVEN.config()).model.module
    hook = module.register_forward_pre_hook(
        lambda layer, given, named: seen.append(named["input_ids"].clone()), with_kwargs=True
    )
    do, _ = rounds(UNEVEN, pack=1)
    assert do() == UNEVEN.users * UNEVEN.steps
    hook.remove()
    theirs = [batch["input_ids"] for batches in everybody for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(seen, theirs, strict=True))
    assert len({batch.shape[1] for batch in theirs}) > 1  # each batch at its own length


def test_texts_are_of_one_length_or_as_they_are() -> None:
    even = ready(SMALL.config()).rows(0)
    assert set(even.inputs.lengths) == {LENGTH}
    uneven = ready(UNEVEN.config()).rows(0)
    assert len(set(uneven.inputs.lengths)) > 1
    assert len(bench_texts(7).train) == 7


@pytest.mark.slow
def test_a_bare_loop_from_the_files_agrees_and_gives_rows(tmp_path: Path) -> None:
    told: list[str] = []
    rows = compared(SMALL, 1, told.append, tmp_path / "task", loop(tmp_path))
    assert [row.case for row in rows] == [
        "small, 3 users: packs of 3",
        "small, 3 users: one by one",
    ]
    assert [row.allowed for row in rows] == [1.5, None]
    assert all(row.sense == "at least" and row.clock == "cpu" for row in rows)
    assert all(row.ours > 0 and row.peer > 0 and row.pairs == 1 for row in rows)
    assert told[0] == "small, 3 users: loading"


@pytest.mark.slow
def test_no_ratio_where_the_sides_do_not_do_the_same(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"differs by .* so no ratio"):
        compared(SMALL, 1, quiet, tmp_path / "task", loop(tmp_path, scale=1.001))


def test_agreement_is_of_every_tensor_and_of_one_that_moved() -> None:
    first = {"A": torch.ones(4), "B": torch.zeros(4)}
    after = {"A": torch.ones(4) * 1.1, "B": torch.ones(4)}
    check_agreement("a case", {"A": after["A"] * (1 + 1e-6), "B": after["B"]}, after, first)
    for key in first:
        with pytest.raises(FedloraError, match=f"{key!r} differs by 1.0e-04"):
            check_agreement("a case", {**after, key: after[key] * (1 + 1e-4)}, after, first)
    with pytest.raises(FedloraError, match="differs by nan"):
        check_agreement("a case", {**after, "A": after["A"] * torch.nan}, after, first)
    with pytest.raises(FedloraError, match="only one side trains 'B'"):
        check_agreement("a case", {"A": after["A"]}, after, first)
    with pytest.raises(FedloraError, match="changes no tensor"):
        check_agreement("a case", after, after, {key: value * 0.99 for key, value in after.items()})


def test_versions_must_be_alike() -> None:
    check_versions({"torch": "2"}, {"torch": "2", "pfl": "0.6"})
    with pytest.raises(FedloraError, match="its environment has torch 3, allowed: 2, as here"):
        check_versions({"torch": "2"}, {"torch": "3"})


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import sys; sys.exit('no such thing')", "a peer ended: no such thing"),
        ("print('not JSON', flush=True)", "a peer ended: not JSON"),
        ('print(\'{"error": "ValueError: odd"}\', flush=True)', "a peer failed: ValueError: odd"),
    ],
)
def test_a_process_that_fails_says_why(script: str, expected: str) -> None:
    command = [sys.executable, "-c", script]
    with pytest.raises(FedloraError, match=expected), speaking("a peer", command, {}):
        pass


def test_a_process_that_cannot_start_or_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FedloraError, match="cannot start"), speaking("x", ["/dev/null/x"], {}):
        pass
    monkeypatch.setattr(bench_peer, "PATIENCE", 0.2)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with pytest.raises(FedloraError, match=r"no answer within 0\.2 s"), speaking("x", command, {}):
        pass


def test_where_no_environment_can_be_made_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip is told to look nowhere but in an empty folder, so nothing leaves this machine."""
    monkeypatch.delenv("FEDLORA_PFL", raising=False)
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["bench", "pfl", "--quick", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("fedlora: bench pfl: cannot make its environment (offline?): ")
    assert "pfl[pytorch]==0.6.*" in last and last.endswith("in $FEDLORA_PFL")
    assert not list((tmp_path / "data" / "peers").iterdir())


def test_an_environment_is_made_once_and_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[str]] = []

    def run(name: str, variable: str, command: list[str]) -> None:
        steps.append(command)
        if command[1:3] == ["-m", "venv"]:
            (Path(command[-1]) / "bin").mkdir()
            (Path(command[-1]) / "bin" / "python").touch()

    monkeypatch.delenv("FEDLORA_PFL", raising=False)
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path))
    monkeypatch.setattr(bench_peer, "_run", run)
    made = environment_of("pfl", bench_pfl.REQUIREMENTS, "FEDLORA_PFL", quiet)
    assert made.exists() and made.is_relative_to(tmp_path / "peers") and len(steps) == 2
    assert f"torch=={torch.__version__}" in steps[1]
    assert environment_of("pfl", bench_pfl.REQUIREMENTS, "FEDLORA_PFL", quiet) == made
    assert len(steps) == 2
    assert environment_of("pfl", ["pfl==0.7"], "FEDLORA_PFL", quiet) != made
    monkeypatch.setenv("FEDLORA_PFL", "/a/python")
    assert environment_of("pfl", (), "FEDLORA_PFL", quiet) == Path("/a/python")
    monkeypatch.setenv("FEDLORA_DATA", "/dev/null")
    monkeypatch.delenv("FEDLORA_PFL")
    with pytest.raises(ConfigError, match="cannot write in"):
        environment_of("pfl", (), "FEDLORA_PFL", quiet)


def test_the_subjects_are_as_told() -> None:
    tiny, uneven, minilm = bench_pfl.SUBJECTS
    assert (tiny.users, tiny.batch_size, tiny.steps, tiny.uneven) == (64, 4, 5, False)
    assert (uneven.users, uneven.uneven) == (64, True)
    assert (minilm.model, minilm.options, minilm.users) == ("minilm", (("layers", 3),), 16)
    assert bench_pfl.FASTER == 1.5 and bench_pfl.ALLOWED == 1e-5
