"""Federated LoRA: adapters, low-rank maths, models, tasks and the wire."""
