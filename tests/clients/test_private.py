"""The comparison of Opacus' per-example gradients with a plain loop notices what is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clients.self_test import Batch, per_example_gradient_error


class Hidden(nn.Module):
    """Uses a layer's weight without calling the layer, so that no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(3, 2)
        self.hidden = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Both layers' outputs, added."""
        return torch.as_tensor(self.seen(inputs) + inputs @ self.hidden.weight.T)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Squared sums, one for each example."""
    return torch.as_tensor(model(batch["inputs"]).square().sum(dim=1))


def batch() -> dict[str, Tensor]:
    """Five examples."""
    return {"inputs": torch.randn(5, 3, generator=torch.Generator().manual_seed(0))}


def test_linear_layers_agree_and_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # float64 leaves about 1e-15
    assert per_example_gradient_error(model, batch(), losses) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())


def test_a_trained_tensor_that_hooks_miss_is_infinitely_wrong() -> None:
    model = Hidden()
    model.hidden.bias.requires_grad_(False)
    assert per_example_gradient_error(model, batch(), losses) == math.inf


def test_a_loss_that_mixes_examples_is_noticed() -> None:
    def mixed(model: nn.Module, batch: Batch) -> Tensor:
        return losses(model, batch) * losses(model, batch).sum()

    assert per_example_gradient_error(nn.Linear(3, 2), batch(), mixed) > 0.1
