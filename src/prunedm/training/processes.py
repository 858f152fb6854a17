"""Several processes in one job (`accelerate launch`, `torchrun`): ranks, waiting, writing."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# set by torchrun and by MPI launchers; accelerate reads the same
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def rank() -> int:
    """This process's number; process 0 writes and prints."""
    return _first_of(_RANKS)


def local_rank() -> int:
    """This process's number on its machine, which selects its GPU."""
    return _first_of(_LOCAL_RANKS)


def count() -> int:
    """Number of processes in the job."""
    return _first_of(_COUNTS) or 1


def _first_of(names: Sequence[str]) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 0)


def as_figures() -> dict[str, int]:
    """For the record of a training: the number of processes, where there are several."""
    return {"processes": count()} if count() > 1 else {}


def wait_for_all() -> None:
    """Block until every process has called this."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=without_gpus()).wait_for_everyone()


def without_gpus() -> bool:
    """Whether processes must communicate on CPUs; accelerate would otherwise not connect them."""
    import torch

    return count() > 1 and not torch.cuda.is_available()


@contextmanager
def place_to_write(folder: Path, shared: str) -> Iterator[Path]:
    """`folder` for the first process; a temporary folder for the others.

    The subfolder `shared` is common to all, so that they resume from the same state.
    """
    if rank() == 0:
        yield folder
        return
    with TemporaryDirectory() as aside:
        (Path(aside) / shared).symlink_to((folder / shared).resolve(), target_is_directory=True)
        yield Path(aside)
