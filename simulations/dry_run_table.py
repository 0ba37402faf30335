"""A dry run as people read it: what it found, line by line."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from fedlora.tasks.declared import Declared
from simulations.dry_run import DryRun
from simulations.forecast import Spread


def table(found: DryRun) -> Table:
    """All of it, a line for each thing."""
    title = f"{found.name}: {found.method}, {found.rounds} rounds; nothing was started"
    shown = Table("what", "how much", title=title, title_justify="left")
    for what, how_much in (*_sizes(found), *_measured(found)):
        shown.add_row(what, how_much)
    return shown


def _sizes(found: DryRun) -> Iterator[tuple[str, str]]:
    """What follows from the recipe, the data and the shapes."""
    sent, about = found.traffic, "" if found.traffic.exact else "about "
    yield "base model", f"{found.model}, {found.base_numbers:,} numbers"
    if said := found.declared:
        yield "task", f"{_task(said)}: as the recipe declares, not read"
    who = f"a client of rank {max(found.ranks)}" if found.ranks else "each client"
    yield "trained", f"{found.trained_numbers:,} numbers by {who}"
    yield "clients", f"{found.clients}, {about}{sent.clients:g} of them in a round"
    yield "examples of a client", _spread(found.examples)
    yield "steps of a client", f"{_spread(found.steps)}; {about}{found.total_steps:,.0f} in all"
    yield "clients in a pack", f"{found.pack}: {found.pack_because}"
    yield "workers", str(found.workers)
    for way, one, total in (("up", sent.up, sent.total_up), ("down", sent.down, sent.total_down)):
        yield f"bytes {way}", f"{about}{one:,.0f} in round 1, {about}{total:,.0f} in all"
    if noise := found.privacy:
        multiplier = _spread(noise.noise_multiplier)
        yield "noise multiplier", f"{multiplier}, of each {noise.unit}"
        yield "epsilon", f"{noise.epsilon:.4g} at delta {noise.delta:g}, after all rounds at most"


def _measured(found: DryRun) -> Iterator[tuple[str, str]]:
    """What was measured, or why it could not be."""
    memory, times, timing = found.memory, found.times, found.timing
    if memory.measured:
        yield "memory of a worker", f"{_mb(memory.worker)} above {_mb(memory.imports)} of imports"
    else:
        yield "memory of a worker", f"{_mb(memory.worker)} by formula, activations not counted"
    if memory.gpu:
        yield "GPU memory of a worker", _mb(memory.gpu)
    yield "memory of all workers", _mb(memory.all_workers)
    if times and timing:
        together = f" of {found.pack} clients" if found.pack > 1 else ""
        yield "a step", f"{timing.step:.3g} s{together}, measured"
        yield "training", f"{times.training:.3g} s a round"
        yield "evaluation", f"{times.evaluation:.3g} s a round"
        yield "loading", f"{times.start:.3g} s once"
        yield "the whole run", f"{times.total:.3g} s"
    if found.missing:
        yield "not measured", found.missing


def _task(said: Declared) -> str:
    """What a recipe declares of its data."""
    kinds = f"{said.labels} labels, " if said.labels else "no labels, "
    kept = f"{said.rows:,} rows, {kinds}{said.groups} group(s), {said.kept:,} to train on"
    return f"{kept}, pictures of {_mb(said.picture_bytes)}" if said.picture_bytes else kept


def _spread(spread: Spread) -> str:
    """Least, median and greatest, or the one that all are."""
    least, median, greatest = map(_number, (spread.least, spread.median, spread.greatest))
    return least if least == greatest else f"{least} to {greatest}, median {median}"


def _number(number: float) -> str:
    """Whole from ten thousand on, else four digits."""
    return f"{number:,.0f}" if number >= 1e4 else f"{number:.4g}"


def _mb(number: int) -> str:
    """Bytes in MB."""
    return f"{number / 1e6:,.0f} MB" if number >= 1e7 else f"{number / 1e6:.2f} MB"
