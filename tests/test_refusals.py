"""What no option may be, secrets that nobody is told, messages and progress lines that stay whole."""

import math
import os

import pytest
from helpers import tiny_folder
from pydantic import BaseModel, ValidationError

from prunedm import console, options
from prunedm.cli import main
from prunedm.configuration import parse_settings
from prunedm.errors import UserError, first_line, masked, shortened
from prunedm.experiments import study
from prunedm.experiments import sweep as sweeps
from prunedm.experiments.plan import Range, Search, Sweep
from prunedm.messages import one_line
from prunedm.options import Group, Options, TrainOptions
from prunedm.recipe import Recipe
from prunedm.stages import train
from prunedm.stages.evaluating.steps import Steps
from prunedm.system.watching import Watched

CLASSES = [
    *(c for c in vars(options).values() if isinstance(c, type) and issubclass(c, Options)),
    *Group.__subclasses__(),
    Recipe,
    Search,
]
NUMBERS = {"int", "float"}
# a negative number means something: the ends of a range
SIGNED = {(Range, "low"), (Range, "high")}


def numeric(kind: type[BaseModel]) -> list[tuple[str, object]]:
    """Fields that take a number, and how the bad one is given: alone or in a tuple."""
    found = []
    for name, field in kind.model_fields.items():
        words = set(str(field.annotation).replace("[", " ").replace("]", " ").split())
        words = {word.strip("<>,'|").rpartition(".")[2] for word in words}
        if "bool" not in words and words & NUMBERS and "Literal" not in str(field.annotation):
            found.append((name, "tuple" in str(field.annotation)))
    return found


def str_or_huge(value: float) -> str:
    return str(value) if abs(value) < 10**9 or not isinstance(value, int) else "huge"


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    "bad", [-1, -0.5, math.inf, -math.inf, math.nan, 10**5000], ids=str_or_huge
)
def test_no_number_of_any_verb_may_be_that(bad):
    offenders, count = [], 0
    for kind in {*CLASSES, Range}:
        base = {"space": {"seed": [1]}} if kind is Search else {"low": 0, "high": 1}
        for name, several in numeric(kind):
            if (kind, name) in SIGNED and isinstance(bad, int | float) and -1 <= bad < 0:
                continue
            value = [bad, bad] if several else bad
            count += 1
            try:
                kind.model_validate((base if kind in (Search, Range) else {}) | {name: value})
            except (ValidationError, UserError):
                continue
            offenders.append(f"{kind.__name__}.{name}")
    assert count > 100
    assert not offenders


