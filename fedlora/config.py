"""One run, written down: every table of a recipe as a frozen type."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationInfo, field_validator, model_validator

from fedlora.config_clock import ClockConfig as ClockConfig
from fedlora.config_evaluate import EvaluateConfig as EvaluateConfig
from fedlora.config_secure import SecureConfig as SecureConfig
from fedlora.config_train import PrivacyConfig as PrivacyConfig
from fedlora.config_train import TrainConfig as TrainConfig
from fedlora.options import (
    Count,
    CountOrZero,
    Counts,
    Finite,
    Names,
    NonNegative,
    Part,
    Positive,
    Shares,
)

Split = Literal[
    "group", "natural", "iid", "dirichlet", "pathological", "group_dirichlet", "proportions", "own"
]
Scalar = Annotated[str | int | float | bool | list[str], Finite]  # JSON has no others


class TaskConfig(Part):
    """Which data, and which part of it measures.

    Attributes:
        name: an entry of ``TASKS``.
        evaluate: held-out part that is measured; ``validation`` is for choosing settings.
        rows_per_group: measure at most so many examples of each group; 0 measures all.
        options: the task's own options.
    """

    name: str = "vader"
    evaluate: Literal["test", "validation"] = "test"
    rows_per_group: CountOrZero = 0
    options: dict[str, Scalar] = {}


class ClientsConfig(Part):
    """How many clients there are, how the data is dealt to them, who takes part in a round.

    Attributes:
        number: of clients.
        split: ``group`` (one client per domain), ``natural`` (per article, review, ...),
            ``iid``, ``dirichlet`` (label skew), ``pathological`` (few classes each),
            ``group_dirichlet`` (label skew inside each domain, client k in the k-th by turns),
            ``proportions`` (label skew as written), or ``own``, with the task ``local`` alone:
            each has rows of its own.
        alpha: of the Dirichlet splits; smaller is more skewed.
        classes: per client, for the pathological split.
        proportions: each client's shares of the labels, in the task's order of labels, for the
            split of that name.
        min_examples: what each client must have at least.
        fraction_train: share of the clients drawn in each round.
        min_train_nodes: draw at least so many, and merge only if so many good replies came.
        timeout: seconds to wait for the replies of one round.
        newcomers: the last so many clients never train; see ``EvaluateConfig``.
        attackers: the first so many clients attack, for experiments with rules that resist.
        attack: how: ``none`` or an entry of ``ATTACKS``; ``attack_options`` are its own.
    """

    number: Count = 4
    split: Split = "group"
    alpha: Positive = 0.5
    classes: Count = 2
    proportions: Annotated[tuple[Shares, ...], Strict(False)] = ()
    min_examples: Count = 1
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_train_nodes: Count = 2
    timeout: Positive = 3600.0
    newcomers: CountOrZero = 0
    attackers: CountOrZero = 0
    attack: str = "none"
    attack_options: dict[str, Scalar] = {}

    @property
    def training(self) -> int:
        """How many clients may be drawn to train: all but the newcomers."""
        return self.number - self.newcomers


class ModelConfig(Part):
    """The frozen base model.

    Attributes:
        name: an entry of ``MODELS``, a folder, an installed package that carries a model, or a
            name on the hub.
        max_length: tokens a text is cut to.
        dtype: of its weights and activations; what trains is float32 in either.
        quantise: keep a folder's or the hub's weights in so many bits (bitsandbytes).
        options: the model's own options.
    """

    name: str = "minilm"
    max_length: Count = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantise: Literal["none", "8bit", "4bit"] = "none"
    options: dict[str, Scalar] = {}


class AdapterConfig(Part):
    """What is trained on top of the base.

    Attributes:
        name: an entry of ``ADAPTERS``.
        rank: r; with ``ranks`` the largest of them, which it is if left out.
        ranks: of the clients: client k has the (k mod n)-th of n; none is ``rank`` for all.
        target_modules: names of the layers that get an adapter, as PEFT matches them.
        heads: a classifier's head trains in full beside the adapter; false leaves it as it was
            loaded, or drawn with the base: the same in every run, and nothing of it travels.
        options: the adapter's own options (for ``lora``: alpha, dropout, use_rslora, ...).
    """

    name: str = "lora"
    rank: Count = 8
    ranks: Counts = ()
    target_modules: Names = ("query", "value")
    heads: bool = True
    options: dict[str, Scalar] = {}

    @model_validator(mode="before")
    @classmethod
    def _largest(cls, given: Any) -> Any:  # Any: what a recipe holds
        """``rank`` is the largest of ``ranks`` where it is left out."""
        ranks = given.get("ranks") if isinstance(given, dict) and "rank" not in given else None
        if ranks and isinstance(ranks, list | tuple) and all(type(r) is int for r in ranks):
            return {**given, "rank": max(ranks)}
        return given

    @field_validator("ranks")
    @classmethod
    def _one_adapter(cls, ranks: tuple[int, ...], found: ValidationInfo) -> tuple[int, ...]:
        """The server's adapter is of the largest rank."""
        rank = found.data.get("rank")
        if ranks and rank is not None and max(ranks) != rank:
            raise ValueError(f"a list whose largest is adapter.rank, {rank}; or leave rank out")
        return ranks

    def rank_of(self, client: int) -> int:
        """A client's rank."""
        return self.ranks[client % len(self.ranks)] if self.ranks else self.rank


