"""Every command and every example in the documents runs."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("results/*/*.md")),
    *sorted(ROOT.glob("results/bench/*/*.md")),
]

# Commands that something else runs, and what does.
ELSEWHERE = {
    "make demo": "the same comparison is the last step of .ci/run, with fewer rounds",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    "fedlora compare quickstart": ".ci/run, with fewer rounds",
    "fedlora list tasks --partition own.toml": "tests/simulations/test_local_runs.py",
    "fedlora run own.toml": "tests/simulations/test_local_runs.py",
}


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def console(document: Path) -> list[str]:
    """The commands after a dollar sign."""
    joined = "".join(blocks(document, "console")).replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def test_console_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulations.cli import main

    monkeypatch.chdir(tmp_path)
    commands = [command for document in DOCUMENTS for command in console(document)]
    ours = [c for c in commands if not any(c.startswith(other) for other in ELSEWHERE)]
    assert len(ours) >= 8
    for command in ours:
        program, *arguments = shlex.split(command)
        assert program == "fedlora", command
        assert main(arguments) == 0, (command, capsys.readouterr().err)


def test_long_commands_would_run() -> None:
    """Commands in `sh` blocks take minutes; their recipes and overrides must be right."""
    from simulations.recipe import load

    found = 0
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            words = shlex.split(block.replace("\\\n", " "))
            if words[:2] != ["fedlora", "run"]:
                continue
            options = dict(zip(words[3::2], words[4::2], strict=True))
            sets = [b for a, b in itertools.pairwise(words) if a == "--set"]
            backend = f"launch.backend={options.get('--backend', 'ray')}"
            load(words[2]).resolve(
                options.get("--method"), [*sets, f"seed={options['--seed']}", backend]
            )
            found += 1
    assert found


def test_long_comparisons_would_run() -> None:
    """`fedlora compare` in `sh` blocks: every method that it names or the recipe does, as set."""
    from simulations.recipe import load
    from strategies import METHODS

    found = 0
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                if words[:2] != ["fedlora", "compare"]:
                    continue
                recipe, options = load(words[2]), dict(zip(words[3::2], words[4::2], strict=True))
                assert options.keys() <= {"--methods", "--seeds", "--set", "--out"}, document
                sets = [b for a, b in itertools.pairwise(words) if a == "--set"]
                named = options.get("--methods", ",".join(recipe.compare)).split(",")
                for method in METHODS if named == ["all"] else named:
                    recipe.resolve(method, sets)
                found += 1
    assert found


def test_long_sweeps_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fedlora sweep` in `sh` blocks, on the sweep that the page shows."""
    from simulations.cli import main

    monkeypatch.chdir(tmp_path)
    readme = ROOT / "README.md"
    (shown,) = [block for block in blocks(readme, "toml") if "[grid]" in block]
    (tmp_path / "skew.toml").write_text(shown)
    lines = [line for block in blocks(readme, "sh") for line in block.splitlines()]
    found = [shlex.split(line)[1:] for line in lines if line.startswith("fedlora sweep skew.toml")]
    for arguments in found:
        assert main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
    assert found


