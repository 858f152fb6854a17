"""The one line that the user is told about an error."""

import errno
import os

from cyclopts import CycloptsError
from pydantic import ValidationError

from prunedm.configuration import validation_message
from prunedm.errors import UserError, masked, shortened

# errors of the place that was to be written to, not of the program
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT, errno.ELOOP,
)  # fmt: skip


def one_line(error: BaseException) -> str | None:
    """What the user can do about it, bounded and without secrets; None where the fault is ours."""
    text = _in_words(error)
    return None if text is None else shortened(masked(text))


def _in_words(error: BaseException) -> str | None:
    cause = error.__cause__ or error.__context__
    if isinstance(error, ValidationError):
        return validation_message(error)
    if isinstance(error, CycloptsError):
        if isinstance(cause, ValidationError):
            return validation_message(cause)
        return " ".join(str(error).split()) or "wrong arguments; see --help"
    if "No space left on device" in str(error):  # safetensors has an error type of its own
        return "the disk is full; make room, or choose another place: the same command goes on"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = error.filename or "the output folder"
        return f"cannot read or write {where}: {os.strerror(error.errno)}; choose another place"
    return " ".join(str(error).split()) if isinstance(error, UserError) else None
