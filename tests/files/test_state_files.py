"""States of tensors and plain values come back from their file as they were."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from fomoe_ext.files.states import read_state, write_state


def test_states_come_back(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "round": 3,
        "loss": math.inf,
        "warmup": [(0, 1)],
        "anchor": {"everyone": shared[:4], "0 1/x": shared[2:]},
        "momentum": {},
        "tokens": torch.tensor([2**60], dtype=torch.int64),
        "half": {"deep": {"er": torch.ones(2, 2, dtype=torch.bfloat16).T}},
        "scalar": torch.tensor(0.5),
    }
    write_state(tmp_path / "a", state)
    back = read_state(tmp_path / "a")
    assert back.keys() == state.keys() and back["anchor"].keys() == state["anchor"].keys()
    for name in ("round", "loss", "warmup", "momentum"):
        assert repr(back[name]) == repr(state[name])
    pairs = [(back["anchor"][n], state["anchor"][n]) for n in state["anchor"]] + [
        (back["half"]["deep"]["er"], state["half"]["deep"]["er"])
    ]
    for found, wanted in [*pairs, *((back[n], state[n]) for n in ("tokens", "scalar"))]:
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["a"], '{"b": 1}'),
        (["[]"], "{}"),
        (['["a", "b"]'], "{}"),
        (['["a", "b"]'], '{"a": 1}'),
        (['["a"]'], '{"a": 1}'),
        ([], "[1]"),
        ([], "{"),
        ([], None),
    ],
)
def test_other_files_are_refused(tmp_path, names, plain):
    tensors = {name: torch.ones(1) for name in names}
    save_file(tensors, tmp_path / "a", metadata=None if plain is None else {"state": plain})
    with pytest.raises(ValueError, match="must be a state file, got another or a damaged one"):
        read_state(tmp_path / "a")


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(ValueError, match="must be a state file, got another or a damaged one"):
        read_state(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "b")


def test_values_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\['b'\] must be of numbers"):
        write_state(tmp_path / "a", {"a": {"b": {1, 2}}})
    assert not (tmp_path / "a").exists()
