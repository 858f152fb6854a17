"""The words of `words.en.yaml` and `words.zh.yaml`, and how a page holds both languages.

Every word is written twice, as a pair of <span lang>, one of which the style sheet hides. Data
(labels, layers, record fields, errors) have one form and are escaped.
"""

from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from prunedm.reading import read_yaml

LANGUAGES = {"en": "en", "zh": "zh-CN"}  # file -> tag
WORDS: dict[str, dict[str, str]] = {
    language: read_yaml(Path(__file__).with_name(f"words.{language}.yaml"))
    for language in LANGUAGES
}


class Words(Markup):
    """Markup that holds both languages; `english` and `chinese` hold one each."""

    english: Markup
    chinese: Markup

    @classmethod
    def of(cls, english: Markup, chinese: Markup) -> "Words":
        spans = zip(LANGUAGES.values(), (english, chinese), strict=True)
        pair = (Markup('<span lang="{}">{}</span>').format(tag, words) for tag, words in spans)
        made = cls(english if english == chinese else Markup("").join(pair))
        made.english, made.chinese = english, chinese
        return made


def text(key: str, **values: Any) -> Words:
    """The words of `key` in both languages, filled with escaped `values`."""
    return translated(key, WORDS["en"][key], **values)


def translated(key: str, english: str, **values: Any) -> Words:
    """As `text`, for English that stands in the code; it serves as the Chinese where `key` has none."""
    forms = (english, WORDS["zh"].get(key, english))
    if values:
        return Words.of(*(_filled(form, k, values) for k, form in enumerate(forms)))
    return Words.of(*map(escape, forms))


def _filled(form: str, number: int, values: dict[str, Any]) -> Markup:
    own = {
        name: (value.english, value.chinese)[number] if isinstance(value, Words) else value
        for name, value in values.items()
    }
    return Markup(form).format(**own)


def attribute(name: str, key: str, **values: Any) -> Markup:
    """`name="..."` in English, with both languages beside it for the page's script."""
    words = text(key, **values)
    return Markup('{0}="{1}" data-en-{0}="{1}" data-zh-{0}="{2}"').format(
        name, words.english, words.chinese
    )