@pytest.mark.parametrize(
    "kind", [c for c in CLASSES if {"lr", "weight_lr"} & c.model_fields.keys()]
)
def test_learning_rates_are_bounded(kind):
    for name in {"lr", "weight_lr"} & kind.model_fields.keys():
        for bad in (1e30, 0, "inf"):
            with pytest.raises(ValidationError):
                kind(**{name: bad})


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "MODEL", "OUT", "--count", DIGITS],
        ["sample", "MODEL", "OUT", "--seed", DIGITS],
        ["sample", "MODEL", "OUT", "--sampler", "x" * 6000],
        ["sample", "y" * 6000, "OUT"],
        ["finetune", "MODEL", "OUT", "--lr", "1" + DIGITS],
        ["finetune", "MODEL", "OUT", "--dataset", "/" + "z" * 6000],
        ["run", "OUT", "--set", f"seed={DIGITS}"],
        ["run", "OUT", "--set", f"finetune.lr={DIGITS}"],
        ["run", "OUT", "--set", f"finetune.{'q' * 6000}=1"],
        ["sweep", "s.yaml", "OUT", "--workers", DIGITS],
        ["monitor", "--every", "inf"],
        ["monitor", "--every", "nan"],
    ],
)
def test_endless_values_are_one_short_line(words, tmp_path, capsys):
    named = {"MODEL": str(tiny_folder()), "OUT": str(tmp_path / "out")}
    assert call(*[named.get(word, word) for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("prunedm: ")
    assert "internal" not in told
    assert told.count("\n") == 1
    assert len(told) < 700
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["run", "OUT", "--config", "F"], ["run", "F", "OUT"], ["sweep", "F", "OUT"]],
)
@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_a_recipe_that_is_no_file_is_refused_at_once(words, what, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    places = {"F": path, "OUT": tmp_path / "out"}
    assert call(*[places.get(word, word) for word in words]) == 2
    assert "not a regular file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_of_five_thousand_digits_in_settings():
    with pytest.raises(UserError):
        parse_settings([f"seed={DIGITS}"])


def test_a_scheduler_class_is_not_taken_in_silence(tmp_path):
    unet = {"sample_size": 8}
    for table in (
        {"scheduler": {"_class_name": "DDIMScheduler"}},
        {"unet": unet | {"_class_name": "UNet2DConditionModel"}},
        {"scheduler": {"_clas_name": "DDPMScheduler"}},
    ):
        wanted = TrainOptions.model_validate({"unet": unet} | table)
        with pytest.raises(UserError, match="_clas"):
            train(tmp_path / "out", wanted)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- secrets

SECRETS = [
    "postgresql://me:{}@host:5432/db",
    "mysql+pymysql://me:{}@host/db?charset=utf8",
    "postgresql://host/db?user=me&password={}",
    "redis://:{}@host",
    "api_key={}",
]
PASSWORDS = ["hunter2hunter2", "p@ss/w:rd-0123", "ü%40-0123456"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("text", SECRETS)
def test_a_password_is_told_to_nobody(text, password, tmp_path, capsys):
    secret = text.format(password)
    error = UserError(f"cannot open {secret}: no")
    steps = Steps()
    steps.take("x", lambda: (_ for _ in ()).throw(RuntimeError(secret)))
    with Watched(console.Terminal(), tmp_path, command=f"prunedm {secret}", about=secret) as seen:
        seen.say(secret)
        with seen.task("work", 1) as bar:
            bar.advance(1, secret)
        told = [
            seen.entry.model_dump_json(), masked(secret), one_line(error), first_line(error),
            *steps.failures, capsys.readouterr().out,
        ]  # fmt: skip
    assert not [line for line in told if password in line]
    assert all("***" in line for line in told)


def test_secrets_of_the_environment_are_masked_too(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert masked("no entry for 0123456789abcdef") == "no entry for ***"
    assert masked("a path /a:b/c@d and 2:4, x=1") == "a path /a:b/c@d and 2:4, x=1"


def test_a_storages_password_is_kept_nowhere_and_asked_for(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 's.db'}?password=hunter2hunter2"
    search = Search(space={"seed": [1]}, storage=url)
    kept = sweeps.Kept(sweep=Sweep(search=search), hashes={}, place="x")
    told = sweeps.without_secrets(kept)
    assert "hunter2" not in told.model_dump_json()
    with pytest.raises(UserError, match="PRUNEDM_STORAGE"):
        study._storage(told.sweep.search)
    monkeypatch.setenv("PRUNEDM_STORAGE", url)
    assert study._storage(told.sweep.search) == url
    assert study._storage(search) == url


def test_a_storage_that_fails_does_not_tell_its_password(tmp_path):
    search = Search(space={"seed": [1]}, storage="postgresql://me:hunter2hunter2@127.0.0.1:1/db")
    with pytest.raises(UserError, match="cannot open storage") as caught:
        study._opened(Sweep(search=search), tmp_path)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


# ------------------------------------------------------------------------------- lines that stay


def test_both_ends_of_a_long_message_stay():
    short = shortened(f"cannot read /a/{'b' * 5000}/c.png: no such file; give another")
    assert short.startswith("cannot read /a/bbb")
    assert short.endswith("c.png: no such file; give another")
    assert len(short) < 320
    assert shortened("x " * 5000).count(" ") < 400


def test_a_progress_line_in_a_file_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    note = "a note that is long, " * 10
    with console.Terminal().task("training", 3) as bar:
        bar.advance(3, f"{note}\nend")
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.strip()]) == 1
    assert "end" in lines[0]
