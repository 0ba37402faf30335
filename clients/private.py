"""Differentially private training of one client: Opacus' hooks, clipping and noise."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients.local import Rows, example_losses, fresh_optimizer
from fedlora.config import TrainConfig
from fedlora.errors import FedloraError, PrivacyError
from fedlora.tasks.task import Objective

REACH = 1e3  # clips (or ones): what is longer comes shortened to Opacus, which sums in its own type


@dataclass(frozen=True)
class PrivateResult:
    """What one private training did.

    ``steps`` and ``sample_rate`` are the mechanism's and may be told. All else is computed
    from the client's data without noise: it is not private, and no epsilon covers it.

    Attributes:
        loss: mean over the examples seen whose loss is a finite number; NaN if there are none.
        steps: noisy steps taken, those with an empty batch among them.
        sample_rate: chance of each example to be in a step's batch.
        seen: examples seen, over all steps.
        empty_batches: steps in which no example was drawn.
        nonfinite_examples: how many of those seen had a gradient that is not finite.
        clipped: share of those seen whose gradient was longer than ``clip``.
    """

    loss: float
    steps: int
    sample_rate: float
    seen: int
    empty_batches: int
    nonfinite_examples: int
    clipped: float


def poisson_batches(
    examples: int, config: TrainConfig, rng: numpy.random.Generator
) -> Iterator[list[int]]:
    """Row numbers of each step's batch: every example by its own toss, so a batch may be empty."""
    rate = config.sample_rate(examples)
    for _ in range(config.step_count(examples)):
        yield numpy.flatnonzero(rng.random(examples) < rate).tolist()


def train_privately(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Rows,
    objective: Objective,
    config: TrainConfig,
    *,
    noise_multiplier: float,
    clip: float,
    rng: numpy.random.Generator,
    noise_generator: torch.Generator | None,
) -> PrivateResult:
    """Train ``parameters`` in place by DP-SGD (Abadi et al. 2016) with a fresh optimiser.

    A step's gradient is ``(sum_i min(1, clip / |g_i|) g_i + N(0, (noise_multiplier clip)^2)) /
    (q n)``: the norm is L2 over all trained tensors together, ``q n`` the expected, not the drawn,
    size of a batch. ``config.clip_gradient`` then acts on the noisy gradient.

    ``rng`` draws the batches. ``noise_generator`` lies on the parameters' device; it can be
    foretold by whoever knows its seed, so what it protects is a simulation's data only. It may
    be None when there is no noise.

    Raises:
        PrivacyError: the promise cannot be kept for this model or these settings.
        FedloraError: the trained tensors stopped being finite numbers.
    """
    _check_noise(noise_multiplier, clip, noise_generator)
    check_supported(module, parameters)
    rate = config.sample_rate(len(rows))
    losses, norms = [], []
    module.train()
    with _hooks(module, parameters) as hooked:
        optimizer = DPOptimizer(
            fresh_optimizer(parameters, config),
            noise_multiplier=noise_multiplier,
            max_grad_norm=min(clip, sys.float_info.max),  # 0 noise times inf would be NaN
            expected_batch_size=rate * len(rows),  # Opacus divides by it, and takes a float
            loss_reduction="mean",  # "sum" would leave the division out
            generator=noise_generator,
        )
        if limit := config.clip_gradient:
            optimizer.attach_step_hook(lambda _: nn.utils.clip_grad_norm_(parameters, limit))
        _same_tensors("the optimiser", optimizer.params, parameters)
        for picked in poisson_batches(len(rows), config, rng):
            optimizer.zero_grad(set_to_none=True)
            losses.append(_example_gradients(hooked, parameters, rows, picked, objective))
            norms.append(_tame(parameters, clip))
            optimizer.step()
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise FedloraError(
            "training diverged: a trained tensor is not finite at learning rate "
            f"{config.learning_rate:g} and noise multiplier {noise_multiplier:g}"
        )
    return _result(losses, norms, rate, clip)


def _result(losses: list[Tensor], norms: list[Tensor], rate: float, clip: float) -> PrivateResult:
    """What the steps' losses and gradient norms, ``[b]`` each, come to."""
    loss, norm = torch.cat(losses).double(), torch.cat(norms)
    loss, finite = loss[loss.isfinite()], norm[norm.isfinite()]
    return PrivateResult(
        loss=float(loss.mean()) if len(loss) else math.nan,
        steps=len(norms),
        sample_rate=rate,
        seen=len(norm),
        empty_batches=sum(not len(step) for step in norms),
        nonfinite_examples=len(norm) - len(finite),
        clipped=float((finite > clip).sum()) / max(len(norm), 1),
    )


