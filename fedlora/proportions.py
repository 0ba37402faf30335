"""Dealing rows so that each client has the label shares that are written for it."""

from __future__ import annotations

import math

import numpy
from numpy.typing import NDArray

from fedlora.config import ClientsConfig
from fedlora.errors import wrong

Rows = NDArray[numpy.int64]


def by_proportions(
    labels: Rows, names: tuple[str, ...], clients: ClientsConfig, generator: numpy.random.Generator
) -> tuple[Rows, ...]:
    """Rows of each client, sorted: as many for one as for another, drawn without replacement.

    They are the most for which every label suffices; counts of a label are rounded down.

    Args:
        labels: of all rows, ``[N]``, codes into ``names``.
        names: of the labels.
        clients: ``number`` of them, and their ``proportions``.
        generator: draws the rows.

    Raises:
        ConfigError: not one share for each client and label, or a client's do not sum to 1.
    """
    shares = clients.proportions
    if len(shares) != clients.number or any(
        len(own) != len(names) or not math.isclose(sum(own), 1.0, abs_tol=1e-6) for own in shares
    ):
        allowed = (
            f"for each of {clients.number} clients the shares of {len(names)} labels "
            f"({', '.join(names)}), summing to 1"
        )
        raise wrong("clients.proportions", [list(own) for own in shares], allowed)
    asked = numpy.array(shares)
    held = numpy.bincount(labels, minlength=len(names))
    wanted = asked.sum(axis=0)
    each = min(have / want for have, want in zip(held, wanted, strict=True) if want)
    counts = numpy.floor(each * asked + 1e-9).astype(numpy.int64)
    parts: list[list[Rows]] = [[] for _ in shares]
    for label, of_label in enumerate(counts.T):
        rows = generator.permutation(numpy.flatnonzero(labels == label))
        for own, end, count in zip(parts, numpy.cumsum(of_label), of_label, strict=True):
            own.append(rows[end - count : end])
    return tuple(numpy.sort(numpy.concatenate(own)) for own in parts)
