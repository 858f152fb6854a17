"""Options from files: defaults < YAML < command line, and errors that suggest the nearest name."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prunedm.errors import UserError, nearest, shortened
from prunedm.options import Options
from prunedm.reading import parse_yaml, read_yaml

AnyOptions = TypeVar("AnyOptions", bound=Options)


def merged(
    kind: type[AnyOptions], path: Path | None, above: Mapping[str, Any] | None = None
) -> AnyOptions:
    """Defaults < the file < the table `above`. Raises `UserError` naming the file."""
    try:
        return kind.model_validate(combined(read_options(path) if path else {}, above or {}))
    except ValidationError as error:
        where = f"{path}: " if path else ""
        raise UserError(f"{where}{validation_message(error, kind)}") from error


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Nested tables of `stage.option=value` texts; values read as in a YAML file.

    Raises `UserError` for a text without a name or a "=".
    """
    merged: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.strip()):
            raise UserError(f"{text!r} sets nothing; give NAME=VALUE, such as learn.pattern=1:4")
        merged = combined(merged, nested({name.strip(): parse_yaml(value, text)}))
    return merged


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"learn.steps": 5} as {"learn": {"steps": 5}}; hyphens in names mean underscores."""
    merged: dict[str, Any] = {}
    for name, value in settings.items():
        *tables, last = str(name).replace("-", "_").split(".")
        inner: dict[str, Any] = {last: value}
        for table in reversed(tables):
            inner = {table: inner}
        merged = combined(merged, inner)
    return merged


def preset_file(stage: str, name: str) -> Path:
    """A packaged YAML file. Raises `UserError` naming the available ones."""
    folder = Path(str(resources.files("prunedm") / "assets" / "presets"))
    path = folder / f"{stage}-{name}.yaml"
    if not path.exists():
        known = sorted(p.stem.removeprefix(f"{stage}-") for p in folder.glob(f"{stage}-*.yaml"))
        raise UserError(f"no preset {name!r} of {stage}; there are {', '.join(known)}")
    return path


def validation_message(
    error: ValidationError, model: type[BaseModel] | None = None, within: str = ""
) -> str:
    """Pydantic's first error in one line: which option, which value, the way out.

    within: label of the stage that the options belong to.
    """
    first = error.errors()[0]
    name = ".".join(str(part) for part in (*filter(None, [within]), *first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown option {name!r}{_suggestion(first['loc'], model)}"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if not name:  # about several options
        return reason
    return f"{name} = {_shown(first['input'])}: {reason}"


def _shown(value: Any) -> str:
    try:
        return shortened(repr(value))
    except ValueError:  # an integer with over 4,300 digits
        return "a number of thousands of digits"


def _suggestion(location: tuple[Any, ...], model: type[BaseModel] | None) -> str:
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        inner = field.annotation if field else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    known = list(model.model_fields) if model else []
    return nearest(str(location[-1]), known)


def read_options(path: Path) -> dict[str, Any]:
    """The table in a YAML file, hyphens in names as underscores. Raises `UserError` without one."""
    value = read_yaml(path) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no table of options")
    return underscored(value)


def underscored(value: Mapping[str, Any]) -> dict[str, Any]:
    """Replace hyphens in names by underscores, as the command line does."""
    return {
        str(k).replace("-", "_"): underscored(v) if isinstance(v, dict) else v
        for k, v in value.items()
    }


def combined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = combined(merged[key], value) if both else value
    return merged