# keys of [launch] that say where clients run, and nothing of what
PLACES = (
    "backend",
    "workers",
    "num_cpus",
    "num_gpus",
    "resources",
    "address",
    "placement",
    "ship",
    "runtime_env",
)


Tracker = Literal["auto", "tensorboard", "wandb", "mlflow"]


class LaunchConfig(Part):
    """Where clients run, and how many at once.

    Of these, ``threads``, ``device``, ``pack`` and ``sums`` may change a result in its last digits
    (and ``pack`` what is dropped, where a model has dropout); nothing else does. ``PLACES`` may be
    others when a run is gone on with.

    Attributes:
        backend: ``inprocess`` (this process, for small things and debugging) or ``ray``.
        workers: Ray workers; 0 takes as many as the cores hold, and the GPUs if each needs a share.
        threads: torch threads per worker on CPU, and of the server; sums may depend on it.
        device: ``auto`` takes CUDA where there is one.
        pack: clients that are trained together on one model, in one forward and backward pass; 0
            takes what suits the model and the number of clients, 1 trains one by one.
        sums: ``workers`` checks and adds up the updates of a pack where they were trained, so that
            the server holds sums and not every client's update; the aggregation error, which
            takes single updates, is then not measured. ``masked`` lets nobody but a client see its
            update: the server gets their sum, of rounded numbers (``SecureConfig``).
        num_cpus: cores that each worker reserves; 0 takes ``threads``.
        num_gpus: share of a GPU that each worker reserves.
        resources: what else each worker reserves of a cluster, by Ray's names.
        address: of a running Ray cluster to join; empty starts one on this machine. On a cluster
            ``workers`` is the most there may be, 0 one for each client, as far as nodes have room.
        placement: of workers on nodes: ``spread`` them evenly, or ``pack`` them on few.
        ship: bring the task's data and the base model to nodes that lack them.
        runtime_env: Ray's, for the workers; empty leaves each node's own environment.
        checkpoint: commit every so many rounds, so that ``fedlora run --resume`` can go on after
            them; 0 commits none.
        track: who is told each round, in ``track/`` or over the network: ``tensorboard``, ``wandb``
            or ``mlflow``; ``auto`` is TensorBoard where it is installed. May change, as ``PLACES``.
    """

    backend: Literal["inprocess", "ray"] = "inprocess"
    workers: CountOrZero = 0
    threads: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    pack: CountOrZero = 0
    sums: Literal["server", "workers", "masked"] = "server"
    num_cpus: NonNegative = 0.0
    num_gpus: NonNegative = 0.0
    resources: dict[str, Positive] = {}
    address: str = ""
    placement: Literal["spread", "pack"] = "spread"
    ship: bool = False
    runtime_env: dict[str, Any] = {}  # Any: what Ray takes there
    checkpoint: CountOrZero = 1
    track: Annotated[tuple[Tracker, ...], Strict(False)] = ("auto",)

    @field_validator("num_cpus", "num_gpus")
    @classmethod
    def _whole(cls, each: float) -> float:
        """Ray deals out several of a thing whole."""
        if each > 1 and each != int(each):
            raise ValueError("a share of one, or a whole number")
        return each

    @field_validator("resources")
    @classmethod
    def _named(cls, resources: dict[str, float]) -> dict[str, float]:
        """Resources that have keys of their own go there."""
        for name, each in resources.items():
            cls._whole(each)
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError("names of custom resources; num_cpus and num_gpus have their own")
        return resources

    def cpus(self) -> float:
        """Cores that each worker reserves."""
        return self.num_cpus or float(self.threads)

    def processes(self) -> int:
        """How many workers there are: 1 in process, on Ray as asked or as the cores hold."""
        if self.backend == "inprocess":
            return 1
        return self.workers or max(1, int((os.cpu_count() or 1) / self.cpus()))


class ClientConfig(Part):
    """What a client needs to know of a run; the server sends it with each message."""

    seed: CountOrZero = 0
    task: TaskConfig = TaskConfig()
    clients: ClientsConfig = ClientsConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"


class RunConfig(Part):
    """A whole run, as ``config.toml`` keeps it.

    Attributes:
        name: of the run's folder.
        method: an entry of ``METHODS``; ``options`` are its fields.
        rounds: of federated training.
        seed: the root of every random stream.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), Strict()] = "run"
    method: str = "fedavg"
    rounds: Count = 5
    seed: CountOrZero = 0
    options: dict[str, Scalar] = {}
    task: TaskConfig = TaskConfig()
    clients: ClientsConfig = ClientsConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    clock: ClockConfig = ClockConfig()
    launch: LaunchConfig = LaunchConfig()
    secure: SecureConfig = SecureConfig()

    def client(self) -> ClientConfig:
        """The part that travels to clients."""
        return ClientConfig(
            seed=self.seed,
            task=self.task,
            clients=self.clients,
            model=self.model,
            adapter=self.adapter,
            train=self.train,
            privacy=self.privacy,
            evaluate=self.evaluate,
            device=self.launch.device,
        )
