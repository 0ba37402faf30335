"""Emoji: getting the drawings, rendering them, and the task that they make."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from fedlora import emoji_images, emoji_packages, fetch
from fedlora.emoji_packages import PACKAGES, Package
from fedlora.errors import ConfigError
from fedlora.tasks.emoji import GROUPS, emoji, images_of
from fedlora.tasks.task import Task

SUNS = [f"1f3{number:02x}" for number in range(0x10, 0x30)]  # 32 made-up signs
TONED, FLAG, RARE, OTHER = "1f44b-1f3fd", "1f3f4", "1f9ff", "0023"
SHAPES = (
    "<circle cx='5' cy='5' r='{}'/>",
    "<path d='M0 0h{0}v{0}z'/>",
    "<rect width='{}' height='6'/>",
)

needs_renderer = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("resvg_py", "PIL")),
    reason="needs the packages resvg-py and pillow: pip install 'fedlora[data]'",
)


def drawings(group: str, **bodies: str) -> dict[str, Any]:
    """The files of a package: suns, and signs that are to be left out; ``bodies`` are others."""
    codes = [*SUNS, TONED, FLAG, OTHER, *([RARE] if group == "noto" else [])]
    names = {code: f"sign-{code}" for code in codes}
    icons = {
        name: {"body": SHAPES[row % 3].format(1 + row % 4)}
        for row, name in enumerate(names.values())
    }
    icons |= {name: {"body": body} for name, body in bodies.items()}
    categories = {"Food & Drink": [], "Travel & Places": []}
    for row, code in enumerate([*SUNS, TONED, RARE]):
        categories[sorted(categories)[row % 2]].append(names.get(code, ""))
    categories["Flags"] = [names[FLAG]]
    return {
        "icons": {"prefix": group, "icons": icons, "width": 10, "height": 10},
        "chars": names,
        "metadata": {"categories": categories},
    }


def pack(path: Path, files: dict[str, Any]) -> str:
    """Write an archive as npm makes them; its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Four small packages in the data folder, which are the ones that are asked for."""
    found = [
        replace(package, sha256=pack(folder / package.archive, drawings(package.group)))
        for package in PACKAGES
    ]
    monkeypatch.setattr(emoji_packages, "PACKAGES", tuple(found))
    yield folder


def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a stand-in for npm, and nothing else, on the path."""
    place = tmp_path / "bin"
    place.mkdir()
    if script:
        (place / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (place / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}/bin" if script else str(place))


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@needs_renderer
def test_without_npm_it_says_how(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(tmp_path, monkeypatch, "")
    message = refused(lambda: fetch.fetch("emoji"))
    assert message.startswith("emoji: npm, which brings the drawings, is not installed")
    assert str(folder / PACKAGES[0].archive) in message and PACKAGES[0].sha256 in message
    assert list(folder.iterdir()) == []


FAILS = """echo 'npm warn Unknown user config' >&2
echo 'npm error code ENOTFOUND' >&2
echo 'npm error syscall getaddrinfo' >&2
echo 'npm error errno ENOTFOUND' >&2
echo 'npm error network request to https://registry.example/noto failed' >&2
exit 1"""


@needs_renderer
def test_what_npm_cannot_bring_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(tmp_path, monkeypatch, FAILS)
    message = refused(lambda: fetch.fetch("emoji"))
    assert "could not bring @iconify-json/noto@1.2.9 (offline?): network request to" in message
    assert list(folder.iterdir()) == []


def test_another_archive_is_refused_and_no_script_is_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(
        tmp_path,
        monkeypatch,
        f'echo "$@" > {tmp_path}/asked; echo other > {PACKAGES[0].archive}',
    )
    told: list[str] = []
    message = refused(lambda: emoji_packages.download(folder, tmp_path, told.append))
    assert "@iconify-json/noto@1.2.9 has another SHA-256 than 3e918d88fc" in message
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:2] == ["pack", "@iconify-json/noto@1.2.9"] and "--ignore-scripts" in asked
    assert told == ["emoji: @iconify-json/noto@1.2.9, Apache-2.0 (1 of 4)"]


def test_a_missing_renderer_is_named_before_anything_is_brought(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(tmp_path, monkeypatch, f"touch {tmp_path}/called")
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "resvg_py" else known(name)
    )
    message = refused(lambda: fetch.fetch("emoji"))
    assert "'resvg_py' is not installed" in message and "fedlora[data]" in message
    assert not (tmp_path / "called").exists()


def test_signs_that_all_styles_have_get_notos_category() -> None:
    found = {group: emoji_images.Drawings(**named(drawings(group))) for group in GROUPS}
    labels = emoji_images.labels_of(found)
    assert sorted(labels) == SUNS  # no skin tone, no flag, none of one style or no category
    food, travel = (emoji_images.LABELS.index(name) for name in ("food", "travel"))
    assert [labels[code] for code in SUNS] == [food, travel] * 16


def named(files: dict[str, Any]) -> dict[str, Any]:
    """A package's files as ``Drawings`` has them."""
    return {
        "icons": files["icons"],
        "names": files["chars"],
        "categories": files["metadata"]["categories"],
    }


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "noto.tgz"
    pack(path, {"package": {}})
    assert str(path) in refused(lambda: emoji_images.read_archive(path))
    path.write_bytes(b"no archive")
    assert "no Iconify package" in refused(lambda: emoji_images.read_archive(path))


def one(icons: dict[str, Any], **more: Any) -> emoji_images.Drawings:
    """Drawings with the one sign 1f642, whose icon is ``smile``."""
    return emoji_images.Drawings({"icons": icons, **more}, {"1f642": "smile"}, {})


def rendered(drawn: emoji_images.Drawings) -> Any:
    return emoji_images.render(emoji_images.svg(drawn, "1f642", "noto"), "noto's 1f642")


@needs_renderer
def test_a_drawing_lies_in_the_middle_of_a_square_on_white() -> None:
    """One twice as high as wide fills the middle half; its colour is kept."""
    tall = {"smile": {"body": "<path fill='#204080' d='M0 0h8v16H0z'/>", "width": 8, "height": 16}}
    pixels = rendered(one(tall))
    assert pixels.shape == (28, 28, 3) and pixels.dtype == numpy.uint8
    assert (pixels[:, 7:21] == [0x20, 0x40, 0x80]).all()
    assert (pixels[:, :7] == 255).all() and (pixels[:, 21:] == 255).all()


@needs_renderer
def test_a_flipped_alias_is_the_mirror_image() -> None:
    body = {"body": "<path d='M2 0h4v16z'/>", "left": 1, "top": 0}
    plain = rendered(one({"smile": body}))
    flipped = {"smile": {"parent": "frown", "hFlip": True}, "frown": {"parent": "wink"}}
    mirrored = rendered(one({"wink": body}, aliases=flipped))
    assert numpy.array_equal(mirrored, plain[:, ::-1])
    assert not numpy.array_equal(mirrored, plain)
    turned = one({"wink": body}, aliases={"smile": {"parent": "wink", "rotate": 1}})
    assert "noto's smile: found ['rotate'], allowed: hFlip" in refused(lambda: rendered(turned))
    assert "noto's smile (1f642): found no drawing" in refused(lambda: rendered(one({})))


@needs_renderer
@pytest.mark.parametrize(
    "body", ["<path d='", "<path d='zzz'/>", "<path fill='#fff' d='M0 0h9v9z'/>"]
)
def test_a_bad_drawing_is_named(body: str) -> None:
    message = refused(lambda: rendered(one({"smile": {"body": body}})))
    assert message.startswith("emoji: noto's 1f642: not a drawing: ")


@needs_renderer
def test_fetching_makes_a_file_and_the_file_a_task(by_hand: Path) -> None:
    told: list[str] = []
    path = fetch.fetch("emoji", told.append)
    assert told == [f"emoji: rendering 32 of {g} ({n} of 4)" for n, g in enumerate(GROUPS, 1)]
    assert path == fetch.find("emoji") == by_hand / "emoji-1.npz"
    written = path.read_bytes()
    assert fetch.fetch("emoji").read_bytes() == written
    with numpy.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
    assert set(about["drawings"].values()) == {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}
    task = emoji()
    parts = (task.train, task.validation, task.test)
    assert sum(map(len, parts)) == 4 * 32
    assert_signs_lie_in_one_part(task)
    assert {part.images.shape[1:] for part in parts if part.images is not None} == {(3, 28, 28)}
    assert emoji(grey=True).train.natural == task.train.natural


@needs_renderer
def test_a_changed_file_is_refused(by_hand: Path) -> None:
    path = fetch.fetch("emoji")
    with numpy.load(path) as file:
        arrays = dict(file)
    arrays["noto"] = arrays["noto"].copy()
    arrays["noto"][0, 0, 0, 0] ^= 1
    numpy.savez(path, **arrays)
    message = refused(emoji)
    assert message == f"{path}: damaged; remove it and run: fedlora fetch emoji"
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(emoji) == message


def test_pictures_are_light_on_black() -> None:
    pixels = numpy.full((1, 2, 2, 3), 255, dtype=numpy.uint8)
    pixels[0, 0, 0] = 0
    pixels[0, 1, 1] = (0, 255, 255)
    colours, grey = images_of(pixels, grey=False), images_of(pixels, grey=True)
    assert colours.dtype == grey.dtype == numpy.float32
    assert colours[0].tolist() == [[[1, 0], [0, 1]], [[1, 0], [0, 0]], [[1, 0], [0, 0]]]
    assert grey[0, 0] == pytest.approx(numpy.array([[1, 0], [0, 0.299]]))


def assert_signs_lie_in_one_part(task: Task) -> None:
    """And each is there in every style."""
    parts = [set(part.natural) for part in (task.train, task.validation, task.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    for part in (task.train, task.validation, task.test):
        assert sorted(part.natural) == sorted([*set(part.natural)] * len(GROUPS))
        by_group = [
            [n for n, g in zip(part.natural, part.groups, strict=True) if g == group]
            for group in range(len(GROUPS))
        ]
        assert all(names == by_group[0] for names in by_group)


@pytest.mark.slow
def test_the_real_drawings() -> None:
    """Rendered by resvg-py 0.5.0, as constraints.txt pins it, they are these pictures."""
    if not fetch.present("emoji"):
        pytest.skip("needs: fedlora fetch emoji")
    with numpy.load(fetch.find("emoji")) as file:
        checksum, about = str(file["checksum"]), json.loads(str(file["about"]))
    task = emoji()
    assert_signs_lie_in_one_part(task)
    parts = (task.train, task.validation, task.test)
    counts = sum(numpy.bincount(part.labels) for part in parts) // len(GROUPS)
    assert counts.tolist() == [85, 158, 130, 262, 342, 168, 223, 218]
    if about["renderer"] == "resvg_py 0.5.0":
        assert checksum == "3d6c2e6262a9ccce3cc48b289f0ec56a7717772520d18063d142cab22c19fd29"


def test_packages_are_pinned() -> None:
    assert [package.requirement.count("@") for package in PACKAGES] == [2] * 4
    assert all(isinstance(each, Package) and len(each.sha256) == 64 for each in PACKAGES)
    for package in PACKAGES:
        assert f"{package.group} {package.licence}" in fetch.SOURCES["emoji"].what
