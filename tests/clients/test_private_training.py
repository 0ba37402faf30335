"""Private training against loops over examples, and its noise and batches against their laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy
import peft
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from clients.local import Rows, batches, example_losses, train
from clients.private import (
    PrivateResult,
    check_supported,
    poisson_batches,
    train_privately,
)
from fedlora.adapters import attach
from fedlora.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from fedlora.errors import FedloraError, PrivacyError
from fedlora.models import load_model
from fedlora.models.base import BaseModel, ImageInputs
from fedlora.seeds import torch_generator
from fedlora.tasks import load_task
from fedlora.tasks.task import Objective

SGD = TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=6, steps=3)
ONE_STEP = TrainConfig(optimizer="sgd", learning_rate=1.0, batch_size=1000, steps=1)


@dataclass
class Case:
    """What is trained on what."""

    module: nn.Module
    parameters: Sequence[nn.Parameter]
    rows: Rows
    objective: Objective = "classify"

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def adapted(base: BaseModel, rows: Rows, *targets: str, adapter: str = "lora") -> Case:
    """A model in float64 without dropout, no factor of its adapter at zero."""
    model = attach(base, AdapterConfig(name=adapter, rank=2, target_modules=targets), seed=3)
    module = model.module.double()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    case = Case(module, list(model.trained.values()), rows, base.objective)
    generator = torch_generator(0, "start")
    case.put([0.1 * torch.randn(p.shape, generator=generator) for p in case.parameters])
    return case


def bert(adapter: str = "lora") -> Case:
    base = load_model(ModelConfig(name="tiny_bert", max_length=16), 2, "classify")
    examples = load_task(TaskConfig(name="tweets")).train.take(numpy.arange(20))
    rows = Rows(base.encode(examples), torch.from_numpy(examples.labels))
    return adapted(base, rows, "query", "value", adapter=adapter)


def llama() -> Case:
    base = load_model(ModelConfig(name="tiny_llama", max_length=12), 0, "language")
    examples = load_task(TaskConfig(name="tweets_lm")).train.take(numpy.arange(20))
    rows = Rows(base.encode(examples), torch.from_numpy(examples.labels))
    return adapted(base, rows, "q_proj", "v_proj")


def mixer() -> Case:
    base = load_model(ModelConfig(name="mixer"), 3, "classify")
    images = torch.rand(20, 1, 28, 28, generator=torch_generator(0, "images")).double()
    return adapted(base, Rows(ImageInputs(images, [1] * 20), torch.arange(20) % 3), "t1", "c2")


class Toy(nn.Module):
    """One linear layer on ``[b, T, d]``, summed over T; it starts at zero."""

    def __init__(self, d: int = 3, classes: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(d, classes, bias=bias)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(x).sum(1))


@dataclass
class Vectors:
    """The rows of a tensor as a model's inputs."""

    x: Tensor

    @property
    def lengths(self) -> list[int]:
        return [1] * len(self.x)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"x": self.x[list(rows)]}


def toy(x: Tensor, classes: int = 2, bias: bool = True) -> Case:
    """``Toy`` on the rows of ``x [n, T, d]``; the labels take turns."""
    module = Toy(x.shape[-1], classes, bias).to(x.dtype)
    return Case(module, list(module.parameters()), Rows(Vectors(x), torch.arange(len(x)) % classes))


def private(
    case: Case,
    config: TrainConfig = SGD,
    *,
    clip: float = 1.0,
    noise: float = 0.0,
    seed: int = 7,
    stream: Sequence[str | int] = ("noise",),
) -> PrivateResult:
    return train_privately(
        case.module,
        case.parameters,
        case.rows,
        case.objective,
        config,
        noise_multiplier=noise,
        clip=clip,
        rng=numpy.random.default_rng(seed),
        noise_generator=torch_generator(0, *stream),
    )


def moved(case: Case, *arguments: object, **settings: object) -> Tensor:
    """How far private training carries the parameters, in one vector; they are put back."""
    start = case.values()
    private(case, *arguments, **settings)  # type: ignore[arg-type]
    change = torch.cat(
        [(p.detach() - s).flatten() for p, s in zip(case.parameters, start, strict=True)]
    )
    case.put(start)
    return change


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- against loops over examples ---------------------------------------------------------------

