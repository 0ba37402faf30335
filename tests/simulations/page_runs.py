"""Run folders written by hand, for the page of a report, and a reader of its HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import tomli_w

EVIL = "<script>alert(1)</script>"
EMPTY = {"meta", "input", "br"}
RULES = {"fedavg": 0.7, "ffa_lora": 0.5, "lora_fair": 0.8}  # accuracies around which seeds lie
WOBBLE = {"fedavg": (0, 1, -1), "ffa_lora": (1, -1, 2), "lora_fair": (1, 0.5, 0)}  # in hundredths


def write_runs(folder: Path, seeds: int = 3, **more: Any) -> Path:
    """Three rules on so many seeds: LoRA-FAIR leads in every test; one group is called badly."""
    for rule, level in RULES.items():
        for seed in range(seeds):
            score = level + 0.01 * WOBBLE[rule][seed]
            config = {
                "name": f"bad {EVIL}",
                "method": rule,
                "seed": seed,
                "rounds": 2,
                "task": {"name": "tweets"},
                "clients": {"number": 3, "split": "dirichlet"},
                "train": {"learning_rate": 0.001 if rule == "fedavg" else 0.01},
                **more,
            }
            write_run(folder / f"{rule}-{seed}", config, score, exact=rule == "ffa_lora")
    return folder


def write_run(folder: Path, config: dict[str, Any], score: float, exact: bool = False) -> None:
    """One run of two rounds that ends at an accuracy."""
    folder.mkdir(parents=True)
    records = [
        {
            "round": number,
            "loss": 1.5 - at,
            "accuracy": at,
            "perplexity": None,
            "groups": {"calm": at + 0.1, EVIL: at - 0.1},
            "aggregation_error": None if number == 0 else (0.0 if exact else 0.1 / number),
            "bytes_up": 500_000 * (number > 0),
            "bytes_down": 600_000 * (number > 0),
            "seconds": 1.0,
            "clients": [0, 1, 2],
            "failures": [],
        }
        for number, at in enumerate((0.3, (score + 0.3) / 2, score))
    ]
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    environment = {
        "python": "3.11",
        "packages": {"torch": EVIL},
        "command": f"fedlora run '{EVIL}'",
    }
    (folder / "environment.json").write_text(json.dumps(environment))


class Reader(HTMLParser):
    """The elements of a page: (name, attributes, text), closed ones with all the text in them.

    Whatever is not closed in the order in which it was opened is an assertion.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in EMPTY:
            self.found.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        name, attributes, text = self.open.pop()
        assert name == tag
        self.found.append((name, attributes, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, name: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        """Elements of a name that have these attributes; ``class_`` for class."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            (found, text)
            for tag, found, text in self.found
            if tag == name and wanted.items() <= found.items()
        ]
