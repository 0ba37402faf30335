"""Is this installation sound: versions, devices, data, Ray, per-example gradients."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedlora.errors import FedloraError

if TYPE_CHECKING:  # torch is loaded by the checks that need it
    from torch import Tensor, nn

HOUSE = ("fedlora", "strategies", "clients", "simulations")
LIBRARIES = ("flwr", "ray", "torch", "transformers", "peft", "opacus")
LARGEST_ERROR = 1e-6  # float64 leaves about 1e-15; a wrong rule is off by far more


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, whether it is as it should be, and what was found."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str


def checks(ray: bool = False) -> list[Check]:
    """All checks; starting Ray takes seconds and is left out unless ``ray``."""
    return [
        _house(),
        Check("python", "ok", platform.python_version()),
        *(_library(name) for name in LIBRARIES),
        _torch(),
        _ray_starts() if ray else _ray_found(),
        *_data(),
        _own_rows(),
        _gradients(),
    ]


def house_check() -> None:
    """Make sure, without importing them, that our four packages lie side by side.

    Raises:
        FedloraError: one is missing, or another project's package of that name comes first.
    """
    homes = {name: _home(name) for name in HOUSE}
    missing = [name for name, home in homes.items() if home is None]
    if missing:
        raise FedloraError(
            f"package {missing[0]!r} is not installed beside the others ({', '.join(HOUSE)}); "
            "install Fedlora again, into an environment of its own"
        )
    if len(set(homes.values())) > 1:
        found = ", ".join(f"{name} in {home}" for name, home in homes.items())
        raise FedloraError(
            f"the packages {', '.join(HOUSE)} must lie in one folder, found: {found}; "
            "install Fedlora into an environment of its own"
        )


def _home(name: str) -> Path | None:
    """The folder that holds a package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


def _house() -> Check:
    try:
        house_check()
    except FedloraError as error:
        return Check("packages", "fail", str(error))
    return Check("packages", "ok", f"{', '.join(HOUSE)} side by side in {_home('fedlora')}")


def _library(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed; install Fedlora again")


def _torch() -> Check:
    import torch

    found = [f"{torch.get_num_threads()} threads of {os.cpu_count()} CPU cores"]
    for number in range(torch.cuda.device_count()):
        found.append(f"cuda:{number} {torch.cuda.get_device_name(number)}")
    if not torch.cuda.is_available():
        found.append("no CUDA device")
    return Check("devices", "ok", ", ".join(found))


def _ray_found() -> Check:
    """Whether Ray can be imported at all."""
    try:
        import ray
    except ImportError as error:
        return Check("ray works", "fail", f"cannot be imported: {_first_line(error)}")
    return Check("ray works", "ok", f"{ray.__name__} can be imported; --ray starts it as well")


def _ray_starts() -> Check:
    """Start Ray with one worker, run one task, stop it."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        worker = ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
    except Exception as error:  # whatever stops Ray is the finding
        return Check("ray works", "fail", f"{type(error).__name__}: {_first_line(error)}")
    finally:
        ray.shutdown()
    return Check("ray works", "ok", f"a task ran in worker process {worker}")


def _data() -> list[Check]:
    """One check for each source of data or weights."""
    from fedlora.fetch import SOURCES, present

    return [
        Check(f"data: {name}", "ok", source.what)
        if present(name)
        else Check(f"data: {name}", "warn", f"not there; run: fedlora fetch {name}")
        for name, source in SOURCES.items()
    ]


def _own_rows() -> Check:
    """What the task ``local`` can read."""
    missing = [
        f"{what} (no {package})"
        for what, package in {"parquet": "pyarrow", "pictures": "PIL"}.items()
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        return Check("own rows", "warn", f"task 'local' cannot read {', '.join(missing)}")
    return Check("own rows", "ok", "task 'local' reads CSV, JSON lines, parquet and pictures")


def _gradients() -> Check:
    """Opacus' hooks against a loop, on LoRA and a head in a tiny random BERT."""
    name = "per-example gradients"
    try:
        error = gradient_error()
    except (ImportError, FedloraError, RuntimeError, TypeError, ValueError) as reason:
        return Check(name, "fail", f"{type(reason).__name__}: {_first_line(reason)}")
    detail = f"Opacus against a loop over examples: relative error {error:.1e}"
    if error <= LARGEST_ERROR:
        return Check(name, "ok", detail)
    return Check(name, "fail", f"{detail}, allowed: {LARGEST_ERROR:.0e}; do not train with privacy")


def gradient_error() -> float:
    """``per_example_gradient_error`` of a tiny random BERT with LoRA, its factors not zero."""
    import numpy
    import torch

    from clients.self_test import per_example_gradient_error
    from fedlora.adapters import attach
    from fedlora.config import AdapterConfig, ModelConfig
    from fedlora.models import load_model
    from fedlora.seeds import torch_generator
    from fedlora.tasks.tweets import tweets

    base = load_model(ModelConfig(name="tiny_bert"), 2, "classify")
    adapted = attach(base, AdapterConfig(rank=4), seed=0)
    generator = torch_generator(0, "doctor")
    with torch.no_grad():
        for parameter in adapted.trained.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    examples = tweets().train.take(numpy.arange(6))
    labels = torch.arange(6) % 2
    batch = {**base.encode(examples)(range(6)), "labels": labels}
    return per_example_gradient_error(adapted.module, batch, _losses)


def _losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy of each example, ``[N]``."""
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    losses: Tensor = torch.nn.functional.cross_entropy(
        model(**inputs).logits, batch["labels"], reduction="none"
    )
    return losses


def _first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "no message")
