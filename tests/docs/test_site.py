"""Links on the pages work both in the repository and on the site."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from pages import ROOT


@pytest.fixture
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "source, page, written, shown",
    [
        ("README.md", "index.md", "[a](docs/claims.md#x)", "[a](claims.md#x)"),
        ("README.md", "index.md", "[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("README.md", "index.md", "![a](docs/claims/b.png)", "![a](claims/b.png)"),
        ("README.md", "index.md", "[Apache](LICENSE)", "Apache (`LICENSE`)"),
        ("docs/a.md", "a.md", "[words](../README.md#words)", "[words](index.md#words)"),
        ("docs/a.md", "a.md", "[b](b.md)", "[b](b.md)"),
        ("docs/a.md", "a.md", "[setup.py](../setup.py)", "setup.py"),
        ("docs/api/a.md", "api/a.md", "[b](ops.md#c)", "[b](ops.md#c)"),
        ("docs/api/a.md", "api/a.md", "[b](../b.md)", "[b](../b.md)"),
        ("docs/a.md", "a.md", "[x](https://arxiv.org/abs/1)", "[x](https://arxiv.org/abs/1)"),
        ("docs/a.md", "a.md", "[x](../lost.md)", "[x](../lost.md)"),  # mkdocs names it
        ("docs/a.md", "a.md", "```\n[a](../setup.py)\n```", "```\n[a](../setup.py)\n```"),
    ],
)
def test_links_lead_to_pages(hooks, source, page, written, shown):
    assert hooks.links_to_pages(written, source, page) == shown


def test_the_same_version_is_cited():
    from fomoe_ext import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
