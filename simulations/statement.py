"""What a private run promises, what it spent, and what no promise covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.calibration import ClientPlan, plan, plan_clients
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.ledger import Ledger
from fedlora.partition import deal
from fedlora.privacy import RELATIONS, Accountant, PrivacyEvent, epsilon
from strategies.client_privacy import sampled

if TYPE_CHECKING:
    from simulations.census import Census


@dataclass(frozen=True)
class Wording:
    """How a statement names what is protected, and by what."""

    unit: str
    covered: str
    mechanism: str
    composition: str
    disjoint: str
    not_covered: tuple[str, ...]


OTHERS = (
    "accuracies and losses on held-out examples",
    "settings chosen by looking at private data, and other runs with a ledger of their own",
)
WORDINGS = {
    "example": Wording(
        unit="one example of one client",
        covered="The adapters that clients sent are differentially private in their training "
        "examples",
        mechanism="Gaussian noise on the sum of clipped per-example gradients",
        composition="all steps of all rounds in which a client took part",
        disjoint="no example lies with two clients; if one does, their epsilons add up",
        not_covered=(
            "each client's number of examples (it weighs the average)",
            "training losses in rounds.jsonl",
            "who took part in a round, and when, and whose pack did not fit into memory",
            *OTHERS,
        ),
    ),
    "client": Wording(
        unit="one client with all its examples",
        covered="The global adapters that the server sent and saved are differentially private "
        "in each whole client",
        mechanism="Gaussian noise on the sum of clipped updates, added by the server",
        composition="all rounds",
        disjoint="no person lies with two clients; if one does, the clients' epsilons add up",
        not_covered=(
            "what the server itself sees: each client's update without noise",
            "rounds.jsonl: training losses, who took part or failed, and whose pack did not fit",
            *OTHERS,
        ),
    ),
}
SPENT = {  # where the ledgers are
    "server": "as the ledgers say",
    "clients": "not known to the server, since clients keep ledgers of their own; every epsilon "
    "here is what all planned rounds cost, once each",
}
TOLD = (
    "each client's number of examples, told to the server before round 1 to plan the noise, and "
    "the noise of all clients, which goes to each"
)
RELATION_WORDS = {
    "add_or_remove_one": "add or remove one {unit}",
    "replace_one": "replace one {unit} by another",
}
CLAIMS = {
    "simulation": "simulation only: the noise comes from a seeded generator, which whoever knows "
    "the seed can draw again",
    "os": "beyond simulation: noise and samples come from the operating system (ChaCha20), the "
    "noise as half the sum of four Gaussians in float64",
}


def plan_run(config: RunConfig, examples: Sequence[int]) -> list[ClientPlan]:
    """Every client's noise, and what all planned rounds cost it at most.

    Raises:
        PrivacyError: the target cannot be had, or delta is too large for a client.
    """
    privacy, clients = config.privacy, config.clients
    if privacy.unit == "client":
        q, mechanism = sampled(clients.number, clients.fraction_train, privacy.sampling)
        return plan_clients(
            examples,
            sample_rate=q,
            rounds=config.rounds,
            mechanism=mechanism,
            epsilon=privacy.epsilon,
            noise_multiplier=privacy.noise_multiplier,
            delta=privacy.delta,
            accountant=privacy.accountant,
        )
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
            "privacy.unit: found 'none', allowed here: 'example', 'client'; for instance --set "
            "privacy.unit=example --set privacy.epsilon=8.0"
        )
    _, parts = deal(config.task, config.clients, config.seed)
    return plan_run(config, [len(part) for part in parts])


def ledger_folder(config: RunConfig, folder: Path) -> Path:
    """Where the ledgers of a run lie: its own, or those that several runs share."""
    return Path(config.privacy.ledger or folder / "ledger").resolve()


def statement(
    config: RunConfig, planned: Sequence[ClientPlan], ledger: Ledger, known: Census
) -> dict[str, Any]:  # Any: JSON values of several kinds
    """``privacy.json``: unit, relation, sampling, accountants, and each client's epsilon.

    ``epsilon`` is what the ledger says was spent, ``planned`` what all rounds would cost. Of the
    whole run both are the largest over clients, whose data must not overlap. Where the clients'
    ledgers are their own, ``epsilon`` is what all rounds would cost too.
    """
    privacy, words = config.privacy, WORDINGS[config.privacy.unit]
    spent = {
        client.client: [client.event(client.steps)]
        if known.own_ledgers
        else _spent(config, ledger, client)
        for client in planned
    }
    rows: list[dict[str, Any]] = []  # Any: JSON values of several kinds
    for client in planned:
        events = spent[client.client]
        rows.append(
            {
                "client": client.client,
                "examples": client.examples or None,
                "sample_rate": client.sample_rate,
                "noise_multiplier": client.noise_multiplier,
                "steps": sum(event.steps for event in events),
                "epsilon": epsilon(events, privacy.delta, privacy.accountant),
                "planned": client.epsilon,
            }
        )
    worst = max(planned, key=lambda client: rows[client.client]["epsilon"])
    mechanism = worst.mechanism
    fixed = mechanism == "fixed_size_gaussian"
    names: tuple[Accountant, ...] = ("rdp",) if fixed else ("prv", "rdp", "pld")
    return {
        "unit": words.unit,
        "relation": RELATION_WORDS[RELATIONS[mechanism]].format(unit=privacy.unit),
        "mechanism": words.mechanism,
        "sampling": _sampling(config),
        "composition": words.composition,
        "clip": privacy.clip,
        "adaptive_clip": privacy.adaptive_clip,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "epsilon": rows[worst.client]["epsilon"],
        "planned": max(client.epsilon for client in planned),
        "target": privacy.epsilon,
        "spent": SPENT["clients" if known.own_ledgers else "server"],
        "accountants": {name: epsilon(spent[worst.client], privacy.delta, name) for name in names},
        "rng": privacy.rng,
        "claim": CLAIMS[privacy.rng],
        "assumed": words.disjoint,
        "covered": words.covered,
        "not_covered": [*words.not_covered, *([TOLD] if known.told else [])],
        "ledger": privacy.ledger or "ledger",
        "clients": rows,
    }


def _spent(config: RunConfig, ledger: Ledger, client: ClientPlan) -> list[PrivacyEvent]:
    """What the ledger holds against a client."""
    return ledger.events(client.client if config.privacy.unit == "example" else None)


def _sampling(config: RunConfig) -> str:
    """How the records of a noisy sum are drawn."""
    if config.privacy.unit == "example":
        return "Poisson, each example by itself with its client's rate, in every step"
    clients = config.clients
    share = f"{100 * clients.fraction_train:g} % of the {clients.number} clients"
    return {
        "poisson": f"Poisson, each client by itself, {share} on average in every round",
        "fixed": f"{share} in every round, drawn without replacement",
        "none": f"{share} in every round; no amplification is claimed",
    }[config.privacy.sampling]


Points = list[tuple[int, float]]  # round, epsilon after it


def planned_spending(config: RunConfig, client: ClientPlan) -> Points:
    """A client's epsilon after each round if it takes part in all."""
    privacy, event = config.privacy, client.event(client.steps // config.rounds)
    return [
        (done, epsilon([event] * done, privacy.delta, privacy.accountant))
        for done in range(1, config.rounds + 1)
    ]


def spent_by_round(folder: Path, found: dict[str, Any]) -> dict[int, Points]:
    """The epsilon after each round of the clients that spent most and least, from the ledger.

    Where whole clients are protected, all have spent the same. Where the server does not know what
    was spent, there are no rounds.
    """
    ledger = Ledger(folder / found["ledger"])
    order = sorted(found["clients"], key=lambda row: (row["epsilon"], row["client"]))
    lines: dict[int, Points] = {}
    for client in {row["client"] for row in (order[0], order[-1])}:
        charges = ledger.charges(client if found["unit"] == WORDINGS["example"].unit else None)
        lines[client] = [
            (number, epsilon([c.event for c in charges if c.round <= number], *_priced_by(found)))
            for number in sorted({charge.round for charge in charges})
        ]
    return lines


def in_words(found: dict[str, Any]) -> str:
    """The statement for a reader who decides whether to accept it."""
    accountants = ", ".join(f"{name} {value:.3f}" for name, value in found["accountants"].items())
    target = "none was set" if found["target"] is None else f"{found['target']:g}"
    clip = "clip at first" if found["adaptive_clip"] else "clip"
    open_points = "\n".join(f"  - {point}" for point in found["not_covered"])
    return f"""\
{found["covered"]}: epsilon {found["epsilon"]:.3f} at delta {found["delta"]:g} for the client that
spent most (target {target}; all planned rounds would cost {found["planned"]:.3f}).

Unit protected:  {found["unit"]}
Neighbours:      {found["relation"]}
Mechanism:       {found["mechanism"]}, {clip} {found["clip"]:g}
Spent:           {found["spent"]}
Sampling:        {found["sampling"]}
Composition:     {found["composition"]}
Accountants:     {accountants} (claimed by {found["accountant"]})
Noise:           {found["claim"]}
Assumed:         {found["assumed"]}

Not covered:
{open_points}"""


def _priced_by(found: dict[str, Any]) -> tuple[float, Accountant]:
    """The delta and the accountant of a statement."""
    return found["delta"], found["accountant"]
