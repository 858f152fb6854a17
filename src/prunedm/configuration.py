"""Options from files: defaults < YAML < command line, and errors that suggest the nearest name."""

from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from prunedm.errors import UserError, nearest
from prunedm.options import Options

AnyOptions = TypeVar("AnyOptions", bound=Options)


def merge_file(given: AnyOptions, path: Path | None) -> AnyOptions:
    """`given` wins over the file wherever it was set; the file wins over the defaults."""
    if path is None:
        return given
    merged = _merge(_read(path), given.model_dump(exclude_unset=True))
    try:
        return type(given).model_validate(merged)
    except ValidationError as error:
        raise UserError(f"{path}: {validation_message(error, type(given))}") from error


def preset_file(stage: str, name: str) -> Path:
    """A packaged YAML file. Raises `UserError` naming those there are."""
    folder = Path(str(resources.files("prunedm") / "assets" / "presets"))
    path = folder / f"{stage}-{name}.yaml"
    if not path.exists():
        known = sorted(p.stem.removeprefix(f"{stage}-") for p in folder.glob(f"{stage}-*.yaml"))
        raise UserError(f"no preset {name!r} of {stage}; there are {', '.join(known)}")
    return path


def validation_message(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first thing pydantic objects to, in one line: which option, which value, the way out."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown option {name!r}{_suggestion(first['loc'], model)}"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    return (
        f"{name} = {first['input']!r}: {reason}" if name else reason
    )  # no name: of several options


def _suggestion(location: tuple[Any, ...], model: type[BaseModel] | None) -> str:
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        inner = field.annotation if field else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    known = list(model.model_fields) if model else []
    return nearest(str(location[-1]), known)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no table of options")
    return _underscored(value)


def _underscored(value: dict[str, Any]) -> dict[str, Any]:
    """Hyphens in names mean underscores, as on the command line."""
    return {
        str(k).replace("-", "_"): _underscored(v) if isinstance(v, dict) else v
        for k, v in value.items()
    }


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
