"""Commands whose parameters are the fields of an options class, by name and with its help."""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter as Argument
from inspect import Signature
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import Group, Parameter

from prunedm.options import Leaf, OneOf, Options

Given = Mapping[str, Any]  # what stands on the command line, by the parameter's name

# options of any verb that few commands need, under the headings of `--help-all`
RARE = {
    "images": (
        "label_column", "caption_column", "image_column", "flip", "convert_channels", "scheduler",
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
    """What a command needs, by place or by name."""
    return Argument(name, Argument.POSITIONAL_OR_KEYWORD, annotation=annotation)


def keyword(name: str, annotation: Any, default: Any) -> Argument:
    """What may be left out."""
    return Argument(name, Argument.KEYWORD_ONLY, annotation=annotation, default=default)


def options_of(
    kind: type[Options], *, within: str = "", everything: bool = False
) -> list[Argument]:
    """One keyword an option. `within` a stage it is named --STAGE.OPTION.

    everything: whether the help shows those of `RARE` and of methods too, under headings.
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
    """What was given of the options."""
    flags = {leaf.flag for leaf in kind.leaves()}
    return {name: value for name, value in given.items() if name in flags}


def section_of(leaf: Leaf) -> str:
    """The heading under which `--help-all` lists an option; "" is in front."""
    if len(leaf.path) > 1:
        return leaf.path[0].replace("_", "-")
    return next((section for section, flags in RARE.items() if leaf.flag in flags), "")


def sections_of(kind: type[Options]) -> list[str]:
    """All headings, in order."""
    return list(dict.fromkeys(filter(None, map(section_of, kind.leaves()))))


def _type(leaf: Leaf) -> Any:
    """With the choices of a table in the place of its text."""
    table = leaf.mark(OneOf)
    return Literal.__getitem__(tuple(table.table)) if table else leaf.field.annotation


def _plain(annotation: Any) -> Any:
    """A type without bounds within it: pydantic names the option when it refuses a value."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return tuple.__class_getitem__(tuple(_plain(part) for part in get_args(annotation)))
    return annotation


def command(
    name: str, text: str, arguments: Sequence[Argument], run: Callable[[Given], None]
) -> Callable[..., None]:
    """A function that cyclopts reads as if it had been written out; `run` gets what was given."""
    signature = Signature(list(arguments))

    def function(*by_place: Any, **by_name: Any) -> None:
        run(signature.bind_partial(*by_place, **by_name).arguments)

    function.__name__, function.__doc__ = name, text
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {a.name: a.annotation for a in arguments}
    return function