def check_supported(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Make sure that Opacus' hooks see each trained tensor and that no layer mixes examples.

    Raises:
        PrivacyError: naming the tensor and the type of the layer that holds it.
    """
    _same_tensors("the model", [p for p in module.parameters() if p.requires_grad], parameters)
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            raise PrivacyError(
                f"layer {path!r} is a {type(layer).__name__}, which mixes the examples of a batch; "
                "private training needs a model with LayerNorm or GroupNorm instead"
            )
        hookable = type(layer) in GradSampleModule.GRAD_SAMPLERS and not layer._buffers
        for name, parameter in layer.named_parameters(path, recurse=False):
            if parameter.requires_grad and not hookable:
                raise PrivacyError(
                    f"trained tensor {name!r} is held by a {type(layer).__name__}, whose gradients "
                    "of single examples Opacus' hooks cannot see; train privately with "
                    "adapter.name = 'lora'"
                )
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise PrivacyError(
                    f"trained tensor {name!r} is {parameter.dtype}, too coarse for the noise; "
                    "allowed: float32, float64"
                )


def _same_tensors(
    holder: str, found: Sequence[nn.Parameter], parameters: Sequence[nn.Parameter]
) -> None:
    """What ``holder`` trains must be what is clipped, noised and uploaded."""
    if {id(p) for p in found} != {id(p) for p in parameters} or len(found) != len(parameters):
        raise PrivacyError(
            f"{holder} trains {len(found)} tensors and {len(parameters)} were given to clip and "
            "noise; they must be the same ones, each once: set requires_grad on these alone"
        )


def _check_noise(multiplier: float, clip: float, generator: torch.Generator | None) -> None:
    """Refuse what is no Gaussian mechanism."""
    if not (math.isfinite(multiplier) and multiplier >= 0):
        raise PrivacyError(f"noise_multiplier: found {multiplier}, allowed: 0 or more")
    if not clip > 0 or (math.isinf(clip) and multiplier > 0):
        raise PrivacyError(f"clip: found {clip}, allowed: above 0, and finite where there is noise")
    if generator is None and multiplier > 0:
        raise PrivacyError("noise_generator: found None, allowed: a stream of its own for noise")


@contextmanager
def _hooks(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[GradSampleModule]:
    """Opacus' hooks on the layers that train now; nothing of them, nor a gradient, is left."""
    hooked = GradSampleModule(module, loss_reduction="sum")
    try:
        with warnings.catch_warnings():  # a first layer's inputs have no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield hooked
    finally:
        hooked.to_standard_module()
        for parameter in parameters:
            parameter.grad = None
            vars(parameter).pop("summed_grad", None)
        for layer in module.modules():  # left behind by a step that failed half-way
            vars(layer).pop("activations", None)
            vars(layer).pop("max_batch_len", None)


def _example_gradients(
    hooked: GradSampleModule,
    parameters: Sequence[nn.Parameter],
    rows: Rows,
    picked: list[int],
    objective: Objective,
) -> Tensor:
    """Leave each parameter's ``grad_sample [b, *shape]`` on it; returns the losses, ``[b]``."""
    if not picked:  # transformers cannot run on no rows; the step takes its noise all the same
        for parameter in parameters:
            vars(parameter)["grad_sample"] = parameter.new_zeros(0, *parameter.shape)
        return parameters[0].new_zeros(0)
    device = parameters[0].device
    batch = {key: value.to(device) for key, value in rows.inputs(picked).items()}
    logits = hooked(**batch).logits
    losses = example_losses(logits, batch, rows.labels[picked].to(device), objective)
    torch.autograd.backward(losses.sum())
    for name, parameter in hooked._module.named_parameters():
        found = getattr(parameter, "grad_sample", None)
        shape = (len(picked), *parameter.shape)
        if parameter.requires_grad and getattr(found, "shape", None) != shape:
            raise PrivacyError(
                f"trained tensor {name!r} has no gradient for each of the {len(picked)} examples "
                "of a batch; its layer must be called on all of them, the examples first"
            )
    return losses.detach()


def _tame(parameters: Sequence[nn.Parameter], clip: float) -> Tensor:
    """Keep from Opacus what its clipping cannot take; returns the gradients' norms, ``[b]``.

    An example whose gradient is not finite counts as zero in every tensor: one NaN would make
    the sum NaN. One far longer than the clip is shortened first, since its norm may be infinite
    in float32; clipping leaves its direction alone of it anyway.
    """
    samples: list[Tensor] = [vars(parameter)["grad_sample"] for parameter in parameters]
    per_tensor = [torch.linalg.vector_norm(s.flatten(1).double(), dim=1) for s in samples]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(per_tensor), dim=0)  # [b]
    broken = ~norms.isfinite()
    shrink = torch.where(broken, 0.0, (REACH * max(clip, 1.0) / norms).clamp(max=1.0))
    for sample in samples:
        column = (-1, *[1] * (sample.dim() - 1))
        sample.masked_fill_(broken.reshape(column), 0.0).mul_(shrink.to(sample).reshape(column))
    return norms
