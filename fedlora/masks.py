"""Masks that cancel in a sum over clients, and that survive clients which drop out.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal and Seth, "Practical Secure
Aggregation for Privacy-Preserving Machine Learning", CCS 2017. Client u sends, modulo 2^32 or 2^64,

    y_u = x_u + G(b_u) + sum_{v > u} G(s_uv) - sum_{v < u} G(s_uv)

with G a keystream, b_u a secret of its own and s_uv one that u and v agree on. Whoever is in the
sum has its b_u recovered from shares, whoever dropped out the key of its s_uv; never both.

Everything is from `cryptography`: X25519 agrees on keys, HKDF-SHA256 makes one for each purpose,
ChaCha20 is G, ChaCha20-Poly1305 seals shares. Keys follow from secrets of 16 bytes, drawn from the
operating system for one sum and used for no other.

What it hides, and from whom. A server that follows the protocol and looks at all it sees (*honest
but curious*), together with fewer than ``threshold`` clients, learns the sum over the clients that
lasted, and of each other client no more than that. Clients learn nothing of each other.

Keys are not signed. A server that hands out keys of its own making, invents clients, or asks for
updates in the clear is not held up, unless clients refuse the last (``masked`` in their node's
configuration) and know by other means whom they talk to. A server that merely lies about who takes
part and who dropped out is: each client answers once, for ``threshold`` or more that lasted, so of
n clients at most (n - c) (n - threshold) / (threshold - c) can have their keys recovered, c being
on the server's side. It then learns a sum over at least ``threshold - c`` less that number of the
others: n / 6 for two thirds and c = 0. That is a count of what it would need, not a proof.

Whoever sends a wrong upload or wrong shares can spoil a sum, and nobody can look at single ones.
And a sum is still told: of few clients it says much, and sums over two sets of the same updates
tell their difference. Noise is what bounds that.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora import shares
from fedlora.errors import WireError
from fedlora.fixed_point import Words

SECRET, NONCE = 16, 12  # bytes


@dataclass(frozen=True)
class PublicKeys:
    """What all know of a client: X25519 keys, to seal shares for it and to agree on masks."""

    seal: bytes
    mask: bytes


@dataclass(frozen=True)
class Secrets:
    """What a client alone knows: where its two private keys and its own mask come from."""

    seal: bytes
    mask: bytes
    own: bytes

    @staticmethod
    def fresh() -> Secrets:
        """From the operating system."""
        return Secrets(*(secrets.token_bytes(SECRET) for _ in range(3)))

    def public(self) -> PublicKeys:
        """Its public keys."""
        return PublicKeys(public_key(self.seal), public_key(self.mask))


@dataclass(frozen=True)
class Roster:
    """The clients of one sum.

    Attributes:
        token: names the sum, and is in every key.
        threshold: so many shares give a secret, and so many clients must last.
        keys: by node, in ascending order; a client's share has its place there, from 1.
    """

    token: str
    threshold: int
    keys: Mapping[int, PublicKeys]

    def __post_init__(self) -> None:
        """Refuse what would tell a single client's update.

        Raises:
            WireError: a threshold that is not above half the clients, or above all of them; or
                clients out of order, or with equal keys.
        """
        count = len(self.keys)
        if count < 2 or not 2 * count < 3 * self.threshold <= 3 * count:
            raise WireError(
                f"masked sums: a threshold of {self.threshold} with {count} clients; allowed: at "
                "least two clients, and more than two thirds of them, but no more than all"
            )
        if list(self.keys) != sorted(self.keys):
            raise WireError("masked sums: the clients are out of order")
        public = [key for keys in self.keys.values() for key in (keys.seal, keys.mask)]
        if len({*public}) != len(public):
            raise WireError("masked sums: two clients have the same key")

    def place(self, node: int) -> int:
        """Which share of every secret is this client's."""
        return list(self.keys).index(node) + 1


def public_key(secret: bytes) -> bytes:
    """The public key of the private one that follows from a secret."""
    return _private(secret).public_key().public_bytes_raw()


def check_key(public: bytes) -> None:
    """Refuse, by a ``WireError``, what is no key that others can agree with."""
    agreed(secrets.token_bytes(SECRET), public, "check")


