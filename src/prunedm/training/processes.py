"""Several processes on one job (`accelerate launch`, `torchrun`): who writes, who waits."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# torchrun's, then what MPI launchers set; accelerate reads the same
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def rank() -> int:
    """This process's number; 0 writes and prints."""
    return _first_of(_RANKS, 0)


def local_rank() -> int:
    """This process's number on its machine, which decides its GPU."""
    return _first_of(_LOCAL_RANKS, 0)


def count() -> int:
    """How many processes share the job."""
    return _first_of(_COUNTS, 1)


def _first_of(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def as_figures() -> dict[str, int]:
    """For the record of a training: how many shared every step, where more than one did."""
    return {"processes": count()} if count() > 1 else {}


def wait_for_all() -> None:
    """Until every process has come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=without_gpus()).wait_for_everyone()


def without_gpus() -> bool:
    """Whether several processes must meet on CPUs; accelerate would else leave each to itself."""
    import torch

    return count() > 1 and not torch.cuda.is_available()


@contextmanager
def place_to_write(folder: Path, shared: str) -> Iterator[Path]:
    """`folder` for the first process; for the others one that is thrown away.

    What is under `shared` all of them see, so that they resume from the same state.
    """
    if rank() == 0:
        yield folder
        return
    with TemporaryDirectory() as aside:
        (Path(aside) / shared).symlink_to((folder / shared).resolve(), target_is_directory=True)
        yield Path(aside)
