"""What stands beside an option's type: its name elsewhere, its place in the help, what it decides."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Input:
    """Names what is read, whose content decides the result."""

    kind: Literal["model", "dataset", "file"]
    words: tuple[str, ...] = ()  # values that name nothing on this machine


@dataclass(frozen=True)
class How:
    """Changes how a result is made, but not what it is."""


@dataclass(frozen=True)
class Flag:
    """The name, of an option in a group, on the command line and in records."""

    name: str


@dataclass(frozen=True)
class OneOf:
    """A name in a table, as it is when the option is set."""

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
