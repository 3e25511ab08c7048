"""Files of the training state: any mesh, how tensors are divided among files, plain values."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from sites import pool
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.checkpoint.shards import (
    TensorPart,
    _in_files,
    read_tensors,
    tensor_names,
    write_tensors,
)
from fomoe_ext.files.json_values import from_json, to_json
from fomoe_ext.files.tensors import write_synced


def many_meshes(process: int, num_processes: int, folder: Path) -> list[str]:
    """Replicated and sharded on two axes, on two of four processes, in two meshes, and by FSDP2."""
    tensor, mesh = torch.arange(30.0).view(6, 5), init_device_mesh("cpu", (2, 2))
    two = DeviceMesh("cpu", [1, 2])
    site = init_device_mesh("cpu", (2, 2), mesh_dim_names=("site", "rank"))["rank"]
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + len(name))
    kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fully_shard(module, mesh=init_device_mesh("cpu", (4,)))

    def tensors(whole: Tensor) -> dict[str, Tensor]:
        return {
            "copies": distribute_tensor(whole, mesh, [Replicate(), Shard(0)]),
            "shards": distribute_tensor(whole, mesh, [Shard(0), Shard(1)]),
            "two": distribute_tensor(whole, two, [Shard(1)]),
            "both sites": distribute_tensor(whole, site, [Shard(0)]),
            "number": distribute_tensor(whole[0, 0], mesh, [Replicate(), Replicate()]),
        }

    given = tensors(tensor) | dict(module.named_parameters())
    assert all(isinstance(value, DTensor) for value in given.values())
    names = write_tensors(folder, given, process=process, num_processes=num_processes)
    dist.barrier()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    wanted = tensors(torch.zeros_like(tensor))
    read_tensors(folder, wanted | dict(module.named_parameters()))
    for name, found in wanted.items():
        if name == "two":  # of the others each has an empty tensor of it
            columns = {1: tensor[:, :3], 2: tensor[:, 3:]}.get(process, torch.empty(0))
            assert torch.equal(found.to_local(), columns)
        else:
            assert torch.equal(found.full_tensor(), tensor[0, 0] if name == "number" else tensor)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.full_tensor(), kept[name]), name
    return names


def test_tensors_of_any_mesh_are_written(tmp_path):
    names = [name for own in pool().run(4, many_meshes, tmp_path) for name in own]
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    shapes = dict.fromkeys(("copies", "shards", "two", "both sites"), (6, 5)) | {"number": (1,)}
    found = tensor_names(tmp_path)
    assert {name: found[name] for name in shapes} == shapes and len(found) == 9
    held = [
        name
        for file in tmp_path.iterdir()
        for name in safe_open(file, framework="pt").keys()  # noqa: SIM118
    ]
    parts = {"copies": 2, "shards": 4, "two": 2, "both sites": 2, "number": 1}
    assert {name: held.count(name) for name in parts} == parts


def test_tensors_are_dealt_to_few_files():
    sizes = {"b": 4, "a": 4, "c": 4, "d": 9, "e": 8}
    shards = {
        name: TensorPart(torch.zeros(size, dtype=torch.uint8), (0,)) for name, size in sizes.items()
    }
    dealt = lambda limit: [list(held) for held in _in_files(shards, limit)]
    assert dealt(8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert dealt(100) == [["a", "b", "c", "d", "e"]]
    assert dealt(1) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert _in_files({}, 1) == []


def test_a_synced_file_is_a_safetensors_file(tmp_path):
    """All dtypes, also empty ones, without dimensions, not contiguous, sharing memory; hashes."""
    base = torch.arange(24).view(4, 6)
    dtypes = (torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.float8_e4m3fn)
    given = {str(dtype): (base % 7).to(dtype) for dtype in dtypes}
    given |= {"bool": base > 5, "turned": base.t(), "row": base[1], "none": base[:0]}
    given["number"] = torch.tensor(2.5)
    file = tmp_path / "a.safetensors"
    written = write_synced(file, given, {"format": "pt", "x": "y"})
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    assert written.size == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert written.header_sha256 == hashlib.sha256(content[:length]).hexdigest()
    assert length % 8 == 0
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "x": "y"}
        assert sorted(opened.keys()) == sorted(given)
        for name, tensor in given.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
            assert torch.equal(found.double(), tensor.double()), name
    with pytest.raises(ValueError, match=r"dtype of tensor z must be .*got torch\.complex64"):
        write_synced(file, {"z": torch.zeros(1, dtype=torch.complex64)}, {})


# ---- what is no tensor ---------------------------------------------------------------------------


def bits(number: float) -> bytes:
    return struct.pack(">d", number)


def test_numbers_come_back_bit_for_bit():
    (payload,) = struct.unpack(">d", bytes.fromhex("fff8000000000abc"))
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, payload]
    back = from_json(json.loads(json.dumps(to_json(floats), allow_nan=False)))
    assert [bits(number) for number in back] == [bits(number) for number in floats]
    nest = {
        "a": {1: [True, None, "x"], 2: (1, 2.5)},
        "$float": {"$items": 3, (1, 2): []},
        "big": 2**70,
    }
    back = from_json(json.loads(json.dumps(to_json(nest))))
    assert back == nest and type(back["a"][2]) is tuple and back["a"][1][0] is True


@pytest.mark.parametrize("wrong", [torch.ones(1), {1, 2}, b"x", Path("x")])
def test_values_that_json_lacks_are_refused(wrong):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] must be of numbers"):
        to_json({"a": [0, wrong]})


def test_a_header_that_is_nested_too_deeply_is_refused(tmp_path):
    """Found by fuzzing: Python's json, which reads it, raises RecursionError."""
    name = "shard-00001-model-00001-of-00001.safetensors"
    offsets = '{"a": {"saved_offsets": ' + "[" * 5000 + "]" * 5000 + "}}"
    metadata = {"format": "pt", "DCP_SHARDING_INFO": offsets}
    write_synced(tmp_path / name, {"a": torch.ones(2)}, metadata)
    with pytest.raises(CheckpointError, match="cannot read the tensors in"):
        tensor_names(tmp_path)
