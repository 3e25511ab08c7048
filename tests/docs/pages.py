"""The pages of the documentation as blocks of code and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
NEEDS = {"gpu", "several machines"}
"""What a block may be marked to need: <!-- needs: gpu --> on the line before it."""

_BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMAND = re.compile(r"\s*(fomoe|torchrun|python3?|pytest|pip|mkdocs|export|\w+=\S+|\.ci/\w+)\s")


class Block(NamedTuple):
    """A fenced block: its page and line, language, title, mark (a comment before it) and text."""

    page: str
    line: int
    language: str
    title: str | None
    mark: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> set[str]:
        """What its mark says it needs beyond what a test has, e.g. {"gpu"}."""
        if not self.mark.startswith("needs: "):
            return set()
        return {word.strip() for word in self.mark.removeprefix("needs: ").split(",")}


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    found = []
    for match in _BLOCK.finditer(text):
        language, _, rest = match[2].partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        line = text[: match.start(2)].count("\n") + 1
        named = title[1] if title else None
        found.append(Block(page, line, language, named, match[1] or "", match[3]))
    return found


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


BLOCKS = [block for page in PAGES for block in blocks_of(read(page), page)]


def inline_code(text: str) -> list[str]:
    """What stands between single backticks outside of blocks."""
    return _INLINE.findall(_BLOCK.sub("", text))


def commands_in(text: str) -> list[list[str]]:
    """The commands of a block for a shell, as words, without comments; variables for it are left
    out. A line that ends in a backslash goes on in the next."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[&|;]+", word):
                words.append(word)
                continue
            while words and (re.match(r"\w+=", words[0]) or words[0] == "export"):
                del words[0]
            found += [words] if words else []
            words = []
    return found


def untested(block: Block) -> str:
    """Why no test would look at a block, or an empty string."""
    if block.language not in ("python", "sh", "toml", "text", ""):
        return f"language {block.language!r} is no known one"
    if block.needs - NEEDS:
        return f"needs {block.needs - NEEDS}, not one of {NEEDS}"
    if block.language in ("text", "") and (found := _COMMAND.match(block.text)):
        return f"begins with the command {found[1]!r}: its language is sh"
    return ""
