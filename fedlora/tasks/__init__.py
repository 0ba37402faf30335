"""The tasks, by name, and loading one from its part of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from fedlora.config import TaskConfig
from fedlora.errors import ConfigError, choose
from fedlora.options import checked_options
from fedlora.tasks import digits, emoji, fashion, hub, local, shakespeare, tweets, vader
from fedlora.tasks.split import some_of_each_group
from fedlora.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "vader": vader.vader,
    "tweets": tweets.tweets,
    "tweets_lm": tweets.tweets_lm,
    "digits": digits.digits,
    "emoji": emoji.emoji,
    "fashion": fashion.fashion,
    "shakespeare": shakespeare.shakespeare,
    "hub": hub.hub,
    "local": local.local,
}


def load_task(config: TaskConfig) -> Task:
    """The task of a recipe; the same configuration gives the same object in one process.

    ``rows_per_group`` cuts the validation and the test part, never the training part. Of a task
    whose rows are with the clients, see ``load_own``.

    Raises:
        ConfigError: unknown task or option, or data that is missing or damaged.
    """
    return _load(config.model_copy(update={"evaluate": "test"}).model_dump_json())


@lru_cache(maxsize=4)
def _load(text: str) -> Task:
    config = TaskConfig.model_validate_json(text)
    function = choose(TASKS, config.name, "task.name")
    return _cut(config, function(**checked_options(function, config.options, "task.options")))


def load_own(config: TaskConfig, client: int, data: str = "", held_out: str = "") -> Task:
    """One client's own rows, read anew; see ``AtClients.task_of``.

    Raises:
        DataError: they cannot be read.
        ConfigError: the task has no rows of clients' own, or there are none to measure on.
    """
    shared = load_task(config)
    if shared.at_clients is None:
        raise ConfigError(f"task {config.name!r}: its rows are dealt to clients, none has its own")
    task = _cut(config, shared.at_clients.task_of(client, data, held_out))
    if config.evaluate == "validation" and not len(task.validation):
        raise ConfigError(
            "task.options.validation: found 0.0, allowed: above 0 with task.evaluate = 'validation'"
        )
    return task


def _cut(config: TaskConfig, task: Task) -> Task:
    """The task with no more held-out rows than the recipe measures."""
    if not config.rows_per_group:
        return task
    return replace(
        task,
        validation=some_of_each_group(task.name, task.validation, config.rows_per_group),
        test=some_of_each_group(task.name, task.test, config.rows_per_group),
    )
