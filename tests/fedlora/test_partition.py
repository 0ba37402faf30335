"""Dealing examples to clients."""

from __future__ import annotations

import numpy
import pytest

from fedlora import fetch
from fedlora.config import ClientsConfig, TaskConfig
from fedlora.errors import ConfigError
from fedlora.partition import SkewRow, by_own_groups, hold_back, partition, skew
from fedlora.tasks import load_task
from fedlora.tasks.task import Examples, Task

CLASSES = 4
GROUPS = 3
SOURCES = 12


def examples(rows: int, seed: int) -> Examples:
    """Random labels, groups and sources; source ``s`` appears at least ``s + 1`` times."""
    generator = numpy.random.default_rng(seed)
    sources = numpy.repeat(numpy.arange(SOURCES), numpy.arange(SOURCES) + 1)
    sources = numpy.concatenate([sources, numpy.full(rows - len(sources), SOURCES - 1)])
    return Examples(
        labels=generator.integers(CLASSES, size=rows),
        groups=generator.integers(GROUPS, size=rows),
        natural=tuple(f"source {source:02d}" for source in sources),
        texts=tuple(f"text {row}" for row in range(rows)),
    )


@pytest.fixture(scope="module")
def task() -> Task:
    """A made-up task of 600 rows."""
    return Task(
        name="made_up",
        objective="classify",
        label_names=tuple("abcd"),
        group_names=("red", "green", "blue"),
        train=examples(600, 0),
        validation=examples(100, 1),
        test=examples(100, 2),
    )


SPLITS = [
    ClientsConfig(split="group", number=GROUPS),
    ClientsConfig(split="natural", number=SOURCES),
    ClientsConfig(split="iid", number=7),
    ClientsConfig(split="dirichlet", number=7, alpha=0.5),
    ClientsConfig(split="pathological", number=7, classes=2),
    ClientsConfig(split="group_dirichlet", number=7, alpha=0.5),
]


@pytest.mark.parametrize("clients", SPLITS, ids=lambda clients: clients.split)
def test_every_row_has_one_client(task: Task, clients: ClientsConfig) -> None:
    parts = partition(task, clients, seed=3)
    assert len(parts) == clients.number
    assert all(part.dtype == numpy.int64 and (numpy.diff(part) > 0).all() for part in parts)
    assert numpy.array_equal(numpy.sort(numpy.concatenate(parts)), numpy.arange(600))


@pytest.mark.parametrize("clients", SPLITS, ids=lambda clients: clients.split)
def test_the_seed_decides(task: Task, clients: ClientsConfig) -> None:
    first, again, other = (partition(task, clients, seed) for seed in (3, 3, 4))
    assert all(map(numpy.array_equal, first, again))
    by_data = clients.split in ("group", "natural")  # nothing is drawn here
    assert all(map(numpy.array_equal, first, other)) == by_data


def test_group_gives_client_k_group_k(task: Task) -> None:
    parts = partition(task, ClientsConfig(split="group", number=GROUPS), seed=0)
    for client, part in enumerate(parts):
        assert set(task.train.groups[part].tolist()) == {client}


def test_group_needs_one_client_per_group(task: Task) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(task, ClientsConfig(split="group", number=9), seed=0)
    assert str(caught.value) == (
        "clients.number: found 9, allowed: 3, one per group of 'made_up' (red, green, blue)"
    )


def test_natural_clients_are_whole_sources_in_order(task: Task) -> None:
    parts = partition(task, ClientsConfig(split="natural", number=5), seed=0)
    names = [{task.train.natural[row] for row in part} for part in parts]
    assert all(len(name) == 1 for name in names)
    order = [name.pop() for name in names]
    assert order == sorted(order)
    counts = [task.train.natural.count(name) for name in order]
    assert counts == [len(part) for part in parts]
    other = partition(task, ClientsConfig(split="natural", number=5), seed=1)
    assert [part.tolist() for part in parts] != [part.tolist() for part in other]


def test_natural_takes_sources_that_are_large_enough(task: Task) -> None:
    clients = ClientsConfig(split="natural", number=4, min_examples=9)
    parts = partition(task, clients, seed=0)
    assert [len(part) >= 9 for part in parts] == [True] * 4
    with pytest.raises(ConfigError, match="found 5, allowed: at most 4, the natural sources"):
        partition(task, clients.model_copy(update={"number": 5}), seed=0)


def test_dirichlet_skews_labels_more_for_a_smaller_alpha(task: Task) -> None:
    def spread(alpha: float) -> float:
        clients = ClientsConfig(split="dirichlet", number=5, alpha=alpha)
        rows = skew(task, partition(task, clients, seed=0))
        return float(numpy.mean([max(row.labels.values()) / row.examples for row in rows]))

    assert spread(0.2) > spread(100.0) + 0.1