Merge = Callable[[list[list[Tensor]], float, float], list[Tensor]]  # gradients, clip, q n


def factor(gradient: Sequence[Tensor], clip: float) -> float:
    """Opacus' factor: it keeps away from 0 / 0 by a millionth."""
    return min(1.0, clip / (math.sqrt(sum(float(g.square().sum()) for g in gradient)) + 1e-6))


def added(gradients: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(per_tensor).sum(0) for per_tensor in zip(*gradients, strict=True)]


def flat(gradients: list[list[Tensor]], clip: float, expected: float) -> list[Tensor]:
    return [t / expected for t in added([[g * factor(gs, clip) for g in gs] for gs in gradients])]


def per_layer(gradients: list[list[Tensor]], clip: float, expected: float) -> list[Tensor]:
    return [t / expected for t in added([[g * factor([g], clip) for g in gs] for gs in gradients])]


def unclipped(gradients: list[list[Tensor]], clip: float, expected: float) -> list[Tensor]:
    return [t / expected for t in added(gradients)]


def mean_of_the_drawn(gradients: list[list[Tensor]], clip: float, expected: float) -> list[Tensor]:
    return flat(gradients, clip, len(gradients))


def clipped_mean(gradients: list[list[Tensor]], clip: float, expected: float) -> list[Tensor]:
    mean = unclipped(gradients, clip, expected)
    return [t * factor(mean, clip) for t in mean]


def example_gradients(case: Case, picked: Sequence[int]) -> list[list[Tensor]]:
    """Each example's gradients by a forward pass of its own."""
    found = []
    for row in picked:
        batch = case.rows.inputs([row])
        logits = case.module(**batch).logits
        loss = example_losses(logits, batch, case.rows.labels[[row]], case.objective).sum()
        found.append(list(torch.autograd.grad(loss, case.parameters)))
    return found


def loop(case: Case, config: TrainConfig, clip: float, merge: Merge) -> Tensor:
    """How far SGD carries the parameters; they are put back."""
    case.module.train()
    start = case.values()
    count = len(case.rows)
    expected = min(1.0, config.batch_size / count) * count
    for picked in poisson_batches(count, config, numpy.random.default_rng(7)):
        if picked:
            step = merge(example_gradients(case, picked), clip, expected)
            case.put(
                [p - config.learning_rate * g for p, g in zip(case.values(), step, strict=True)]
            )
    change = torch.cat([(p - s).flatten() for p, s in zip(case.values(), start, strict=True)])
    case.put(start)
    return change


@pytest.mark.parametrize("build", [bert, llama, mixer])
def test_clipped_steps_equal_a_loop_over_examples_and_no_mistaken_one(
    build: Callable[[], Case],
) -> None:
    case = build()
    norms = [
        math.sqrt(sum(float(g.square().sum()) for g in gradient))
        for gradient in example_gradients(case, range(20))
    ]
    clip = float(numpy.median(norms))
    found = moved(case, clip=clip)
    assert relative(found, loop(case, SGD, clip, flat)) < 1e-9  # float64 leaves about 1e-14
    for wrong in (per_layer, unclipped, mean_of_the_drawn, clipped_mean):
        assert relative(found, loop(case, SGD, clip, wrong)) > 1e-2, wrong.__name__
    result = private(case, clip=clip)
    assert 0.2 < result.clipped < 0.8  # half of them at the start
    assert (result.steps, result.nonfinite_examples) == (3, 0)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(learning_rate=1e-2, batch_size=6, steps=4, weight_decay=0.1),
        SGD.model_copy(update={"momentum": 0.9, "clip_gradient": 0.05}),
    ],
)
def test_without_noise_and_clip_it_is_plain_training(config: TrainConfig) -> None:
    case = bert()
    found = moved(case, config, clip=math.inf)
    result = private(bert(), config, clip=math.inf)

    start, losses = case.values(), []
    if config.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            case.parameters, lr=1e-2, weight_decay=0.1
        )
    else:
        optimizer = torch.optim.SGD(case.parameters, lr=0.1, momentum=0.9)
    case.module.train()
    for picked in poisson_batches(20, config, numpy.random.default_rng(7)):
        batch = case.rows.inputs(picked)
        loss = example_losses(
            case.module(**batch).logits, batch, case.rows.labels[picked], "classify"
        )
        optimizer.zero_grad()
        (loss.sum() / 6).backward()
        if config.clip_gradient:
            nn.utils.clip_grad_norm_(case.parameters, config.clip_gradient)
        optimizer.step()
        losses += loss.tolist()
    plain = torch.cat([(p - s).flatten() for p, s in zip(case.values(), start, strict=True)])
    assert relative(found, plain) < 1e-9
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert (result.seen, result.clipped) == (len(losses), 0.0)


