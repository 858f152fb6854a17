"""Texts as sequences of tokens: which texts, in which order, and what is refused."""

import json
import os

import datasets
import pytest
import torch
from language import byte_tokenizer, text

from prunedm.data import hub, texts
from prunedm.data.hub import KNOWN
from prunedm.data.texts import load_texts
from prunedm.errors import UserError

LENGTH = 16


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def loaded(path, split: str = "train", **options):
    given = {"tokenize": tokens_of, "length": LENGTH, "vocabulary": 257} | options
    return load_texts(str(path), split=split, **given)


def read(found) -> str:
    return byte_tokenizer().decode(found.tokens_SL.flatten())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(text(400), encoding="utf-8")
    return path


def test_a_file_is_cut_into_windows_and_every_20th_is_held_out(file):
    whole = file.read_text(encoding="utf-8")
    train, test = loaded(file), loaded(file, "test")
    count = len(whole) // LENGTH
    assert (len(train), len(test)) == (count - count // 20, count // 20)
    assert train.tokens_SL.dtype == torch.int32
    windows = [whole[k * LENGTH : (k + 1) * LENGTH] for k in range(count)]
    assert read(test) == "".join(windows[19::20])
    assert read(train) == "".join(w for k, w in enumerate(windows) if k % 20 != 19)
    assert train.left_out == f"{count // 20} other sequences"


def test_documents_are_joined_by_blank_lines(tmp_path):
    for name, content in (("b.txt", "second " * 9), ("a.md", "first " * 9)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / "data.bin").write_text("never")
    whole = "first " * 9 + "\n\n" + "second " * 9
    assert whole.startswith(read(loaded(tmp_path)))


def test_a_split_is_named_by_its_file_or_folder(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 64)
    (tmp_path / "held").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "x.txt").write_text("b" * 32)
    assert read(loaded(tmp_path)) == "a" * 64
    assert read(loaded(tmp_path, "test")) == "b" * 32


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_tables_with_a_column_of_texts(kind, tmp_path):
    rows = {"number": [1, 2], "content": ["one " * 10, "two " * 10]}
    table, path = datasets.Dataset.from_dict(rows), tmp_path / f"rows.{kind}"
    if kind == "saved":
        table.save_to_disk(path)
    elif kind == "jsonl":
        lines = [
            json.dumps({"number": n, "content": c}) for n, c in zip(*rows.values(), strict=True)
        ]
        path.write_text("\n".join(lines))
    else:
        getattr(table, f"to_{kind}")(path)
    whole = "one " * 10 + "\n\n" + "two " * 10
    assert whole.startswith(read(loaded(path)))
    assert whole.startswith(read(loaded(path, column="content")))
    with pytest.raises(UserError, match=r"--text-column: no texts in 'contents'; did you mean"):
        loaded(path, column="contents")


def test_of_two_columns_one_is_to_be_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q " * 20, "answer": "a " * 20}))
    with pytest.raises(UserError, match="texts in question, answer; name one with --text-column"):
        loaded(path)
    assert read(loaded(path, column="answer")).startswith("a a ")


def test_a_table_comes_before_the_texts_beside_it_and_they_are_said(tmp_path):
    (tmp_path / "README.md").write_text("about " * 20)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x" * 32}))
    found = loaded(tmp_path)
    assert read(found) == "x" * 32
    assert found.left_out == "1 other files"


def test_long_texts_are_tokenized_in_parts_of_whole_documents(tmp_path, monkeypatch):
    for k in range(9):
        (tmp_path / f"{k}.txt").write_text(f"{k} " * 20)
    whole = loaded(tmp_path)
    monkeypatch.setattr(texts, "TOGETHER", 100)
    assert torch.equal(loaded(tmp_path).tokens_SL, whole.tokens_SL)
    monkeypatch.setattr(texts, "MOST_TOKENS", 100)
    cut = loaded(tmp_path)
    assert torch.equal(cut.tokens_SL, whole.tokens_SL[: len(cut)])
    assert "what comes after" in cut.left_out


def test_the_fingerprint_is_of_every_token_and_of_the_length(file):
    first = loaded(file).fingerprint()
    assert first == loaded(file).fingerprint()
    assert first != loaded(file, length=8).fingerprint()
    content = file.read_text(encoding="utf-8")
    file.write_text(content[:200] + "x" + content[201:], encoding="utf-8")
    assert first != loaded(file).fingerprint()


def test_what_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "short.txt").write_text("few")
    (tmp_path / "words.txt").write_text("word " * 100)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "numbers.jsonl").write_text(json.dumps({"a": 1}))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, options, message in (
        ("short.txt", {}, "holds 3 tokens, less than one sequence of 16; give more text, or a"),
        (
            "words.txt",
            {"vocabulary": 50},
            "the tokenizer makes token .*, and the model knows 50: is it",
        ),
        ("latin.txt", {}, "cannot read dataset .*latin.txt"),
        ("numbers.jsonl", {}, "has no column of texts; its columns are"),
        ("empty", {}, "holds no texts"),
        ("pipe.txt", {}, "not a regular file"),
        ("nowhere.txt", {}, "unknown dataset"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            loaded(tmp_path / name, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "asked", "how"),
    [
        ("wikitext", "Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
        ("wikitext:wikitext-103-raw-v1", "Salesforce/wikitext", {"name": "wikitext-103-raw-v1"}),
        ("owner/name:part", "owner/name", {"name": "part"}),
        ("owner/name", "owner/name", {}),
        ("c4", "allenai/c4", {"data_files": KNOWN["c4"][2]}),
    ],
)
def test_names_of_papers_and_configurations_are_asked_of_the_hub(name, asked, how, monkeypatch):
    calls = []

    def load_dataset(repository, **given):
        calls.append((repository, given))
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["word " * 20]})})

    monkeypatch.setattr(hub, "why_silent", lambda _: "")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub.open_hub.cache_clear()
    assert read(loaded(name)).startswith("word word")
    assert calls == [(asked, how)]
    hub.open_hub.cache_clear()
