"""What each self-test of the emulator writes, by its definition in numpy."""

from __future__ import annotations

import functools

import numpy as np

INPUT = np.arange(1024, dtype=np.uint32) * np.uint32(2654435761)


def lines(words: np.ndarray, count: int, width: int) -> np.ndarray:
    return words[: count * width].reshape(count, width)


def operand(seed: int, *shape: int) -> np.ndarray:
    """What the self-tests fill operands with."""
    index = np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(seed)
    return ((index * np.uint32(2654435761) >> np.uint32(16)) % 5 - 2.0).reshape(shape)


PRODUCTS = [
    "stored_bf16_64",
    "stored_bf16_256",
    "stored_f16_64",
    "stored_f16_128",
    "stored_f16_256",
    # By what is contiguous in A and in B.
    "gemm_kk",
    "gemm_mk",
    "gemm_kn",
    "gemm_mn",
    # By who waits for the copies.
    "gathered",
    "gathered_some",
    "gathered_issuer",
]
BOXES = [(0, 0, 0), (-8, -1, 1), (40, 3, 3), (8, 1, -9), (-72, 0, 0)]


def boxes() -> np.ndarray:
    """Boxes of 64 x 4 x 2 values of INPUT as 4 planes of 5 rows of 72, in 128-byte swizzle."""
    values = INPUT.view(np.uint16)
    planes, rows, columns = np.ogrid[:4, :5, :72]
    tensor = values[planes * 480 + rows * 80 + columns]
    out = np.zeros((len(BOXES), 8, 8, 8), np.uint16)
    for box, (x, y, z) in enumerate(BOXES):
        for row, chunk, i in np.ndindex(8, 8, 8):
            place = (z + row // 4, y + row % 4, x + chunk * 8 + i)
            if all(0 <= p < size for p, size in zip(place, tensor.shape, strict=True)):
                out[box, row, chunk ^ row, i] = tensor[place]
    return out


def products(name: str) -> np.ndarray:
    """The result of a self-test of matrix products."""
    kind, *rest = name.split("_")
    if kind == "stored":
        a, b = operand(1, 64, 64), operand(2, int(rest[1]), 64).T
    elif kind == "gathered":
        a, b = operand(1, 64, 256)[::-1], operand(2, 64, 256).T
    else:
        a = operand(1, 192, 128).T if rest[0][0] == "m" else operand(1, 128, 192)
        b = operand(2, 192, 128) if rest[0][1] == "n" else operand(2, 128, 192).T
    return np.ascontiguousarray(a @ b, np.float32)


BORDERS = np.array(
    [
        *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000),
        *(0x00000001, 0x807FFFFF, 0x00800000, 0x80800000),
        *(0x7F7FFFFF, 0xFF7FFFFF, 0x7E800000, 0x7E900000, 0xFE900000),
        *(0x43000000, 0x42FE0000, 0xC2FC0000, 0xC2FE0000),
    ],
    np.uint32,
).view(np.float32)


def approximations() -> np.ndarray:
    """What the PTX manual says of ex2.approx.ftz, rcp.approx.ftz and lg2.approx.ftz: zeros,
    infinities and NaN as they are, 1 for other results. Around 1 log2 has 2 added.
    """

    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x)

    def told(exact: np.ndarray) -> np.ndarray:
        result = flushed(exact.astype(np.float32)).astype(np.float32)
        special = np.isnan(result) | np.isinf(result) | (result == 0)
        words = np.where(np.isnan(result), np.uint32(0x7FC00000), result.view(np.uint32))
        return np.where(special, words, 1)

    words = INPUT[:64].view(np.int32)
    x = np.fmod(words, 2000).astype(np.float32) * np.float32(0.01)
    x[: len(BORDERS)] = BORDERS
    x = flushed(x).astype(np.float64)
    with np.errstate(all="ignore"):
        logarithms = np.log2(x) + np.where((x >= 0.5) & (x <= 2), 2, 0)
        return np.concatenate([told(np.exp2(x)), told(1 / x), told(logarithms)]).astype(np.uint32)


@functools.cache
def expected(name: str) -> np.ndarray:
    """The output of a self-test, by its definition in numpy."""
    if name == "tensor_boxes":
        return boxes().view(np.uint32).ravel()
    if name in PRODUCTS:
        return products(name).view(np.uint32).ravel()
    if name.startswith("matrices"):
        product = operand(1, 16, 16) @ operand(2, 16, 16).T
        return np.tile(product.ravel().astype(np.float32).view(np.uint32), 4)
    if name == "cluster_words":
        own = INPUT[:256].reshape(2, 2, 64)  # clusters, blocks, threads
        return np.stack([own[:, ::-1, ::-1] + 1, own[:, ::-1]], axis=2).ravel()
    if name == "multicast":
        rows = INPUT.reshape(2, 16 * 32)
        return np.concatenate([rows[(np.arange(8) + block // 2) % 2].ravel() for block in range(4)])
    out = np.zeros(1024, np.uint32)
    if name == "neighbours":
        out[:128] = np.roll(INPUT[:128], -1)
    elif name == "histogram":
        out[:8] = np.bincount(INPUT[:256] % 8, minlength=8)
    elif name == "warp_words":
        x, lanes = INPUT[:32], np.arange(32)
        out[:32] = np.cumsum(x % 100)
        bits = np.uint32(1) << lanes.astype(np.uint32)
        out[32:64] = bits[x & 1 == 1].sum()
        out[64:96] = [bits[x % 3 == v].sum() for v in x % 3]
        out[96:128], out[128:160] = x.max(), x.min()
        out[160:192] = x.sum(dtype=np.uint32)
        out[192:224] = x[lanes ^ 5]
        out[224:256] = x[np.where(lanes % 8 + 3 < 8, lanes + 3, lanes)]
    elif name == "named_barriers":
        out[:128] = lines(INPUT, 4, 32)[:, ::-1].ravel()
    elif name in ("async_copies", "copy_arrivals"):
        rows = INPUT[:512].reshape(4, 32, 4) * (np.arange(32) % 3 != 0)[:, None]
        out[:512] = rows[:, ::-1].ravel()
    elif name == "bulk_ring":
        rows = INPUT.reshape(8, 32, 4).copy()
        rows[..., 0] += 1
        rows[..., 3] += np.arange(32, dtype=np.uint32)
        out[:] = rows.ravel()
    elif name == "stored_matrices":
        out[:128].reshape(32, 4)[np.arange(32) * 5 % 32] = INPUT[:128].reshape(32, 4)
    elif name == "uniform_words":
        out[:64] = INPUT[:128].reshape(2, 64)[:, :32].ravel()
    elif name == "approximations":
        out[:192] = approximations()
    elif name == "spoken_for":
        out[:256] = lines(INPUT, 8, 32)[:, ::-1].ravel()
    elif name == "chain":
        out[:6] = np.cumsum(INPUT[:6] % 1000)
        out[500:506], out[600:606], out[1000] = out[:6], 1, 6
    else:
        assert name == "wide_words"
        # The low words of two 64-bit numbers come first.
        out[:4] = [8, INPUT[0], 7, INPUT[0]]
    return out