# --- batches -----------------------------------------------------------------------------------


def size_p_value(sizes: Sequence[int], n: int, q: float) -> float:
    """Chi-square of batch sizes against Binomial(n, q), bins under 5 expected put together."""
    expected = stats.binom.pmf(numpy.arange(n + 1), n, q) * len(sizes)
    seen = numpy.bincount(sizes, minlength=n + 1)
    common = expected >= 5
    return float(
        stats.chisquare(
            [*seen[common], seen[~common].sum()], [*expected[common], expected[~common].sum()]
        ).pvalue
    )


@pytest.mark.parametrize(("n", "b"), [(50, 8), (49, 1), (98, 2)])
def test_batches_are_poisson(n: int, b: int) -> None:
    config, q = TrainConfig(batch_size=b, steps=2000), b / n
    drawn = list(poisson_batches(n, config, numpy.random.default_rng(2)))
    assert len(drawn) == 2000
    assert size_p_value([len(batch) for batch in drawn], n, q) > 1e-3
    times = numpy.bincount([row for batch in drawn for row in batch], minlength=n)
    z = (times - 2000 * q) / math.sqrt(2000 * q * (1 - q))
    assert 1e-3 < stats.chi2.sf((z**2).sum(), n) < 1 - 1e-3
    shuffled = list(batches(n, config, numpy.random.default_rng(2)))
    assert size_p_value([len(batch) for batch in shuffled], n, q) < 1e-9


def test_a_batch_of_all_is_all() -> None:
    drawn = poisson_batches(5, ONE_STEP, numpy.random.default_rng(0))
    assert list(drawn) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("n", "b"), [(49, 1), (98, 2), (93, 1), (100, 32), (10, 16)])
def test_the_sum_is_divided_by_the_real_number(n: int, b: int) -> None:
    """49 * (1 / 49) is below 1 in floating point: cut to an integer it is 0."""
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, batch_size=b, steps=0, epochs=1)
    case = toy(torch.ones(n, 1, 3, dtype=torch.float64), bias=False)
    case.rows.labels.zero_()
    result = private(case, config, clip=1e-6)  # every example adds the same, clipped
    assert result.sample_rate == config.sample_rate(n) == min(1.0, b / n)
    assert result.steps == math.ceil(n / b)
    length = 1e-6 * math.sqrt(1.5) / (math.sqrt(1.5) + 1e-6)  # |g| = sqrt(2 * 3 / 4)
    expected = result.seen * length / (min(1.0, b / n) * n)
    assert float(case.values()[0].norm()) == pytest.approx(expected, rel=1e-4)  # g turns a little


# --- noise -------------------------------------------------------------------------------------


def blank(d: int = 400, classes: int = 300) -> Case:
    """All gradients are zero, so that what moves is noise."""
    return toy(torch.zeros(30, 1, d), classes, bias=False)


def seed_for(size: int, n: int, config: TrainConfig) -> int:
    """A seed whose first batch has so many examples."""
    return next(
        seed
        for seed in range(10_000)
        if len(next(poisson_batches(n, config, numpy.random.default_rng(seed)))) == size
    )


@pytest.mark.parametrize("size", [0, 2, 6])
def test_noise_is_normal_and_of_the_stated_scale_whatever_was_drawn(size: int) -> None:
    config = ONE_STEP.model_copy(update={"batch_size": 2})  # q n = 2
    noise = moved(blank(), config, clip=0.7, noise=1.3, seed=seed_for(size, 30, config))
    scale = 1.3 * 0.7 / 2
    assert len(noise) >= 100_000
    assert float(noise.std()) == pytest.approx(scale, rel=0.01)  # 4.9 standard errors
    assert stats.kstest(noise.numpy() / scale, "norm").pvalue > 1e-3


