"""The table of activations agrees with the contract of the kernels and with an exported model."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import house
import pytest
from new_process import environment

from fomoe_ext.activations import (
    ACTIVATIONS,
    Activation,
    activation_id,
    is_gated,
    num_projections,
)

ROOT = house.PACKAGE.parent
CONTRACT = (ROOT / "csrc/kernels.h").read_text(encoding="utf-8")
GATED = {name for name in ACTIVATIONS if is_gated(name)}


def test_names_of_the_type_are_those_of_the_table():
    assert get_args(Activation) == tuple(ACTIVATIONS)
    assert {name: num_projections(name) for name in ACTIVATIONS} == {
        name: 2 if name in GATED else 1 for name in ACTIVATIONS
    }


def test_numbers_are_those_of_the_kernels():
    enum = re.search(r"enum class Activation : int32_t \{(.*?)\}", CONTRACT, re.S)
    assert enum is not None
    assert {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", enum[1])} == {
        name: activation_id(name) for name in ACTIVATIONS
    }


def test_the_same_are_gated_in_the_kernels_and_in_an_exported_model():
    rule = re.search(r"constexpr bool is_gated\(Activation a\) \{(.*?)\}", CONTRACT, re.S)
    assert rule is not None
    assert set(re.findall(r"Activation::(\w+)", rule[1])) == GATED
    exported = (house.PACKAGE / "export/exported/modeling_fomoe.py").read_text(encoding="utf-8")
    named = re.search(r"^_GATED = \((.*)\)$", exported, re.M)
    assert named is not None
    assert set(re.findall(r'"(\w+)"', named[1])) == GATED


@pytest.mark.parametrize("ask", [activation_id, is_gated, num_projections])
def test_an_unknown_name_is_refused(ask):
    with pytest.raises(ValueError, match=r"^activation must be one of swiglu, .*, got 'tanh'$"):
        ask("tanh")


def test_the_table_needs_no_torch():
    code = "import fomoe_ext.activations, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
