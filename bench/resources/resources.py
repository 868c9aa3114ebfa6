"""Registers, spills and instructions of the kernels, without a GPU: `python -m bench.resources [--json]`.

The Triton launchers are called with tensors that have no memory, and what they would launch is compiled ahead of time
instead, with the hints on alignment that real launches have. All plans of `kernels.tuning` are compiled. Those of csrc/
follow where there are compilers for them, see `bench.resources.of_csrc`. Exit status 1 if one falls short (`problems`).
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .limits import ARCHS, SHARED_LIMIT, Row, cuobjdump, occupancy

# One micro-batch of the FFHQ-512 preset: images, plane resolution, rays, samples of a pass, decoder outputs.
BATCH, RESOLUTION, RAYS, SAMPLES, OUT = 4, 512, 4096, 48, 4


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _planes(channels: int, dtype: torch.dtype) -> Tensor:
    planes = _meta(BATCH, 3 * channels, RESOLUTION, RESOLUTION, dtype=dtype)
    return planes.contiguous(memory_format=torch.channels_last)


def _network(channels: int, hidden: int) -> tuple[Tensor, ...]:
    return _meta(hidden, channels), _meta(hidden), _meta(OUT, hidden), _meta(OUT)


def launches(arch: int, *, brief: bool = False, match: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to compile: a name, and a call of a launcher.

    All sizes with every plan of `tuning`; or if `brief` those of the FFHQ preset with the default plans. Of them those
    in whose architecture and name, as in "sm_80 cut C=96 float32", one of the patterns `match` is found, if there are
    any.
    """
    for name, launch in _all_launches(arch, brief):
        if not match or any(re.search(pattern, f"sm_{arch} {name}") for pattern in match):
            yield name, launch


