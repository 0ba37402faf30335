"""Masks: they cancel to the bit, hide to the byte, and open to enough clients only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest
import torch
from scipy.stats import chi2

from fedlora import shares
from fedlora.errors import WireError
from fedlora.fixed_point import FixedPoint, Words, clear_sums
from fedlora.masks import (
    SECRET,
    PublicKeys,
    Roster,
    Secrets,
    agreed,
    check_key,
    keystream,
    masked,
    opened_shares,
    sealed_shares,
    unmasked,
)

NODES = [3, 8, 2**63 + 5, 2**63 + 6, 2**64 - 1]  # as large as Flower's may be
ONE_IN_A_MILLION = 1e-6


class Clients:
    """Five clients with numbers of their own."""

    def __init__(self, count: int = 300, bits: int = 32) -> None:
        self.secrets = {node: Secrets.fresh() for node in NODES}
        keys = {node: mine.public() for node, mine in self.secrets.items()}
        self.roster = Roster("a sum", 4, keys)
        self.fixed = FixedPoint(16.0, bits, 1000, len(NODES))
        draw = numpy.random.default_rng(5)
        self.values = {node: draw.normal(size=count) for node in NODES}
        self.weights = {node: 10 + place for place, node in enumerate(NODES)}
        self.sealed = {n: sealed_shares(self.roster, n, s) for n, s in self.secrets.items()}

    def words(self, node: int) -> Words:
        return self.fixed.words(self.fixed.levels(self.values[node], "x"), self.weights[node])

    def sent(self, node: int, included: Sequence[int]) -> Words:
        return masked(self.words(node), self.roster, node, self.secrets[node], included)

    def recovered(self, owner: int, holders: Sequence[int], which: int) -> bytes:
        held = {
            self.roster.place(holder): opened_shares(
                self.roster, holder, self.secrets[holder], owner, self.sealed[owner][holder]
            )[which]
            for holder in holders
        }
        return shares.combine(held, self.roster.threshold, SECRET)

    def total(self, included: Sequence[int], lasted: Sequence[int]) -> list[int]:
        parts = [self.sent(node, included) for node in lasted]
        total = numpy.sum(parts, axis=0, dtype=self.fixed.dtype)
        own = {node: self.recovered(node, lasted, 0) for node in lasted}
        dropped = {n: self.recovered(n, lasted, 1) for n in included if n not in lasted}
        return list(self.fixed.whole(unmasked(total, self.roster, own, dropped)).tolist())

    def clear(self, lasted: Sequence[int]) -> list[int]:
        values = [self.values[node].tolist() for node in lasted]
        return clear_sums(values, [self.weights[node] for node in lasted], self.fixed)


@pytest.mark.parametrize("bits", [32, 12])
@pytest.mark.parametrize(
    ("included", "lasted"),
    [(NODES, NODES), (NODES, NODES[1:]), (NODES, NODES[:4]), (NODES[:4], NODES[:4])],
)
def test_the_sum_of_who_lasts_is_the_sum_in_the_clear(
    included: list[int], lasted: list[int], bits: int
) -> None:
    clients = Clients(bits=bits)
    assert clients.fixed.dtype == ("uint64" if bits == 32 else "uint32")
    assert clients.total(included, lasted) == clients.clear(lasted)


def uneven(words: Words) -> float:
    """The chance that uniform bytes are as uneven as the words' (or as even): the less likely."""
    counts = numpy.bincount(words.view(numpy.uint8), minlength=256)
    expected = counts.sum() / 256
    found = float(((counts - expected) ** 2 / expected).sum())
    return 2 * float(min(chi2.sf(found, 255), chi2.cdf(found, 255)))


@pytest.mark.parametrize("bits", [32, 12])
def test_an_upload_looks_uniform_to_whoever_lacks_a_mask(bits: int) -> None:
    """Bytes of one upload; also where all its masks with others are known, but not its own."""
    clients, node = Clients(8_000, bits), NODES[1]
    width = numpy.dtype(clients.fixed.dtype).itemsize
    sent = clients.sent(node, NODES)
    bare = unmasked(sent, clients.roster, {node: clients.secrets[node].own}, {})
    pairs_gone = sent.copy()
    for other in NODES:  # as if all others had dropped out and told their keys
        if other != node:
            key = clients.secrets[other].mask
            pairs_gone = unmasked(pairs_gone, clients.roster, {}, {other: key})
            low, high = sorted((node, other))
            purpose = f"mask a sum {low} {high}"
            stream = keystream(
                agreed(key, clients.roster.keys[node].mask, purpose), 8_000, sent.dtype.name
            )
            pairs_gone += stream if other < node else -stream
    own = pairs_gone - clients.words(node)
    known = unmasked(numpy.zeros_like(own), clients.roster, {node: clients.secrets[node].own}, {})
    assert numpy.array_equal(own, -known)  # nothing but its own mask is left
    for hidden in (sent, bare, pairs_gone):
        assert uneven(hidden) > ONE_IN_A_MILLION
        for place in range(width):
            column = numpy.ascontiguousarray(hidden.view(numpy.uint8).reshape(-1, width)[:, place])
            assert uneven(column) > ONE_IN_A_MILLION / width
    assert uneven(clients.words(node)) < ONE_IN_A_MILLION


