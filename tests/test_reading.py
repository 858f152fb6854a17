"""What cannot be trusted is read within bounds: length, nesting, aliases, and regular files only."""

import os
import threading
import time

import pytest

from prunedm import reading
from prunedm.errors import UserError
from prunedm.reading import parse_json, parse_yaml, read_json, read_object, read_text, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join(f'*a{k - 1}' for _ in range(9))}]\n" for k in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{<<: [{', '.join(f'*a{k - 1}' for _ in range(9))}]}}\n" for k in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "stand for more than"),
        (MERGES, "stand for more than"),
        ("a: &a [*a]", "inside of what it repeats"),
        ("a: &a {b: *a}", "inside of what it repeats"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [", "cannot read"),
        ('a: !!int ""', "not of the type"),
        ('a: !!float ""', "not of the type"),
        ("a: !!bool x", "not of the type"),
        ("a: !!timestamp x", "not of the type"),
        ("a: 1\nb: 2\na: 3", "a is given twice"),
        ("b: {a: 1, a: 1}", "a is given twice"),
        ("a: \0", "cannot read"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_yaml_that_is_no_document_of_ours_is_refused_at_once(text, reason):
    started = time.process_time()
    with pytest.raises(UserError, match=reason):
        parse_yaml(text, "f.yaml")
    assert time.process_time() - started < 5


def test_aliases_and_merges_within_bounds_are_read():
    text = "base: &b {steps: 5, lr: 1e-3}\none: {<<: *b, steps: 7}\nlist: [*b, *b]"
    assert parse_yaml(text, "f") == {
        "base": {"steps": 5, "lr": 1e-3},
        "one": {"steps": 7, "lr": 1e-3},
        "list": [{"steps": 5, "lr": 1e-3}] * 2,
    }
    assert parse_yaml("", "f") is None
    assert parse_yaml("[" * 60 + "1" + "]" * 60, "f") is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ' * 70 + "1" + "}" * 70, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "not JSON"),
        ("{", "not JSON"),
    ],
)
def test_json_is_bounded(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_json(text, "f.json")


def test_json_within_bounds_is_read():
    assert parse_json('{"a": [1, {"b": null}]}', "f") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("read", [read_text, read_json, read_object, read_yaml])
def test_only_regular_files_of_some_length_are_read(tmp_path, read, monkeypatch):
    monkeypatch.setattr(reading, "RECORD_LIMIT", 64)
    long = tmp_path / "long"
    long.write_bytes(b"1" * 100)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    limit = {} if read is read_yaml else {"limit": 64}
    monkeypatch.setattr(reading, "YAML_LIMIT", 64)
    for path, reason in [
        (tmp_path / "none", "is missing"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        (tmp_path / "binary", "cannot read"),
        (long, "longer than 64 bytes"),
    ]:
        asked = threading.Thread(target=_refused, args=(read, path, reason, limit, found := []))
        asked.daemon = True  # one that hangs must not hold the session
        asked.start()
        asked.join(10)
        assert found == [True], (path, found)


def _refused(read, path, reason, limit, found):
    try:
        read(reading.Path(path), **limit)
    except UserError as error:
        found.append(reason in str(error) or str(error))


def test_an_object_is_wanted(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_object(tmp_path / "list.json")
