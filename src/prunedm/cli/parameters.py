"""Commands whose parameters are the fields of an options class, by name and with its help."""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter as Argument
from inspect import Signature
from typing import Annotated, Any, get_args, get_origin

from cyclopts import Parameter

from prunedm.options import Options

Given = Mapping[str, Any]  # what stands on the command line, by the parameter's name


def argument(name: str, annotation: Any) -> Argument:
    """What a command needs, by place or by name."""
    return Argument(name, Argument.POSITIONAL_OR_KEYWORD, annotation=annotation)


def keyword(name: str, annotation: Any, default: Any) -> Argument:
    """What may be left out."""
    return Argument(name, Argument.KEYWORD_ONLY, annotation=annotation, default=default)


def options_of(kind: type[Options], *, within: str = "") -> list[Argument]:
    """One keyword a field; `within` a stage, hidden from the help and named --STAGE.OPTION."""
    return [
        keyword(
            f"{within}__{name}" if within else name,
            Annotated[
                _plain(field.annotation),
                Parameter(
                    name=f"--{within}.{name.replace('_', '-')}" if within else None,
                    help=field.description,
                    show=not within,
                ),
            ],
            field.get_default(call_default_factory=True),
        )
        for name, field in kind.model_fields.items()
    ]


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
