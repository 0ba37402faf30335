"""What a round's record tells trackers: numbers by names that stay."""

from __future__ import annotations

from fedlora.rounds import OverClients, RoundRecord


def scalars(record: RoundRecord, epsilon: float | None = None) -> dict[str, float]:
    """A record's numbers by name, without those that were not measured.

    ``/`` parts what trackers show together. ``epsilon`` is what was spent up to the round.
    """
    groups = record.groups
    found: dict[str, float | None] = {
        "accuracy/all": record.accuracy,
        "accuracy/mean": sum(groups.values()) / len(groups) if groups else None,
        "accuracy/worst": min(groups.values(), default=None),
        **{f"accuracy/group/{name}": value for name, value in groups.items()},
        "loss/held_out": record.loss,
        "loss/train": record.train_loss,
        "perplexity": record.perplexity,
        "epsilon": epsilon,
        "aggregation_error/all": record.aggregation_error,
        **{
            f"aggregation_error/layer/{name}": value
            for name, value in record.aggregation_error_by_layer.items()
        },
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "seconds/round": record.seconds,
        "seconds/virtual": record.virtual_seconds,
        "clients/merged": len(record.clients),
        "clients/failures": len(record.failures),
        "clip": record.clip,
        "staleness/mean": record.staleness_mean,
        "staleness/max": record.staleness_max,
    }
    for whose, rows in record.own_rows.items():
        found |= _over(f"own_rows/{whose}/accuracy", rows.accuracy)
        found |= _over(f"own_rows/{whose}/loss", rows.loss)
    return {name: float(value) for name, value in found.items() if value is not None}


def _over(name: str, clients: OverClients) -> dict[str, float | None]:
    """A number over clients."""
    return {
        f"{name}/mean": clients.mean,
        f"{name}/worst": clients.worst,
        f"{name}/spread": clients.spread,
    }
