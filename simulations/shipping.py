"""Data and weights that this machine has, brought to nodes of a cluster that lack them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora.config import ClientConfig
from fedlora.disk import writing
from fedlora.fetch import MINILM_PACKAGE, data_folder, find

FILES = ("vader", "digits", "emoji", "shakespeare")  # tasks whose data is a file in the data folder
PACKAGES = "packages"  # under the data folder: those that carry models


def cargo(config: ClientConfig) -> dict[str, Path]:
    """What a run reads besides Fedlora, as far as it can be shipped: where to, and from where.

    A relative place is under a node's data folder, an absolute one the same everywhere. The data of
    other tasks and models from the hub are not in it.

    Raises:
        ConfigError: it is not here.
    """
    from fedlora.models import MODELS  # its library takes seconds to import

    found: dict[str, Path] = {}
    if config.task.name in FILES:
        path = find(config.task.name)
        found[path.name] = path
    model = config.model.name
    if model in ("minilm", "smollm2"):
        folder = find(model)
    if model == "smollm2":
        found |= {f"{folder.name}/{path.name}": path for path in _files(folder)}
    package = MINILM_PACKAGE if model == "minilm" else model
    if Path(model).is_absolute():
        found |= {str(path): path for path in _files(Path(model))}
    elif (model not in MODELS or model == "minilm") and package.isidentifier():
        for root in _roots(package):
            to = {path: path.relative_to(root).as_posix() for path in _files(root)}
            found |= {f"{PACKAGES}/{package}/{name}": path for path, name in to.items()}
    return found


def unload(names: Sequence[str], bring: Callable[[], Mapping[str, bytes]]) -> list[Path]:
    """Put files where they are not yet, and let this process import packages that came so.

    Args:
        names: places, as ``cargo`` gives them.
        bring: the files' content, asked for only if one of them is lacking.

    Returns what was written.

    Raises:
        FedloraError: it cannot be written here.
    """
    packages = {name.split("/")[1] for name in names if name.startswith(f"{PACKAGES}/")}
    here = {package for package in packages if _roots(package)}
    lacking = {
        name: data_folder() / name  # which is the name itself, if it is absolute
        for name in names
        if not (name.startswith(f"{PACKAGES}/") and name.split("/")[1] in here)
        and not (data_folder() / name).exists()
    }
    content = bring() if lacking else {}
    for name, path in lacking.items():
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content[name])
            os.replace(part, path)  # whole, or not at all, whoever else does the same
    if packages - here:
        sys.path.append(str(data_folder() / PACKAGES))
        importlib.invalidate_caches()
    return list(lacking.values())


def _roots(package: str) -> list[Path]:
    """The folders of an installed package; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    return [Path(root) for root in (spec and spec.submodule_search_locations) or ()]


def _files(root: Path) -> list[Path]:
    """All files under a folder but what Python caches."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return [path for path in found if path.parent.name != "__pycache__"]
