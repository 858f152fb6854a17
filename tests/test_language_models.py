"""Language models go through every verb: their texts, their masks, their files."""

import json
import shutil

import numpy as np
import pytest
import torch
from language import byte_tokenizer, language_model, network, text, text_file
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import prunedm
from prunedm.architecture import architecture_of
from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.perplexity import strided_perplexity
from prunedm.folder import load
from prunedm.networks.layers import prunable_layers
from prunedm.options import (
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    LearnOptions,
    LossOptions,
    PruneOptions,
    SampleOptions,
)
from prunedm.stages.evaluating.measure import read_evaluation
from prunedm.stages.evaluating.reload import check_reload
from prunedm.stages.inputs import held_out_problems

CLASSES = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "GPT2LMHeadModel": {},
    "Qwen3ForCausalLM": {"head_dim": 8},
    "MistralForCausalLM": {"sliding_window": 32},
    "Gemma3ForCausalLM": {"head_dim": 8, "sliding_window": 32},
    "PhiForCausalLM": {"pad_token_id": 0},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPTNeoXForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MambaForCausalLM": {"state_size": 8},
}
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def data(**options):
    return {"dataset": str(text_file()), "device": "cpu"} | options


CALIBRATED = data(calibration_problems=8)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A Llama under 2:4 masks."""
    out = tmp_path_factory.mktemp("lm") / "pruned"
    prunedm.prune(language_model(), out, PruneOptions(mechanism="nm", score="wanda", **CALIBRATED))
    return out


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mechanism", ["nm", "obs-nm"])
def test_every_class_takes_masks_and_loads_in_transformers(cls, mechanism, tmp_path):
    source, out = language_model(cls, **CLASSES[cls]), tmp_path / "out"
    score = {"score": "wanda"} if mechanism == "nm" else {}
    prunedm.prune(source, out, PruneOptions(mechanism=mechanism, **score, **CALIBRATED))
    made, dense = load(out), load(source)
    layers = prunable_layers(made.denoiser)
    stats = json.loads((out / "pruning_stats.json").read_text(encoding="utf-8"))
    assert layers.keys() <= made.masks.by_layer.keys() | stats["dense"].keys()
    assert len(made.masks.by_layer) >= 6
    experts = {
        name for name, p in made.denoiser.named_parameters() if p.ndim == 3 and "expert" in name
    }
    assert experts <= stats["dense"].keys()
    assert bool(experts) == (cls == "MixtralForCausalLM")
    assert not [n for n in layers if "head" in n or "embed" in n or n.endswith((".wte", ".wpe"))]
    assert made.masks.validity(made.denoiser) == 1
    assert made.denoiser.config.vocab_size == dense.denoiser.config.vocab_size
    for name in BESIDE:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(24)[None]
    assert torch.equal(theirs(ids).logits, made.denoiser(ids).logits)
    assert not torch.equal(theirs(ids).logits, dense.denoiser(ids).logits)
    tied = getattr(made.denoiser.config, "tie_word_embeddings", False)
    inside, outside = made.denoiser.get_input_embeddings(), made.denoiser.get_output_embeddings()
    assert (outside.weight is inside.weight) is bool(tied)


def test_masks_are_learned_and_held_in_training(pruned, tmp_path):
    quick = data(steps=3, batch_size=4, validation_problems=4)
    prunedm.learn(pruned, tmp_path / "learned", LearnOptions(**quick))
    record, _ = prunedm.finetune(pruned, tmp_path / "tuned", FinetuneOptions(**quick, lr=1e-3))
    assert record.figures["loss"] < record.figures["loss_before"]
    tuned, before = load(tmp_path / "tuned"), load(pruned)
    assert tuned.masks.validity(tuned.denoiser) == 1
    assert not torch.equal(tuned.denoiser.lm_head.weight, before.denoiser.lm_head.weight)


def test_an_interrupted_training_of_tied_weights_ends_with_the_same_bits(tmp_path, monkeypatch):
    source = language_model(tie_word_embeddings=True)
    options = FinetuneOptions(
        **data(steps=4, batch_size=4, validation_problems=4, checkpoint_every=2), teacher="none"
    )
    prunedm.finetune(source, tmp_path / "whole", options)
    from prunedm.training import loop

    step, done = loop._step, []

    def dying(*given, **named):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(*given, **named)

    monkeypatch.setattr(loop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        prunedm.finetune(source, tmp_path / "out", options)
    monkeypatch.setattr(loop, "_step", step)
    prunedm.finetune(source, tmp_path / "out", options)
    assert load(tmp_path / "out").hash == load(tmp_path / "whole").hash


def test_a_network_trained_in_bf16_answers_as_its_files_do(tmp_path):
    """transformers decorates the call of a network, and so does the autocast that ends."""
    options = FinetuneOptions(
        **data(steps=1, batch_size=4, validation_problems=4, mixed_precision="bf16"), teacher="none"
    )
    record, _ = prunedm.finetune(language_model(), tmp_path / "out", options)
    loss = denoising_loss(
        load(tmp_path / "out").denoiser,
        held_out_problems(load(tmp_path / "out"), options, options.validation_problems),
    )
    assert record.figures["loss"] == loss.mean


def test_the_loss_is_the_mean_over_windows(pruned, tmp_path):
    record, _ = prunedm.loss(pruned, tmp_path / "loss", LossOptions(**data()))
    made = load(pruned)
    whole = text_file().read_text(encoding="utf-8")
    windows = [whole[k * 64 : (k + 1) * 64] for k in range(len(whole) // 64)][19::20]
    ids = torch.tensor([byte_tokenizer()(w)["input_ids"] for w in windows])
    with torch.no_grad():
        due = [float(made.denoiser(row[None], labels=row[None]).loss) for row in ids]
    assert record.figures["loss"] == pytest.approx(np.mean(due), rel=1e-5)
    assert record.figures["problems"] == len(windows)


def test_evaluate_tells_perplexity_beside_the_dense_model(pruned, tmp_path):
    options = EvaluateOptions(
        **data(), latency_repeats=1, latency_batch=1, stride=16, depth="quick"
    )
    prunedm.evaluate(pruned, tmp_path / "out", options)
    found = read_evaluation(tmp_path / "out")
    assert found.failed == {}
    assert found.figures.perplexity == pytest.approx(np.exp(found.figures.loss))
    assert found.reloads is True
    assert found.conditions.length == 64
    assert 0.5 < found.figures.perplexity_strided / found.figures.perplexity < 2
    summary = (tmp_path / "out" / "evaluation_summary.md").read_text(encoding="utf-8")
    assert "windows of 64 tokens" in summary
    assert "images/s" not in summary


def test_weights_keep_the_type_of_the_file_and_load_again(tmp_path):
    network().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    options = PruneOptions(mechanism="nm", score="magnitude", **CALIBRATED)
    prunedm.prune(tmp_path / "half", tmp_path / "out", options)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert check_reload(load(tmp_path / "out"))


@pytest.mark.parametrize("stride", [5, 16, 32, 64])
def test_strided_perplexity_counts_every_token_but_the_first_once(stride):
    """Against transformers' documented loop, with labels of -100 for what was counted before."""
    made, window = network(), 32
    tokens_T = torch.randint(257, (150,), generator=torch.Generator().manual_seed(0))
    total, count, before = 0.0, 0, 0
    for start in range(0, len(tokens_T), stride):
        end = min(start + window, len(tokens_T))
        ids = tokens_T[None, start:end]
        labels = ids.clone()
        labels[:, : -(end - before)] = -100
        new = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(made(ids, labels=labels).loss) * new
        count, before = count + new, end
        if end == len(tokens_T):
            break
    found = strided_perplexity(made, tokens_T, window, stride, device=torch.device("cpu"))
    assert found == pytest.approx(np.exp(total / count), rel=1e-4)


