"""Checking values against type annotations, with errors that name the place and the remedy."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from fedlora.errors import ConfigError, unknown, wrong

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bound = Annotated[float, Field(gt=0)]  # infinity is none
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]
Names = Annotated[tuple[str, ...], Strict(False)]
Counts = Annotated[tuple[Count, ...], Strict(False)]
Shares = Annotated[tuple[Share, ...], Strict(False)]


def _finite(value: object) -> object:
    """The value, unless it is infinite or no number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


Finite = AfterValidator(_finite)

STRICT = ConfigDict(
    frozen=True, extra="forbid", strict=True, protected_namespaces=(), arbitrary_types_allowed=True
)


class Part(BaseModel):
    """A frozen table of a recipe: no unknown keys, no silent conversions."""

    model_config = STRICT


def read(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """Build ``model`` from a table read from a file (Any: the caller names the type).

    Raises:
        ConfigError: one line for the first thing that is wrong, with its dotted key.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(model, error.errors()[0], where) from None


def checked_options(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, leave_out: int = 0
) -> dict[str, Any]:
    """The options as ``function`` takes them: names and types from its signature.

    ``leave_out`` is how many leading parameters the caller fills in itself.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type or out of range.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[leave_out:]
    fields: dict[str, Any] = {
        parameter.name: (
            hints[parameter.name],
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in parameters
    }
    model = create_model("Options", __config__=STRICT, **fields)
    checked = read(model, options, where)
    return {name: getattr(checked, name) for name in options}


def _explain(model: type[BaseModel], error: ErrorDetails, where: str) -> ConfigError:
    """One pydantic error as what, where, found, allowed."""
    path = [str(step) for step in error["loc"]]
    key = ".".join([where, *path] if where else path)
    if error["type"] == "extra_forbidden":
        parent = _model_at(model, path[:-1])
        names = parent.model_fields if parent else ()
        place = ".".join(key.split(".")[:-1]) or "the recipe"
        return unknown(f"unknown key in {place}", path[-1], names)
    if error["type"] == "missing":
        return ConfigError(f"{key}: missing, and it has no default")
    return wrong(key, error["input"], _allowed(error["msg"]))


def _allowed(message: str) -> str:
    """Pydantic's message without what introduces it."""
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The nested model that a dotted path leads to."""
    for step in path:
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        if not (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model
