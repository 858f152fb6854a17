"""What a model's record and scheduler tell of the conditions under which it is measured."""

from prunedm.evaluation.results import EMA, LAST, Asked
from prunedm.record import Record


def asked(record: Record | None) -> list[Asked]:
    """What each pruning of the lineage was asked for, and what it reached."""
    found = []
    for stage in record.lineage() if record else []:
        got = stage.figures.get("achieved", {})
        for what, wanted in stage.figures.get("requested", {}).items():
            reached = got.get(what, wanted)  # a pattern is reached, or the stage fails
            reason = stage.figures.get("reason", "")
            found.append(Asked(what=what, asked=wanted, got=reached, reason=reason))
    return found


def weights_in_words(record: Record | None) -> str:
    """Whether the weights are an average over training, by the stage that trained them last."""
    for stage in reversed(record.lineage() if record else []):
        decay = stage.options.get("ema_decay")
        own = stage.stage != "learn" or stage.options.get("train_weights")  # else of logits alone
        if decay is not None and own:
            return f"{EMA}{decay:g}" if decay else LAST
    return ""
