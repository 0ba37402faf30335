"""How many workers a node holds, which one gets the next, and what its versions mean."""

from __future__ import annotations

from collections import Counter

import pytest

from fedlora.config import LaunchConfig
from simulations.installed import compared
from simulations.ray_nodes import Node, choose, room, wanted


@pytest.mark.parametrize(
    ("resources", "keys", "expected"),
    [
        ({"CPU": 4.0}, {}, 4),
        ({"CPU": 4.0}, {"threads": 3}, 1),
        ({"CPU": 0.3}, {"num_cpus": 0.1}, 3),
        ({}, {}, 0),
        ({"CPU": 9.0, "GPU": 2.0}, {"num_gpus": 0.25}, 8),
        ({"CPU": 9.0, "GPU": 2.0}, {"num_gpus": 0.6}, 2),  # one on each, not three on both
        ({"CPU": 9.0, "GPU": 3.0}, {"num_gpus": 2.0}, 1),
        ({"CPU": 9.0}, {"num_gpus": 1.0}, 0),
        ({"CPU": 9.0, "site": 1.0}, {"resources": {"site": 0.5}}, 2),
    ],
)
def test_room_is_what_fits_of_the_scarcest(
    resources: dict[str, float], keys: dict[str, object], expected: int
) -> None:
    assert room(resources, LaunchConfig.model_validate(keys)) == expected


def test_only_what_is_wanted_counts() -> None:
    assert wanted(LaunchConfig(threads=2)) == {"CPU": 2.0}
    some = LaunchConfig(num_cpus=0.5, num_gpus=1.0, resources={"site": 0.1})
    assert wanted(some) == {"CPU": 0.5, "GPU": 1.0, "site": 0.1}


def placed(nodes: list[Node], count: int, placement: str, unfit: str = "") -> list[str]:
    """Where so many workers go, one after the other; ``-`` where there is no room."""
    has: Counter[str] = Counter()
    found = []
    for _ in range(count):
        node = choose(nodes, lambda n: has[n.id], placement, lambda n: n.id != unfit)
        found.append(node.id if node else "-")
        has[found[-1]] += 1
    return found


def test_spread_and_pack() -> None:
    nodes = [Node("a", "", 2, 2), Node("b", "", 3, 3), Node("c", "", 0, 0)]
    assert placed(nodes, 6, "spread") == ["b", "a", "b", "a", "b", "-"]
    assert placed(nodes, 6, "pack") == ["a", "a", "b", "b", "b", "-"]
    assert placed(nodes, 3, "spread", unfit="b") == ["a", "a", "-"]


def test_nodes_that_others_fill_come_last() -> None:
    nodes = [Node("a", "", 4, 0), Node("b", "", 1, 1)]
    for placement in ("spread", "pack"):
        assert placed(nodes, 3, placement) == ["b", "a", "a"]


def test_other_versions_are_named_and_another_fedlora_is_refused() -> None:
    here = {"fedlora": "1a", "torch": "2.13.0", "numpy": "2.4"}
    assert compared(here, here) == ("", "")
    assert compared(here, {**here, "torch": "2.12.1"}) == (
        "torch is 2.12.1, 2.13.0 here; last digits may differ",
        "",
    )
    word, refused = compared(here, {"fedlora": "2b", "torch": "2.13.0"})
    assert word == ""
    assert refused.startswith("fedlora is 2b, 1a here, numpy is missing, 2.4 here; install the")
