"""Optuna for sweeps: the study in its storage, samplers, pruners, spaces."""

import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunedm.errors import UserError, first_line, is_masked, masked
from prunedm.experiments.plan import Range, Search, Sweep, case_of
from prunedm.experiments.store import run_of
from prunedm.randomness import seed_for

STORAGE = "PRUNEDM_STORAGE"  # the storage's URL, password included, for `sweep show`
DATABASE = "study.db"
BASIS = "basis"  # a study's attribute: objectives, recipe and model
_ATTEMPTS = 4  # to open the database


def open_study(sweep: Sweep, out: Path, hashes: Mapping[str, str]) -> Any:
    """The Optuna study, new or continued.

    Raises `UserError` where it cannot be opened, and where it has other objectives, another recipe or
    another model: its figures would not compare.
    """
    study = _opened(sweep, out)
    basis = {"objectives": sweep.objectives, "recipe": run_of(case_of(sweep, {}), hashes).id}
    if BASIS not in study.user_attrs:
        study.set_user_attr(BASIS, basis)
    if study.user_attrs[BASIS] != basis:
        both = study.user_attrs[BASIS]["objectives"], sweep.objectives
        what = "objectives {}, the file {}".format(*both) if both[0] != both[1] else (
            "another recipe, model or data"
        )  # fmt: skip
        raise UserError(
            f"study {study.study_name!r} is of {what}; name another search.study, or give "
            "another folder"
        )
    return study


def _opened(sweep: Sweep, out: Path) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "search needs Optuna, which is not installed: pip install 'prunedm[sweep]'"
        ) from error
    from sqlalchemy.exc import SAWarning

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert sweep.search is not None
    search, directions = sweep.search, list(sweep.objectives.values())
    url = _storage(search) or f"sqlite:///{(out / DATABASE).resolve()}"
    out.mkdir(parents=True, exist_ok=True)
    # processes take turns writing to one SQLite file
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(_ATTEMPTS):
        try:
            # SQLAlchemy warns of errors that it then raises
            warnings.filterwarnings("ignore", category=SAWarning)
            return optuna.create_study(
                storage=optuna.storages.RDBStorage(url, engine_kwargs=waiting),
                study_name=search.study or out.resolve().name,
                directions=directions,
                pruner=_pruner(search),
                load_if_exists=True,
            )
        except Exception as error:  # URL, driver, server, permissions: any database error
            if attempt + 1 == _ATTEMPTS:
                raise UserError(
                    f"cannot open storage {masked(url)}: {first_line(error)}; fix search.storage, or "
                    "delete the file of a damaged database"
                ) from None  # the cause would print the password
            time.sleep(0.2 * (attempt + 1))  # two processes creating the tables at once
    raise AssertionError("unreachable")


def _storage(search: Search) -> str:
    """The URL; OUT keeps it without the password, which the environment may provide."""
    if not is_masked(search.storage):
        return search.storage
    whole = os.environ.get(STORAGE, "")
    if not whole or masked(whole) != search.storage:
        raise UserError(
            f"the password of {search.storage} is not kept: set {STORAGE} to the whole URL"
        )
    return whole


def suggest(trial: Any, name: str, space: list[Any] | Range) -> Any:
    """A value of the space. Raises `ValueError` where the study has another space of this name."""
    if isinstance(space, Range):
        ends = [space.low, space.high] + ([] if space.step is None else [space.step])
        if all(isinstance(end, int) for end in ends):
            return trial.suggest_int(
                name, space.low, space.high, step=space.step or 1, log=space.log
            )
        return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
    if all(value is None or isinstance(value, bool | int | float | str) for value in space):
        return trial.suggest_categorical(name, space)
    # lists and tables: Optuna stores plain values only
    return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in space]))


def sampler_for(search: Search, number: int) -> Any:
    """The sampler of trial `number`, seeded by it, so that an interruption changes nothing."""
    from optuna import samplers

    seed = seed_for(search.seed, "search", number) % (1 << 32)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    if search.sampler == "nsga2":
        # the first generation is random; Optuna's 50 would be all of a short search
        population = min(50, max(4, search.trials // 5))
        return samplers.NSGAIISampler(seed=seed, population_size=population)
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed)


def _pruner(search: Search) -> Any:
    from optuna import pruners

    if search.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=search.pruner_patience)
    if search.pruner == "halving":
        return pruners.SuccessiveHalvingPruner()
    return pruners.NopPruner()
