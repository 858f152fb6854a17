"""Marks in an option's annotation: what it names, what it decides, its flag, its choices."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Input:
    """Names an input, whose content decides the result."""

    kind: Literal["model", "dataset", "file"]
    words: tuple[str, ...] = ()  # values that name nothing on this machine


@dataclass(frozen=True)
class How:
    """Changes how a result is made, not what it is."""


@dataclass(frozen=True)
class Flag:
    """Name of a group's option on the command line and in records."""

    name: str


@dataclass(frozen=True)
class OneOf:
    """A name in a table, looked up when the option is set."""

    table: Collection[str]

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(str))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.table)}

    def _checked(self, name: str) -> str:
        if name not in self.table:
            *others, last = map(repr, self.table)
            raise PydanticCustomError(
                "literal_error",
                f"Input should be {', '.join(others)} or {last}",  # type: ignore[arg-type]
            )
        return name