def test_sample_continues_prompts_by_the_seed(pruned, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("prune the\n\nkeep\n", encoding="utf-8")
    options = SampleOptions(prompts=str(prompts), tokens=6, temperature=1.0, device="cpu")
    lines = []
    for name in ("a", "b"):
        prunedm.sample(pruned, tmp_path / name, options)
        lines.append((tmp_path / name / "samples.jsonl").read_text(encoding="utf-8"))
    assert lines[0] == lines[1]
    assert [json.loads(line)["prompt"] for line in lines[0].splitlines()] == ["prune the", "keep"]
    prunedm.sample(pruned, tmp_path / "c", options.model_copy(update={"temperature": 0.0}))
    made, ids = load(pruned), torch.tensor([byte_tokenizer()("keep")["input_ids"]])
    for _ in range(6):
        ids = torch.cat([ids, made.denoiser(ids).logits[:, -1:].argmax(-1)], 1)
    last = (tmp_path / "c" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["text"] == byte_tokenizer().decode(ids[0, 4:], skip_special_tokens=True)


def test_packed_files_hold_language_models(pruned, tmp_path):
    prunedm.export(pruned, tmp_path / "out", ExportOptions(format="packed", precision="fp32"))
    packed, made = load(tmp_path / "out"), load(pruned)
    ids = torch.arange(24)[None]
    assert torch.equal(packed.denoiser(ids).logits, made.denoiser(ids).logits)
    assert packed.tokenizer.loaded("keep")["input_ids"] == byte_tokenizer()("keep")["input_ids"]
    with pytest.raises(UserError, match="optimum-cli makes ONNX and OpenVINO ones"):
        prunedm.export(pruned, tmp_path / "onnx", ExportOptions(format="onnx"))


RECIPE = """
model: {model}
dataset: {text}
device: cpu
stages:
  - prune: {{mechanism: obs-nm, calibration_problems: 8}}
  - finetune: {{steps: 2, batch_size: 4, validation_problems: 4}}
  - export: {{format: packed}}
evaluate: {{depth: quick, problems: 4, latency_repeats: 1, latency_batch: 1}}
"""


def test_a_recipe_runs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=language_model(), text=text_file()), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), str(tmp_path / "out")])
    assert ended.value.code == 0
    report = (tmp_path / "out" / "report" / "report.html").read_text(encoding="utf-8")
    assert "perplexity" in report


