"""Put a finished `prunedm run` into the docs.

    python benchmarks/publish.py runs/digits digits --command "prunedm run"

Writes `benchmarks/results/NAME.json` (figures, conditions, wall times, versions), the picture
`docs/images/NAME.png`, and the section NAME of `docs/results.md` between its two markers.
"""

import argparse
from pathlib import Path

import numpy as np
from bench import RESULTS, ROOT, Row, into_docs
from PIL import Image, ImageDraw

from prunedm.evaluation.pictures import grid
from prunedm.evaluation.results import Evaluation
from prunedm.evaluation.table import markdown_table
from prunedm.record import read_record, write_json
from prunedm.stages.verbs.compare import read_comparison
from prunedm.stages.verbs.evaluate import read_samples

SHOWN = 36  # samples of each model in the picture
SCALE = 64  # pixels of a sample's side in it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--command", required=True)
    arguments = parser.parse_args()
    evaluations = [_without_paths(e) for e in read_comparison(arguments.run / "report")]
    summary = _summary(arguments.run, evaluations, arguments.command)
    write_json(summary, RESULTS / f"{arguments.name}.json")
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    _picture(arguments.run, evaluations).save(images / f"{arguments.name}.png", optimize=True)
    into_docs(arguments.name, _section(arguments.name, summary, evaluations))


def _without_paths(evaluation: Evaluation) -> Evaluation:
    """Names of folders, not where they lie on this machine."""
    dataset = Path(evaluation.conditions.dataset).name
    conditions = evaluation.conditions.model_copy(update={"dataset": dataset})
    model = Path(evaluation.model).name
    return evaluation.model_copy(update={"model": model, "conditions": conditions})


def _summary(run: Path, evaluations: list[Evaluation], command: str) -> Row:
    folders = [folder for folder in sorted(run.iterdir()) if (folder / "record.json").exists()]
    records = {folder.name: read_record(folder) for folder in folders}
    done = {name: record for name, record in records.items() if record is not None}
    report = done["report"]
    return {
        "command": command,
        "device": report.device,
        "versions": report.versions,
        "created": report.created,
        "wall_time_s": {name: record.wall_time_s for name, record in done.items()},
        "models": [
            e.model_dump(mode="json", include={"label", "hash", "figures", "conditions"})
            for e in evaluations
        ],
    }


def _picture(run: Path, evaluations: list[Evaluation]) -> Image.Image:
    """A sheet of samples of every model, from the same noise."""
    labels = [e.label for e in evaluations]
    sheets = []
    for label in labels:
        samples = read_samples(run / "report", label)
        assert samples is not None, f"{label} has no samples"
        sheets.append(_sheet(samples[:SHOWN], label))
    width, height = sheets[0].size
    columns = 3
    rows = -(-len(sheets) // columns)
    page = Image.new("RGB", (columns * (width + 16) - 16, rows * (height + 16) - 16), "white")
    for k, sheet in enumerate(sheets):
        page.paste(sheet, (k % columns * (width + 16), k // columns * (height + 16)))
    return page


def _sheet(samples_NHWC: np.ndarray, label: str) -> Image.Image:
    image = grid(samples_NHWC, 6)
    factor = max(1, SCALE // samples_NHWC.shape[1])
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (large.width, large.height + 28), "white")
    sheet.paste(large.convert("RGBA"), (0, 28), large.convert("RGBA"))
    ImageDraw.Draw(sheet).text((2, 4), label, fill="black", font_size=18)
    return sheet


def _section(name: str, summary: Row, evaluations: list[Evaluation]) -> str:
    conditions = evaluations[0].conditions
    stages = ", ".join(f"{key} {value:.0f} s" for key, value in summary["wall_time_s"].items())
    return "\n\n".join(
        [
            f"```\n{summary['command']}\n```",
            markdown_table(evaluations).strip(),
            f"{conditions.features} of {conditions.samples} {conditions.sampler} samples against "
            f"{conditions.reference} held-out images; loss on {conditions.problems} held-out "
            f"problems; latency of batch {conditions.latency_batch}, {conditions.dtype}, eager; "
            f"{summary['device']}. Wall time: {stages}. Data: "
            f"`benchmarks/results/{name}.json`.",
            f"![samples of every stage from the same noise](images/{name}.png)",
        ]
    )


if __name__ == "__main__":
    main()
