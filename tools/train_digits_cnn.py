"""Make the embedded digits classifier, whose features measure "FD (digits-cnn)".

    python tools/train_digits_cnn.py [--out src/prunedm/assets]

Writes `digits_cnn.safetensors` (float16) and `digits_cnn.json`, replacing those that are there:
the figures in the record are of the rounded weights, on digits that training never saw. The last
step's weights are kept; nothing is selected by the held-out digits.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch.nn import functional as F

from prunedm.data.images import load_images
from prunedm.evaluation.features import DIGITS_CNN_FILE, DigitsCNN, FeatureNetwork, extract
from prunedm.evaluation.fid import Statistics, frechet_distance, statistics
from prunedm.randomness import generator_for, seed_for
from prunedm.record import environment, write_json

SIZE = 16
OPTIONS: dict[str, float] = {
    "steps": 900, "batch": 128, "lr": 2e-3, "weight_decay": 0.05,
    "degrees": 10, "scale": 0.1, "contrast": 0.2,  # each the widest, either way
    "shift": 0.12,  # of half the image's side
    "noise": 3,  # largest standard deviation, in grey levels
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("src/prunedm/assets"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    model = train(*digits("train"), seed=arguments.seed)
    weights = {key: _half(value) for key, value in model.state_dict().items()}
    model.load_state_dict(weights)  # from here on, figures are of what is shipped
    figures = held_out_figures(model) | {"distances": distances(model, seed=arguments.seed)}
    record = {"file": DIGITS_CNN_FILE, "figures": figures, "options": OPTIONS} | environment()
    record |= {"seed": arguments.seed, "wall_time_s": round(time.perf_counter() - start, 1)}
    record["command"] = " ".join(["python", *sys.argv])
    (arguments.out / DIGITS_CNN_FILE).write_bytes(save(weights))
    write_json(record, arguments.out / Path(DIGITS_CNN_FILE).with_suffix(".json"))
    print(f"held-out digits: {figures['accuracy']:.2%} of {figures['images']} right")


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 1, 16, 16), and classes (N,)."""
    images = load_images("digits", split=split, size=SIZE, channels=1)
    labels = [images.label(k) for k in range(len(images))]
    return torch.stack([images[k] for k in range(len(images))]), torch.tensor(labels)


def train(images_NCHW: torch.Tensor, labels_N: torch.Tensor, *, seed: int) -> DigitsCNN:
    """A classifier trained on augmented digits: same seed, same bits on the same machine."""
    torch.manual_seed(seed_for(seed, "digits-cnn/init"))
    model = DigitsCNN()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"]
    )
    steps = int(OPTIONS["steps"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, OPTIONS["lr"], total_steps=steps)
    for step in range(steps):
        generator = generator_for(seed, "digits-cnn/step", step)
        chosen = torch.randperm(len(images_NCHW), generator=generator)[: int(OPTIONS["batch"])]
        logits = model.logits(augment(images_NCHW[chosen], generator))
        loss = F.cross_entropy(logits, labels_N[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    return model.eval().requires_grad_(False)


def augment(images_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned, moved, scaled, of other contrast, noisy: float in 0..255. Black (0) pads."""
    count = len(images_NCHW)

    def spread(width: float, *shape: int) -> torch.Tensor:
        return (2 * torch.rand(count, *shape, generator=generator) - 1) * width

    angle, zoom = spread(OPTIONS["degrees"]).deg2rad(), 1 + spread(OPTIONS["scale"])
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rotation = torch.stack([cos, -sin, sin, cos], 1).view(count, 2, 2)
    affine = torch.cat([rotation, spread(OPTIONS["shift"], 2, 1)], 2)
    grid = F.affine_grid(affine, list(images_NCHW.shape), align_corners=False)
    moved = F.grid_sample(images_NCHW.float(), grid, align_corners=False)
    moved = moved * (1 + spread(OPTIONS["contrast"], 1, 1, 1))
    noise = torch.randn(moved.shape, generator=generator)
    strength = torch.rand(count, 1, 1, 1, generator=generator) * OPTIONS["noise"]
    return (moved + noise * strength).clamp(0, 255)


@torch.no_grad()
def held_out_figures(model: DigitsCNN) -> dict[str, Any]:
    """Accuracy and calibration on the digits that training never saw."""
    images_NCHW, labels_N = digits("test")
    logits = model.logits(images_NCHW)
    right = logits.argmax(1) == labels_N
    return {
        "accuracy": float(right.double().mean()),
        "images": len(labels_N),
        "cross_entropy": float(F.cross_entropy(logits, labels_N)),
        "mean_confidence": float(logits.softmax(1).amax(1).mean()),
    }


def distances(model: DigitsCNN, *, seed: int) -> dict[str, float]:
    """The scale of FD (digits-cnn): what sampling error and visible noise come to."""
    train_NCHW, test_NCHW = digits("train")[0], digits("test")[0]
    of = {
        "train": train_NCHW,
        "train, even": train_NCHW[::2],  # interleaved: the file is sorted by writer
        "train, odd": train_NCHW[1::2],
        "held-out": test_NCHW,
        "held-out + noise 10/255": noisy(test_NCHW, 10, seed),
        "held-out + noise 40/255": noisy(test_NCHW, 40, seed),
    }
    fits = {name: _fit(model, images) for name, images in of.items()}
    pairs = [("train", "held-out"), ("train, even", "train, odd")]
    pairs += [(base, name) for base in ("held-out", "train") for name in of if "noise" in name]
    return {f"{a} : {b}": round(frechet_distance(fits[a], fits[b]), 4) for a, b in pairs}


def noisy(images_NCHW: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """uint8 images with Gaussian noise of this standard deviation, in grey levels."""
    generator = generator_for(seed, f"digits-cnn/noise {strength}")
    noise = torch.randn(images_NCHW.shape, generator=generator) * strength
    return (images_NCHW + noise).round().clamp(0, 255).to(torch.uint8)


def _fit(model: DigitsCNN, images_NCHW: torch.Tensor) -> Statistics:
    network = FeatureNetwork("FD (digits-cnn)", DigitsCNN.dim, model)
    return statistics(extract(network, images_NCHW.split(100)), features=network.name)


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


if __name__ == "__main__":
    main()
