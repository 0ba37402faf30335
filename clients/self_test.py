"""Opacus against a plain loop: are the gradients of each example right on this machine."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]  # the losses of a batch's examples, [N]


def per_example_gradient_error(model: nn.Module, batch: Batch, loss: Loss) -> float:
    """How far Opacus' per-example gradients are from those of a plain loop over examples.

    The largest, over the trained tensors, of ``|| hooks - loop ||_F / || loop ||_F`` in
    float64 on a copy of the model. Infinity when Opacus left a trained tensor out, or when
    a tensor's gradient is 0 in the loop and not in the hooks. Give it a model with no zero
    factors (a fresh LoRA has ``B = 0``), since gradients that vanish prove nothing.
    """
    model = copy.deepcopy(model).double()
    _train_owners(model)
    batch = {name: _double(tensor) for name, tensor in batch.items()}
    expected = _loop(model, batch, loss)
    found = _hooks(model, batch, loss)
    return max(_relative(found[name], gradient) for name, gradient in expected.items())


def _train_owners(model: nn.Module) -> None:
    """Training mode for the layers that own trained tensors: hooks ignore all others.

    The rest stays in evaluation mode, so that dropout does not blur the comparison.
    """
    model.eval()
    for layer in model.modules():
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            layer.training = True


def _loop(model: nn.Module, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """Each trained tensor's gradients, one example at a time: ``[N, *shape]``."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = len(next(iter(batch.values())))
    gradients = []
    for row in range(count):
        single = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        value = loss(model, single).sum()
        gradients.append(torch.autograd.grad(value, list(trained.values())))
    return {
        name: torch.stack(per)
        for name, per in zip(trained, zip(*gradients, strict=True), strict=True)
    }


def _hooks(model: nn.Module, batch: Batch, loss: Loss) -> dict[str, Tensor | None]:
    """The same gradients as Opacus' hooks see them in one pass."""
    hooked = GradSampleModule(model, loss_reduction="sum")
    with warnings.catch_warnings():  # the ids that enter an embedding have no gradient
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.autograd.backward(loss(hooked, batch).sum())
    found = {name: getattr(p, "grad_sample", None) for name, p in model.named_parameters()}
    hooked.to_standard_module()
    return found


def _relative(found: Tensor | None, expected: Tensor) -> float:
    """``|| found - expected || / || expected ||``; infinity for a missing or misshapen one."""
    if found is None or found.shape != expected.shape:
        return math.inf
    error, size = float((found - expected).norm()), float(expected.norm())
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size


def _double(tensor: Tensor) -> Tensor:
    """Floating-point inputs in float64, indices as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor
