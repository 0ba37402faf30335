"""The server's part in one masked sum: who takes part, and what unmasks those who last."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora import npy, shares
from fedlora.config_secure import SecureConfig
from fedlora.errors import WireError
from fedlora.fixed_point import FixedPoint, Words
from fedlora.masks import SECRET, PublicKeys, Roster, check_key, unmasked
from fedlora.records import arrays_in, configs_in
from fedlora.rounds import MASKED, Failure
from strategies.replies import refusal

Given = TypeVar("Given")
NONCE_AND_TAG = 28  # bytes that sealing adds to two shares
SHARE = shares.INDEX + 2 * SECRET


@dataclass
class MaskedSum:
    """One sum over the clients that last: their keys, their shares, and at last the sum.

    Attributes:
        grid: that messages go through.
        server_round, timeout: of each stage.
        asked: client numbers by node, of all who are asked.
        threshold: see ``Roster``.
        fixed: how sums count.
        failures: to which is added who did not count, and why.
        after: the token of the pass before, if there was one.
        token: names the sum.
        roster: of those who gave keys.
        sealed: of those who gave shares, what each sealed for each other; see ``open``.
    """

    grid: Grid
    server_round: int
    timeout: float
    asked: Mapping[int, int]
    threshold: int
    fixed: FixedPoint
    failures: list[Failure]
    after: str = ""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    roster: Roster = field(init=False)
    sealed: dict[int, dict[int, bytes]] = field(init=False)

    @staticmethod
    def of(
        grid: Grid,
        server_round: int,
        timeout: float,
        asked: Mapping[int, int],
        config: SecureConfig,
        failures: list[Failure],
    ) -> MaskedSum:
        """Over these clients.

        Raises:
            ConfigError: sums over so many do not fit into words.
        """
        count = len(asked)
        fixed = FixedPoint(config.clip, config.bits, config.examples, max(count, 1))
        needed = config.needed(count)
        return MaskedSum(grid, server_round, timeout, asked, needed, fixed, failures)

    def open(self) -> list[int]:
        """Ask for keys, then for shares; the nodes that gave both are those to be in the sum.

        Raises:
            WireError: they are too few.
        """
        ask: dict[str, str] = {"token": self.token}
        if self.after:
            ask["after"] = self.after
        nodes = sorted(self.asked)
        found = self._ask("keys", dict.fromkeys(nodes, ConfigRecord({**ask})), self._keys)
        for node in _with_others_keys(found):
            del found[node]
            self._refuse(node, "keys: gave a key that another client has")
        self._enough(found, "gave keys")
        self.roster = Roster(self.token, self.threshold, dict(sorted(found.items())))
        told = ConfigRecord(
            {
                "token": self.token,
                "threshold": self.threshold,
                "nodes": _names(self.roster.keys),
                "seal-keys": [keys.seal for keys in self.roster.keys.values()],
                "mask-keys": [keys.mask for keys in self.roster.keys.values()],
            }
        )
        self.sealed = self._ask("shares", dict.fromkeys(self.roster.keys, told), self._sealed)
        self._enough(self.sealed, "gave shares")
        return sorted(self.sealed)

    def turn(self, node: int, order: str) -> ConfigRecord:
        """What a client needs to put in its part, summed by ``order``."""
        fixed = self.fixed
        return ConfigRecord(
            {
                "token": self.token,
                "order": order,
                "included": _names(self.sealed),
                "sealed": [self.sealed[sender][node] for sender in sorted(self.sealed)],
                "clip": fixed.clip,
                "bits": fixed.bits,
                "examples": fixed.examples,
                "of": fixed.clients,
            }
        )

    def total(self, parts: Mapping[int, Words]) -> Words:
        """The sum of the masked parts, unmasked by those who sent them.

        Raises:
            WireError: too few of them are left, or their shares are wrong.
        """
        self._enough(parts, "sent their part")
        total = numpy.zeros_like(next(iter(parts.values())))
        for words in parts.values():
            total += words
        lasted = sorted(parts)
        dropped = sorted(self.sealed.keys() - parts.keys())
        told = ConfigRecord(
            {"token": self.token, "lasted": _names(lasted), "dropped": _names(dropped)}
        )
        found = self._ask("unmask", dict.fromkeys(lasted, told), self._shares)
        self._enough(found, "gave the shares that unmask")
        own, mask = dict[int, bytes](), dict[int, bytes]()
        for place, owner in enumerate(sorted(self.sealed)):
            held = {self.roster.place(node): given[place] for node, given in found.items()}
            held = {index: share for index, share in held.items() if shares.number(share) == index}
            try:
                secret = shares.combine(held, self.threshold, SECRET)
            except WireError as error:
                who = f"client {self.asked[owner]}"
                raise WireError(f"masked sums: of {who}'s secret there are {error}") from None
            (own if owner in parts else mask)[owner] = secret
        return unmasked(total, self.roster, own, mask)

    def _ask(
        self,
        step: str,
        records: Mapping[int, ConfigRecord],
        read: Callable[[ConfigRecord], Given],
    ) -> dict[int, Given]:
        """What the nodes answer to one step; who does not, or wrongly, is noted."""
        messages = [
            Message(
                RecordDict({MASKED: record}), node, f"query.{step}", group_id=str(self.server_round)
            )
            for node, record in records.items()
        ]
        found, reasons = dict[int, Given](), dict.fromkeys(records, "no reply")
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            node = reply.metadata.src_node_id
            if node not in records or node in found:
                continue  # nobody's, or one too many
            try:
                if reply.has_error():
                    raise WireError(reply.error.reason or f"error code {reply.error.code}")
                answer = configs_in(reply.content).get(MASKED, ConfigRecord())
                if answer.get("token") != self.token:
                    raise WireError("answers for another sum")
                found[node] = read(answer)
            except WireError as error:
                reasons[node] = str(error)
        for node, reason in reasons.items():
            if node not in found:
                self._refuse(node, f"{step}: {reason}")
        return found

    def _refuse(self, node: int, reason: str) -> None:
        """Note why a client does not count, or has helped no further."""
        self.failures.append(refusal(self.asked[node], "train", WireError(reason)))

    def _enough(self, found: Mapping[int, object], what: str) -> None:
        """Refuse to go on with too few."""
        if len(found) < self.threshold:
            raise WireError(
                f"masked sums: {len(found)} clients {what}, {self.threshold} needed "
                "(secure.threshold)"
            )

    def _keys(self, answer: ConfigRecord) -> PublicKeys:
        """A client's public keys."""
        seal, mask = answer.get("seal"), answer.get("mask")
        if not (isinstance(seal, bytes) and isinstance(mask, bytes) and seal != mask):
            raise WireError("gave no two keys")
        for key in (seal, mask):
            check_key(key)
        return PublicKeys(seal, mask)

    def _sealed(self, answer: ConfigRecord) -> dict[int, bytes]:
        """What a client sealed for each of the roster."""
        size = 2 * SHARE + NONCE_AND_TAG
        sealed = _bytes(answer, "sealed", len(self.roster.keys), {size})
        return dict(zip(self.roster.keys, sealed, strict=True))

    def _shares(self, answer: ConfigRecord) -> Sequence[bytes]:
        """The shares that a client revealed, nothing where it got none."""
        return _bytes(answer, "shares", len(self.sealed), {0, SHARE})


