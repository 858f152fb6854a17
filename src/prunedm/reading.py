"""Text, JSON and YAML that others wrote, bounded: no file can fill the memory or hang the reader.

Raises `UserError` for what is not a regular file, is longer than `limit` bytes, is nested deeper than
`DEPTH`, or whose YAML aliases stand for more than `VALUES` values.
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

CONFIG_LIMIT = 1 << 20  # bytes of a configuration; the largest of diffusers' have some 10,000
RECORD_LIMIT = 1 << 26  # of what we write ourselves: losses of every step, rows of every model
YAML_LIMIT = 1 << 18
DEPTH = 64
VALUES = 100_000
Content = TypeVar("Content", bound=BaseModel)


def check_regular(path: Path) -> Path:
    """Raises `UserError` for what is missing, and for pipes, sockets and devices, which could hang."""
    try:
        if path.is_file():
            return path
        why = "not a regular file" if path.exists() else "missing"
    except OSError:  # a name that is too long, a folder that is closed
        why = "missing"
    raise UserError(f"cannot read {shortened(str(path))}: it is {why}")


def read_text(path: Path, *, limit: int = RECORD_LIMIT) -> str:
    """A UTF-8 text file."""
    try:
        with check_regular(path).open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path} is longer than {limit:,} bytes; is this the right file?")
        return content.decode("utf-8-sig")  # Excel begins its files with a mark
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
    """A JSON file as one of our models. Raises `UserError` that calls it damaged, and `way_out`."""
    return validated(TypeAdapter(kind), path, way_out)


def validated(kind: TypeAdapter[Any], path: Path, way_out: str) -> Any:
    """As `read_as`, of any type."""
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
    except ValueError as error:  # numbers of over 4,300 digits too
        raise UserError(f"{where} is not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    _check_depth(value, where)
    return value


def read_yaml(path: Path) -> Any:
    return parse_yaml(read_text(path, limit=YAML_LIMIT), path)


def parse_yaml(text: str, where: object) -> Any:
    """A YAML 1.2 document; None where it is empty."""
    if _brackets(text) > 4 * DEPTH:  # PyYAML takes seconds to run into its recursion limit
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
    except (LookupError, TypeError, AttributeError) as error:  # PyYAML's for `!!int ""`
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
    """How many flow brackets are open at once, those in quotes counted too."""
    steps = accumulate(1 if c in "[{" else -1 for c in text if c in "[]{}")
    return max(steps, default=0)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: in YAML 1.1, which PyYAML reads, 1:4 is 64, no is false, 1e-3 a text."""

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
    """Values that a node stands for, each alias counted as what it repeats."""
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
    """The last one would win in silence."""
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
