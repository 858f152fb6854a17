"""The documents: commands parse, files are options, links lead somewhere, the site stands alone."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path

import pytest
import yaml

from prunedm.cli import app
from prunedm.configuration import merged
from prunedm.experiments.plan import read_sweep
from prunedm.recipe_draft import read_draft
from prunedm.stages import STAGES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted(DOCS.rglob("*.md"))]
SHELL = ("", "bash", "sh", "console")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    return [text for language, text in fences if language in languages]


def command_lines(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines]


def prunedm_words(line: str) -> list[str] | None:
    """Of `prunedm WORDS`, or of a launcher with `-m prunedm WORDS`."""
    found = re.match(r"(?:\w+=\S+ )*prunedm\s+(.*)|.*\s-m\s+prunedm\s+(.*)", line)
    return shlex.split((found[1] or found[2]).rstrip("'"), comments=True) if found else None


COMMANDS = {
    shlex.join(words): name_of(page)  # one of the pages that tell it
    for page in PAGES
    for words in map(prunedm_words, command_lines(page))
    if words and not words[0].startswith("-")
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_parses(command):
    function, bound, unused, _ = app.parse_known_args(shlex.split(command))
    assert not unused, COMMANDS[command]
    bare = all(p.default is not p.empty for p in signature(function).parameters.values())
    assert bound.arguments or bare, COMMANDS[command]


def test_every_command_is_in_the_documents():
    told = {command.split()[0] for command in COMMANDS}
    for page in PAGES:
        told |= set(re.findall(r"`prunedm (\w+)", page.read_text("utf-8")))
    # --help and --version are cyclopts' own
    assert {name for name in app if not name.startswith("-")} <= told


def launchers() -> list[str]:
    lines = [line for page in PAGES for line in command_lines(page)]
    return sorted({line for line in lines if line.startswith(("accelerate launch ", "torchrun "))})


@pytest.mark.parametrize("line", launchers())
def test_every_launch_is_one_that_its_launcher_takes(line):
    program, *words = shlex.split(line)
    if program == "torchrun":
        from torch.distributed.run import parse_args

        given = parse_args(words)
    else:
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(words[1:])
    assert given.module
    assert given.training_script == "prunedm"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_in_the_documents_are_what_their_commands_take(page, tmp_path):
    """A YAML block that begins with `# NAME.yaml`, and a command on the page that reads NAME.yaml."""
    reading = re.findall(r"^prunedm (\w+).*?([\w-]+\.yaml)", page.read_text("utf-8"), re.M)
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict), text
        name = re.match(r"# ([\w-]+\.yaml)", text)
        if name:
            verbs = {verb for verb, file in reading if file == name[1]}
            assert verbs, f"nothing reads {name[1]}"
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
            for verb in verbs:
                read_as(verb, tmp_path / name[1])


def read_as(verb: str, file: Path) -> None:
    if verb == "sweep":
        read_sweep(file)
        return
    if verb == "run":
        assert read_draft(file).old_form(file.name) == []
        return
    assert merged(STAGES[verb].options, file).model_fields_set


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_documents_compiles(page):
    for text in blocks(page, "python"):
        compile(text, name_of(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        path, _, _ = target.partition("#")
        if path and "://" not in path:
            assert (page.parent / path).exists(), target


def leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(part)


def test_every_page_is_in_the_navigation_once():
    _, _, rest = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")
    nav = yaml.safe_load(re.split(r"^\S", rest, maxsplit=1, flags=re.M)[0])
    assert sorted(leaves(nav)) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


class Requests(HTMLParser):
    """What a browser fetches for a page before anybody clicks."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.urls.append(given["href"])
        self.urls += [given[key] for key in ("src", "srcset", "poster") if given.get(key)]


def test_the_site_builds_and_asks_for_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    # not --quiet: with it, --strict counts no warnings
    command = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    html = list(tmp_path.rglob("*.html"))
    assert len(html) > len(list(DOCS.rglob("*.md"))) - 1
    for page in html:
        seen = Requests()
        seen.feed(page.read_text("utf-8"))
        assert seen.urls
        own = [url.partition("#")[0].partition("?")[0] for url in seen.urls]
        assert not [url for url in own if re.match(r"(https?:)?//", url)], page
        if page.name != "404.html":  # whose links are from the root of a server
            local = [url for url in own if not url.startswith("data:")]
            assert not [url for url in local if not (page.parent / url).exists()], page
    for sheet in tmp_path.rglob("*.css"):
        fetched = re.findall(
            r"url\(\s*['\"]?([^)'\"]+)|@import\s+['\"]([^'\"]+)", sheet.read_text()
        )
        assert not [url for pair in fetched for url in pair if "//" in url.split("data:")[0]]


def sections(page: Path) -> list[str]:
    return re.split(r"^## ", page.read_text("utf-8"), flags=re.M)


def without_words(block: str) -> list[str]:
    """The lines of a block less its comments and, in the house tree, less what is said of each name."""
    lines = [re.sub(r"\s*# .*", "", line) for line in block.splitlines()]
    if "src/prunedm/" not in block:
        return lines
    named = [re.match(r"( *)([\w./-]+/|[\w-]+\.py)(?=\s|$)", line) for line in lines]
    return [found[0] for found in named if found]


def test_the_chinese_readme_says_the_same():
    english, chinese = (sections(ROOT / name) for name in ("README.md", "README.zh.md"))
    assert len(english) == len(chinese)
    for here, there in zip(english, chinese, strict=True):
        title = here.splitlines()[0]
        fenced = [re.findall(r"```.*?```", text, re.S) for text in (here, there)]
        same = [[without_words(block) for block in found] for found in fenced]
        assert same[0] == same[1], title
        numbers = [sorted(re.findall(r"\d+(?:[.,:]\d+)*", text)) for text in (here, there)]
        assert numbers[0] == numbers[1], title
        tables = [re.findall(r"^\|.*", text, re.M) for text in (here, there)]
        assert [len(re.findall(r"\|", row)) for row in tables[0]] == [
            len(re.findall(r"\|", row)) for row in tables[1]
        ], title
        rows = [[re.findall(r"[−–+]?\d[\d.]*", row) for row in table] for table in tables]
        assert rows[0] == rows[1], title
        links = [re.findall(r"\]\((?!README)([^)]+)\)", text) for text in (here, there)]
        translated = [link.replace(".zh.md", ".md") for link in links[1]]
        assert sorted(links[0]) == sorted(translated), title
    assert "](README.zh.md)" in english[0]
    assert "](README.md)" in chinese[0]