def test_dirichlet_that_gives_up_says_what_to_change(
    task: Task, capfd: pytest.CaptureFixture[str]
) -> None:
    clients = ClientsConfig(split="dirichlet", number=30, alpha=0.05, min_examples=10)
    with pytest.raises(ConfigError, match=r"clients\.alpha: with alpha 0\.05.*raise") as caught:
        partition(task, clients, seed=0)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_each_groups_clients_share_its_rows_with_skewed_labels(task: Task) -> None:
    """Seven clients of three groups: 0, 3, 6 of the first, 1 and 4, 2 and 5 of the others."""
    clients = ClientsConfig(split="group_dirichlet", number=7, alpha=0.2)
    parts = partition(task, clients, seed=1)
    for client, part in enumerate(parts):
        assert set(task.train.groups[part].tolist()) == {client % GROUPS}

    def spread(alpha: float) -> float:
        changed = clients.model_copy(update={"alpha": alpha})
        rows = skew(task, partition(task, changed, seed=1))
        return float(numpy.mean([max(row.labels.values()) / row.examples for row in rows]))

    assert spread(0.2) > spread(100.0) + 0.1
    whole = partition(task, clients.model_copy(update={"number": GROUPS}), seed=1)
    assert all(map(numpy.array_equal, whole, partition(task, SPLITS[0], seed=1)))


def test_a_groups_clients_do_not_depend_on_other_groups(task: Task) -> None:
    clients = ClientsConfig(split="group_dirichlet", number=6, alpha=0.5)
    parts = partition(task, clients, seed=2)
    labels = numpy.where(task.train.groups == 1, 0, task.train.labels)
    other = Examples(**{**vars(task.train), "labels": labels})
    changed = partition(Task(**{**vars(task), "train": other}), clients, seed=2)
    same = [numpy.array_equal(*pair) for pair in zip(parts, changed, strict=True)]
    assert same == [client % GROUPS != 1 for client in range(6)]


def test_groups_need_clients_and_rows(task: Task) -> None:
    clients = ClientsConfig(split="group_dirichlet", number=2)
    with pytest.raises(ConfigError) as caught:
        partition(task, clients, seed=0)
    assert str(caught.value) == (
        "clients.number: found 2, allowed: at least 3, the groups of 'made_up' (red, green, blue)"
    )
    with pytest.raises(ConfigError, match=r"group 'red' of 'made_up' has \d+ .* for 600 clients"):
        partition(task, clients.model_copy(update={"number": 1800}), seed=0)
    greedy = {"number": 30, "alpha": 0.05, "min_examples": 15}
    with pytest.raises(ConfigError, match=r"left one of 10 clients of group 'red' with fewer"):
        partition(task, clients.model_copy(update=greedy), seed=0)


@pytest.mark.parametrize("name", ["vader", "digits", "emoji"])
def test_thirty_clients_with_both_skews_on_real_data(name: str) -> None:
    """As in LoRA-FAIR's second setting: Dirichlet 0.5 inside each domain."""
    if not fetch.present(name):
        pytest.skip(f"needs: fedlora fetch {name}")
    task = load_task(TaskConfig(name=name))
    parts = partition(task, ClientsConfig(split="group_dirichlet", number=30, min_examples=2), 0)
    sizes = numpy.array([len(part) for part in parts])
    assert sizes.sum() == len(task.train) and sizes.min() >= 2
    largest = [max(row.labels.values()) / row.examples for row in skew(task, parts)]
    classes = len(task.label_names)
    assert numpy.mean(largest) > {2: 0.65}.get(classes, 2.5 / classes)


def test_natural_split_prints_nothing(task: Task, capfd: pytest.CaptureFixture[str]) -> None:
    partition(task, ClientsConfig(split="natural", number=5), seed=0)
    assert capfd.readouterr() == ("", "")


def test_pathological_clients_have_their_number_of_classes(task: Task) -> None:
    clients = ClientsConfig(split="pathological", number=6, classes=2)
    rows = skew(task, partition(task, clients, seed=0))
    assert all(sum(count > 0 for count in row.labels.values()) == 2 for row in rows)
    with pytest.raises(ConfigError, match=r"clients\.classes: found 5, allowed: at most 4"):
        partition(task, clients.model_copy(update={"classes": 5}), seed=0)


def test_proportions_are_those_written_and_as_large_as_the_labels_allow(task: Task) -> None:
    shares = ((0.1, 0.9, 0.0, 0.0), (0.9, 0.1, 0.0, 0.0), (0.25, 0.25, 0.5, 0.0))
    clients = ClientsConfig(split="proportions", number=3, proportions=shares)
    parts = partition(task, clients, seed=0)
    rows = [row for part in parts for row in part]
    assert len(set(rows)) == len(rows)
    held = numpy.bincount(task.train.labels, minlength=CLASSES)
    each = min(held[0] / 1.25, held[1] / 1.25, held[2] / 0.5)
    for own, row in zip(shares, skew(task, parts), strict=True):
        assert row.labels == {
            name: int(each * share + 1e-9) for name, share in zip("abcd", own, strict=True)
        }
    again, other = partition(task, clients, seed=0), partition(task, clients, seed=1)
    assert all(map(numpy.array_equal, parts, again))
    assert not all(map(numpy.array_equal, parts, other))