def test_committed_sweeps_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those in `results/`, each of which a page there tells how to run."""
    from simulations.cli import main

    lines = [
        line
        for document in DOCUMENTS
        for block in blocks(document, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("fedlora sweep results/")
    ]
    files = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("results/**/*.toml")
        if path.name in ("sweep.toml", "tuning.toml")
    }
    monkeypatch.chdir(tmp_path)
    assert files and {shlex.split(line)[2] for line in lines} == files
    for line in lines:
        _, _, file, *options = shlex.split(line)
        assert main(["sweep", str(ROOT / file), *options, "--dry-run", "--json"]) == 0, line
        cells = json.loads(capsys.readouterr().out)["cells"]
        assert {cell["state"] for cell in cells} == {"new"}, line


def test_what_is_to_be_reproduced_is_kept() -> None:
    """`fedlora reproduce` in `sh` blocks, and every result that keeps runs: they resolve."""
    from simulations.reproducing import cells_of

    lines = [x for d in DOCUMENTS for block in blocks(d, "sh") for x in block.splitlines()]
    named = [shlex.split(x)[2] for x in lines if x.startswith("fedlora reproduce")]
    assert named
    for folder in {*named, *(str(path.parent) for path in ROOT.glob("results/*/runs.jsonl"))}:
        cells = cells_of(ROOT / folder)
        assert cells and not [cell.refused for cell in cells if cell.refused], folder


def test_deployments_would_run() -> None:
    """`fedlora deploy` in `sh` blocks: the options are there, and so is the recipe as it is set."""
    from simulations.cli_deploy import deploy
    from simulations.recipe import load

    found = set()
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                if words[:2] != ["fedlora", "deploy"]:
                    continue
                given = deploy.commands[words[2]].make_context(words[2], words[3:]).params
                if words[2] == "run":
                    load(given["recipe"]).resolve(given["method"], given["settings"])
                found.add(words[2])
    assert {"check", "run"} <= found


def test_long_benches_would_run() -> None:
    """`fedlora bench` commands in `sh` blocks: the bench is there, and its folder is theirs."""
    from simulations.bench import BENCHES

    found = set()
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            words = shlex.split(block.replace("\\\n", " "))
            if words[:2] == ["fedlora", "bench"]:
                assert words[3:] == ["--out", f"results/bench/{words[2]}"], document
                found.add(words[2])
    assert found == set(BENCHES)


@pytest.mark.parametrize("folder", sorted(ROOT.glob("results/bench/*")), ids=lambda f: f.name)
def test_benches_are_told_as_measured(folder: Path) -> None:
    """The table in a bench's document is the committed one, and so are the rows behind it."""
    from simulations.bench import cells
    from simulations.bench_pairs import Row

    table = (folder / "table.md").read_text(encoding="utf-8").strip()
    assert table in (folder / "README.md").read_text(encoding="utf-8")
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        kinds = get_type_hints(Row)
        numbers = {key: float(value) for key, value in line.items() if kinds[key] is float}
        allowed = float(line["allowed"]) if line["allowed"] else None
        row = Row(**{**line, **numbers, "allowed": allowed})  # type: ignore[arg-type]
        assert f"| {' | '.join(cells(row))} |" in table


def test_tables_are_as_measured() -> None:
    """The quickstart's table in the documents is the committed one, turned on its side."""
    results = ROOT / "results" / "quickstart"
    lines = (results / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = zip(rows[0], *rows[2:], strict=True)
    expected = ["| " + " | ".join(column) + " |" for column in columns]
    for document in (ROOT / "README.md", results / "README.md"):
        shown = document.read_text(encoding="utf-8").splitlines()
        start = shown.index(expected[0])
        assert [shown[start], *shown[start + 2 : start + 1 + len(expected)]] == expected


def test_committed_records_give_the_committed_table(tmp_path: Path) -> None:
    from simulations.run_folders import collect
    from simulations.tables import write

    results = ROOT / "results" / "quickstart"
    markdown, csv, _ = write(collect([results]), tmp_path)
    assert markdown.read_text() == (results / "table.md").read_text()
    assert csv.read_text() == (results / "table.csv").read_text()


def test_the_install_block_is_what_make_does() -> None:
    (install,) = [block for block in blocks(ROOT / "README.md", "sh") if "venv" in block]
    pip = install.splitlines()[-1].partition("install ")[2]
    assert pip in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_readme_python_runs() -> None:
    from strategies import LoraStrategy, PrivateClients

    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks(ROOT / "README.md", "python")[1:]:  # the first: test_example_app.py
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["wrapped"], PrivateClients)
    assert isinstance(names["ours"], LoraStrategy)


def test_contributing_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.adapters import ADAPTERS
    from simulations import launch
    from simulations.progress import Progress
    from simulations.recipe import load
    from strategies import METHODS

    before = (set(METHODS), set(ADAPTERS))
    try:
        for number, block in enumerate(blocks(ROOT / "CONTRIBUTING.md", "python")):
            module = types.ModuleType(f"contributing_{number}")
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(compile(block, module.__name__, "exec"), module.__dict__)
        config = load("tiny").resolve("shrunk", ["adapter.name=narrow", "options.factor=0.5"])
        folder = launch.run(config, tmp_path / "run", Progress())
        assert (folder / "summary.json").exists()
    finally:
        for table, names in ((METHODS, before[0]), (ADAPTERS, before[1])):
            for name in set(table) - names:
                del table[name]


def test_what_documents_name_exists() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
        for path in re.findall(
            r"`((?:fedlora|strategies|clients|simulations|tests)/[^`<*{ ]+)`", text
        ):
            assert (ROOT / path).exists(), f"{document.name}: {path}"
