"""The one line that the user is told about an error."""

import errno
import os

from cyclopts import CycloptsError
from pydantic import ValidationError

from prunedm.configuration import validation_message
from prunedm.errors import UserError, masked, shortened

# faults of the place to be read or written, not of the program
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT, errno.ELOOP,
)  # fmt: skip


def one_line(error: BaseException) -> str | None:
    """The error in one bounded line without secrets; None where the fault is the program's."""
    text = _plain_text(error)
    return None if text is None else shortened(masked(text))


def _plain_text(error: BaseException) -> str | None:
    cause = error.__cause__ or error.__context__
    if isinstance(error, ValidationError):
        return validation_message(error)
    if isinstance(error, CycloptsError):
        if isinstance(cause, ValidationError):
            return validation_message(cause)
        return " ".join(str(error).split()) or "wrong arguments; see --help"
    if "No space left on device" in str(error):  # safetensors raises its own type
        return (
            "the disk is full; make room, or choose another place: then the same command continues"
        )
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = error.filename or "the output folder"
        return f"cannot read or write {where}: {os.strerror(error.errno)}; choose another place"
    return " ".join(str(error).split()) if isinstance(error, UserError) else None
