"""Paths of results and inputs as users write them: `~` expanded, links followed.

Raises `UserError` for impossible names, before any work.
"""

import os
from contextlib import suppress
from pathlib import Path

from prunedm.errors import UserError, shortened

PARTIAL = ".partial"  # suffix of a result's working folder, or its name inside the result
LONGEST_NAME = 255  # bytes, on every file system in use
_BESIDE = len(".prunedm-replaced")  # our longest suffix beside a result


def expanded(path: str | Path) -> Path:
    """The path with `~` expanded."""
    shown = shortened(str(path))
    if "\0" in str(path):
        raise UserError(f"{shown!r} has a NUL byte; give a name without")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown!r} is not UTF-8; give a name that is") from None
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{shown!r}: {error}; write the folder out") from error


def target(out: str | Path) -> Path:
    """The absolute path of `out`: `~` expanded, links followed, dangling ones too."""
    if not str(out).strip():
        raise UserError("the output has no name; give a folder")
    path = expanded(out)
    try:
        found = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; the current folder is gone
        raise UserError(
            f"{path} leads nowhere ({shortened(str(error))}); choose another"
        ) from error
    if not found.name:
        raise UserError(f"{path} is the root of the file system; give a folder in it")
    above = next((folder for folder in found.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise UserError(f"{path}: {above} is a file, and not a folder; choose another place")
    longest = max(len(os.fsencode(part)) for part in found.parts)
    if longest > LONGEST_NAME or len(os.fsencode(found.name)) > LONGEST_NAME - _BESIDE:
        raise UserError(
            f"{shortened(str(path))!r} is too long: a name has at most {LONGEST_NAME - _BESIDE} bytes"
        )
    return found


def portable(path: str, folder: Path) -> str:
    """`path` as a file in `folder` refers to it, without user or machine names.

    A local path becomes relative to `folder`, starting with "./" or "../", or "~/..." where that would
    lead through the user's home. A hub id or another name stays as it is. A working folder counts as
    its future result.
    """
    local = _local(path)
    if local is None:
        return path
    home, folder = _home(), (folder.parent if folder.name == PARTIAL else folder).resolve()
    if home is not None and local.is_relative_to(home) and not folder.is_relative_to(home):
        return f"~/{local.relative_to(home).as_posix()}"
    way = Path(os.path.relpath(local, folder)).as_posix()
    return way if way.startswith("..") else f"./{way}"


def located(path: str, folder: Path) -> str:
    """The inverse of `portable`; absolute paths, from older versions, stay."""
    if path.startswith("~/"):
        return str(expanded(path))
    if path == ".." or path.startswith(("./", "../")):
        return os.path.normpath(folder.resolve() / path)
    return path


def bare(path: str) -> str:
    """The last part of a local path; a hub id or another name unchanged."""
    local = _local(path)
    return path if local is None else local.name or path


def _local(path: str) -> Path | None:
    """The absolute path; None for names of things that are not on this machine."""
    with suppress(OSError, RuntimeError, ValueError):
        there = Path(path).expanduser()
        if path and (there.is_absolute() or path.startswith(".") or there.exists()):
            return there.resolve()
    return None


def _home() -> Path | None:
    with suppress(RuntimeError, OSError):
        return Path.home().resolve()
    return None