def _all_launches(arch: int, brief: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, launch in _triplane_launches(arch, 1 if brief else None):
        if not brief or name.split()[2:4] in (["C=32", "hidden=64"], ["C=32", "float32"], ["C=32", "float16"]):
            yield name, launch
    for name, launch in _cut_launches():
        if not brief or "C=96 " in name:
            yield name, launch
    for name, launch in _ray_launches():
        if not brief or any(size in name for size in ("S=48 ", "S=48+48", "S=47")):
            yield name, launch


def _ray_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Depths and compositing: coarse and fine samples, short and long rays, few and many colours, drawn noise."""
    from epigraf_fast.kernels import composite, sample_importance

    density = {"activation": "softplus", "softplus_beta": 1.0, "density_shift": 0.0}
    settings = {**density, "last_interval": 1e10, "last_back": False, "white_background": False}
    seed, std = _meta(1, dtype=torch.int64), _meta(1)
    rows = BATCH * RAYS
    for name, jitter, source in (("drawn", None, seed), ("even", None, None), ("given", _meta(rows, SAMPLES), None)):
        jitter = None if jitter is None else jitter.view(BATCH, RAYS, SAMPLES)
        arguments = BATCH, RAYS, SAMPLES, 0.88, 1.12, jitter, source, torch.device("meta")
        yield f"stratified S={SAMPLES} {name}", functools.partial(sample_importance.stratified, *arguments)
    longest = composite.MAX_SAMPLES // 2
    # With `every`: noise, and gradients of every output to every input, which takes the most registers.
    every = {**settings, "last_back": True, "white_background": True}
    for coarse, fine, out, kinds in (
        (SAMPLES, SAMPLES, OUT, ("", " noise", " every")),
        (96, 0, OUT, ("",)),
        (8, 8, OUT, (" every",)),
        (8, 8, 16, (" every",)),
        (48, 48, 32, (" every",)),
        (256, 256, 16, (" every",)),
        (longest, longest, OUT, (" every",)),
    ):
        sets = [_meta(BATCH, RAYS, coarse), _meta(BATCH, RAYS, coarse, out), None, None]
        if fine:
            sets[2:] = _meta(BATCH, RAYS, fine), _meta(BATCH, RAYS, fine, out)
        rgb, single, weights = _meta(BATCH, RAYS, out - 1), _meta(BATCH, RAYS), _meta(BATCH, RAYS, coarse + fine)
        for kind in kinds:
            name = f"S={coarse}+{fine}{f' out={out}' * (out != OUT)}{kind}"
            whole = kind == " every"
            inputs = *sets, None, rgb if whole else None, *((seed, std) if kind else (None, None))
            options = every if whole else settings
            fwd = functools.partial(composite.fwd, *inputs, return_weights=whole, **options)
            yield f"composite fwd {name}", fwd
            grads = (rgb, single, single, single, weights) if whole else (rgb, None, None, None, None)
            options = {"to_density_noise": False, "to_background": whole, **options}
            yield f"composite bwd {name}", functools.partial(composite.bwd, grads, *inputs, **options)
    longest = sample_importance.MAX_SAMPLES
    for coarse, fine, kinds in (
        (SAMPLES, SAMPLES, ("", " noise", " even")),
        (128, 128, (" noise",)),
        (SAMPLES, 512, (" noise",)),
        (longest, longest, (" noise",)),
    ):
        t, raw_density = _meta(BATCH, RAYS, coarse), _meta(BATCH, RAYS, coarse, OUT)[..., -1]
        for kind in kinds:
            options = {"sorted": True, "even": kind == " even", "noise_std": std if kind == " noise" else None}
            fwd = functools.partial(sample_importance.fwd, t, raw_density, None, seed, fine, **options, **density)
            yield f"importance S={coarse}+{fine}{kind}", fwd


def _cut_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Features and planes in every size of a number, in both layouts; noise images."""
    from epigraf_fast.kernels import cut

    first = _meta(BATCH, 2, dtype=torch.int64)
    size, whole = (RESOLUTION // 2 + 2, RESOLUTION // 2 - 6), (RESOLUTION, RESOLUTION)
    for channels in (64, 96, 24, 5, 1):
        for dtype in (torch.float64, torch.float32, torch.float16):
            name = f"C={channels} {str(dtype).removeprefix('torch.')}"
            for kind, layout in ((" channels_last", torch.channels_last), ("", torch.contiguous_format)):
                x, y = (_meta(BATCH, channels, *s, dtype=dtype).contiguous(memory_format=layout) for s in (whole, size))
                yield f"cut {name}{kind}", functools.partial(cut.cut, x, first, size)
                yield f"paste {name}{kind}", functools.partial(cut.paste, y, first, whole)


def _triplane_launches(arch: int, plans: int | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Sampling and decoding, by the size of texels and network."""
    from epigraf_fast.kernels import decode_triplane, sample_triplane, tuning

    points = _meta(BATCH, RAYS * SAMPLES, 3)
    rays = _meta(BATCH, RAYS, 3), _meta(BATCH, RAYS, 3), _meta(BATCH, RAYS, SAMPLES)
    half = torch.float16
    size = RESOLUTION, RESOLUTION
    for channels, dtype in ((32, torch.float32), (32, half), (8, torch.float32), (64, torch.float32)):
        planes = _planes(channels, dtype)
        grad = _meta(BATCH, RAYS * SAMPLES, channels, dtype=dtype)
        name = f"C={channels} {str(dtype).removeprefix('torch.')}"
        for plan in tuning.plans(sample_triplane.case("fwd", channels, *size, dtype, arch))[:plans]:
            fwd = functools.partial(sample_triplane.fwd, planes, points, chosen=plan, arch=arch)
            yield f"sample fwd {name} {_text(plan)}", fwd
        for deterministic in (False, True):
            for plan in tuning.plans(sample_triplane.case("bwd", channels, *size, dtype, arch, deterministic))[:plans]:
                bwd = functools.partial(sample_triplane.bwd, grad, points, *size, deterministic, chosen=plan, arch=arch)
                yield f"sample bwd {name} {_text(plan)}{' fixed' * deterministic}", bwd
    grad_y = _meta(BATCH, RAYS, SAMPLES, OUT)
    # A part of whole planes, see `PlaneRegion`: a little more arithmetic.
    part, net = (_meta(BATCH, 2, dtype=torch.int64), (2 * RESOLUTION, 2 * RESOLUTION)), _network(32, 64)
    planes, grad = _planes(32, torch.float32), _meta(BATCH, RAYS * SAMPLES, 32)
    options = {"region": part, "arch": arch}
    yield "sample fwd C=32 part", functools.partial(sample_triplane.fwd, planes, points, **options)
    yield "sample bwd C=32 part", functools.partial(sample_triplane.bwd, grad, points, *size, **options)
    for precision in ("fp32", "tf32"):
        named = f"C=32 hidden=64 part {precision}"
        fwd = functools.partial(decode_triplane.fwd, planes, *rays, *net, precision=precision, **options)
        bwd = functools.partial(decode_triplane.bwd, grad_y, planes, *rays, *net[:3], precision=precision, **options)
        yield f"decode fwd {named}", fwd
        yield f"decode bwd {named}", bwd
    for channels, hidden, dtype, precision in (
        (32, 64, torch.float32, "fp32"),
        (32, 64, torch.float32, "tf32"),
        (32, 64, half, "fp16"),
        (8, 16, torch.float32, "fp32"),
        (8, 16, half, "fp16"),
        (16, 64, torch.float32, "fp32"),
        (32, 128, torch.float32, "fp32"),
        (32, 128, half, "fp16"),
        (64, 64, torch.float32, "fp32"),
        (64, 128, torch.float32, "fp32"),
        (64, 128, half, "fp16"),
    ):
        planes, net = _planes(channels, dtype), _network(channels, hidden)
        name = f"C={channels} hidden={hidden} {str(dtype).removeprefix('torch.')} {precision}"
        problem = planes, net[0], net[2], precision, arch
        for plan in tuning.plans(decode_triplane.case("fwd", *problem))[:plans]:
            fwd = functools.partial(
                decode_triplane.fwd, planes, *rays, *net, precision=precision, chosen=plan, arch=arch
            )
            yield f"decode fwd {name} {_text(plan)}", fwd
        for deterministic in (False, True):
            for plan in tuning.plans(decode_triplane.case("bwd", *problem, deterministic))[:plans]:
                options = {"precision": precision, "deterministic": deterministic, "chosen": plan, "arch": arch}
                bwd = functools.partial(decode_triplane.bwd, grad_y, planes, *rays, *net[:3], **options)
                yield f"decode bwd {name} {_text(plan)}{' fixed' * deterministic}", bwd


def _text(plan: tuple[tuple[int | None, ...], ...]) -> str:
    """points x warps of every launch of a plan, and x tiles if there are several."""
    return "+".join(f"{block_n}x{num_warps}{f'x{tiles}' * (tiles > 1)}" for block_n, num_warps, tiles, _ in plan)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple, dict]]]:
    """Launches in this block are not made but listed: (kernel, arguments, keyword arguments)."""
    from triton.runtime.jit import JITFunction

    calls: list[tuple[Any, tuple, dict]] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: calls.append((self, args, kwargs))
    try:
        yield calls
    finally:
        JITFunction.run = run


class Pointer(NamedTuple):
    """What a launch's code depends on of a tensor."""

    kind: str  # as Triton names it
    divisible: bool  # its address by 16; a tensor without memory has address 0

    @classmethod
    def of(cls, x: Tensor) -> Pointer:
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        names |= {
            torch.int8: "i8",
            torch.int16: "i16",
            torch.int32: "i32",
            torch.int64: "i64",
            torch.bool: "i1",
            torch.uint8: "u8",
        }
        return cls(f"*{names[x.dtype]}", x.data_ptr() % 16 == 0)


def _specialize(value: Any) -> tuple[str, bool]:
    """The type that a launch gives an argument ("constexpr": its value is compiled in), and whether 16 divides it."""
    if isinstance(value, Tensor):
        value = Pointer.of(value)
    if isinstance(value, Pointer):
        return value
    if value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0


def compile_launch(kernel: Any, args: tuple, kwargs: dict, arch: int) -> Any:
    """The compiled kernel that a launch would run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    values = {name: values.get(name, p.default) for name, p in kernel.signature.parameters.items()}
    signature, constants, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        signature[name], divisible = _specialize(values[name])
        if parameter.is_constexpr or signature[name] == "constexpr":
            signature[name], constants[name] = "constexpr", values[name]
        elif divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any, arch: int) -> Row:
    """What a compiled kernel takes: registers, spill and shared memory bytes, its widest instructions, occupancy."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, spill = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK"))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    loads = _loads(ptx)
    atomics = re.findall(r"(?:red|atom)\.global\.(\S+)", ptx)
    products = re.findall(r"(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\S*", ptx)
    return {
        "registers": registers,
        "spill": spill,
        "shared": shared,
        "warps": warps,
        "load_bits": max((width for width, _, _ in loads), default=0),
        "plane_bits": min((width for width, *line in loads if tuple(line) in _plane_lines()), default=None),
        "atomic": max(set(atomics), key=len) if atomics else None,
        "products": sorted(set(products)),
        "occupancy": occupancy(registers, shared, warps, arch),
    }


def _loads(ptx: str) -> list[tuple[int, str, int]]:
    """Global loads: bits, and the file and line of the source that they come from."""
    files = dict(re.findall(r'\.file\s+(\d+) "(?:[^"]*/)?([^/"]+)"', ptx))
    found, file, line = [], "", 0
    for text in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            file, line = files[place[1]], int(place[2])
        elif load := re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", text):
            found.append((int(load[1] or 1) * int(load[2]), file, line))
    return found


@functools.cache
def _plane_lines() -> set[tuple[str, int]]:
    """Where texels are read: every line of `gather_features`, and one of the kernel that cuts."""
    from epigraf_fast.kernels.cut import _cut_kernel
    from epigraf_fast.kernels.planes import gather_features

    lines, first = inspect.getsourcelines(gather_features.fn)
    found = {("planes.py", first + i) for i in range(len(lines))}
    lines, first = inspect.getsourcelines(_cut_kernel.fn)
    return found | {("cut.py", first + i) for i, line in enumerate(lines) if "tl.load(x_ptr" in line}


def problems(row: Row) -> list[str]:
    """Where a kernel falls short of what is promised for its architecture."""
    found = []
    if row["arch"] >= 80:
        if row["spill"]:
            found.append(f"spills {row['spill']} bytes")
        if row["shared"] > SHARED_LIMIT[row["arch"]] * 1024:
            found.append(f"takes {row['shared']} bytes of shared memory")
        if row["plane_bits"] is not None and row["plane_bits"] < 128:
            found.append(f"loads {row['plane_bits']} bits of planes at once")
        if row["kernel"].startswith("_decode") and not row["products"]:
            found.append("has no tensor-core instruction")
    return found


def _rows(arch: int, brief: bool, match: Sequence[str], first: int, step: int) -> list[Row]:
    """Compiles every `step`-th launch from the `first` on."""
    rows = []
    for case, launch in itertools.islice(launches(arch, brief=brief, match=match), first, None, step):
        with recorded() as calls:
            launch()
        for kernel, args, kwargs in calls:
            row = {"arch": arch, "case": case, "kernel": kernel.__name__}
            row |= resources(compile_launch(kernel, args, kwargs, arch), arch)
            if kwargs.get("UNIT") == 1:  # texels that are no whole vectors
                row["plane_bits"] = None
            rows.append(row | {"problems": problems(row)})
    return rows


def table(archs: tuple[int, ...], *, brief: bool = False, match: Sequence[str] = ()) -> list[Row]:
    """Compiles everything, in two processes: one row a kernel and architecture. Triton keeps what it has compiled."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(_rows, arch, brief, match, first, 2) for arch in archs for first in range(2)]
        rows = [row for part in parts for row in part.result()]
    order = {case: i for arch in archs for i, (case, _) in enumerate(launches(arch, brief=brief, match=match))}
    return sorted(rows, key=lambda row: (row["arch"], order[row["case"]]))


def format_table(rows: list[Row]) -> str:
    header = f"arch  {'case':<58} regs  spill  shared  warps  occupancy  load  planes  atomic; products"
    lines = [header]
    for row in rows:
        end = "; ".join(filter(None, [row["atomic"], " ".join(row["products"])]))
        lines.append(
            f"sm_{row['arch']} {row['case']:<58} {row['registers']:>4} {row['spill']:>6} {row['shared']:>7} "
            f"{row['warps']:>6} {row['occupancy']:>10.2f} {row['load_bits']:>5} {row['plane_bits'] or '':>7}  "
            f"{end}".rstrip()
        )
        lines += [f"      ! {problem}" for problem in row["problems"]]
    return "\n".join(lines)


def _rows_of_csrc(archs: tuple[int, ...]) -> list[Row]:
    """Those of the architectures that something here compiles csrc/ for; a line on standard error says of the rest."""
    from . import of_csrc

    rows = []
    for arch in archs:
        known = arch in of_csrc.NVCC_ARCHS + of_csrc.NVRTC_ARCHS
        reason = of_csrc.lacking(arch) if known else "it is not one that the extension is built for"
        if reason is None:
            rows += of_csrc.rows((arch,))
        else:
            print(f"bench.resources: csrc/ is not compiled for sm_{arch}: {reason}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=ARCHS)
    parser.add_argument("--brief", action="store_true", help="default plans at the sizes of the ffhq preset alone")
    parser.add_argument(
        "--match",
        nargs="+",
        default=(),
        metavar="REGEX",
        help="Triton's cases alone in whose names, as in 'sm_80 cut C=96 float32', one of these is found",
    )
    parser.add_argument("--only", choices=("triton", "csrc"), help="these kernels alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        print("bench.resources: TRITON_INTERPRET is ignored, kernels are compiled", file=sys.stderr)
    rows = [] if args.only == "csrc" else table(tuple(args.arch), brief=args.brief, match=args.match)
    if args.only != "triton" and not (args.brief or args.match):
        rows += _rows_of_csrc(tuple(args.arch))
    print(json.dumps(rows, indent=2) if args.json else format_table(rows))
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