def words_in(content: RecordDict, count: int, dtype: str) -> Words:
    """The masked words in a reply.

    Raises:
        WireError: they are not ``count`` words of this type.
    """
    arrays = [array for record in arrays_in(content).values() for array in record.values()]
    if len(arrays) != 1:
        raise WireError(f"sent {len(arrays)} arrays, expected 1 of masked words")
    data, room = arrays[0].data, numpy.dtype(dtype).itemsize * count + npy.LONGEST
    try:
        if len(data) > room:
            raise ValueError(f"it is {len(data)} bytes")
        inside = npy.header(data)
        if (npy.name(inside.dtype), inside.shape) != (dtype, (count,)):
            raise ValueError(f"it is {inside.dtype}{list(inside.shape)}")
        return cast(Words, npy.view(data))
    except Exception as error:  # NumPy's header parser raises whatever its tokeniser does
        raise WireError(f"sent no masked words, {dtype}[{count}]: {error}") from None


def told_arrays(told: ArrayRecord, turn: ConfigRecord) -> RecordDict:
    """What asks a client for its part of a second pass."""
    return RecordDict({"told": told, MASKED: turn})


def _with_others_keys(found: Mapping[int, PublicKeys]) -> list[int]:
    """Who gave a key that somebody else has given too."""
    given = [key for keys in found.values() for key in (keys.seal, keys.mask)]
    return [n for n, keys in found.items() if given.count(keys.seal) + given.count(keys.mask) > 2]


def _names(nodes: Mapping[int, object] | Sequence[int]) -> list[str]:
    """Node ids as text, since they need not fit into Flower's integers."""
    return [str(node) for node in sorted(nodes)]


def _bytes(answer: ConfigRecord, key: str, count: int, sizes: set[int]) -> list[bytes]:
    """A list of so many texts of these sizes."""
    found = answer.get(key)
    if not isinstance(found, list) or len(found) != count:
        raise WireError(f"gave no list of {count} {key!r}")
    good = [one for one in found if isinstance(one, bytes) and len(one) in sizes]
    if len(good) != count:
        raise WireError(f"gave {key!r} of a wrong size")
    return good
