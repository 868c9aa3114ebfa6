"""Which configuration a launch takes: a default, or the one that was fastest when `tune` timed them on the device.

A plan is one configuration for each launch. The plans of a kernel are few and fixed, by architecture, size of the
problem and size of a texel: what `python -m bench.resources` found to spill nothing, to load texels 128 bits at a time,
and to keep the most warps on a multiprocessor. It compiles all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources


class Config(NamedTuple):
    """How a kernel is cut into programs."""

    block_n: int  # points of a tile; of sample_triplane: those of 32 channels, so that tiles are alike
    num_warps: int
    tiles: int = 1  # tiles of a program, one after the other
    max_registers: int | None = None  # of a thread; None leaves it to the compiler


# A plan with two configurations has one for the launch to planes and one for that to the network, which comes first.
Plan = tuple[Config, ...]
Timer = Callable[[Callable[[], Any]], float]


class Case(NamedTuple):
    """What a plan is chosen for."""

    kernel: str
    arch: int
    channels: int
    hidden: int
    out: int
    height: int
    width: int
    texel_bytes: int
    precision: str
    deterministic: bool


def _plan(*configs: tuple[int | None, ...]) -> Plan:
    return tuple(Config(*config) for config in configs)


# (kernel, size, bytes of a texel) -> oldest architecture -> plans, the default first; "4 tf32" is for that precision
# alone. With sixteen points a warp a thread holds half of a point's channels, and only two threads work out the same
# taps. The forward's four tiles keep w0: fewer instructions, more shared memory and registers. The backward has two
# launches by default: that to planes, 64 points for 8 warps, keeps 24 warps on a multiprocessor, on sm_90 32.
PLANS: dict[tuple[str, str, int | str], dict[int, tuple[Plan, ...]]] = {
    ("sample_fwd", "any", 4): {
        70: (_plan((32, 4)), _plan((64, 4)), _plan((128, 8))),
        90: (_plan((32, 4, 1, 72)), _plan((64, 4)), _plan((128, 8))),
        100: (_plan((32, 4)), _plan((64, 4)), _plan((128, 8))),
    },
    ("sample_fwd", "any", 2): {70: (_plan((32, 4)), _plan((64, 4)), _plan((128, 8)))},
    ("sample_bwd", "any", 4): {70: (_plan((32, 4)), _plan((64, 4)), _plan((128, 8)))},
    ("sample_bwd", "any", 2): {70: (_plan((32, 4)), _plan((64, 4)), _plan((128, 8)))},
    ("decode_fwd", "narrow", 4): {70: (_plan((16, 8)),), 80: (_plan((32, 4)), _plan((16, 2)))},
    ("decode_fwd", "narrow", 2): {70: (_plan((16, 8)),), 80: (_plan((32, 2)), _plan((64, 4)))},
    ("decode_fwd", "usual", 4): {
        70: (_plan((64, 4)),),
        80: (_plan((32, 2)), _plan((64, 4)), _plan((32, 4))),
        90: (_plan((64, 4)), _plan((32, 4))),
    },
    ("decode_fwd", "usual", "4 fp32"): {
        70: (_plan((64, 4)),),
        80: (_plan((64, 4, 4)), _plan((32, 2)), _plan((32, 4))),
        90: (_plan((64, 4)), _plan((64, 4, 4, 128))),
        100: (_plan((64, 4)), _plan((32, 4))),
    },
    ("decode_fwd", "usual", "4 tf32"): {
        70: (_plan((64, 4)),),
        80: (_plan((64, 4, 4, 96)), _plan((32, 2)), _plan((64, 4))),
        90: (_plan((64, 4)), _plan((64, 4, 4, 72))),
        100: (_plan((64, 4)), _plan((32, 4))),
    },
    ("decode_fwd", "usual", 2): {
        70: (_plan((64, 4)),),
        80: (_plan((32, 2)), _plan((64, 4))),
        90: (_plan((64, 4)), _plan((32, 2))),
    },
    ("decode_fwd", "deep", 4): {70: (_plan((16, 8)),), 80: (_plan((16, 4)),), 90: (_plan((32, 8)), _plan((16, 4)))},
    ("decode_fwd", "deep", 2): {70: (_plan((16, 8)),), 80: (_plan((32, 4)), _plan((64, 8)))},
    ("decode_fwd", "large", 4): {70: (_plan((16, 8)),), 80: (_plan((16, 8)),)},
    ("decode_fwd", "large", 2): {70: (_plan((16, 8)),), 80: (_plan((16, 4)),), 90: (_plan((32, 8)), _plan((16, 4)))},
    ("decode_fwd", "huge", 4): {70: (_plan((16, 8)),), 80: (_plan((16, 8)),)},
    ("decode_fwd", "huge", 2): {70: (_plan((16, 8)),), 80: (_plan((16, 4)),), 90: (_plan((32, 8)), _plan((16, 4)))},
    ("decode_bwd", "narrow", 4): {
        70: (_plan((16, 8), (16, 8, 8)),),
        80: (_plan((32, 4), (32, 4, 8)), _plan((32, 4, 8))),
    },
    ("decode_bwd", "narrow", 2): {
        70: (_plan((16, 8), (16, 8, 8)),),
        80: (_plan((32, 2), (32, 2, 8, 168)),),
    },
    ("decode_bwd", "usual", 4): {
        70: (_plan((64, 4), (32, 4, 8)),),
        80: (_plan((64, 8, 1, 80), (32, 4, 8)), _plan((64, 4), (32, 4, 8))),
        90: (_plan((64, 8, 1, 64), (32, 4, 8)), _plan((64, 4), (32, 4, 8))),
        100: (_plan((64, 8), (32, 4, 8)),),
    },
    ("decode_bwd", "usual", 2): {
        70: (_plan((64, 4), (32, 4, 8)),),
        80: (_plan((64, 8, 1, 80), (32, 4, 8)), _plan((64, 4), (32, 4, 8))),
        90: (_plan((64, 8, 1, 64), (32, 4, 8)), _plan((64, 4), (32, 4, 8))),
        100: (_plan((64, 8), (32, 4, 8)),),
    },
    ("decode_bwd", "deep", 4): {
        70: (_plan((64, 4), (16, 8, 8)),),
        80: (_plan((64, 8, 1, 80), (32, 8, 8)),),
        90: (_plan((64, 8, 1, 64), (32, 8, 8)),),
        100: (_plan((64, 8), (32, 8, 8)),),
    },
    ("decode_bwd", "deep", 2): {
        70: (_plan((64, 4), (16, 8, 8)),),
        80: (_plan((64, 8, 1, 80), (32, 4, 8)),),
        90: (_plan((64, 8, 1, 64), (64, 8, 8)),),
        100: (_plan((64, 8), (64, 8, 8)),),
    },
    ("decode_bwd", "large", 4): {
        70: (_plan((16, 8), (16, 8, 8)),),
        80: (_plan((16, 8), (16, 8, 8)),),
    },
    ("decode_bwd", "large", 2): {
        70: (_plan((16, 8), (16, 8, 8)),),
        80: (_plan((32, 8, 1, 168), (32, 8, 8)),),
    },
    ("decode_bwd", "huge", 4): {
        70: (_plan((16, 8), (16, 8, 8)),),
        80: (_plan((16, 8, 1, 168), (16, 8, 8)),),  # shared memory holds one block, whatever the registers
    },
    ("decode_bwd", "huge", 2): {
        70: (_plan((16, 8), (16, 8, 8)),),
        80: (_plan((32, 8, 1, 200), (32, 8, 8)),),
        90: (_plan((32, 8, 1, 168), (32, 8, 8)),),
    },
}

_chosen: dict[Case, Plan] = {}


def architecture(device: torch.device) -> int:
    """The compute capability of a GPU, as 80, which the interpreter takes itself for."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def plans(case: Case) -> tuple[Plan, ...]:
    """What a launch may take, the default first; if deterministic that one alone, for others have other roundings."""
    size, texel = _size(case), min(case.texel_bytes, 4)
    own = (case.kernel, size, f"{texel} {case.precision}") if case.out <= 16 else None  # of more outputs they spill
    by_arch = PLANS.get(own) or PLANS[case.kernel, size, texel]
    found = by_arch[max(arch for arch in by_arch if arch <= case.arch)]
    return found[:1] if case.deterministic else found


