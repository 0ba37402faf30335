"""What a base model is, and how examples become its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.tasks.task import Examples, Objective


class Inputs(Protocol):
    """Encoded examples: batches are cut from them by row."""

    @property
    def lengths(self) -> Sequence[int]:
        """The cost of each row, to batch rows of like length."""
        ...

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's keyword arguments for the given rows, padded to the longest."""
        ...


@runtime_checkable
class Joinable(Inputs, Protocol):
    """Inputs of which several clients' rows make one batch."""

    @staticmethod
    def together(parts: Sequence[tuple[Any, Sequence[int]]]) -> dict[str, Tensor]:
        """Rows of several such inputs, one after the other, as one batch (Any: of this type)."""
        ...


@dataclass(frozen=True)
class TextInputs:
    """Token ids per row, padded only when a batch is made.

    Of a row's tokens the first so many as ``given`` says are a prompt; empty for none.
    """

    tokens: Sequence[Sequence[int]]
    pad: int
    lengths: Sequence[int]
    given: Sequence[int] = ()

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """All rows padded to the longest, ``[N, T]``, and their numbers of tokens, ``[N]``."""
        batch = padded(self.tokens, self.pad)
        return batch["input_ids"], batch["attention_mask"].sum(1)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both ``[b, T]`` int64."""
        ids, counts = self._padded
        picked = torch.tensor(rows)
        own = counts.index_select(0, picked)
        width = int(own.max())
        mask = (torch.arange(width) < own[:, None]).long()
        return {"input_ids": ids[:, :width].index_select(0, picked), "attention_mask": mask}

    @staticmethod
    def together(parts: Sequence[tuple[TextInputs, Sequence[int]]]) -> dict[str, Tensor]:
        """As for one client, padded to the longest of all."""
        tokens = [inputs.tokens[row] for inputs, rows in parts for row in rows]
        return padded(tokens, parts[0][0].pad)


def padded(tokens: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Texts as ``input_ids`` and ``attention_mask``, both ``[b, T]`` int64."""
    lengths = torch.tensor([len(own) for own in tokens])
    width = int(lengths.max())
    ids = [[*own, *[pad] * (width - len(own))] for own in tokens]
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": torch.tensor(ids), "attention_mask": mask}


@dataclass(frozen=True)
class Pixels:
    """What a pretrained model takes for an image.

    Attributes:
        shape: channels, height and width.
        mean, std: of each channel, ``[channels, 1, 1]``; pixels in [0, 1] are taken less the one
            and over the other.
    """

    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class ImageInputs:
    """Images as they are, or as ``pixels`` says batch by batch."""

    images: Tensor
    lengths: Sequence[int]
    pixels: Pixels | None = None

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``pixel_values`` ``[b, channels, height, width]``."""
        images = self.images[list(rows)]
        if self.pixels is not None:
            images = (images - self.pixels.mean) / self.pixels.std
        return {"pixel_values": images}

    @staticmethod
    def together(parts: Sequence[tuple[ImageInputs, Sequence[int]]]) -> dict[str, Tensor]:
        """As for one client."""
        return {"pixel_values": torch.cat([inputs(rows)["pixel_values"] for inputs, rows in parts])}


@dataclass(frozen=True)
class BaseModel:
    """A base model, ready for an adapter.

    Attributes:
        module: called with the keywords of ``encode``'s batches, returns ``.logits``.
        objective: ``classify`` (``logits [b, classes]``) or ``language`` (``[b, T, vocab]``).
        heads: names of modules that train in full beside the adapter.
        task_type: PEFT's, or None for modules PEFT does not know.
        encode: turns examples into ``Inputs``.
    """

    module: nn.Module
    objective: Objective
    heads: tuple[str, ...]
    task_type: str | None
    encode: Callable[[Examples], Inputs]


def text_model(
    module: nn.Module,
    tokenizer: Any,  # Any: transformers' tokenizers share no typed base class
    objective: Objective,
    max_length: int,
) -> BaseModel:
    """Put a transformers module and its tokenizer together; its head trains in full."""
    heads = tuple(name for name in ("classifier", "score") if hasattr(module, name))
    kind = "CAUSAL_LM" if objective == "language" else "SEQ_CLS"
    encode = partial(encode_texts, tokenizer=tokenizer, max_length=max_length)
    return BaseModel(module, objective, heads, kind, encode)


def encode_texts(examples: Examples, tokenizer: Any, max_length: int) -> TextInputs:
    """Tokenise all texts once, cut to ``max_length`` tokens; a prompt and its text each alone.

    Raises:
        ConfigError: the task has no texts.
    """
    if not examples.texts and len(examples):
        raise ConfigError("model.name: this model reads texts, and the task has images")
    if not examples.texts:
        return TextInputs([], tokenizer.pad_token_id, [])
    if examples.prompts:
        before = tokenizer(list(examples.prompts))["input_ids"]
        after = tokenizer(list(examples.texts), add_special_tokens=False)["input_ids"]
        both = [[*a, *b][:max_length] for a, b in zip(before, after, strict=True)]
        given = [len(ids) for ids in before]
        return TextInputs(both, tokenizer.pad_token_id, [len(ids) for ids in both], given)
    tokens = tokenizer(list(examples.texts), truncation=True, max_length=max_length)["input_ids"]
    return TextInputs(tokens, tokenizer.pad_token_id, [len(ids) for ids in tokens])


def encode_images(
    examples: Examples,
    model: str,
    shape: tuple[int, ...] | None = None,
    pixels: Pixels | None = None,
) -> ImageInputs:
    """Images as a tensor, for the model of that name.

    ``shape`` is that of the images it reads, of ``pixels`` if they are given; None is any.

    Raises:
        ConfigError: the task has no images, or others.
    """
    if examples.images is None:
        raise ConfigError(f"model.name: {model!r} reads images, and the task has texts")
    read, seen = pixels.shape if pixels else shape, examples.images.shape[1:]
    if read is not None and seen != read:
        allowed, found = (" x ".join(map(str, each)) for each in (read, seen))
        options = "the task's options size and grey"
        if model == "mixer" and seen[1:] == read[1:]:
            options += ", or model.options.channels"
        raise ConfigError(
            f"model.name: {model!r} reads images of {allowed} (channels, height, width), and the "
            f"task's are {found}; see {options}"
        )
    return ImageInputs(torch.from_numpy(examples.images), [1] * len(examples), pixels)
