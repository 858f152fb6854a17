"""A recipe as written: the tables of a file, with settings over them by the stages' names.

The old form, five fields instead of a list, is read as the list it stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from prunedm.configuration import combined, read_options, underscored, validation_message
from prunedm.errors import UserError, nearest
from prunedm.options import Options
from prunedm.recipe import DEFAULT, Recipe, RecipeStage, numbered, verb_of
from prunedm.stages import STAGES

Table = dict[str, Any]
*_first, _last = (
    (stage.name or stage.verb, (stage.verb, stage.options.given()))
    for stage in map(RecipeStage.model_validate, DEFAULT)
)
# fields of the old form in their order: the verb and its default options. They are the default stages
# plus `learn`, which ran only where `stages` named it
FIELDS: dict[str, tuple[str, Table]] = dict([*_first, ("learn", ("learn", {})), _last])


@dataclass
class StageDraft:
    """One stage as written. told: whether it was given any options."""

    name: str
    verb: str
    table: Table
    runs: bool = True
    told: bool = False

    def set(self, table: Mapping[str, Any]) -> None:
        """Set options over the present ones."""
        kind = STAGES[self.verb].options
        self.table = combined(kind.nested(self.table), kind.nested(underscored(table)))
        self.told = True

    def written(self) -> Table:
        """The entry as an item of the list."""
        named = {} if self.name == self.verb else {"name": self.name}
        return {self.verb: self.table} | named


@dataclass
class Draft:
    """A recipe being put together. was_old: whether the file had stages as fields."""

    top: Table = field(default_factory=dict)
    entries: list[StageDraft] = field(default_factory=list)
    was_old: bool = False

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Draft":
        """Raises `UserError` for a table that cannot be a recipe."""
        listed = table.get("stages")
        draft = cls({}, [StageDraft(n, v, dict(t), n != "learn") for n, (v, t) in FIELDS.items()])
        if _is_list(listed):
            both = [name for name in table if name in FIELDS]
            if both:
                raise UserError(
                    f"{both[0]}: the stages are a list, which has their options; write "
                    f"`- {FIELDS[both[0]][0]}: {{...}}` in it"
                )
        else:
            draft.was_old = bool(table.keys() & {"stages", *FIELDS})
        draft.set({"stages": listed} if listed is not None else {})
        draft.set({key: value for key, value in table.items() if key != "stages"})
        return draft

    def set(self, settings: Mapping[str, Any]) -> None:
        """Set nested tables: `{finetune: {steps: 5}}`, `{finetune: {2: {steps: 5}}}`."""
        for key, value in settings.items():
            if key == "stages":
                self._choose(value)
            elif key in Recipe.model_fields and not _has_numbers(value):
                self.top = combined(self.top, {key: value})
            else:
                self._set(key, value)

    def _choose(self, value: Any) -> None:
        """A list of entries replaces the stages; a list of names selects those that run."""
        if _is_list(value):
            self.entries = [_entry(part) for part in value]
            return
        names = [value] if isinstance(value, str) else value
        known = [entry.name for entry in self.entries]
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise UserError(f"stages = {value!r}: write a list of verbs, such as `- prune: {{}}`")
        for name in names:
            if name not in known:
                raise UserError(f"stages: no {name!r}; there are {', '.join(known)}")
        for entry in self.entries:
            entry.runs = entry.name in names

    def _set(self, key: str, value: Any) -> None:
        entries = self._named(key)
        if not entries:
            raise UserError(f"unknown option {key!r}{self._nearest(key)}")
        value = {} if value is None else value
        if isinstance(value, Options):
            value = value.given()
        if not isinstance(value, dict):
            raise UserError(f"{key} = {value!r}: {key} is a stage; set an option, {key}.NAME")
        numbers = {k: v for k, v in value.items() if str(k).isdecimal()}
        for number, table in numbers.items():
            if not 1 <= int(number) <= len(entries):
                raise UserError(f"{key}.{number}: there are {len(entries)} stages {key}")
            entries[int(number) - 1].set(table)
        options = {k: v for k, v in value.items() if k not in numbers}
        if len(entries) > 1 and options:
            name = next(iter(options))
            ways = [f"{key}.{k}.{name}" for k in range(1, len(entries) + 1)]
            raise UserError(f"{key}.{name}: which of {len(entries)}? write {' or '.join(ways)}")
        if not numbers or options:
            entries[0].set(options)

    def _named(self, key: str) -> list[StageDraft]:
        """The stages of this name, or else of this verb."""
        key = key.replace("-", "_")
        by_name = [entry for entry in self.entries if entry.name.replace("-", "_") == key]
        return by_name or [entry for entry in self.entries if entry.verb == key]

    def _nearest(self, key: str) -> str:
        names = dict.fromkeys(entry.name for entry in self.entries)
        return nearest(key, [*Recipe.model_fields, *names])

    def owner(self, option: str) -> StageDraft | None:
        """The stage that a dotted option belongs to; None for the recipe itself.

        Raises `UserError` for an unknown option.
        """
        first, *rest = option.replace("-", "_").split(".")
        kind: type[Options] = Recipe
        entry = None
        if first not in Recipe.model_fields:
            found = self._named(first)
            if not found:
                raise UserError(f"no option {option!r} to vary{self._nearest(first)}")
            number = int(rest.pop(0)) if rest and rest[0].isdecimal() else 1
            entry = found[min(number, len(found)) - 1]
            kind = STAGES[entry.verb].options
        else:
            rest = [first, *rest]
        _check_option(kind, rest, option)
        return entry

    def recipe(self) -> Recipe:
        """Raises `UserError` naming the stage, the option and the way out."""
        labels = numbered([entry.name for entry in self.entries])
        checked = [_checked(*pair) for pair in zip(labels, self.entries, strict=True)]
        listed = [part for part, entry in zip(checked, self.entries, strict=True) if entry.runs]
        try:
            return Recipe.model_validate(self.top | {"stages": tuple(listed)})
        except ValidationError as error:
            if not listed:
                raise UserError(
                    "stages: the list is empty; write one, such as `- prune: {}`"
                ) from error
            raise UserError(validation_message(error, Recipe)) from error

    def old_form(self, name: str) -> list[str]:
        """For a file with stages as fields: one line with its list form."""
        if not self.was_old:
            return []
        table = {"stages": [entry.written() for entry in self.entries if entry.runs]}
        flow = yaml.safe_dump(_plain(table), default_flow_style=True, sort_keys=False, width=10**6)
        return [f"{name}: stages are a list now; this one is {flow.strip()[1:-1]}"]

    def unused(self) -> list[str]:
        """One line for every stage that was given options but is not run."""
        runs = ", ".join(entry.name for entry in self.entries if entry.runs)
        return [
            f"{name}: given options, but not among the stages ({runs})"
            for name, entry in zip(
                numbered([e.name for e in self.entries]), self.entries, strict=True
            )
            if entry.told and not entry.runs
        ]


def read_draft(file: Path | None, *settings: Mapping[str, Any]) -> Draft:
    """A recipe's file with settings over it. Raises `UserError` naming the file."""
    try:
        draft = Draft.of(read_options(file) if file else {})
        for table in settings:
            draft.set(table)
        draft.recipe()
    except UserError as error:
        told = str(error)
        raise UserError(told if not file or str(file) in told else f"{file}: {told}") from error
    return draft


