"""Zero-shot tasks: lm-eval's figures in the table and the record, and what is said without it."""

import json
from importlib import util

import pytest
import torch
from language import language_model, text_file

import prunedm
from prunedm.errors import UserError
from prunedm.evaluation import table, tasks
from prunedm.evaluation.results import Figures
from prunedm.evaluation.tasks import Tasks, task_metrics
from prunedm.folder import load
from prunedm.options import EvaluateOptions
from prunedm.stages.verbs.compare import read_comparison

QUESTIONS = [
    {"question": "prune the", "choices": [" model", " weights of"], "answer": 0},
    {"question": "keep what", "choices": [" it makes", " two"], "answer": 1},
    {"question": "and", "choices": [" the model", " it"], "answer": 1},
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUICK = {"dataset": str(text_file()), "device": "cpu", "depth": "quick", "problems": 2}


def test_names_stand_between_commas_or_alone():
    assert EvaluateOptions(tasks=("arc_easy, hellaswag", "boolq")).tasks == (
        "arc_easy",
        "hellaswag",
        "boolq",
    )


def test_without_lm_eval_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs lm_eval; run: pip install 'prunedm\[lm-eval\]'"):
        prunedm.evaluate(language_model(), tmp_path / "e", EvaluateOptions(tasks=["x"], **QUICK))


def test_models_of_images_have_no_tasks(tmp_path):
    with pytest.raises(UserError, match="for language models, and digits makes images"):
        prunedm.evaluate("digits", tmp_path / "e", EvaluateOptions(tasks=["x"], skip_fid=True))


def test_rows_of_lm_eval_become_figures_and_figures_become_columns():
    row = {
        "alias": "arc",
        "acc,none": 0.25,
        "acc_stderr,none": 0.01,
        "exact_match,strict-match": 1,
        "exact_match_stderr,strict-match": "N/A",
        "word_perplexity,none": 8.0,
    }
    found = dict(tasks._figures("arc", row))
    assert found == {
        "task:arc:acc": 0.25,
        "task:arc:acc_se": 0.01,
        "task:arc:exact_match@strict-match": 1.0,
        "task:arc:word_perplexity": 8.0,
    }
    figures = Figures(loss=1.0, **found)
    columns = task_metrics(name for name, _ in figures)
    assert [(c.header, c.better) for c in columns] == [
        ("arc, acc", "higher"),
        ("arc, exact_match@strict-match", "higher"),
        ("arc, word_perplexity", "lower"),
    ]
    assert columns[0].spread == "task:arc:acc_se"
    assert getattr(Figures(), "task:arc:acc") is None  # a model that was not asked


def expected() -> tuple[float, float]:
    """acc and acc_norm from the log-likelihoods of the answers, one pass each."""
    model = load(language_model())
    right = [0, 0]
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            start, whole = (
                list(text.encode())
                for text in (question["question"], question["question"] + choice)
            )
            tokens = model.tokenizer(question["question"] + choice)
            assert len(tokens) == len(whole)
            with torch.no_grad():
                logits = model.denoiser(torch.tensor([tokens])).logits[0].log_softmax(-1)
            each = logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[len(start) - 1 :]
            scores.append((float(each.sum()), len(choice)))
        answer = question["answer"]
        right[0] += max(range(2), key=lambda k: scores[k][0]) == answer
        right[1] += max(range(2), key=lambda k: scores[k][0] / scores[k][1]) == answer
    return right[0] / len(QUESTIONS), right[1] / len(QUESTIONS)


@pytest.mark.skipif(util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_local_task_is_measured_beside_the_other_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "why_silent", lambda ask: "no network in tests")
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    text = YAML.format(name="tiny_words", file=folder / "lines.jsonl")
    (folder / "tiny_words.yaml").write_text(text)
    options = EvaluateOptions(tasks=["tiny_words"], task_folder=str(folder), **QUICK)
    record, _ = prunedm.evaluate(language_model(), tmp_path / "e", options)
    acc, normed = expected()
    assert record.figures["task:tiny_words:acc"] == acc
    assert record.figures["task:tiny_words:acc_norm"] == normed
    assert record.figures["task:tiny_words:acc_se"] == pytest.approx(
        (acc * (1 - acc) / (len(QUESTIONS) - 1)) ** 0.5
    )
    (row,) = read_comparison(tmp_path / "e")
    head = table.headers([row], table.measured([row]))
    assert "tiny_words, acc" in head
    assert "tiny_words, acc_norm" in head
    assert f"{acc:.4f} ± " in table.markdown_table([row])
    assert "task:tiny_words:acc" in table.csv_text([row])
    with pytest.raises(UserError, match="no 'tiny_wrods'; near are tiny_words"):
        Tasks(["tiny_wrods"], str(folder))
    with pytest.raises(UserError, match=r"cannot read the questions: .*no network in tests\)"):
        Tasks(["arc_easy"])
