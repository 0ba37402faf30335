"""The tasks, by name, and loading one from its part of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from fedlora.config import TaskConfig
from fedlora.errors import choose
from fedlora.options import checked_options
from fedlora.tasks import digits, fashion, hub, tweets, vader
from fedlora.tasks.split import some_of_each_group
from fedlora.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "vader": vader.vader,
    "tweets": tweets.tweets,
    "tweets_lm": tweets.tweets_lm,
    "digits": digits.digits,
    "fashion": fashion.fashion,
    "hub": hub.hub,
}


def load_task(config: TaskConfig) -> Task:
    """The task of a recipe; the same configuration gives the same object in one process.

    ``rows_per_group`` cuts the validation and the test part, never the training part.

    Raises:
        ConfigError: unknown task or option, or data that is missing or damaged.
    """
    return _load(config.model_copy(update={"evaluate": "test"}).model_dump_json())


@lru_cache(maxsize=4)
def _load(text: str) -> Task:
    config = TaskConfig.model_validate_json(text)
    function = choose(TASKS, config.name, "task.name")
    task = function(**checked_options(function, config.options, "task.options"))
    if not config.rows_per_group:
        return task
    return replace(
        task,
        validation=some_of_each_group(task.name, task.validation, config.rows_per_group),
        test=some_of_each_group(task.name, task.test, config.rows_per_group),
    )