def _has_numbers(value: Any) -> bool:
    """Whether it addresses one of several stages: {2: {steps: 5}}."""
    return isinstance(value, dict) and any(str(key).isdecimal() for key in value)


def _is_list(value: Any) -> bool:
    """Whether it is entries rather than names."""
    return isinstance(value, list | tuple) and not all(isinstance(part, str) for part in value)


def _entry(part: Any) -> StageDraft:
    if isinstance(part, RecipeStage):
        return StageDraft(part.name or part.verb, part.verb, part.options.given())
    if isinstance(part, str):
        raise UserError(f"stages: write `- {part}: {{}}` among entries with options")
    try:
        verb = verb_of(part)
    except ValueError as error:
        raise UserError(f"stages: {error}") from error
    entry, table = StageDraft(str(part.get("name") or verb), verb, {}), part[verb]
    if isinstance(table, Options):
        table = table.given()
    if table is not None and not isinstance(table, dict):
        raise UserError(f"stages: {verb} = {table!r}: give it a table of options, or nothing")
    entry.set(table or {})
    return entry


def _checked(label: str, entry: StageDraft) -> Any:
    kind = STAGES[entry.verb].options
    try:
        options = kind.model_validate(entry.table)
        return RecipeStage.model_validate(entry.written() | {entry.verb: options})
    except ValidationError as error:
        raise UserError(validation_message(error, kind, label)) from error


def _check_option(kind: type[Options], parts: list[str], option: str) -> None:
    if len(parts) == 1 and parts[0] in {leaf.flag for leaf in kind.leaves()}:
        return  # flat, of a group
    for number, part in enumerate(parts):
        if part not in kind.model_fields:
            known = list(kind.model_fields)
            raise UserError(f"no option {option!r} to vary{nearest(part, known)}")
        inner = kind.model_fields[part].annotation
        if number < len(parts) - 1:
            if not (isinstance(inner, type) and issubclass(inner, Options)):
                raise UserError(f"no option {option!r} to vary: {part} is not a stage")
            kind = inner


def _plain(value: Any) -> Any:
    """With lists for tuples, which plain YAML lacks."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