def without(name: str, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(language_model(), folder)
    (folder / name).unlink()
    return folder


def changed(tmp_path, **config):
    folder = tmp_path / "lm"
    shutil.copytree(language_model(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_what_cannot_be_done_is_one_line(tmp_path):
    prune = PruneOptions(mechanism="nm", score="wanda", **CALIBRATED)
    (tmp_path / "short.txt").write_text("few words")
    cases = [
        (without("tokenizer.json", tmp_path / "a"), prune, "has no tokenizer"),
        (
            language_model(),
            prune.model_copy(update={"dataset": "digits"}),
            "give --dataset: a text",
        ),
        (language_model(), prune.model_copy(update={"length": 65}), "has 64 positions"),
        (
            language_model(),
            prune.model_copy(update={"dataset": str(tmp_path / "short.txt")}),
            "less than one sequence of 64",
        ),
        (changed(tmp_path / "b", num_hidden_layers=10**9), prune, "num_hidden_layers = .* range"),
        (changed(tmp_path / "c", quantization_config={"bits": 4}), prune, "weights are quantised"),
        (changed(tmp_path / "d", num_hidden_layers=3), prune, "missing tensors, first"),
        (
            language_model(),
            PruneOptions(target="weights=0.3", **CALIBRATED),
            "channels takes params",
        ),
    ]
    for number, (source, options, message) in enumerate(cases):
        with pytest.raises(UserError, match=message) as caught:
            prunedm.prune(source, tmp_path / f"out-{number}", options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give --prompts, a text file with a prompt a line"):
        prunedm.sample(language_model(), tmp_path / "s", SampleOptions())
    (tmp_path / "long.txt").write_text(text(30))
    with pytest.raises(UserError, match="are over the 64 that"):
        prunedm.sample(
            language_model(), tmp_path / "s", SampleOptions(prompts=str(tmp_path / "long.txt"))
        )


def test_the_classes_that_nobody_named_have_the_record():
    for cls, config in CLASSES.items():
        assert architecture_of(network(cls, **config)).text
