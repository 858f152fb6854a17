"""Images from folders, tables, the hub and arrays; and texts. Nothing heavy is imported here."""

from importlib import import_module
from typing import Any

_OF_IMAGES = (
    "ImageSet",
    "all_images",
    "digits",
    "is_embedded",
    "load_images",
    "to_model_range",
    "to_uint8",
)


def __getattr__(name: str) -> Any:
    if name not in _OF_IMAGES:
        raise AttributeError(f"module 'prunedm.data' has no attribute {name!r}")
    return getattr(import_module("prunedm.data.images"), name)