def plan(case: Case) -> Plan:
    """What a launch takes."""
    return _chosen.get(case) or plans(case)[0]


def tune(case: Case, launch: Callable[[Plan], Any], timer: Timer) -> Plan:
    """Has `launch` run with every plan, and later launches of the case take the fastest that the GPU can hold.

    Args:
        timer: Milliseconds of a call, median of several.
    """

    def timed(candidate: Plan) -> float:
        try:
            return timer(lambda: launch(candidate))
        except OutOfResources:  # of shared memory, which GPUs of one generation have more and less of
            return math.inf

    times = {candidate: timed(candidate) for candidate in plans(case)}
    _chosen[case] = min(times, key=times.__getitem__)
    return _chosen[case]


def export_choices() -> list[dict[str, Any]]:
    """What `tune` chose, as plain JSON values."""
    return [{**case._asdict(), "plan": [list(config) for config in chosen]} for case, chosen in _chosen.items()]


def import_choices(choices: Sequence[dict[str, Any]]) -> None:
    """Takes up what `export_choices` gave.

    Raises:
        ValueError: A plan is none of its case's: what was saved is of another version.
    """
    read = {}
    for choice in choices:
        try:
            case = Case(**{name: value for name, value in choice.items() if name != "plan"})
            chosen = _plan(*choice["plan"])
            known = chosen in plans(case)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tuning: choices must be what export_choices gave, got {choice}") from error
        if not known:
            raise ValueError(
                f"tuning: plan must be one of {plans(case)} (because bench.resources checks those), got {chosen}"
            )
        read[case] = chosen
    _chosen.update(read)


def forget_choices() -> None:
    """Back to the defaults."""
    _chosen.clear()


def _size(case: Case) -> str:
    """Which plans a problem takes: those of channels and hidden units that fill the same registers."""
    if case.kernel.startswith("sample"):
        return "any"
    if case.channels > 32:
        return "huge" if case.hidden > 64 else "large"
    if case.hidden > 64:
        return "deep"
    return "narrow" if triton.next_power_of_2(case.channels) <= 16 else "usual"
