"""The trainer of old MaskPro scripts: weights and masks learn together, step by step from Python.

`prunedm learn --train-weights` does the same in one go, with resume and several processes; here
every step is a call, for scripts with a loop of their own.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.learning.layer import (
    MaskProLayer,
    maskpro_layers,
    separate_parameters,
    unwrap_model,
    wrap_model_with_maskpro,
)
from prunedm.learning.relaxation import temperature
from prunedm.learning.sparsity import layer_masks
from prunedm.maskpro.batches import Epochs, problems_of
from prunedm.maskpro.config import MaskProConfig, parsed_config
from prunedm.randomness import generator_for, seed_for
from prunedm.record import Record, environment
from prunedm.stages.inputs import (
    data_source,
    device_for,
    held_out_problems,
    images_for,
    source_of,
    training_problems,
)
from prunedm.task import Batch, predict

Made = TypeVar("Made")


class DiffusionMaskProTrainer:
    """Two AdamW optimizers, one for weights and one for mask logits, on the denoising loss.

    In this order: `load_model_and_scheduler`, `apply_maskpro_wrappers`, `setup_data_loaders`,
    `setup_optimizers`; then `training_step` as often as wanted. What is asked for too early is a
    `UserError` that names the call it lacks.

    With "relaxed", the masks are soft in training, and the loss's own gradient reaches the logits.
    With "reinforce", they are hard, and the logits follow (loss - baseline) * grad log P(mask)
    (Williams 1992); the baseline is a moving average of the losses of earlier steps.
    """

    def __init__(self, config: str | Path | Mapping[str, Any] | MaskProConfig) -> None:
        """`config`: a YAML file, a mapping, or typed. Raises `UserError` for unknown names."""
        self.config = parsed_config(config)
        self.device = device_for(self.config.device)
        self._begin(None)

    def _begin(self, loaded: Model | None) -> None:
        self._loaded = loaded
        self.steps = 0
        self.baseline: float | None = None
        self._images: ImageSet | None = None
        self._train_loader: Epochs | None = None
        self._held_out: list[Batch] | None = None
        self._optimizers: tuple[torch.optim.AdamW, torch.optim.AdamW] | None = None

    @property
    def model(self) -> nn.Module:
        """The denoiser, wrapped once `apply_maskpro_wrappers` was called."""
        denoiser: nn.Module = self._source.denoiser
        return denoiser

    @property
    def scheduler(self) -> Any:
        """The model's noise scheduler."""
        return self._source.scheduler

    @property
    def train_loader(self) -> Epochs:
        return _made(self._train_loader, "setup_data_loaders")

    @property
    def optimizers(self) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
        """Of the weights, of the logits."""
        return _made(self._optimizers, "setup_optimizers")

    @property
    def total_steps(self) -> int:
        """Over which the temperature falls."""
        return self.config.steps or self.config.epochs * len(self.train_loader)

    def load_model_and_scheduler(self) -> None:
        """Also to start afresh. Raises `UserError` for a model whose weights are masked already."""
        loaded = load(self.config.model)
        if loaded.masks is not None:
            raise UserError(f"{loaded.name} has masks already; give the model before masking")
        loaded.denoiser.to(self.device)
        self._begin(loaded)

    def apply_maskpro_wrappers(self) -> None:
        """Wrap the target layers. Raises `UserError` where they are wrapped, or none can be."""
        config = self.config
        if maskpro_layers(self.model):
            raise UserError("the model is wrapped already; load_model_and_scheduler starts afresh")
        wrap_model_with_maskpro(
            self.model,
            config.n,
            config.m,
            config.target_layers,
            draw="relaxed" if config.estimator == "relaxed" else "sample",
            temperature=config.temperature[0],
            lead=config.first_lead,
            seed=config.seed,
        )

    def setup_data_loaders(self) -> None:
        """`train_loader` of the training images, and fixed held-out problems for `validate`."""
        source, config = self._source, self.config
        self._images = images_for(source, config, "train")
        problems = training_problems(source, config, self._images)
        self._train_loader = Epochs(problems, config.batch_size)
        self._held_out = held_out_problems(source, config, config.validation_problems)

    def setup_optimizers(self) -> None:
        self._wrapped()
        weights, logits = separate_parameters(self.model)
        self._optimizers = (
            torch.optim.AdamW(weights, lr=self.config.model_lr, weight_decay=0.0),
            torch.optim.AdamW(logits, lr=self.config.mask_lr, weight_decay=0.0),
        )

    def training_step(self, batch: Batch | torch.Tensor) -> dict[str, float]:
        """One step of both optimizers, on problems, or on clean images NCHW in -1..1.

        total_loss = diffusion_loss + mask_loss_weight * mask_loss; the latter is 0 with "relaxed".
        Figures of masks are of the hard ones after the step; grad_norm is that before clipping.
        Raises `UserError`, and no parameter has changed, on a loss or gradient that is not finite.
        """
        optimizers, layers, config = self.optimizers, self._wrapped(), self.config
        if not isinstance(batch, Batch):
            batch = problems_of(
                batch, self._source, generator_for(config.seed, "maskpro", self.steps)
            )
        problems = batch.to(self.device)
        progress = min(1.0, self.steps / max(1, self.total_steps - 1))
        tau = temperature(config.temperature, progress)
        for layer in layers.values():
            layer.temperature = tau
        torch.manual_seed(seed_for(config.seed, "dropout", self.steps))
        self.model.train()
        diffusion = problems.losses(predict(self.model, problems)).mean()
        value = float(diffusion.detach())
        baseline = value if self.baseline is None else self.baseline
        mask_loss = torch.zeros((), device=self.device)
        if config.estimator == "reinforce":
            free = (layer for layer in layers.values() if layer.fixed_mask is None)
            log_prob = sum((layer.log_prob() for layer in free), start=mask_loss)
            mask_loss = reinforce_loss(diffusion, baseline, log_prob)
        total = diffusion + config.mask_loss_weight * mask_loss
        norm = self._backward(total, layers)
        for optimizer in optimizers:
            optimizer.step()
        self.baseline = baseline + (1 - config.baseline_momentum) * (value - baseline)
        self.steps += 1
        losses = {"total_loss": total, "diffusion_loss": diffusion, "mask_loss": mask_loss}
        figures = {name: float(loss.detach()) for name, loss in losses.items()}
        return figures | self._figures(layers) | {"temperature": tau, "grad_norm": norm}

    def train(self) -> dict[str, float]:
        """All steps that are left, each a `training_step`; the figures of `validate` then."""
        while self.steps < self.total_steps:
            for batch in self.train_loader:
                self.training_step(batch)
                if self.steps >= self.total_steps:
                    break
        return self.validate()

    def validate(self) -> dict[str, float]:
        """The denoising loss under the hard masks, on held-out problems that never change."""
        layers = self._wrapped()
        held_out = _made(self._held_out, "setup_data_loaders")
        found = denoising_loss(self.model, held_out, device=self.device)
        return {"loss": found.mean, "loss_se": found.standard_error} | self._figures(layers)

    def save(self, folder: str | Path) -> None:
        """Write the model, its masks applied, as a folder that every stage takes; keep training.

        Raises `UserError` where the folder holds anything.
        """
        folder, source = Path(folder), self._source
        layers = self._wrapped()
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} exists and is no empty folder; give another")
        denoiser = deepcopy(source.denoiser).to("cpu")
        masks = unwrap_model(denoiser)
        inputs = {"model": source_of(source)}
        if self._images is not None:
            inputs["dataset"] = data_source(self._images)
        record = Record(
            stage="maskpro",
            options=self.config.model_dump(mode="json"),
            inputs=inputs,
            seed=self.config.seed,
            history=source.record.lineage() if source.record else [],
            figures={"steps": self.steps} | self._figures(layers),
        ).model_copy(update=environment(self.config.device))
        save(replace(source, denoiser=denoiser.eval(), masks=masks, record=record), folder)

    def state_dict(self) -> dict[str, Any]:
        """All that an equal trainer needs to go on to the same bits, from the end of an epoch."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "drawn": {name: layer.drawn for name, layer in self._wrapped().items()},
            "epoch": self._train_loader.epoch if self._train_loader else 0,
            "steps": self.steps,
            "baseline": self.baseline,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; call it after `setup_optimizers`."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.model.load_state_dict(state["model"])
        for name, layer in self._wrapped().items():
            layer.drawn = state["drawn"][name]
        if self._train_loader:
            self._train_loader.epoch = state["epoch"]
        self.steps, self.baseline = state["steps"], state["baseline"]

    @property
    def _source(self) -> Model:
        return _made(self._loaded, "load_model_and_scheduler")

    def _wrapped(self) -> dict[str, MaskProLayer]:
        return _made(maskpro_layers(self.model) or None, "apply_maskpro_wrappers")

    def _backward(self, total: torch.Tensor, layers: Mapping[str, MaskProLayer]) -> float:
        """Gradients, clipped apart for weights and logits; their norm before."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total.backward()
        if self.config.estimator == "relaxed":
            for layer in layers.values():
                if layer.mask_logits.grad is not None:
                    layer.mask_logits.grad.mul_(self.config.mask_loss_weight)
        limit = self.config.clip or math.inf
        norms = [nn.utils.clip_grad_norm_(x, limit) for x in separate_parameters(self.model)]
        norm = math.hypot(*(float(norm) for norm in norms))
        if not math.isfinite(norm):
            raise UserError(
                f"loss {float(total.detach()):g} has no finite gradient at step {self.steps}: "
                "lower model_lr or mask_lr"
            )
        return norm

    @staticmethod
    def _figures(layers: Mapping[str, MaskProLayer]) -> dict[str, float]:
        masks = layer_masks(layers)
        return {
            "sparsity_ratio": 1 - masks.kept / masks.total,
            "nm_compliance": masks.compliance,
        }


def reinforce_loss(
    loss: torch.Tensor, baseline: float | torch.Tensor, log_prob: torch.Tensor
) -> torch.Tensor:
    """A scalar with the gradient (loss - baseline) * grad log P; unbiased where the baseline does
    not depend on the mask drawn (Williams 1992)."""
    return (loss - baseline).detach() * log_prob


def _made(thing: Made | None, call: str) -> Made:
    if thing is None:
        raise UserError(f"call {call}() first")
    return thing
