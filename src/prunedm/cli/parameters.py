"""Commands whose parameters are the fields of an options class."""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter as Argument
from inspect import Signature
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import Group, Parameter

from prunedm.options import Leaf, OneOf, Options

Given = Mapping[str, Any]  # values on the command line, by parameter name

# options that few commands need, by their heading in `--help-all`
RARE = {
    "images": (
        "label_column", "caption_column", "image_column", "flip", "convert_channels", "scheduler",
        "text_column", "length",
    ),
    "calibration": ("calibration_problems", "calibration_batch", "time_range", "time_bins"),
    "training": (
        "accumulation", "warmup", "schedule", "weight_decay", "beta2", "clip", "ema_decay",
        "workers", "checkpoint_every", "validate_every", "validation_problems", "memo_memory",
        "compile", "distribution", "logits", "weight_lr", "mask_loss_weight", "keep_magnitude",
    ),
    "tracking": ("tracker_project", "tracker_mode", "track_images"),
}  # fmt: skip


def argument(name: str, annotation: Any) -> Argument:
    """A required parameter, by position or by name."""
    return Argument(name, Argument.POSITIONAL_OR_KEYWORD, annotation=annotation)


def keyword(name: str, annotation: Any, default: Any) -> Argument:
    """An optional parameter, by name."""
    return Argument(name, Argument.KEYWORD_ONLY, annotation=annotation, default=default)


def options_of(
    kind: type[Options], *, within: str = "", everything: bool = False
) -> list[Argument]:
    """One keyword per option, named --STAGE.OPTION `within` a stage.

    everything: whether the help also shows options in `RARE` and of methods, under headings.
    """
    flags = {leaf.flag for leaf in kind.leaves()}
    return [_option(leaf, flags, within, everything) for leaf in kind.leaves()]


def _option(leaf: Leaf, flags: set[str], within: str, everything: bool) -> Argument:
    section = within or section_of(leaf)
    names = [leaf.flag] if leaf.path[-1] in flags else [leaf.flag, leaf.path[-1]]
    prefix = f"--{within}." if within else "--"
    parameter = Parameter(
        name=tuple(prefix + name.replace("_", "-") for name in names),
        help=leaf.field.description,
        group=Group(section) if section else Group.create_default_parameters(),
        show=everything or not section,
    )
    name = f"{within}__{leaf.flag}" if within else leaf.flag
    return keyword(name, Annotated[_plain(_type(leaf)), parameter], leaf.default)


def options_in(kind: type[Options], given: Given) -> dict[str, Any]:
    """The given values that are options of this kind."""
    flags = {leaf.flag for leaf in kind.leaves()}
    return {name: value for name, value in given.items() if name in flags}


def section_of(leaf: Leaf) -> str:
    """The heading of an option in `--help-all`; "" comes first."""
    if len(leaf.path) > 1:
        return leaf.path[0].replace("_", "-")
    return next((section for section, flags in RARE.items() if leaf.flag in flags), "")


def sections_of(kind: type[Options]) -> list[str]:
    """All headings, in order."""
    return list(dict.fromkeys(filter(None, map(section_of, kind.leaves()))))


def _type(leaf: Leaf) -> Any:
    """The option's type, with the choices of a table as a `Literal`."""
    table = leaf.mark(OneOf)
    return Literal.__getitem__(tuple(table.table)) if table else leaf.field.annotation


def _plain(annotation: Any) -> Any:
    """The type without inner bounds, which pydantic checks with the option's name."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return tuple.__class_getitem__(tuple(_plain(part) for part in get_args(annotation)))
    return annotation


def command(
    name: str, text: str, arguments: Sequence[Argument], run: Callable[[Given], None]
) -> Callable[..., None]:
    """A function with this signature for cyclopts; it calls `run` with the given values."""
    signature = Signature(list(arguments))

    def function(*by_place: Any, **by_name: Any) -> None:
        run(signature.bind_partial(*by_place, **by_name).arguments)

    function.__name__, function.__doc__ = name, text
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {a.name: a.annotation for a in arguments}
    return function
