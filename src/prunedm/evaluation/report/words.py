"""The words of `words.en.yaml` and `words.zh.yaml`, and how both languages stand on one page.

Every word is written twice, as a pair of <span lang>; a rule of style shows one of them. What comes
from data (labels, layers, record fields, errors) has one form and is escaped.
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


def text(key: str, **values: Any) -> Markup:
    """The words of `key` in both languages, filled with escaped `values`."""
    return both(*(Markup(words[key]).format(**values) for words in WORDS.values()))


def translated(key: str, english: str) -> Markup:
    """What the code names in English, with the Chinese of `key`; without it, one form."""
    chinese = WORDS["zh"].get(key)
    return escape(english) if chinese is None else both(english, chinese)


def both(english: Any, chinese: Any) -> Markup:
    """A pair of spans, one for each language; what is no markup is escaped."""
    spans = zip(LANGUAGES.values(), (english, chinese), strict=True)
    return Markup("").join(
        Markup('<span lang="{}">{}</span>').format(tag, words) for tag, words in spans
    )


def attribute(name: str, key: str, **values: Any) -> Markup:
    """`name="..."` in English, with both languages beside it for the page's script."""
    english, chinese = (escape(words[key].format(**values)) for words in WORDS.values())
    return Markup('{0}="{1}" data-en-{0}="{1}" data-zh-{0}="{2}"').format(name, english, chinese)
