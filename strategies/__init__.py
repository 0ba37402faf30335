"""Aggregation rules: each one a Flower ``Strategy``, one page long, and a line in ``METHODS``."""

from strategies.base import LoraStrategy
from strategies.fedavg import FedAvg
from strategies.ffa_lora import FfaLora
from strategies.lora_fair import LoraFair

METHODS: dict[str, type[LoraStrategy]] = {
    "fedavg": FedAvg,
    "ffa_lora": FfaLora,
    "lora_fair": LoraFair,
}

__all__ = ["METHODS", "FedAvg", "FfaLora", "LoraFair", "LoraStrategy"]
