"""The house: floors, doors, sizes, and what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedlora", "strategies", "clients", "simulations")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

PEER = "simulations/peer_pfl.py"  # runs in an environment of the peer's, without our packages

# Library: the places that may import it.
DOORS = {
    "transformers": ("fedlora/models/", PEER),
    "tokenizers": ("fedlora/models/",),
    "peft": ("fedlora/adapters/", PEER),
    "pfl": (PEER,),
    "opacus": (
        "clients/private.py",
        "clients/supported.py",
        "clients/self_test.py",
        "clients/bare_opacus.py",  # the peer that `fedlora bench privacy` measures ours against
        "fedlora/privacy.py",
    ),
    "dp_accounting": ("fedlora/privacy.py",),
    "ray": ("simulations/",),
    "flwr": (
        "fedlora/records.py",
        "fedlora/shares.py",
        "fedlora/wire.py",
        "strategies/adding.py",
        "strategies/asking.py",
        "strategies/base.py",
        "strategies/fedbuff.py",
        "strategies/loop.py",
        "strategies/masked.py",
        "strategies/masked_round.py",
        "strategies/merging.py",
        "strategies/messages.py",
        "strategies/own_rows.py",
        "strategies/replies.py",
        "strategies/record.py",
        "strategies/sampling.py",
        "strategies/snapshot.py",
        "strategies/virtual_time.py",
        "strategies/private_round.py",
        "strategies/private_wrapper.py",
        "clients/client_app.py",
        "clients/masked_input.py",
        "clients/masking.py",
        "clients/node_places.py",
        "clients/partition_id.py",
        "clients/personal.py",
        "clients/pruned_rank.py",
        "simulations/",
    ),
    "flwr_datasets": ("fedlora/partitioners.py",),
    "datasets": ("fedlora/partitioners.py", "fedlora/tasks/hub.py"),
    "pyarrow": ("fedlora/tasks/tables.py",),
    "PIL": ("fedlora/tasks/pictures.py", "fedlora/digit_images.py", "fedlora/emoji_images.py"),
    "resvg_py": ("fedlora/emoji_images.py",),
    "matplotlib": (
        "simulations/figures.py",
        "simulations/bench_figure.py",
        "simulations/rules_figure.py",
        "simulations/settings_figure.py",
        "fedlora/digit_images.py",
    ),
    "tensorboard": ("simulations/tracking/event_files.py",),
    "wandb": ("simulations/tracking/weights_and_biases.py",),
    "mlflow": ("simulations/tracking/mlflow_runs.py",),
    "pydantic": ("fedlora/options.py", "fedlora/config", "fedlora/adapters/", "fedlora/tasks/"),
}
MATHS = (
    "fedlora/lowrank.py",
    "fedlora/base_change.py",
    "strategies/clusters.py",
    "strategies/cosine.py",
)


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_each_library_has_one_door() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {library}"
        for path in FILES
        for library in imports(path) & DOORS.keys()
        if not str(path.relative_to(ROOT)).startswith(DOORS[library])
    ]
    assert not wrong


def test_the_maths_sees_torch_alone() -> None:
    for name in MATHS:
        outside = imports(ROOT / name) - set(sys.stdlib_module_names) - set(PACKAGES)
        assert outside == {"torch"}, name


def test_floors_are_kept() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_relative_imports_and_no_drawers() -> None:
    for path in FILES:
        assert path.stem not in {"utils", "helpers", "common", "misc"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_nobody_leaves_messages_to_the_garbage_collector() -> None:
    """Flower's views of a content by kind do; see ``fedlora.records``."""
    views = {"array_records", "config_records", "metric_records"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in views
    ]
    assert not found


def test_files_and_functions_stay_small() -> None:
    long_files = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if (lines := path.read_text(encoding="utf-8").count("\n")) > 300
    }
    assert not long_files
    long_functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": size
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or 0) - node.lineno + 1) > 80
    }
    assert not long_functions


def test_top_level_is_as_planned() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout, so nothing says which files belong to the project")
    tops = {name.split("/")[0] for name in tracked.stdout.split("\0") if name}
    allowed = {*PACKAGES, "tests", "results", "pyproject.toml", "README.md", "LICENSE", "Makefile"}
    allowed |= {"CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", ".ci", ".gitignore"}
    assert tops <= allowed


def test_the_wheel_holds_the_four_packages_and_their_data(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    for needed in (
        "simulations/recipes/quickstart.toml",
        "simulations/recipes/papers/ffa_lora_mnli.toml",
        "fedlora/tasks/tweets.jsonl",
        "fedlora/mixer.json",
        "simulations/report_page/report.html",
        "simulations/report_page/report.css",
        "simulations/report_page/marks.js",
        "simulations/report_page/table.js",
        "simulations/report_page/charts.js",
    ):
        assert needed in names
