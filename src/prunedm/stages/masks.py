"""Masks from a file, from a model that has them, or from the zeros of one without."""

import filecmp
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.folder import Model, load
from prunedm.masks import Masks, Pattern, load_masks, save_masks
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import prunable_layers
from prunedm.record import Source
from prunedm.removal.nm import LARGEST_M, eligible_layers, exact_pattern, project
from prunedm.stages.inputs import file_source, reload, source_of
from prunedm.stages.workplace import Workplace
from prunedm.system.places import target

SUFFIX = ".safetensors"
STRAY = 0.01  # a smaller share of zeros is chance: half precision rounds some weights to 0


@dataclass(frozen=True)
class Projected:
    """Numbers of groups in one layer that kept more than N, and fewer; others are unchanged."""

    over: int
    under: int


@dataclass(frozen=True)
class Extraction:
    """The origin of masks, and the changes that gave them one pattern."""

    origin: str
    source: Source
    without_zeros: tuple[str, ...] = ()  # layers with nothing to take a mask from
    stray: tuple[str, ...] = ()  # layers whose few zeros count as chance
    pattern: Pattern | None = None  # the one asked for
    projected: Mapping[str, Projected] = field(default_factory=dict)  # layers with changed groups
    ineligible: Mapping[str, str] = field(default_factory=dict)  # masked layers left out, and why

    @property
    def groups_changed(self) -> int:
        return sum(change.over + change.under for change in self.projected.values())

    def lines(self) -> list[str]:
        """The same as sentences for the user."""
        said = [f"masks from {self.origin}"]
        for names, what in (
            (self.without_zeros, "without zeros"),
            (self.stray, f"with less than {STRAY:.0%} zeros, as if by chance"),
        ):
            if names:
                said.append(f"left out: {_layers(len(names))} {what}, first {names[0]}")
        if self.pattern is not None:
            said.append(self._projection(self.pattern))
        for reason in dict.fromkeys(self.ineligible.values()):
            out = [name for name, why in self.ineligible.items() if why == reason]
            said.append(f"left out, as {reason}: {', '.join(out)}")
        return said

    def _projection(self, pattern: Pattern) -> str:
        over = sum(change.over for change in self.projected.values())
        under = sum(change.under for change in self.projected.values())
        if not over and not under:
            return f"every group was {pattern} already"
        reasons = [
            f"{over:,} kept more than {pattern.n}, so the smallest |w| went" * bool(over),
            f"{under:,} kept fewer, so the largest |w| (of zeros, the first) came in" * bool(under),
        ]
        return (
            f"projected to {pattern}: {over + under:,} groups of {_layers(len(self.projected))} "
            f"changed: {'; '.join(filter(None, reasons))}"
        )


def extract_masks(
    model: Model, *, targets: Iterable[str] = (), pattern: Pattern | None = None
) -> tuple[Masks, Extraction]:
    """The model's own masks, or those of the zeros in its prunable layers, with their origin.

    Layers without zeros, or with a few by chance, get no mask. Without `pattern`, a layer gets the
    N:M that its zeros satisfy exactly, or an unstructured mask. With it, every masked layer that
    allows it is projected to it, and the others are left out. Raises `UserError` where there is
    nothing to extract.
    """
    targets = tuple(targets)
    masks, found = _given(model, targets)
    return _finish(masks, found, model.denoiser, pattern=pattern, targets=targets)


def masks_from(
    source: str | Path,
    denoiser: nn.Module,
    *,
    pattern: Pattern | None = None,
    targets: Iterable[str] = (),
) -> tuple[Masks, Extraction]:
    """Masks for `denoiser` from a masks file or, as `extract_masks`, from another model.

    A projection to `pattern` goes by the magnitude of the weights of `denoiser`. Raises `UserError`
    naming the first layer that does not fit.
    """
    targets, path = tuple(targets), Path(source).expanduser()
    if path.is_file() or path.suffix == SUFFIX:
        masks, found = load_masks(path), Extraction(str(source), file_source(path))
        masks.check_pattern()
    else:
        masks, found = _given(load(source), targets)
    masks.check_fits(denoiser)
    return _finish(masks, found, denoiser, pattern=pattern, targets=targets)


def extract_to(
    source: str | Path,
    out: str | Path,
    *,
    targets: Iterable[str] = (),
    pattern: str | None = None,
    overwrite: bool = False,
) -> tuple[Masks, Extraction, bool]:
    """`extract_masks` of the model at `source` into the file `out`; also whether it was written.

    It is not where `out` holds the same masks. Raises `UserError` where it holds anything else,
    unless `overwrite`, or its name does not end in .safetensors.
    """
    out = target(out)
    if out.suffix != SUFFIX:
        raise UserError(f"{out} is not the name of a masks file; try {out.name}{SUFFIX}")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} exists and is not a file; give another name")
    if out.exists() and not overwrite:  # refuse another kind of file before any work
        try:
            load_masks(out)
        except UserError:
            raise UserError(
                f"{out} exists and holds other things; give another file, or --overwrite"
            ) from None
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is not None and wanted.m > LARGEST_M:
        raise UserError(f"pattern {pattern!r} has M over {LARGEST_M}; try 2:4")
    masks, found = extract_masks(load(source), targets=targets, pattern=wanted)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Workplace.of(out).held():
        return masks, found, _write(masks, out, overwrite=overwrite)


