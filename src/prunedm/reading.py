"""Bounded reading of untrusted text, JSON and YAML: no file can exhaust memory or hang the reader.

Raises `UserError` for files that are not regular, are longer than `limit` bytes, are nested deeper than
`DEPTH`, or whose YAML aliases expand to more than `VALUES` values.
"""

import json
import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from prunedm.errors import UserError, shortened

CONFIG_LIMIT = 1 << 20  # bytes of a configuration; the largest in diffusers have about 10,000
RECORD_LIMIT = 1 << 26  # bytes of our own files: losses of every step, rows of every model
YAML_LIMIT = 1 << 18
DEPTH = 64
VALUES = 100_000
Content = TypeVar("Content", bound=BaseModel)


def check_regular(path: Path) -> Path:
    """The path. Raises `UserError` where it is missing, or a pipe, socket or device."""
    try:
        if path.is_file():
            return path
        why = "not a regular file" if path.exists() else "missing"
    except OSError:  # a name that is too long, a folder without access
        why = "missing"
    raise UserError(f"cannot read {shortened(str(path))}: it is {why}")


def read_text(path: Path, *, limit: int = RECORD_LIMIT) -> str:
    """A UTF-8 text file."""
    try:
        with check_regular(path).open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path} is longer than {limit:,} bytes; is this the right file?")
        return content.decode("utf-8-sig")  # Excel starts files with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_json(path: Path, *, limit: int = RECORD_LIMIT) -> Any:
    return parse_json(read_text(path, limit=limit), path)


def read_object(path: Path, *, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """A JSON object, as configurations are."""
    value = read_json(path, limit=limit)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def read_as(kind: type[Content], path: Path, way_out: str) -> Content:
    """A JSON file as one of our models. Raises `UserError` with `way_out` where it is damaged."""
    return validated(TypeAdapter(kind), path, way_out)


def validated(kind: TypeAdapter[Any], path: Path, way_out: str) -> Any:
    """As `read_as`, for any type."""
    try:
        return kind.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
    except UserError as error:
        reason = str(error)
    raise UserError(f"{path} is damaged ({reason}); {way_out}")


def parse_json(text: str | bytes, where: object) -> Any:
    """`where` names the text in errors."""
    try:
        value = json.loads(text)
    except ValueError as error:  # also for numbers of over 4,300 digits
        raise UserError(f"{where} is not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    _check_depth(value, where)
    return value


def read_yaml(path: Path) -> Any:
    return parse_yaml(read_text(path, limit=YAML_LIMIT), path)


def parse_yaml(text: str, where: object) -> Any:
    """A YAML 1.2 document; None where it is empty."""
    if _brackets(text) > 4 * DEPTH:  # PyYAML takes seconds to reach its recursion limit
        raise UserError(f"{where} is nested too deeply")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, where, {}, ())
        return loader.construct_document(node)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError) as error:  # PyYAML raises them for `!!int ""`
        raise UserError(
            f"cannot read {where}: a value is not of the type that its tag (!!int, !!bool, ...) names"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"cannot read {where}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def _brackets(text: str) -> int:
    """The deepest nesting of flow brackets, counting those in quotes too."""
    steps = accumulate(1 if c in "[{" else -1 for c in text if c in "[]{}")
    return max(steps, default=0)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: in PyYAML's YAML 1.1, 1:4 is 64, no is false, 1e-3 is text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _NUMBER + r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)


def _count_values(
    node: yaml.Node, where: object, known: dict[int, int], above: tuple[int, ...]
) -> int:
    """Number of values in a node after expanding aliases."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise UserError(f"{where}: an alias stands inside of what it repeats")
    if len(above) > DEPTH:
        raise UserError(f"{where} is nested too deeply")
    children: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node, where)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count_values(child, where, known, (*above, id(node))) for child in children)
    if total > VALUES:
        raise UserError(f"{where}: its aliases stand for more than {VALUES:,} values")
    known[id(node)] = total
    return total


def _refuse_twice(node: yaml.MappingNode, where: object) -> None:
    """Raise `UserError` for a repeated key, whose last value would silently win."""
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                said = shortened(key.value, most=60)
                raise UserError(f"{where}: {said} is given twice; leave one")
            seen.add((key.tag, key.value))


def _check_depth(value: Any, where: object) -> None:
    level = [value]
    for _ in range(DEPTH + 1):
        inner: list[Any] = []
        for container in level:
            parts = container.values() if isinstance(container, dict) else container
            if isinstance(container, (dict, list)):
                inner += [part for part in parts if isinstance(part, (dict, list))]
        if not inner:
            return
        level = inner
    raise UserError(f"{where} is nested too deeply")
