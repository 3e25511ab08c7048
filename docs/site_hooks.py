"""What mkdocs does beside building docs/ (`hooks` in mkdocs.yml).

The start page is README.md, and the changelog and the guide for contributors are those of the
repository: they are pages of the site without a second copy. Links are written as they work in the
repository. Here a link to a file that is a page becomes a link to the page; a link to any other
file of the repository becomes the file's name, as the site has no place for it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files beside docs/ that are pages, and what these are called."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages whose text is not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """The page's text with links that lead to pages."""
    names = {page_name: name for name, page_name in PAGES.items()}
    source = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return links_to_pages(markdown, source, page.file.src_uri)


def links_to_pages(markdown: str, source: str, page: str) -> str:
    """`source`: the text's file in the repository; `page`: its file among the pages."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if re.match(r"\w+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES or path.startswith("docs/"):
            to = PAGES.get(path, path.removeprefix("docs/"))
            return f"[{text}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"
        if (ROOT / path).exists():
            return text if path in text else f"{text} (`{path}`)"
        return found[0]  # leads nowhere: mkdocs says so

    def prose(text: str) -> str:
        text = _LINK.sub(link, text)
        return re.sub(r"(!\[[^\]]*\]\()docs/", r"\1", text) if page == "index.md" else text

    return "".join(
        part if part.startswith("```") else prose(part) for part in _FENCE.split(markdown)
    )