@pytest.mark.parametrize(
    "shares",
    [
        (),
        ((0.5, 0.5, 0.0, 0.0),),
        ((0.5, 0.5, 0.0), (0.5, 0.5, 0.0)),
        ((0.5, 0.5, 0.0, 0.0), (0.5, 0.4, 0.0, 0.0)),
    ],
)
def test_proportions_are_one_share_for_each_label(
    task: Task, shares: tuple[tuple[float, ...], ...]
) -> None:
    clients = ClientsConfig(split="proportions", number=2, proportions=shares)
    allowed = r"for each of 2 clients the shares of 4 labels \(a, b, c, d\), summing to 1"
    with pytest.raises(ConfigError, match=rf"clients\.proportions: found .*, allowed: {allowed}"):
        partition(task, clients, seed=0)


def test_a_client_with_too_few_examples_is_named(task: Task) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(task, ClientsConfig(split="iid", number=590, min_examples=2), seed=0)
    assert "client(s) 10, 11, 12, 13, 14, 15, 16, 17 and 572 more" in str(caught.value)
    assert "lower clients.min_examples" in str(caught.value)
    empty = Task(
        **{**vars(task), "train": task.train.take(numpy.flatnonzero(task.train.groups != 1))}
    )
    with pytest.raises(ConfigError, match=r"client\(s\) 1 would have fewer than 1"):
        partition(empty, ClientsConfig(split="group", number=GROUPS), seed=0)


def test_more_clients_than_examples(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"clients\.number: found 601, allowed: at most 600"):
        partition(task, ClientsConfig(split="iid", number=601), seed=0)


def test_one_client_can_hold_everything(task: Task) -> None:
    """As the centralised bound needs it."""
    (part,) = partition(task, ClientsConfig(split="iid", number=1), seed=0)
    assert numpy.array_equal(part, numpy.arange(600))


@pytest.mark.parametrize(
    "clients",
    [*SPLITS, ClientsConfig(split="group_dirichlet", number=5)],
    ids=lambda clients: f"{clients.split} {clients.number}",
)
def test_clients_divide_the_held_out_rows_of_their_groups(
    task: Task, clients: ClientsConfig
) -> None:
    """Each row is measured by one client, which trains on its group, and the load is even."""
    parts, trained, held = partition(task, clients, seed=3), task.train.groups, task.test.groups
    found = [by_own_groups(k, held, trained, parts) for k in range(clients.number)]
    assert numpy.array_equal(numpy.sort(numpy.concatenate(found)), numpy.arange(len(held)))
    for rows, part in zip(found, parts, strict=True):
        assert set(held[rows].tolist()) <= set(trained[part].tolist())
        assert (numpy.diff(rows) > 0).all()
    for group in range(GROUPS):
        taken = [int((held[rows] == group).sum()) for rows in found]
        able = [n for n, part in zip(taken, parts, strict=True) if (trained[part] == group).any()]
        assert max(able) - min(able) <= 1


def test_skew_counts_labels_and_groups(task: Task) -> None:
    table = skew(task, (numpy.flatnonzero(task.train.labels == 1), numpy.array([], dtype=int)))
    reds, greens, blues = numpy.bincount(task.train.groups[task.train.labels == 1])
    size = int((task.train.labels == 1).sum())
    assert table[0] == SkewRow(
        client=0,
        examples=size,
        labels={"a": 0, "b": size, "c": 0, "d": 0},
        groups={"red": reds, "green": greens, "blue": blues},
    )
    assert table[1].examples == 0 and set(table[1].labels.values()) == {0}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99, 1e-9])
def test_rows_are_held_back_or_train_and_every_client_has_both(task: Task, share: float) -> None:
    parts = partition(task, SPLITS[3], seed=3)
    training, held = hold_back(parts, share, seed=3)
    for whole, left, taken in zip(parts, training, held, strict=True):
        assert numpy.array_equal(numpy.sort(numpy.concatenate([left, taken])), whole)
        assert (numpy.diff(left) > 0).all() and (numpy.diff(taken) > 0).all()
        assert len(taken) == min(len(whole) - 1, max(1, round(share * len(whole))))


def test_the_seed_and_the_client_decide_what_is_held_back() -> None:
    rows = numpy.arange(40)
    first, again, other = (hold_back((rows, rows), 0.25, seed)[1] for seed in (3, 3, 4))
    assert all(map(numpy.array_equal, first, again))
    assert not any(map(numpy.array_equal, first, other))
    assert not numpy.array_equal(first[0], first[1])


def test_a_single_row_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match=r"client\(s\) 1 have a single row.*min_examples to 2"):
        hold_back((numpy.arange(2), numpy.arange(1)), 0.2, 0)
