"""The trainer of old MaskPro scripts: weights and masks learn together, step by step from Python.

`prunedm learn --train-weights` does the same in one command, with resume and several processes; here
every step is a call, for scripts with their own loop.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from prunedm.data.images import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.learning.learner import Learner
from prunedm.learning.logits import MaskLogits
from prunedm.learning.policy_gradient import ClassicPolicyGradient
from prunedm.learning.relaxation import RelaxedPatterns, temperature
from prunedm.maskpro.batches import Epochs, problems_of
from prunedm.maskpro.config import MaskProConfig, parsed_config
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.randomness import generator_for, seed_for
from prunedm.record import Record, environment
from prunedm.removal.nm import nm_masks
from prunedm.stages.inputs import (
    data_source,
    device_for,
    held_out_problems,
    images_for,
    source_of,
    training_problems,
)
from prunedm.task import Batch
from prunedm.task.denoising import Denoising

Made = TypeVar("Made")


class DiffusionMaskProTrainer:
    """Two AdamW optimizers, one for weights and one for mask logits, on the denoising loss.

    Call in this order: `load_model_and_scheduler`, `apply_maskpro_wrappers`, `setup_data_loaders`,
    `setup_optimizers`; then `training_step` as often as wanted. A call out of order raises a
    `UserError` that names the missing one.

    With "relaxed", masks are soft in training, and the gradient of the loss reaches the logits. With
    "reinforce", they are hard, and the logits follow MaskPro's policy gradient: the loss minus that
    of the first masks, minus a moving average of this difference. Both estimators are those of `learn`.
    """

    def __init__(self, config: str | Path | Mapping[str, Any] | MaskProConfig) -> None:
        """`config`: a YAML file, a mapping, or typed. Raises `UserError` for unknown names."""
        self.config = parsed_config(config)
        self.device = device_for(self.config.device)
        self._begin(None)

    def _begin(self, loaded: Model | None) -> None:
        self._loaded = loaded
        self.steps = 0
        self._learner: Learner | None = None
        self._images: ImageSet | None = None
        self._train_loader: Epochs | None = None
        self._held_out: list[Batch] | None = None
        self._optimizers: tuple[torch.optim.AdamW, torch.optim.AdamW] | None = None

    @property
    def model(self) -> nn.Module:
        """The denoiser without masks: they are applied in training, validation and saving."""
        denoiser: nn.Module = self._source.denoiser
        return denoiser

    @property
    def scheduler(self) -> Any:
        """The model's noise scheduler."""
        return self._source.scheduler

    @property
    def learner(self) -> Learner:
        """The trained module: the logits, and the model under masks drawn from them."""
        return _made(self._learner, "apply_maskpro_wrappers")

    @property
    def masks(self) -> Masks:
        """The hard masks: the most probable ones."""
        return self.learner.logits.mode()

    @property
    def train_loader(self) -> Epochs:
        return _made(self._train_loader, "setup_data_loaders")

    @property
    def optimizers(self) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
        """The optimizers of the weights and of the logits."""
        return _made(self._optimizers, "setup_optimizers")

    @property
    def total_steps(self) -> int:
        """The number of steps over which the temperature falls."""
        return self.config.steps or self.config.epochs * len(self.train_loader)

    def load_model_and_scheduler(self) -> None:
        """Load, or start again. Raises `UserError` for a model that already has masks."""
        loaded = load(self.config.model)
        if loaded.masks is not None:
            raise UserError(f"{loaded.name} has masks already; give the model before masking")
        loaded.denoiser.to(self.device)
        self._begin(loaded)

    def apply_maskpro_wrappers(self) -> None:
        """Mask the target layers by their largest weights; no module of the model changes.

        Raises `UserError` where they are masked already, or the pattern fits no layer.
        """
        config = self.config
        layers = prunable_layers(self.model, config.target_layers)
        if self._learner is not None:
            raise UserError("the masks are on already; load_model_and_scheduler starts afresh")
        scores = {name: layer.get_parameter("weight").detach() for name, layer in layers.items()}
        first = nm_masks(layers, scores, Pattern(config.n, config.m))
        self._learner = Learner(
            self.model,
            MaskLogits(first, scores, lead=config.first_lead),
            RelaxedPatterns(config.temperature)
            if config.estimator == "relaxed"
            else ClassicPolicyGradient(decay=config.baseline_momentum),
            train_weights=True,
            mask_loss_weight=config.mask_loss_weight,
        ).to(self.device)

    def setup_data_loaders(self) -> None:
        """`train_loader` of the training images, and fixed held-out problems for `validate`."""
        source, config = self._source, self.config
        self._images = images_for(source, config, "train")
        problems = training_problems(source, config, self._images)
        assert isinstance(problems, Denoising)
        self._train_loader = Epochs(problems, config.batch_size)
        self._held_out = held_out_problems(source, config, config.validation_problems)

    def setup_optimizers(self) -> None:
        logits = self.learner.logits.parameters()
        self._optimizers = (
            torch.optim.AdamW(self.model.parameters(), lr=self.config.model_lr, weight_decay=0.0),
            torch.optim.AdamW(logits, lr=self.config.mask_lr, weight_decay=0.0),
        )

    def training_step(self, batch: Batch | torch.Tensor) -> dict[str, float]:
        """One step of both optimizers, on problems, or on clean images NCHW in -1..1.

        total_loss is the denoising loss under the drawn masks. Figures of masks are those of the hard
        masks after the step; grad_norm is taken before clipping. Raises `UserError` on a loss or
        gradient that is not finite, without changing a parameter.
        """
        optimizers, learner, config = self.optimizers, self.learner, self.config
        if not isinstance(batch, Batch):
            batch = problems_of(
                batch, self._source, generator_for(config.seed, "maskpro", self.steps)
            )
        progress = min(1.0, self.steps / max(1, self.total_steps - 1))
        generator = generator_for(config.seed, "masks", self.steps, self.device)
        torch.manual_seed(seed_for(config.seed, "dropout", self.steps))
        averages = deepcopy(learner.estimator.state_dict())
        loss = learner.train()(batch.to(self.device), progress, generator)
        norm = self._backward(loss)
        if not math.isfinite(norm):
            learner.estimator.load_state_dict(averages)
            raise UserError(
                f"loss {float(loss.detach()):g} has no finite gradient at step {self.steps}: "
                "lower model_lr or mask_lr"
            )
        for optimizer in optimizers:
            optimizer.step()
        self.steps += 1
        return self._figures() | {
            "total_loss": float(loss.detach()),
            "temperature": temperature(config.temperature, progress),
            "grad_norm": norm,
        }

    def train(self) -> dict[str, float]:
        """Take all remaining steps; returns the figures of `validate`."""
        while self.steps < self.total_steps:
            for batch in self.train_loader:
                self.training_step(batch)
                if self.steps >= self.total_steps:
                    break
        return self.validate()

    def validate(self) -> dict[str, float]:
        """The denoising loss under the hard masks, on held-out problems that never change."""
        masks = self.masks
        held_out = _made(self._held_out, "setup_data_loaders")
        with masks.applied(self.model):
            found = denoising_loss(self.model, held_out, device=self.device)
        return {"loss": found.mean, "loss_se": found.standard_error} | self._figures()

    def save(self, folder: str | Path) -> None:
        """Write the model with its masks applied as a folder for any stage; training may continue.

        Raises `UserError` where the folder is not empty.
        """
        folder, source = Path(folder), self._source
        masks = Masks({name: mask.cpu() for name, mask in self.masks}, self.masks.patterns)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; give another")
        denoiser = deepcopy(source.denoiser).to("cpu").eval()
        masks.apply_(denoiser)
        inputs = {"model": source_of(source)}
        if self._images is not None:
            inputs["dataset"] = data_source(self._images)
        record = Record(
            stage="maskpro",
            options=self.config.model_dump(mode="json"),
            inputs=inputs,
            seed=self.config.seed,
            history=source.record.lineage() if source.record else [],
            figures={"steps": self.steps} | self._figures(),
        ).model_copy(update=environment(self.config.device))
        save(replace(source, denoiser=denoiser, masks=masks, record=record), folder)

    def state_dict(self) -> dict[str, Any]:
        """What an equal trainer needs to continue to the same bits, at the end of an epoch."""
        return {
            "learner": self.learner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "epoch": self._train_loader.epoch if self._train_loader else 0,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; call it after `setup_optimizers`."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.learner.load_state_dict(state["learner"])
        if self._train_loader:
            self._train_loader.epoch = state["epoch"]
        self.steps = state["steps"]

    @property
    def _source(self) -> Model:
        return _made(self._loaded, "load_model_and_scheduler")

    def _backward(self, loss: torch.Tensor) -> float:
        """Compute gradients, clipped separately for weights and logits; their norm before that."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        limit = self.config.clip or math.inf
        parts = (self.model.parameters(), self.learner.logits.parameters())
        return math.hypot(*(float(nn.utils.clip_grad_norm_(part, limit)) for part in parts))

    def _figures(self) -> dict[str, float]:
        masks = self.masks
        return {
            "sparsity_ratio": 1 - masks.kept / masks.total,
            "nm_compliance": masks.compliance,
        }


def _made(thing: Made | None, call: str) -> Made:
    if thing is None:
        raise UserError(f"call {call}() first")
    return thing
