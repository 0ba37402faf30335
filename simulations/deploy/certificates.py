"""The keys and certificates of a deployment: how they are made, and what they say."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import ConfigError

CURVE = ec.SECP384R1()
SKEW = timedelta(days=1)  # clocks of machines differ
ALWAYS = ("localhost", "127.0.0.1", "::1")  # the SuperLink's own processes reach it by these
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Pair:
    """A private key and what is public of it, as files hold them."""

    private: bytes
    public: bytes


def issue(names: Sequence[str], days: int) -> tuple[Pair, Pair]:
    """A new authority, and the certificate that it gives to a server of these names.

    Both hold for so many days from now. The authority's key is needed no more until a server is
    given another certificate.
    """
    ca_key, server_key = ec.generate_private_key(CURVE), ec.generate_private_key(CURVE)
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora deployment CA")])
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(ca_name, ca_name, ca_key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(ca_id, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    return _pair(ca_key, ca), _pair(server_key, _server(names, days, server_key, ca_key, ca))


def node_key() -> Pair:
    """A node's key pair in OpenSSH's form, which Flower reads."""
    key = ec.generate_private_key(CURVE)
    return Pair(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n",
    )


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in a file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{path}: found no certificate, allowed: one in PEM form") from None


def read_public(path: Path) -> bytes:
    """A public key, or that of a private key, as PEM bytes: what the SuperLink knows nodes by.

    Raises:
        ConfigError: the file holds no key on the curve P-384.
    """
    try:
        public = _public(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: found no key, allowed: one without a passphrase") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != CURVE.name:
        raise ConfigError(f"{path}: found another kind of key, allowed: elliptic curve P-384")
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _public(data: bytes) -> object:
    """The public key in a file of any of our three kinds."""
    if b"PRIVATE KEY" not in data:
        return load_ssh_public_key(data)
    if b"OPENSSH" in data:
        return load_ssh_private_key(data, None).public_key()
    return load_pem_private_key(data, None).public_key()


def public_of(certificate: x509.Certificate) -> bytes:
    """The public key that a certificate speaks for, as ``read_public`` gives it."""
    return certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate holds for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    hosts = [*found.get_values_for_type(x509.DNSName)]
    return hosts + [str(address) for address in found.get_values_for_type(x509.IPAddress)]


def days_left(certificate: x509.Certificate) -> float:
    """Days until a certificate no longer holds; negative once it does not."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def address_of(host: str) -> Address | None:
    """The IP address that a host is written as, if it is."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _server(
    names: Sequence[str],
    days: int,
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
) -> x509.Certificate:
    """A server's certificate for names and addresses, and for the machine's own."""
    unique = dict.fromkeys([*names, *ALWAYS])
    addresses = {name: address_of(name) for name in unique}
    held: list[x509.GeneralName] = [
        x509.IPAddress(address) if address else x509.DNSName(name)
        for name, address in addresses.items()
    ]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora SuperLink")])
    return (
        _builder(subject, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(held), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    """What all certificates say; ``days`` below 0 gives one that has expired."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + timedelta(days=days)) - SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    """An authority's key signs certificates, a server's what it says."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Pair:
    """A private key and its certificate in PEM form."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Pair(private, certificate.public_bytes(Encoding.PEM))
