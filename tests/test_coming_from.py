"""The pages "Coming from the old scripts": every old script is there, every new command parses."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import GROUPS

from prunedm.cli import app
from prunedm.options.presets import PRESETS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / name).read_text("utf-8") for name in ("coming-from.md", "coming-from.zh.md")}
# as the old documents name them; modules of its package included
NAMES = """
ddpm_prune.py ddpm_weight_prune.py ddpm_train.py ddpm_train_simple_masked.py ddpm_sample.py
fid_score.py run_fid_test.sh experiments/analyze_activations.py scripts/test_wanda_diff.sh
scripts/sampling/sample_ddpm_cifar10_magnitude_pruned.sh tools/convert_cifar10_ddpm_ema.sh
scripts/weight_prune/prune_ddpm_weight_magnitude_cifar10.sh get_mask_diffusion.py
inference_loss_diffusion.py train_diffusion.py test_ddpm_maskpro.py wrapper_diffusion.py
get_mask.py wrapper.py inference_loss.py train.py scripts/loss/ scripts/train/ scripts/test/
scripts/experiment_configs.md quick_start.sh run_all_experiments.sh gpu_monitor.sh
auto_config1.sh auto_config2.sh auto_config3.sh auto_config4.sh auto_config5.sh
scripts/maskpro/test_foundation.py scripts/maskpro/test_integration.py
scripts/maskpro/test_training.py scripts/maskpro/extract_initial_masks.py
scripts/maskpro/diffusion_inference_loss.py scripts/maskpro/diffusion_maskpro_train.py
scripts/maskpro/run_maskpro_training.sh scripts/maskpro/configs/diffusion_maskpro_config.yaml
scripts/maskpro/evaluation/evaluate_maskpro_model.py
scripts/maskpro/evaluation/quick_evaluate.py scripts/maskpro/evaluation/compare_models.py
scripts/maskpro/evaluation/evaluation_workflow.py scripts/deployment/optimize_for_inference.py
scripts/deployment/tensorrt_optimization.py maskpro_layer.py conv_adapter.py utils.py
maskpro_trainer.py
"""
OLD_SCRIPTS = NAMES.split()


def commands(page: str) -> list[str]:
    """In blocks and in the cells of tables."""
    text = PAGES[page]
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    cells = re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.M | re.S))
    lines = [*blocks.splitlines(), *cells]
    return [shlex.join(shlex.split(line)) for line in lines if line.startswith("prunedm ")]


ENGLISH, CHINESE = map(commands, PAGES)


def test_both_pages_hold_the_same_commands():
    assert len(ENGLISH) > 50
    assert [c for c in ENGLISH if c != "prunedm COMMAND --help"] == [
        c for c in CHINESE if c != "prunedm COMMAND --help"
    ]


@pytest.mark.parametrize("command", sorted({*ENGLISH} - {"prunedm COMMAND --help"}))
def test_every_command_parses(command):
    words = shlex.split(command)[1:]
    if len(words) == 1:  # a verb by its name
        assert words[0] in list(app)
        return
    _, bound, unused, _ = app.parse_known_args(words)
    assert not unused
    assert bound.arguments


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("script", OLD_SCRIPTS)
def test_every_old_script_is_named(script, page):
    assert re.search(rf"(?<![\w/]){re.escape(script)}(?!\w)", PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_the_presets_are_what_they_are_said_to_be(page):
    for name, preset in PRESETS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGES[page], re.M)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:] == [
            f"{preset.dataset_size:,}", str(preset.batch_size),
            f"{preset.lr:g}", f"{preset.logits:g}", f"{preset.masks:,}",
        ]  # fmt: skip
        assert cells[1].split()[1] == preset.config.split()[1]


def test_both_pages_have_the_same_rows():
    """So that an option that is told of in one language is told of in the other."""

    def first_cells(page: str) -> list[str]:
        rows = re.findall(r"^\| (`.*?) \|", PAGES[page], re.M)
        return [" ".join(re.findall(r"`([^`]+)`", row)) for row in rows]

    english, chinese = map(first_cells, PAGES)
    assert english == chinese


def test_the_suites_that_are_named_are_there():
    for page in PAGES.values():
        named = set(re.findall(r"`pytest -m (\w+)`", page))
        assert named == GROUPS.keys() == {"foundation", "integration", "training"}
    tests = Path(__file__).parent
    assert all((tests / f"test_{name}.py").exists() for names in GROUPS.values() for name in names)
