"""What a private run promises, what it spent, and what no promise covers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.calibration import ClientPlan, plan
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from fedlora.partition import partition
from fedlora.privacy import Accountant, PrivacyEvent, epsilon
from fedlora.tasks import load_task

NOT_COVERED = (
    "each client's number of examples (it weighs the average)",
    "training losses in rounds.jsonl",
    "who took part in a round, and when",
    "settings chosen by looking at private data, and other runs on the same data",
)
CLAIM = (
    "simulation only: the noise comes from a seeded generator, which whoever knows the seed can "
    "draw again"
)


def plan_run(config: RunConfig, examples: Sequence[int]) -> list[ClientPlan]:
    """Every client's noise, and what all planned rounds cost it at most.

    Raises:
        PrivacyError: the target cannot be had, or delta is too large for a client.
    """
    privacy = config.privacy
    return plan(
        examples,
        batch_size=config.train.batch_size,
        rounds=config.rounds,
        steps_per_round=[config.train.step_count(count) for count in examples],
        epsilon=privacy.epsilon,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        accountant=privacy.accountant,
        shared_noise=privacy.shared_noise,
    )


def plan_recipe(config: RunConfig) -> list[ClientPlan]:
    """As ``plan_run``, from the recipe alone: the data is dealt, no model is loaded.

    Raises:
        ConfigError: the recipe asks for no privacy.
    """
    if config.privacy.unit == "none":
        raise ConfigError(
            "privacy.unit: found 'none', allowed here: 'example'; for instance --set "
            "privacy.unit=example --set privacy.epsilon=8.0"
        )
    parts = partition(load_task(config.task), config.clients, config.seed)
    return plan_run(config, [len(part) for part in parts])


def statement(
    config: RunConfig, planned: Sequence[ClientPlan], ledger: Ledger
) -> dict[str, Any]:  # Any: JSON values of several kinds
    """``privacy.json``: unit, relation, sampling, accountants, and each client's epsilon.

    ``epsilon`` is what the ledger says was spent, ``planned`` what all rounds would cost. Of the
    whole run both are the largest over clients, whose data must not overlap.
    """
    privacy, rows = config.privacy, []
    for client in planned:
        spent = ledger.events(client.client)
        rows.append(
            {
                "client": client.client,
                "examples": client.examples,
                "sample_rate": client.sample_rate,
                "noise_multiplier": client.noise_multiplier,
                "steps": sum(event.steps for event in spent),
                "epsilon": epsilon(spent, privacy.delta, privacy.accountant),
                "planned": client.epsilon,
            }
        )
    worst = max(planned, key=lambda client: rows[client.client]["epsilon"])
    events = ledger.events(worst.client)
    return {
        "unit": "one example of one client",
        "relation": "add or remove one example",
        "mechanism": "Gaussian noise on the sum of clipped per-example gradients",
        "sampling": "Poisson, each example by itself with its client's rate, in every step",
        "composition": "all steps of all rounds in which a client took part",
        "clip": privacy.clip,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "epsilon": rows[worst.client]["epsilon"],
        "planned": max(client.epsilon for client in planned),
        "target": privacy.epsilon,
        "accountants": {
            name: epsilon(events, privacy.delta, name) for name in ("prv", "rdp", "pld")
        },
        "rng": "simulation",
        "claim": CLAIM,
        "not_covered": list(NOT_COVERED),
        "clients": rows,
    }


Points = list[tuple[int, float]]  # round, epsilon after it


def planned_spending(config: RunConfig, client: ClientPlan) -> Points:
    """A client's epsilon after each round if it takes part in all."""
    privacy, steps = config.privacy, client.steps // config.rounds
    event = PrivacyEvent(client.sample_rate, client.noise_multiplier, steps)
    return [
        (done, epsilon([event] * done, privacy.delta, privacy.accountant))
        for done in range(1, config.rounds + 1)
    ]


def spent_by_round(folder: Path, found: dict[str, Any]) -> dict[int, Points]:
    """The epsilon after each round of the clients that spent most and least, from the ledger."""
    ledger = Ledger(folder / "ledger")
    order = sorted(found["clients"], key=lambda row: (row["epsilon"], row["client"]))
    lines: dict[int, Points] = {}
    for client in {row["client"] for row in (order[0], order[-1])}:
        charges = ledger.charges(client)
        lines[client] = [
            (number, epsilon([c.event for c in charges if c.round <= number], *_priced_by(found)))
            for number in sorted({charge.round for charge in charges})
        ]
    return lines


def in_words(found: dict[str, Any]) -> str:
    """The statement for a reader who decides whether to accept it."""
    accountants = ", ".join(f"{name} {value:.3f}" for name, value in found["accountants"].items())
    target = "none was set" if found["target"] is None else f"{found['target']:g}"
    open_points = "\n".join(f"  - {point}" for point in found["not_covered"])
    return f"""\
The adapters that clients sent are differentially private in their training examples: epsilon
{found["epsilon"]:.3f} at delta {found["delta"]:g} for the client that spent most (target {target};
all planned rounds would cost {found["planned"]:.3f}).

Unit protected:  {found["unit"]}
Neighbours:      {found["relation"]}
Mechanism:       {found["mechanism"]}, clip {found["clip"]:g}
Sampling:        {found["sampling"]}
Composition:     {found["composition"]}
Accountants:     {accountants} (claimed by {found["accountant"]})
Noise:           {found["claim"]}

Not covered:
{open_points}"""


def _priced_by(found: dict[str, Any]) -> tuple[float, Accountant]:
    """The delta and the accountant of a statement."""
    return found["delta"], found["accountant"]
