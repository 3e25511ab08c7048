"""Python's names of the native ops' arguments are those of the schemas, in any order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import fomoe_ext.outer.codec  # noqa: F401  (the codecs' ops)
from fomoe_ext import ops
from fomoe_ext.ops import schemas
from fomoe_ext.ops.derivatives import register_derivative
from fomoe_ext.ops.shapes import register_shapes

PACKAGE = Path(ops.__file__).parents[1]
OPS = sorted({name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
              if name.startswith("fomoe::")})  # fmt: skip


def bound_calls() -> list[tuple[str, str, ast.Call]]:
    """File, op and call, of every call of what `by_name` gave."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bound = {
            target.id: node.value.args[0].value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and getattr(node.value.func, "id", None) == "by_name"
            for target in node.targets
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in bound:
                found.append((path.name, bound[node.func.id], node))
    return found


CALLS = bound_calls()


def test_the_calls_are_found() -> None:
    assert {op for _, op, _ in CALLS} >= {"route", "compact", "expand", "contract", "delta_encode"}
    assert len(CALLS) >= 15


@pytest.mark.parametrize("file, op, call", CALLS, ids=[f"{c[0]}-{c[1]}" for c in CALLS])
def test_a_call_names_the_arguments_of_the_schema(file: str, op: str, call: ast.Call) -> None:
    names = [keyword.arg for keyword in call.keywords]
    assert not call.args and set(names) - {None} <= set(schemas.argument_names(op))
    if None not in names:  # no **mapping
        assert sorted(names) == sorted(schemas.argument_names(op))


def test_no_op_is_called_by_position() -> None:
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if owner in ("_ops", "torch.ops.fomoe") and node.func.attr in OPS:
                assert not node.args, f"{path.name}: {ast.unparse(node)}"
                seen.add(node.func.attr)
    assert seen >= {"gather", "combine"}


@pytest.mark.parametrize("op", OPS)
def test_names_are_bound_in_the_schema_s_order(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = schemas.argument_names(op)
    assert names == tuple(a.name for a in getattr(torch.ops.fomoe, op).default._schema.arguments)
    numbers = {name: number for number, name in enumerate(names)}
    backwards = dict(reversed(numbers.items()))
    assert schemas.in_order(op)(**backwards) == tuple(range(len(names)))
    assert schemas.arguments_type(op)(**backwards) == tuple(range(len(names)))
    packet = getattr(torch.ops.fomoe, op)
    monkeypatch.setattr(packet, "default", lambda *arguments: arguments)
    assert schemas.by_name(op)(**backwards) == tuple(range(len(names)))


def test_a_wrong_name_is_refused() -> None:
    assert schemas.in_order("gather")(offsets=1) == (None, None, 1)
    with pytest.raises(TypeError, match=r"arguments_of_gather\(\) got an unexpected .* 'y'"):
        schemas.in_order("gather")(y=None)
    with pytest.raises(TypeError, match="tokens"):
        schemas.by_name("gather")(tokens=None, row_of_slot=None, offsets=None)
    with pytest.raises(TypeError, match="offsets"):
        schemas.by_name("gather")(x=None, row_of_slot=None)
    with pytest.raises(TypeError, match=r"fomoe::gather has no argument y"):
        register_shapes("gather")(lambda y: y)


def test_tensors_and_other_arguments() -> None:
    assert schemas.tensor_names("combine") == ("rows", "weights", "row_of_slot")
    assert schemas.tensor_names("compact") == ("experts", "resident_index")
    assert "total" in schemas.tensor_names("weight_grad_add")


def test_a_gradient_by_a_wrong_name_is_refused() -> None:
    library = torch.library.Library("fomoe", "FRAGMENT")
    library.define("twice(Tensor x, bool exactly) -> Tensor")
    library.impl("twice", lambda x, exactly: 2 * x, "CPU")
    try:
        for name in ("x", "y"):
            x = torch.ones(3, requires_grad=True)
            seen = []

            def set_up(ctx, given, output, seen=seen):
                seen.append((given.x.shape, given.exactly))

            def formula(ctx, needed, grad, name=name, seen=seen):
                seen.append((needed.x, needed.exactly))
                return {name: 2 * grad}

            autograd = torch.library.Library("fomoe", "FRAGMENT")
            monkey = pytest.MonkeyPatch()
            monkey.setattr("fomoe_ext.ops.derivatives._library", autograd)
            register_derivative("twice", formula, set_up)
            y = torch.ops.fomoe.twice(x, True)
            if name == "x":
                y.sum().backward()
                assert x.grad.tolist() == [2.0] * 3
                assert seen == [((3,), True), (True, False)]
            else:
                with pytest.raises(
                    TypeError, match=r"arguments_of_twice\(\) got an unexpected .* 'y'"
                ):
                    y.sum().backward()
            monkey.undo()
            autograd._destroy()
    finally:
        library._destroy()
        schemas.argument_names.cache_clear()
        schemas.arguments_type.cache_clear()
