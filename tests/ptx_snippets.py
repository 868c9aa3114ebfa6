"""Small kernels around a few lines of PTX, for the tests of bench.ptx."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch

from bench.ptx import Counts, Program

# numpy's types and PTX's, for registers and memory.
TYPES = {"u1": "b16", "i1": "b16", "u2": "b16", "i2": "b16", "f2": "b16", "u4": "b32", "i4": "b32", "f4": "b32"}
TYPES |= {"u8": "b64", "i8": "b64", "f8": "b64"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor(x: np.ndarray) -> torch.Tensor:
    """The array's own memory, as integers."""
    return torch.from_numpy(x.view(f"{'u' if x.itemsize == 1 else 'i'}{x.itemsize}"))


def kernel(body: str, *, params: str = "", header: str = "", arch: int = 80) -> str:
    """A module with the kernel `k`."""
    return f"""
.version 8.7
.target sm_{arch}
.address_size 64
{header}
.visible .entry k({params})
{{
{body}
}}
"""


def launch(
    body: str, tensors: dict[str, torch.Tensor], *, block: int = 32, grid: int = 1, header: str = "", **options: Any
) -> Counts:
    """Runs a body that finds the address of the tensor `x` in the parameter `x`."""
    params = ", ".join(f".param .u64 {name}" for name in tensors)
    addresses = struct.pack(f"<{len(tensors)}Q", *(t.data_ptr() for t in tensors.values()))
    program = Program(kernel(body, params=params, header=header, arch=options.get("arch", 80)))
    return program.launch("k", grid=(grid, 1, 1), block=(block, 1, 1), params=addresses, tensors=tensors, **options)


def evaluate(
    instructions: str, inputs: dict[str, Any], outputs: dict[str, str], *, registers: str = "", **options: Any
) -> list[np.ndarray]:
    """Runs instructions in one thread for every element of the inputs.

    Args:
        instructions: Of registers %NAME, for every input and output.
        inputs: Arrays of one length, or numbers for all of it.
        outputs: numpy's types.
        registers: Further declarations.

    Returns:
        What the outputs' registers hold at the end.
    """
    arrays = {name: np.atleast_1d(x) for name, x in inputs.items()}
    count = max(map(len, arrays.values()))
    arrays = {name: np.array(np.broadcast_to(x, count)) for name, x in arrays.items()}
    arrays |= {name: np.zeros(count, code) for name, code in outputs.items()}
    lines = [registers, ".reg .b64 %at<3>; .reg .b32 %number;", "mov.u32 %number, %tid.x;"]
    for name, x in arrays.items():
        lines.append(f".reg .{TYPES[x.dtype.str[1:]]} %{name};")
    for name, x in arrays.items():
        address = f"ld.param.u64 %at0, [{name}]; mad.wide.u32 %at1, %number, {x.itemsize}, %at0;"
        if name in inputs:
            lines.append(f"{address} ld.global.{_of_memory(x)} %{name}, [%at1];")
        else:
            instructions += f"\n{address} st.global.{_of_memory(x)} [%at1], %{name};"
    body = "\n".join([*lines, instructions, "ret;"])
    launch(body, {name: tensor(x) for name, x in arrays.items()}, block=count, **options)
    return [arrays[name] for name in outputs]


def _of_memory(x: np.ndarray) -> str:
    return f"{'b' if x.itemsize > 1 else 'u'}{8 * x.itemsize}"


# What every lane of a warp holds of matrices that tensor cores multiply, as the manual's figures show it.

GROUP, MEMBER = np.divmod(np.arange(32), 4)


def bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype("f4").view("u4") >> 16).astype("u2")


def packed(x: np.ndarray, kind: str) -> np.ndarray:
    """[32, n] numbers as [32, registers] bits."""
    if kind == "tf32":
        return x.astype("f4").view("u4")
    return np.ascontiguousarray(x.astype("f2").view("u2") if kind == "f16" else bf16(x)).view("u4")


def registers_a(a: np.ndarray, kind: str) -> np.ndarray:
    """Of A, [16, K]: [32, registers] bits."""
    pair = 1 if kind == "tf32" else 2
    numbers = []
    for first in range(0, a.shape[1], 4 * pair):
        for row in (GROUP, GROUP + 8):
            numbers += [a[row, first + MEMBER * pair + part] for part in range(pair)]
    return packed(np.stack(numbers, 1), kind)


def registers_b(b: np.ndarray, kind: str) -> np.ndarray:
    """Of B, [K, 8]."""
    pair = 1 if kind == "tf32" else 2
    numbers = []
    for first in range(0, b.shape[0], 4 * pair):
        numbers += [b[first + MEMBER * pair + part, GROUP] for part in range(pair)]
    return packed(np.stack(numbers, 1), kind)


def registers_c(c: np.ndarray) -> np.ndarray:
    """Of C and D, [16, 8]."""
    numbers = [c[row, 2 * MEMBER + part] for row in (GROUP, GROUP + 8) for part in range(2)]
    return np.stack(numbers, 1).astype("f4").view("u4")