def agreed(secret: bytes, public: bytes, purpose: str) -> bytes:
    """A key of 32 bytes that two clients have in common, for one purpose.

    Raises:
        WireError: the other's key is none.
    """
    try:
        found = _private(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # of another length, or of low order
        raise WireError(f"masked sums: a key that is none: {error}") from None
    return _derived(found, purpose)


def keystream(key: bytes, count: int, dtype: str) -> Words:
    """``count`` words that nobody without the key can tell from random ones."""
    width = numpy.dtype(dtype).itemsize
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(width * count))
    return numpy.frombuffer(stream, numpy.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)


def masked(
    words: Words, roster: Roster, node: int, mine: Secrets, included: Collection[int]
) -> Words:
    """A client's words under its own mask and those it shares with the others that are included."""
    found = words + keystream(_derived(mine.own, "own"), len(words), words.dtype.name)
    for other in included:
        if other != node:
            _add_pair(found, roster, node, other, mine.mask)
    return found


def unmasked(
    total: Words, roster: Roster, own: Mapping[int, bytes], dropped: Mapping[int, bytes]
) -> Words:
    """A sum of masked words without its masks.

    Args:
        total: of the clients in ``own``.
        roster: of the sum.
        own: the secret of each one's own mask.
        dropped: of clients that were included and are not in the sum, the secret of their key.

    Raises:
        WireError: a secret of ``dropped`` is not the one of the key that all know.
    """
    found = total.copy()
    for secret in own.values():
        found -= keystream(_derived(secret, "own"), len(total), total.dtype.name)
    for node, secret in dropped.items():
        if public_key(secret) != roster.keys[node].mask:
            raise WireError(f"masked sums: the recovered key is not that of client {node}")
        for other in own:  # the other half of each pair's masks, which node never sent
            _add_pair(found, roster, node, other, secret)
    return found


def sealed_shares(roster: Roster, node: int, mine: Secrets) -> dict[int, bytes]:
    """For every client, oneself too, its shares of one's own mask and of one's mask key."""
    count = len(roster.keys)
    both = zip(
        shares.split(mine.own, roster.threshold, count),
        shares.split(mine.mask, roster.threshold, count),
        strict=True,
    )
    found = {}
    for (other, keys), (own, mask) in zip(roster.keys.items(), both, strict=True):
        key, nonce = _sealing(roster, mine, keys.seal, node, other), secrets.token_bytes(NONCE)
        text = ChaCha20Poly1305(key).encrypt(nonce, own + mask, _about(roster, node, other))
        found[other] = nonce + text
    return found


def opened_shares(
    roster: Roster, node: int, mine: Secrets, sender: int, sealed: bytes
) -> tuple[bytes, bytes]:
    """The shares of the sender's own mask and of its mask key that it sealed for this client.

    Raises:
        WireError: it did not seal them.
    """
    key = _sealing(roster, mine, roster.keys[sender].seal, sender, node)
    try:
        about = _about(roster, sender, node)
        text = ChaCha20Poly1305(key).decrypt(sealed[:NONCE], sealed[NONCE:], about)
    except (InvalidTag, ValueError):
        raise WireError(f"masked sums: shares that client {sender} did not seal") from None
    return text[: len(text) // 2], text[len(text) // 2 :]


def _add_pair(words: Words, roster: Roster, node: int, other: int, secret: bytes) -> None:
    """Add to ``words`` in place what ``node`` adds for its pair with another client."""
    low, high = sorted((node, other))
    key = agreed(secret, roster.keys[other].mask, f"mask {roster.token} {low} {high}")
    stream = keystream(key, len(words), words.dtype.name)
    if node < other:
        words += stream
    else:
        words -= stream


def _sealing(roster: Roster, mine: Secrets, public: bytes, sender: int, receiver: int) -> bytes:
    """The key under which one client seals shares for another."""
    return agreed(mine.seal, public, f"seal {roster.token} {sender} {receiver}")


def _about(roster: Roster, sender: int, receiver: int) -> bytes:
    """What a sealed text is bound to."""
    return f"{roster.token} {sender} {receiver}".encode()


def _private(secret: bytes) -> X25519PrivateKey:
    """The private key that follows from a secret."""
    return X25519PrivateKey.from_private_bytes(_derived(secret, "key"))


def _derived(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for a purpose."""
    return HKDF(SHA256(), 32, None, f"fedlora masked sums: {purpose}".encode()).derive(secret)
