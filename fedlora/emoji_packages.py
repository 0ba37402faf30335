"""The packages of emoji drawings, and getting them with npm."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import ConfigError


@dataclass(frozen=True)
class Package:
    """One style of drawing.

    Attributes:
        group: what the task calls the style.
        name: of npm's package, in the scope ``@iconify-json``.
        version: the one that is taken.
        licence: of its drawings, as SPDX names it.
        sha256: of its archive.
    """

    group: str
    name: str
    version: str
    licence: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What npm is asked for."""
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def archive(self) -> str:
        """The name that npm gives the archive."""
        return f"iconify-json-{self.name}-{self.version}.tgz"


PACKAGES = (
    Package(
        "noto",
        "noto",
        "1.2.9",
        "Apache-2.0",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    Package(
        "twemoji",
        "twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    Package(
        "openmoji",
        "openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    Package(
        "fluent",
        "fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
)


def download(folder: Path, scratch: Path, tell: Callable[[str], None]) -> dict[str, Path]:
    """The checked archive of each style, by group; none is unpacked and nothing of one is run.

    Args:
        folder: where an archive that lies there by hand is taken.
        scratch: where npm puts the others.
        tell: hears a line about each.

    Raises:
        ConfigError: npm is missing or cannot bring an archive, or brings another one.
    """
    found = {}
    for number, package in enumerate(PACKAGES, 1):
        by_hand, brought = folder / package.archive, scratch / package.archive
        if not _sound(package, by_hand):
            tell(f"emoji: {package.requirement}, {package.licence} ({number} of {len(PACKAGES)})")
            _pack(package, scratch, by_hand)
        found[package.group] = brought if brought.is_file() else by_hand
    return found


def _pack(package: Package, scratch: Path, by_hand: Path) -> None:
    """Bring one archive into ``scratch``; npm checks what its registry says of it, we our own."""
    remedy = f"or put its archive by hand at {by_hand} (SHA-256 {package.sha256})"
    if not (npm := shutil.which("npm")):
        raise ConfigError(
            f"emoji: npm, which brings the drawings, is not installed; on Debian and Ubuntu run: "
            f"apt-get install npm; {remedy}"
        )
    command = [npm, "pack", package.requirement, "--ignore-scripts"]
    command += ["--loglevel=error", "--fetch-retries=1", "--pack-destination", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    if done.returncode or not (scratch / package.archive).is_file():
        reason = _reason(done.stderr)
        raise ConfigError(
            f"emoji: npm could not bring {package.requirement} (offline?): {reason}; {remedy}"
        )
    if not _sound(package, scratch / package.archive):
        raise ConfigError(
            f"emoji: what npm brought as {package.requirement} has another SHA-256 than "
            f"{package.sha256}; {remedy}"
        )


def _sound(package: Package, path: Path) -> bool:
    """Whether the package's archive lies there."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256


def _reason(output: str) -> str:
    """What npm says that is a sentence: its errors come as code, system call and number first."""
    lines = [line.removeprefix("npm error ").strip() for line in output.splitlines()]
    plain = [line for line in lines if " " in line and not line.startswith(("code ", "npm "))]
    said = [line for line in plain if not line.startswith(("syscall ", "errno "))]
    return (said or plain or ["no message"])[0].strip(" .")
