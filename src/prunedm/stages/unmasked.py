"""The weights under a model's masks: what was removed, from the model that still had it."""

import torch

from prunedm.errors import UserError
from prunedm.folder import Model
from prunedm.networks.layer_kinds import weight_of
from prunedm.stages.inputs import reload


def unmasked(given: Model, before: Model) -> Model:
    """`given` with its removed weights as they were `before_masks`; the kept ones are its own.

    A removed weight is zero in the model, and a mask that may move wants its value back.
    """
    if given.masks is None:
        return given
    with torch.no_grad():
        for name, mask in given.masks:
            now, then = (weight_of(m.denoiser.get_submodule(name)) for m in (given, before))
            now.copy_(torch.where(mask, now, then))
    return given


def before_masks(given: Model) -> Model:
    """The nearest ancestor without masks, found through the records; `given` if it has none.

    Raises `UserError` where there is none, or no longer the same.
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