def test_no_two_draws_are_alike() -> None:
    config, case = ONE_STEP.model_copy(update={"batch_size": 4}), blank(100, 200)
    draws: list[NDArray[numpy.float32]] = []
    for client in range(5):
        for number in range(1, 4):
            stream = ("client", client, "round", number, "noise")
            draws.append(moved(case, config, noise=1.0, stream=stream).numpy())
    longer = config.model_copy(update={"steps": 2})
    draws.append(moved(case, longer, noise=1.0, stream=stream).numpy() - draws[-1])
    correlation = numpy.corrcoef(draws) - numpy.eye(len(draws))
    assert numpy.abs(correlation).max() < 5 / math.sqrt(draws[0].size)
    assert numpy.array_equal(moved(case, config, noise=1.0, stream=stream).numpy(), draws[-2])


def test_an_empty_first_batch_takes_its_noise() -> None:
    case, config = bert(), SGD.model_copy(update={"batch_size": 1})
    result = private(case, config, noise=1.0, seed=seed_for(0, 20, config))
    assert result.empty_batches >= 1
    assert result.steps == 3
    nothing = config.model_copy(update={"steps": 1})
    start = case.values()
    result = private(case, nothing, noise=1.0, seed=seed_for(0, 20, config))
    assert (result.seen, result.empty_batches) == (0, 1)
    assert math.isnan(result.loss)
    assert all(bool((p != s).all()) for p, s in zip(case.values(), start, strict=True))


@pytest.mark.parametrize(
    ("noise", "clip"), [(math.nan, 1), (-1, 1), (math.inf, 1), (1, 0), (1, math.nan), (1, math.inf)]
)
def test_settings_that_are_no_mechanism_are_refused(noise: float, clip: float) -> None:
    with pytest.raises(PrivacyError, match="allowed"):
        private(blank(2, 2), clip=clip, noise=noise)


def test_noise_needs_a_stream_of_its_own() -> None:
    case = blank(2, 2)
    with pytest.raises(PrivacyError, match="stream of its own"):
        train_privately(
            case.module,
            case.parameters,
            case.rows,
            "classify",
            SGD,
            noise_multiplier=1.0,
            clip=1.0,
            rng=numpy.random.default_rng(0),
            noise_generator=None,
        )


# --- one example's influence -------------------------------------------------------------------


def influence(odd: Tensor, clip: float) -> tuple[Tensor, PrivateResult]:
    """What the example ``odd [T, d]``, the last of seven, adds to a step's sum."""
    x = torch.randn(6, *odd.shape, generator=torch_generator(0, "x")).to(odd.dtype)
    with_it = toy(torch.cat([x, odd[None]]))
    total = -7 * moved(with_it, ONE_STEP, clip=clip)
    others = -6 * moved(toy(x), ONE_STEP, clip=clip)
    return total - others, private(with_it, ONE_STEP, clip=clip)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_gradient_that_is_not_finite_counts_as_zero_in_every_tensor(value: float) -> None:
    odd = torch.full((4, 3), value)  # four times 3e38 / 2: the weight's is infinite, the bias' is 2
    added, result = influence(odd, clip=0.5)
    assert float(added.abs().max()) < 1e-6  # float32
    assert (result.nonfinite_examples, result.seen, result.steps) == (1, 7, 1)


@pytest.mark.parametrize("clip", [1e-3, 0.5, 100.0])
def test_a_huge_gradient_adds_the_clip_in_its_direction(clip: float) -> None:
    added, result = influence(torch.full((1, 3), 1e38), clip)
    direction = torch.tensor([-1.0, -1, -1, 1, 1, 1, 0, 0]) / math.sqrt(6)  # label 0; p = 1/2
    assert float((added + clip * -direction).norm() / clip) < 1e-4  # float32, sums of seven
    assert result.nonfinite_examples == 0


@pytest.mark.parametrize("clip", [1e-3, 0.5, 100.0])
def test_a_million_times_larger_example_adds_at_most_the_clip(clip: float) -> None:
    odd = 1e6 * torch.randn(2, 3, generator=torch_generator(0, "odd")).double()
    added, _ = influence(odd, clip)
    assert 0.99 * clip < float(added.norm()) <= clip * (1 + 1e-5)