def _write(masks: Masks, out: Path, *, overwrite: bool) -> bool:
    """Whether `out` was written, since it did not hold the same masks."""
    partial = Workplace.of(out).file
    try:
        save_masks(masks, partial)
        if out.exists() and filecmp.cmp(partial, out, shallow=False):
            return False
        if out.exists() and not overwrite:
            raise UserError(
                f"{out} exists and holds other masks; give another file, or --overwrite"
            )
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return True


def read_masks(source: str | Path) -> Masks:
    """Masks of a file, with patterns unchecked, or of a model."""
    path = Path(source).expanduser()
    if path.is_file() or path.suffix == SUFFIX:
        return load_masks(path)
    return extract_masks(load(source))[0]


def unmasked(given: Model, before: Model) -> Model:
    """`given` with its removed weights from `before`; the kept ones are its own."""
    if given.masks is None:
        return given
    with torch.no_grad():
        for name, mask in given.masks:
            now, then = (weight_of(m.denoiser.get_submodule(name)) for m in (given, before))
            now.copy_(torch.where(mask, now, then))
    return given


def before_masks(given: Model) -> Model:
    """The nearest ancestor without masks by the records; `given` itself if it has none.

    Raises `UserError` where there is no such model, or it has changed.
    """
    ancestor = given
    while ancestor.masks is not None:
        record = ancestor.record
        if record is None or "model" not in record.inputs:
            raise UserError(
                f"{ancestor.name} does not say which model its masks were applied to: give learn the "
                f"model before masking, with --masks {given.name}"
            )
        if record.options.get("permute"):
            raise UserError(
                f"{ancestor.name} had its channels reordered when it was pruned, so no model on disk "
                "has the weights under its masks; give learn one that was pruned without --permute"
            )
        ancestor = reload(record.inputs["model"])
    return ancestor


def _given(model: Model, targets: tuple[str, ...]) -> tuple[Masks, Extraction]:
    """The model's masks, or those of its zeros."""
    name = model.name or "the model"
    if model.masks is not None:
        return model.masks, Extraction(name, source_of(model))
    layers = prunable_layers(model.denoiser, targets)
    kept = {n: _weight(layer) != 0 for n, layer in layers.items()}
    zeros = {n: 1 - int(mask.sum()) / mask.numel() for n, mask in kept.items()}
    by_layer = {n: mask for n, mask in kept.items() if zeros[n] >= STRAY}
    if not by_layer:
        raise UserError(
            f"{name} has no masks, and in no layer of {len(layers)} are {STRAY:.0%} of the weights "
            "zero; prune it first"
        )
    patterns = {n: exact_pattern(layers[n], mask) for n, mask in by_layer.items()}
    masks = Masks(by_layer, {n: p for n, p in patterns.items() if p is not None})
    return masks, Extraction(
        f"the zeros of {name}",
        source_of(model),
        without_zeros=tuple(n for n, share in zeros.items() if not share),
        stray=tuple(n for n, share in zeros.items() if 0 < share < STRAY),
    )


def _finish(
    masks: Masks,
    found: Extraction,
    denoiser: nn.Module,
    *,
    pattern: Pattern | None,
    targets: tuple[str, ...],
) -> tuple[Masks, Extraction]:
    """The masks of the targets, projected to the pattern by the magnitude of the weights."""
    if targets:
        masks = masks.only(prunable_layers(denoiser, targets))
    if not masks.by_layer:
        where = f" of {', '.join(targets)}" if targets else ""
        raise UserError(f"no masks{where} in {found.origin}; give other targets or masks")
    if pattern is None:
        return masks, found
    modules = dict(denoiser.named_modules())
    eligible, ineligible = eligible_layers({name: modules[name] for name, _ in masks}, pattern)
    by_layer, projected = {}, {}
    for name, layer in eligible.items():
        mask, score = masks.by_layer[name], _weight(layer).abs()
        if not bool(score.isfinite().all()):
            raise UserError(f"weights of {name} are not all finite, so they cannot be ranked")
        kept_G = pattern.kept_in(mask)
        change = Projected(int((kept_G > pattern.n).sum()), int((kept_G < pattern.n).sum()))
        by_layer[name], changed = project(mask, score, pattern)
        assert changed == change.over + change.under
        if changed:
            projected[name] = change
    found = replace(found, pattern=pattern, projected=projected, ineligible=ineligible)
    return Masks.uniform(by_layer, pattern), found


def _weight(layer: nn.Module) -> Any:
    """The weight on the CPU, where masks are."""
    return weight_of(layer).detach().cpu()


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"
