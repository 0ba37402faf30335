"""The app that is submitted: the four packages as they are installed here."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from flwr.cli.build import build_fab_from_files

import simulations
from fedlora.errors import FedloraError

PACKAGES = ("fedlora", "strategies", "clients", "simulations")
ENDINGS = {".py", ".json", ".jsonl", ".md", ".toml"}
COMPONENTS = {
    "serverapp": "simulations.server_app:app",
    "clientapp": "simulations.node.proxy:app",
}
# a deployment sends the whole configuration as one text, so no keys of recipes
RUN_CONFIG = {"recipe": "tiny", "overrides": "", "folder": "", "config": "", "resume": False}
RUN_CONFIG |= {"tell": "", "wait": 0.0}


def bundle() -> bytes:
    """A Flower app bundle of our packages; the same files give the same bytes.

    Raises:
        FedloraError: Flower does not take it.
    """
    root = Path(simulations.__file__).parent.parent
    files: dict[str, bytes | Path] = {
        str(path.relative_to(root)): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.suffix in ENDINGS and path.is_file()
    }
    files["pyproject.toml"] = tomli_w.dumps(_app()).encode()
    try:
        return build_fab_from_files(files)[0]
    except ValueError as error:
        raise FedloraError(f"the app's bundle: {error}") from None


def _app() -> dict[str, Any]:  # Any: TOML
    """What Flower wants to know of an app; dependencies are those that are installed."""
    try:
        version = metadata.version("fedlora")
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        version = "0.0.0"
    app = {"publisher": "fedlora", "components": COMPONENTS, "config": RUN_CONFIG}
    project = {"name": "fedlora", "version": version, "description": "Fedlora", "license": "Apache"}
    return {"project": project, "tool": {"flwr": {"app": app}}}
