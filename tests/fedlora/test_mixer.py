"""The mixer: shapes, the paper's mixing, committed weights, adapters on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlora import fetch, mixer, pretrain_mixer, seeds


def pictures(rows: int) -> torch.Tensor:
    """Seeded pictures ``[rows, 1, 28, 28]`` in [0, 1]."""
    return torch.rand(rows, 1, 28, 28, generator=seeds.torch_generator(0, "pictures"))


def test_logits_have_one_row_per_picture() -> None:
    model = mixer.Mixer(classes=7)
    assert model(pictures(3)).logits.shape == (3, 7)
    assert sum(weights.numel() for weights in mixer.Mixer(10).parameters()) == 82_062


def test_one_body_looks_at_each_channel_and_the_head_sees_all() -> None:
    with seeds.ambient(0, "head"):
        grey, colour = mixer.pretrained(5), mixer.pretrained(5, channels=3)
    images = torch.cat([pictures(6)[start : start + 2] for start in (0, 2, 4)], dim=1)
    grey.head, head, colour.head = nn.Identity(), colour.head, nn.Identity()
    seen = [grey(images[:, [channel]]).logits for channel in range(3)]
    assert head.in_features == 3 * 64
    torch.testing.assert_close(colour(images).logits, torch.cat(seen, dim=1))
    assert mixer.body_weights(colour).keys() == mixer.body_weights(grey).keys()


def test_a_block_mixes_tokens_and_channels_with_skips() -> None:
    block = mixer.MixerBlock(patches=4, dim=6, token_hidden=3, channel_hidden=5)
    x = torch.randn(2, 4, 6, generator=seeds.torch_generator(0, "block"))
    for layer in (block.t2, block.c2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(block(x), x)  # with nothing added, only the skips are left
    torch.nn.init.ones_(block.t2.weight)
    moved = x.clone()
    moved[:, 0, 0] += 1.0
    assert not torch.allclose((block(moved) - moved)[:, 1:], (block(x) - x)[:, 1:])


def test_pretrained_takes_the_committed_body_and_a_new_head() -> None:
    with seeds.ambient(0, "head"):
        model = mixer.pretrained(classes=3)
    with seeds.ambient(0, "head"):
        again = mixer.pretrained(classes=3)
    assert model.head.out_features == 3
    assert torch.equal(model.head.weight, again.head.weight)
    assert not torch.equal(model.blocks[0].t1.weight, mixer.Mixer(3).blocks[0].t1.weight)
    assert torch.equal(model.blocks[0].t1.weight, mixer.pretrained(5).blocks[0].t1.weight)


def test_body_weights_survive_a_file(tmp_path: Path) -> None:
    model = mixer.Mixer(2)
    save_file(mixer.body_weights(model), tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert not any(name.startswith("head") for name in loaded)
    assert all(torch.equal(model.state_dict()[name], loaded[name]) for name in loaded)


def test_accuracy_counts_right_answers() -> None:
    model = mixer.Mixer(4)
    images = pictures(10)
    answers = model(images).logits.argmax(dim=1)
    answers[:3] = (answers[:3] + 1) % 4
    assert mixer.accuracy(model, images, answers, batch_size=4) == 0.7


def test_lora_on_the_mixer_trains_adapters_and_head_only() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["t1", "t2", "c1", "c2"], modules_to_save=["head"])
    with seeds.ambient(0, "lora"):
        model = peft.get_peft_model(mixer.pretrained(10), config)
    images = pictures(8)
    before = model(pixel_values=images).logits
    assert torch.allclose(before, model.get_base_model()(images).logits)
    trainable = [name for name, weights in model.named_parameters() if weights.requires_grad]
    assert len(trainable) == 2 * 4 * 4 + 2
    assert all("lora_" in name or "head" in name for name in trainable)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    loss = torch.nn.functional.cross_entropy(before, torch.arange(8))
    loss.backward()
    optimizer.step()
    assert torch.nn.functional.cross_entropy(model(images).logits, torch.arange(8)) < loss


def test_committed_weights_carry_over_to_fashion() -> None:
    """The body alone, with a head fitted on a few hundred pictures, is right on three of four."""
    if not fetch.present("fashion"):
        pytest.skip("needs: apt-get install dataset-fashion-mnist (fedlora fetch fashion)")
    from fedlora.tasks.fashion import fashion

    task = fashion(rows=600)
    body = mixer.pretrained(10)
    body.head = torch.nn.Identity()
    images, labels = pretrain_mixer.tensors(task.train)
    held_images, held_labels = (part[:1000] for part in pretrain_mixer.tensors(task.validation))
    with torch.no_grad():
        features, held_features = body(images).logits, body(held_images).logits
    with seeds.ambient(0, "head"):
        head = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = head(held_features).argmax(dim=1) == held_labels
    assert right.float().mean() > 0.75
