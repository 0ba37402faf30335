"""The bundle that Flower sends to machines: what is in it, and that it runs by itself."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import MAX_FILE_BYTES, MAX_FILE_COUNT, MAX_TOTAL_BYTES

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("fedlora", "strategies", "clients", "simulations")
DATA = {
    "fedlora/mixer.json",
    "fedlora/tasks/tweets.jsonl",
    "fedlora/tasks/tweets.LICENSE.md",
    "LICENSE",
    "pyproject.toml",
    ".info/CONTENT",  # Flower's own
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("simulations/recipes/**/*.toml")),
}
RUN = """
import socket, sys
from pathlib import Path

def refuse(*arguments, **more):
    raise OSError("the network was asked for")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

from flwr.app import Context, RecordDict
from clients.client_app import app as client_app
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.server_app import app as server_app
from flwr.common.config import get_project_config, flatten_dict

defaults = flatten_dict(get_project_config(Path.cwd())["tool"]["flwr"]["app"]["config"])
config = {**defaults, "overrides": "rounds=1", "folder": sys.argv[1]}
context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), config)
server_app(InProcessGrid(client_app, 4), context)
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("fedlora", "strategies", "clients", "simulations"):
        print(module.__file__)
"""


@pytest.fixture(scope="module")
def bundle() -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))


def file_of(module: str) -> Path | None:
    """The file of a module of ours."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file() and module.split(".")[0] in PACKAGES:
            return path
    return None


def imported(path: Path) -> Iterator[str]:
    """Whatever a file may import, at once or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def needed(modules: Iterable[str]) -> set[str]:
    """The files of these modules and of all that they may import."""
    left, found = list(modules), set[Path]()
    while left:
        parts = left.pop().split(".")
        for length in range(1, len(parts) + 1):
            path = file_of(".".join(parts[:length]))
            if path is not None and path not in found:
                found.add(path)
                left += imported(path)
    return {str(path.relative_to(ROOT)) for path in found}


def test_it_holds_what_its_apps_may_import_and_their_data_and_nothing_else(
    bundle: zipfile.ZipFile,
) -> None:
    """A module that is missing or too much: see fab-include and fab-exclude in pyproject.toml."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = table["tool"]["flwr"]["app"]["components"].values()
    apps = {"simulations.server_app", "clients.client_app", *(n.partition(":")[0] for n in named)}
    names, expected = set(bundle.namelist()), needed(apps) | DATA
    assert "fedlora/tasks/local.py" in expected
    assert expected - names == set()
    assert names - expected == set()


def test_it_keeps_to_flowers_limits(bundle: zipfile.ZipFile) -> None:
    sizes = {file.filename: file.file_size for file in bundle.infolist()}
    assert sum(sizes.values()) < min(10_000_000, MAX_TOTAL_BYTES)
    assert max(sizes.values()) < min(1_000_000, MAX_FILE_BYTES)
    assert len(sizes) < MAX_FILE_COUNT


def test_it_runs_by_itself_without_a_network(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    bundle.extractall(place)
    environment = {**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run")],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()
    files = done.stdout.splitlines()
    assert len(files) > 100 and all(file.startswith(str(place)) for file in files)