def test_too_few_shares_open_nothing() -> None:
    clients = Clients()
    secret = clients.secrets[NODES[0]]
    assert clients.recovered(NODES[0], NODES[:4], 0) == secret.own
    assert clients.recovered(NODES[0], NODES[1:], 1) == secret.mask
    with pytest.raises(WireError, match="3 shares of a secret, 4 needed"):
        clients.recovered(NODES[0], NODES[:3], 0)
    held = [shares.split(secret.own, 4, 5)[n] for n in range(3)]
    for _ in range(20):  # a threshold that somebody lowers gives another secret, if it gives any
        with_fewer = {share[0]: share for share in held}
        try:
            assert shares.combine(with_fewer, 3, SECRET) != secret.own
        except WireError:
            continue


def test_shares_are_checked() -> None:
    found = dict(enumerate(shares.split(b"s" * SECRET, 3, 5), 1))
    assert shares.combine(found, 3, SECRET) == b"s" * SECRET
    for bad in ({1: found[2]}, {1: found[1][:-1]}, {1: b""}):
        with pytest.raises(WireError, match="length or the number"):
            shares.combine({**found, **bad}, 3, SECRET)
    with pytest.raises(WireError, match="not of one secret"):
        other = dict(enumerate(shares.split(b"s" * (SECRET + 4), 3, 5), 1))
        shares.combine(other, 3, SECRET)


def test_a_recovered_key_is_held_to_the_public_one() -> None:
    clients = Clients()
    words = clients.sent(NODES[0], NODES)
    with pytest.raises(WireError, match="the recovered key is not that of client"):
        unmasked(words, clients.roster, {}, {NODES[1]: clients.secrets[NODES[2]].mask})


def test_sealed_shares_open_to_their_receiver_alone_and_as_they_were() -> None:
    clients = Clients(3)
    sender, receiver, other = NODES[:3]
    sealed, mine = clients.sealed[sender][receiver], clients.secrets[receiver]
    assert opened_shares(clients.roster, receiver, mine, sender, sealed)
    elsewhere = replace(clients.roster, token="another sum")
    broken = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for roster, node, keys, given in [
        (clients.roster, other, clients.secrets[other], sealed),
        (elsewhere, receiver, mine, sealed),
        (clients.roster, receiver, mine, broken),
        (clients.roster, receiver, mine, b""),
        (clients.roster, receiver, mine, clients.sealed[other][receiver]),
    ]:
        with pytest.raises(WireError, match=f"shares that client {sender} did not seal"):
            opened_shares(roster, node, keys, sender, given)


def test_no_seed_decides_a_secret() -> None:
    def drawn() -> tuple[object, ...]:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        mine = Secrets.fresh()
        return mine.seal, mine.mask, mine.own, shares.split(b"s" * SECRET, 2, 2)[0]

    first, second = drawn(), drawn()
    assert len({*first[:3], *second[:3]}) == 6 and first[3] != second[3]


def test_every_use_has_a_key_of_its_own() -> None:
    """Of two sums, two pairs, and the two directions of sealing."""
    clients = Clients(8)
    node, other = NODES[0], NODES[1]
    mine, theirs = clients.secrets[node], clients.roster.keys[other]
    purposes = ("mask 1 3 8", "mask 2 3 8", "seal 1 3 8", "seal 1 8 3")
    keys = [agreed(mine.mask, theirs.mask, purpose) for purpose in purposes]
    assert len({*keys}) == 4
    assert agreed(mine.mask, theirs.mask, "x") == agreed(
        clients.secrets[other].mask, clients.roster.keys[node].mask, "x"
    )
    zero = numpy.zeros(8, clients.fixed.dtype)
    elsewhere = replace(clients.roster, token="another sum")
    found = [masked(zero, r, node, mine, NODES) for r in (clients.roster, elsewhere)]
    assert not numpy.array_equal(*found)


def test_a_roster_that_would_tell_of_one_client_is_refused() -> None:
    keys = {node: Secrets.fresh().public() for node in range(6)}
    Roster("t", 5, keys)
    Roster("t", 2, {n: keys[n] for n in (0, 1)})
    for threshold, count in [(4, 6), (7, 6), (1, 1), (1, 2), (2, 3), (0, 2)]:
        with pytest.raises(WireError, match="more than two thirds"):
            Roster("t", threshold, {n: keys[n] for n in range(count)})
    with pytest.raises(WireError, match="out of order"):
        Roster("t", 5, dict(reversed(keys.items())))
    with pytest.raises(WireError, match="the same key"):
        Roster("t", 5, {**keys, 5: PublicKeys(keys[0].mask, keys[5].mask)})


@pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33), bytes(32), b"\x01" + bytes(31)])
def test_a_key_that_is_none_is_refused(bad: bytes) -> None:
    check_key(Secrets.fresh().public().seal)
    with pytest.raises(WireError, match="a key that is none"):
        check_key(bad)
