"""A small MLP-Mixer for 28x28 pictures, grey or in colour, with committed pretrained weights.

Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021. About 82
thousand parameters: a toy beside the paper's smallest, with the same blocks.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = "mixer.json"  # base64, since a Flower bundle carries text files alone


@dataclass(frozen=True)
class MixerOutput:
    """What the model returns.

    Attributes:
        logits: ``[N, classes]``.
    """

    logits: Tensor


class MixerBlock(nn.Module):
    """Mixes patches with ``t1``, ``t2``, then channels with ``c1``, ``c2``, each with a skip."""

    def __init__(self, patches: int, dim: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        self.t1 = nn.Linear(patches, token_hidden)
        self.t2 = nn.Linear(token_hidden, patches)
        self.channel_norm = nn.LayerNorm(dim)
        self.c1 = nn.Linear(dim, channel_hidden)
        self.c2 = nn.Linear(channel_hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., patches, dim]`` to the same shape."""
        tokens = self.token_norm(x).transpose(-1, -2)  # [..., dim, patches]
        x = x + self.t2(functional.gelu(self.t1(tokens))).transpose(-1, -2)
        mixed: Tensor = x + self.c2(functional.gelu(self.c1(self.channel_norm(x))))
        return mixed


class Mixer(nn.Module):
    """An MLP-Mixer classifier whose head is the linear layer ``head``.

    Args:
        classes: number of classes.
        image_size: height and width in pixels, a multiple of ``patch``.
        patch: height and width of a patch.
        dim: channels.
        depth: blocks.
        token_hidden: width inside the token-mixing MLP.
        channel_hidden: width inside the channel-mixing MLP.
        channels: of a picture. The same body looks at each of them as at a grey picture, and the
            head sees what it found in all: a frozen embedding of three channels, made by copying
            that of one, would see their mean alone. It costs ``channels`` times as much.
    """

    def __init__(
        self,
        classes: int,
        image_size: int = 28,
        patch: int = 4,
        dim: int = 64,
        depth: int = 4,
        token_hidden: int = 32,
        channel_hidden: int = 128,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.channels = channels
        patches = (image_size // patch) ** 2
        self.embed = nn.Conv2d(1, dim, kernel_size=patch, stride=patch)
        self.blocks = nn.Sequential(
            *(MixerBlock(patches, dim, token_hidden, channel_hidden) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(channels * dim, classes)

    def forward(self, pixel_values: Tensor) -> MixerOutput:
        """Logits of ``[N, channels, image_size, image_size]`` pictures with values in [0, 1]."""
        pixels = (2 * pixel_values - 1).to(self.embed.weight.dtype)
        x = self._embedded(pixels).flatten(-2).transpose(-1, -2)  # [N, (channels,) patches, dim]
        x = self.norm(self.blocks(x)).mean(dim=-2)  # [N, (channels,) dim]
        return MixerOutput(logits=self.head(x.flatten(1)))

    def _embedded(self, pixels: Tensor) -> Tensor:
        """``[N, (channels,) dim, rows, columns]`` of patches, of each channel by itself."""
        if self.channels == 1:
            found: Tensor = self.embed(pixels)
            return found
        weight, bias = self.embed.weight.repeat(self.channels, 1, 1, 1), self.embed.bias
        assert bias is not None
        every = functional.conv2d(
            pixels,
            weight,
            bias.repeat(self.channels),
            stride=self.embed.stride,
            groups=self.channels,
        )  # [N, channels * dim, rows, columns]
        parts: Tensor = every.unflatten(1, (self.channels, -1))
        return parts


def pretrained(classes: int, channels: int = 1) -> Mixer:
    """A mixer with the committed weights and a new head, drawn from torch's ambient generator.

    The weights come from Fashion-MNIST by ``python -m fedlora.pretrain_mixer``.
    """
    model = Mixer(classes, channels=channels)
    text = resources.files("fedlora").joinpath(WEIGHTS).read_text(encoding="ascii")
    weights = load(base64.b64decode(json.loads(text)["safetensors"]))
    rest = model.load_state_dict(weights, strict=False)
    assert not rest.unexpected_keys and set(rest.missing_keys) == {"head.weight", "head.bias"}
    return model


def body_weights(model: Mixer) -> dict[str, Tensor]:
    """All weights but the head's, as ``pretrained`` reads them."""
    state = model.state_dict()
    return {name: state[name].contiguous() for name in state if not name.startswith("head.")}


def accuracy(model: Mixer, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """Share of pictures whose largest logit is their label."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(labels), batch_size):
            rows = slice(start, start + batch_size)
            answers = model(images[rows]).logits.argmax(dim=1)
            right += int((answers == labels[rows]).sum())
    return right / len(labels)
