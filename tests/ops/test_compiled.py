"""What torch.compile stores belongs to one version of the ops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.compiler.config as compiler
from torch._inductor.codecache import FxGraphHashDetails

from fomoe_ext.ops import compiled


def test_the_key_of_what_is_stored_has_the_version() -> None:
    assert f"fomoe_ext-{compiled._version()}" in compiler.cache_key_tag
    details = FxGraphHashDetails.__init__.__code__.co_names
    assert "cache_key_tag" in details  # torch still makes it a part of the key


def test_a_tag_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cache_key_tag", "mine")
    compiled.tag_caches()
    compiled.tag_caches()
    assert compiler.cache_key_tag == f"minefomoe_ext-{compiled._version()}"


@pytest.mark.parametrize("what", ["gradient", "schema"])
def test_another_version_has_another_tag(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ops"
    shutil.copytree(Path(compiled.__file__).parent, folder)
    monkeypatch.setattr(compiled, "__file__", str(folder / "compiled.py"))
    before = compiled._version()
    if what == "gradient":
        with (folder / "experts.py").open("a") as file:
            file.write("# another formula\n")
    else:
        names = [n for n in compiled.torch._C._dispatch_get_all_op_names() if "fomoe" in n]
        monkeypatch.setattr(
            compiled.torch._C, "_dispatch_get_all_op_names", lambda: sorted(names)[1:]
        )
    assert compiled._version() != before