def test_divergence_is_an_error() -> None:
    with pytest.raises(FedloraError, match="diverged"):
        private(blank(2, 2), SGD.model_copy(update={"learning_rate": 1e38}), noise=100.0)


# --- what is trained, and what is left ---------------------------------------------------------


def only_b(case: Case) -> Case:
    """The same with every A frozen."""
    names = {id(p): name for name, p in case.module.named_parameters()}
    for parameter in case.parameters:
        parameter.requires_grad_("lora_A" not in names[id(parameter)])
    return Case(
        case.module, [p for p in case.parameters if p.requires_grad], case.rows, case.objective
    )


def traces(module: nn.Module) -> Iterator[str]:
    """What private training would leave on a module."""
    for layer in module.modules():
        yield from vars(layer).keys() & {"activations", "max_batch_len"}
        yield from map(str, [*layer._forward_hooks, *layer._backward_hooks])
        yield from vars(layer).keys() & {"autograd_grad_sample_hooks"}
    for parameter in module.parameters():
        yield from vars(parameter)
        if parameter.grad is not None:
            yield "grad"


def test_with_a_frozen_only_the_rest_is_noised() -> None:
    case = bert()
    some = only_b(case)
    start = case.values()
    private(some, noise=1.0)
    for parameter, value in zip(case.parameters, start, strict=True):
        if parameter.requires_grad:
            assert bool((parameter != value).all())
        else:
            assert torch.equal(parameter, value)
    with pytest.raises(PrivacyError, match="same ones"):
        private(case)  # A is given, and frozen
    case.parameters[0].requires_grad_(True)
    with pytest.raises(PrivacyError, match="same ones"):
        private(some)  # one A moves, and is not given


def test_the_module_is_as_good_as_new_afterwards() -> None:
    used, fresh = bert(), bert()
    start = used.values()
    private(only_b(used), noise=1.0)
    assert not list(traces(used.module))
    for parameter in used.parameters:
        parameter.requires_grad_(True)
    used.put(start)
    private(used, noise=1.0)
    assert not list(traces(used.module))
    used.put(start)
    losses = [
        train(c.module, c.parameters, c.rows, "classify", SGD, numpy.random.default_rng(0))
        for c in (used, fresh)
    ]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(used.values(), fresh.values(), strict=True))


class Uncalled(Toy):
    """Has a layer whose weight is used behind the hooks' back."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=(x @ self.layer.weight.T).sum(1))


class Shared(Toy):
    """Calls its layer on something that has no row for each example."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=x.sum(1)[:, :2] + self.layer(torch.ones_like(x[:1])).sum(1))


class Twice(Toy):
    """Calls its layer once more and makes nothing of it: the hooks would take the wrong inputs."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        used = super().forward(x)
        self.layer(2 * x)
        return used


@pytest.mark.parametrize("kind", [Uncalled, Shared, Twice])
def test_a_tensor_without_gradients_of_its_own_is_refused(kind: type[Toy]) -> None:
    module = kind(bias=False)
    rows = Rows(Vectors(torch.ones(5, 1, 3)), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(PrivacyError, match=r"layer\.weight"):
        private(Case(module, list(module.parameters()), rows), ONE_STEP)
    assert not list(traces(module))


def test_adapters_that_hooks_cannot_see_are_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match=r"miss_block.*ParameterDict"):
        private(bert("miss"))
    base = load_model(ModelConfig(name="tiny_bert"), 2, "classify")
    dora = peft.get_peft_model(
        base.module, peft.LoraConfig(use_dora=True, target_modules=["query"])
    )
    with pytest.raises(PrivacyError, match=r"lora_magnitude_vector.*DoraLinearLayer"):
        check_supported(dora, [p for p in dora.parameters() if p.requires_grad])


def test_layers_that_mix_examples_and_coarse_numbers_are_refused() -> None:
    mixing = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False))
    with pytest.raises(PrivacyError, match="'1' is a BatchNorm1d"):
        check_supported(mixing, list(mixing[0].parameters()))
    counting = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    with pytest.raises(PrivacyError, match="InstanceNorm1d"):
        check_supported(counting, list(counting.parameters()))
    coarse = nn.Linear(3, 3).bfloat16()
    with pytest.raises(PrivacyError, match="bfloat16"):
        check_supported(coarse, list(coarse.parameters()))
