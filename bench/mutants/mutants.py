"""Faults put into the compiled kernels, and how many are found: `python -m bench.mutants [--arch 70 80 90] [--json]`.

A mutant is a kernel's PTX with one fault. It runs small launches of that kernel (`bench.mutants.launches`) on the
machine of `bench.ptx`, and is found when that reports a fault, or when results differ by more than the tests allow. Of
those that are not, some can make no difference in these launches: a probe tells them, an access out of every range in
place of the fault, which nobody makes. `--page` writes the table of docs/without-a-gpu.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ptx import Fault
from ..ptx.parse import Entry
from ..resources.limits import ARCHS
from . import launches as mutant_launches
from .launches import Launch

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "mutants.json", ROOT / "docs" / "without-a-gpu.md"
BEGIN, END = "<!-- mutants:begin, written by python -m bench.mutants --page -->", "<!-- mutants:end -->"

# (relative, absolute), as tests/checks.py has it.
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.float16: (4e-3, 2e-3),
    torch.bfloat16: (3e-2, 2e-2),
}

KINDS = {
    "barrier removed": "what it orders is ordered without it: no access meets another (races are looked for)",
    "mask removed": "what the excluded threads read is not used, or what they write is the same",
    "branch removed": "what it skips changes nothing here",
    "pointer shifted": "the neighbour has the same value, or what is read is not used",
    "output shortened": "nobody touches its last element",
    "fma made a product": "the addend is zero here, or below the tolerance",
    "shared store dropped": "the place held the same value, or is not read",
    "store dropped": "another thread writes the same value",
    "atomic dropped": "it adds zero here",
}
IDLE = {
    "reached": "not reached in these launches",
    "mask": "excludes no thread in these launches",
    "same": "the same bits without it in these launches",
    "unused": "what is read is not used in these launches: it may as well be NaN",
}

# Of what is not found and not proved to be idle: (kind, file of the source, part of its line or "") -> why it is so, by
# reading. A survivor that is not among them is said to be unexplained.
_SHORT_DIVISION = "a shortcut: what fits 32 bits is divided in 32 bits, with the same result as in 64"
EXPLAINED = {
    ("branch removed", "gpu.h", ">> 32"): _SHORT_DIVISION,
    ("branch removed", "common.h", "ceil_div"): _SHORT_DIVISION,
    ("branch removed", "bias_act.cu", "bias_act_part_rows"): _SHORT_DIVISION,
    ("branch removed", "modulation.cu", "j < images"): "what is written more is read by nobody",
    ("mask removed", "standard.py", ""): "lanes that hold the same part of a sum write it to the same place",
    ("pointer shifted", "bias_act.cu", "vector ?"): "of a bias only the side of the kink counts in a derivative",
}

_STATEMENT = re.compile(r"^[ \t]*(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)[ \t]*([^;\n]*);", re.M)
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]")
_ZERO = re.compile(r"0[fd]0+")
_TRAP = "st.global.u32 [0], 0;"
_TYPE = re.compile(r"[bfsu]f?(\d+)(x2)?")


class Mutant(NamedTuple):
    """A fault at one place.

    Attributes:
        line: Of the PTX.
        text: The statement as it was.
        entry: The kernel with the fault; None for what is in the launch.
        probes: The kernel with an access out of range where the fault acts, and what it means if nobody makes it.
        source: File and line of the statement's source, where the PTX says.
    """

    kind: str
    line: int
    text: str
    entry: Entry | None
    probes: tuple[tuple[Entry, str], ...] = ()
    tensor: str = ""
    source: str = ""


def mutants(entry: Entry) -> Iterator[Mutant]:
    """All faults of the kinds that are in a kernel's text.

    Multiply-adds of the constant 0, with which sums begin, are left out: they are products, but for the sign of a zero.
    """
    text = entry.text

    def with_text(found: re.Match, new: str) -> Entry:
        return dataclasses.replace(entry, text=text[: found.start()] + new + text[found.end() :])

    sources = {i.line: f"{i.source[0]}:{i.source[1]}" for i in entry.body.instructions if i.source}
    labels = {found[1]: found.start() for found in re.finditer(r"^\s*([$\w]+):", text, re.M)}
    for found in _STATEMENT.finditer(text):
        negated, guard, opcode, operands = found.groups()
        parts = opcode.split(".")
        place = parts[0] in ("ld", "st", "atom", "red") and {"global", "shared", "shared::cta"}.intersection(parts)
        bare, line = f"{opcode} {operands};", entry.first_line + text.count("\n", 0, found.start(3))
        statement = " ".join(found[0].split())

        def mutant(
            kind: str,
            new: str,
            condition: str = "",
            found: re.Match = found,
            at: Any = None,
            same: str | None = None,
            unused: str | None = None,
        ) -> Mutant:
            line, statement = at
            meaning = IDLE["mask" if kind in ("mask removed", "branch removed") else "reached"]
            probes = [(with_text(found, f"{condition} {_TRAP}\n{found[0]}"), meaning)]
            if same is not None:
                probes.append((with_text(found, same), IDLE["same"]))
            if unused is not None:
                probes.append((with_text(found, unused), IDLE["unused"]))
            return Mutant(kind, line, statement, with_text(found, new), tuple(probes), "", sources.get(line, ""))

        at = line, statement
        same = f"@{negated}{guard}" if guard else ""
        other = f"@{'' if negated else '!'}{guard}" if guard else ""
        if parts[0] in ("bar", "barrier") and "sync" in parts and "warp" not in parts:
            yield Mutant("barrier removed", line, statement, with_text(found, ""), source=sources.get(line, ""))
        elif place:
            if guard:
                yield mutant("mask removed", bare, other, at=at)
            shifted = _shifted(found, parts)
            alike, spoiled = (_compared(found, shifted), _spoiled(found)) if parts[0] == "ld" else (None, None)
            yield mutant("pointer shifted", shifted, same, at=at, same=alike, unused=spoiled)
            shared = "global" not in parts
            if parts[0] == "st":
                kind, alike = ("shared store dropped", _already_there(found)) if shared else ("store dropped", None)
                yield mutant(kind, "", same, at=at, same=alike)
            elif parts[0] in ("atom", "red"):
                yield mutant("atomic dropped", "", same, at=at)
        elif parts[0] == "stmatrix":
            yield mutant("shared store dropped", "", same, at=at)
        elif parts[0] == "fma" and not {"f16x2", "bf16x2"}.intersection(parts):
            factors, addend = operands.rsplit(",", 1)
            product = f"{same} mul{opcode.removeprefix('fma')} {factors};"
            if not _ZERO.fullmatch(addend.strip()):
                yield mutant("fma made a product", product, same, at=at, same=_compared(found, product))
        elif parts[0] == "bra" and guard and labels.get(operands.strip(), -1) > found.start():
            yield mutant("branch removed", "", same, at=at)


def _compared(found: re.Match, other: str) -> str | None:
    """A statement that gives a register or several values, and a trap for threads to whom `other` gives others."""
    kind, targets = _kind_of(found), _targets(found)
    names = [name.strip() for name in targets.strip("{}").split(",")]
    if kind is None:
        return None
    temporary = ", ".join(f"%other{i}" for i in range(len(names)))
    temporary = f"{{ {temporary} }}" if targets[0] == "{" else temporary
    before, after = re.split(rf"(?<=\s){re.escape(targets)}(?=\s*,)", other, maxsplit=1)
    return _trapped(found, kind, len(names), f"{before}{temporary}{after}\n{found[0]}", names)


def _spoiled(found: re.Match) -> str | None:
    """A load, after which its registers hold NaN."""
    kind = _kind_of(found)
    if kind is None:
        return None
    nan = {"32": "0x7FC00000", "64": "0x7FF8000000000000"}[kind[1:]]
    names = [name.strip() for name in _targets(found).strip("{}").split(",")]
    return "\n".join([found[0], *(f"{_guard(found)} mov.b{kind[1:]} {name}, {nan};" for name in names)])


def _targets(found: re.Match) -> str:
    """The registers that a statement gives, as it names them."""
    return re.match(r"\{[^}]*\}|[^,]*", found[4])[0]


def _already_there(found: re.Match) -> str | None:
    """A store, and a trap for threads whose place does not hold before what they store."""
    kind = _kind_of(found)
    address, values = (part.strip() for part in found[4].split(",", 1))
    names = [name.strip() for name in values.strip("{}").split(",")]
    if kind is None:
        return None
    temporary = ", ".join(f"%other{i}" for i in range(len(names)))
    temporary = f"{{ {temporary} }}" if values[0] == "{" else temporary
    load = f"{_guard(found)} ld{found[3].removeprefix('st')} {temporary}, {address};\n"
    return _trapped(found, kind, len(names), load, names) + found[0]


def _kind_of(found: re.Match) -> str | None:
    """The type of a statement's registers; None for those that are wider than what they hold."""
    kind = found[3].rsplit(".", 1)[-1]
    return kind if re.fullmatch(r"[bfsu](32|64)", kind) else None


def _guard(found: re.Match) -> str:
    return f"@{found[1]}{found[2]}" if found[2] else ""


def _trapped(found: re.Match, kind: str, count: int, statements: str, names: list[str]) -> str:
    equal = "neu" if kind[0] == "f" else "ne"
    lines = ["{", f".reg .{kind} %other<{count}>; .reg .pred %differs;", statements, "setp.ne.u32 %differs, 0, 0;"]
    for i, name in enumerate(names):
        lines += [f"{_guard(found)} setp.{equal}.{kind} %differs, %other{i}, {name};", f"@%differs {_TRAP}"]
    return "\n".join([*lines, "}\n"])


def _shifted(found: re.Match, parts: list[str]) -> str:
    """The access, by an element further."""
    bits = next(int(kind[1]) * (2 if kind[2] else 1) for kind in map(_TYPE.fullmatch, reversed(parts)) if kind)
    return _ADDRESS.sub(lambda at: f"[{at[1]}+{int(at[2] or 0) + bits // 8}]", found[0], count=1)


def differs(actual: Tensor, expected: Tensor) -> bool:
    """Beyond what the tests allow; integers are sums in fixed point."""
    a, e = actual.double(), expected.double()
    if not torch.equal(a.isnan(), e.isnan()):
        return True
    a, e = a.nan_to_num(), e.nan_to_num()
    if expected.is_floating_point():
        relative, absolute = TOLERANCES[expected.dtype]
    else:
        relative, absolute = 0.0, 1e-5 * e.abs().max().item()
    return bool(((a - e).abs() > absolute + relative * e.abs()).any())


def fault(launches: list[Launch], entry: Entry | None, tensor: str = "") -> str | None:
    """What shows that something is wrong: the fault's name, "result"; or None.

    Args:
        entry: The kernel's text; None for that of the launches.
        tensor: One that ends before the last element that the first launch changes.
    """
    program = mutant_launches.program_of(entry or launches[0].entry)
    for launch in launches:
        tensors = launch.tensors
        if tensor:
            tensors = tensors | {tensor: tensors[tensor].as_strided((launch.last_changed(tensor),), (1,))}
        try:
            launch.run(program, tensors)
        except Fault as error:
            return type(error).__name__
        if any(differs(launch.tensors[name], x) for name, x in launch.after.items()):
            return "result"
    return None


def judge(arch: int, kernel: str, launches: list[Launch], most: int, seed: int) -> dict[str, Any]:
    """Counts for a kernel, and its survivors."""
    if fault(launches, None) is not None:
        raise RuntimeError(f"bench.mutants: {kernel} on sm_{arch} does not give the same twice")
    by_kind: dict[str, list[Mutant]] = {kind: [] for kind in KINDS}
    for mutant in mutants(launches[0].entry):
        by_kind[mutant.kind].append(mutant)
    for name in sorted({name for launch in launches[:1] for name in launch.outputs}):
        if launches[0].last_changed(name):
            by_kind["output shortened"].append(Mutant("output shortened", 0, name, None, tensor=name))
    rows, survivors = [], []
    for kind, made in by_kind.items():
        if not made:
            continue
        chosen = random.Random(f"{seed} {kernel} {kind}").sample(made, min(most, len(made)))
        found: Counter[str] = Counter()
        idle = 0
        for mutant in chosen:
            shown = fault(launches[:1] if mutant.tensor else launches, mutant.entry, mutant.tensor)
            if shown is not None:
                found[shown] += 1
                continue
            why = f"not proved; presumably {KINDS[kind]}"
            for probe, meaning in mutant.probes:
                if fault(launches, probe) is None:
                    idle, why = idle + 1, meaning
                    break
            place = {
                "line": mutant.line,
                "ptx": mutant.text,
                "source": mutant.source,
                "code": source_line(mutant.source),
            }
            survivors.append({"arch": arch, "kernel": kernel, "kind": kind, **place, "why": why})
        row = {"arch": arch, "kernel": kernel, "kind": kind, "of": len(made), "tried": len(chosen), "idle": idle}
        rows.append(row | {"found": dict(sorted(found.items()))})
    return {"rows": rows, "survivors": survivors}


def table(content: dict[str, Any]) -> str:
    """Markdown: one row a kind, and all."""
    lines = ["| fault | tried | without effect here | found | by | found of those with effect |", "|" + "---|" * 6]
    rows = content["rows"]
    for kind in [*KINDS, "all"]:
        chosen = [row for row in rows if kind in ("all", row["kind"])]
        if not chosen:
            continue
        tried, idle = (sum(row[key] for row in chosen) for key in ("tried", "idle"))
        by = sum((Counter(row["found"]) for row in chosen), Counter())
        found = by.total()
        share = f"{100 * found / (tried - idle):.1f}%" if tried > idle else "-"
        means = ", ".join(f"{name} {n}" for name, n in by.most_common())
        lines.append(f"| {kind} | {tried} | {idle} | {found} | {means} | {share} |")
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in rows}))
    kernels = len({row["kernel"].rsplit(" ", 1)[0] for row in rows})
    total = sum(row["of"] for row in rows)
    lines += [
        "",
        f"{kernels} kernels, {archs}; of {total} faults at most {content['most']} a kernel, kind and architecture,",
    ]
    lines[-1] += f" drawn by seed {content['seed']}."
    reasons = Counter((s["kind"], s["why"]) for s in content["survivors"])
    lines += ["", "| without effect, or not found | how many | why |", "|---|---|---|"]
    lines += [f"| {kind} | {n} | {why} |" for (kind, why), n in sorted(reasons.items())]
    return "\n".join(lines)


def source_line(source: str) -> str:
    """The text of a line, as csrc.cu:12, of csrc/ or kernels/; "" of other files."""
    file, _, line = source.partition(":")
    found = [*ROOT.glob(f"csrc/{file}"), *ROOT.glob(f"kernels/{file}")] if file else []
    return found[0].read_text().splitlines()[int(line) - 1].strip() if found else ""


def explanation(survivor: dict[str, Any]) -> str | None:
    """Why a fault is not found, by reading; None if nobody has said."""
    file = survivor["source"].partition(":")[0]
    for (kind, where, part), why in EXPLAINED.items():
        if (kind, where) == (survivor["kind"], file) and part in survivor["code"]:
            return why
    return None


def unproved(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Survivors of which no probe shows that they have no effect."""
    return [survivor for survivor in content["survivors"] if survivor["why"] not in IDLE.values()]


def survivors_table(content: dict[str, Any]) -> str:
    """Markdown: one row a survivor that is not proved to be idle."""
    lines = ["| not found | kernel | file | its line | PTX | why |", "|---|---|---|---|---|---|"]
    for one in unproved(content):
        kernel, file = f"{one['kernel'].rsplit(' ', 1)[0]}, sm_{one['arch']}", one["source"].partition(":")[0]
        code = f"`{one['code']}`".replace("|", "\\|") if one["code"] else ""
        why = explanation(one) or "unexplained"
        lines.append(f"| {one['kind']} | {kernel} | {file} | {code} | `{one['ptx']}` | {why} |")
    return "\n".join(lines)


def write_page(content: dict[str, Any]) -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(content)}\n\n{survivors_table(content)}\n{END}{rest.split(END)[1]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=[*ARCHS])
    parser.add_argument("--kernel", default="", help="part of a kernel's name; default: all")
    parser.add_argument("--most", type=int, default=4, help="faults of a kind in a kernel (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--triton-only", action="store_true", help="leave out csrc, which needs nvcc")
    parser.add_argument(
        "--json", type=Path, help="where to keep counts and survivors, beside those there of the same draw"
    )
    parser.add_argument("--page", action="store_true", help=f"only write the table of {PAGE.name} from {RESULTS.name}")
    options = parser.parse_args(arguments)
    if options.page:
        write_page(json.loads(RESULTS.read_text()))
        return 0
    content: dict[str, Any] = {"seed": options.seed, "most": options.most, "rows": [], "survivors": []}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        if (before["seed"], before["most"]) != (options.seed, options.most):
            told = f"--seed {before['seed']} --most {before['most']}"
            print(f"bench.mutants: {options.json} is of {told}: give those, or name another --json", file=sys.stderr)
            return 2
        content = before  # of what is judged again the new counts take the place of the old
    judged_rows, unexplained = 0, 0
    for arch in options.arch:
        found = mutant_launches.launches(arch, only=options.kernel, csrc=not options.triton_only)
        for kernel, launches in found.items():
            judged = judge(arch, kernel, launches, options.most, options.seed)
            judged_rows += len(judged["rows"])
            unexplained += sum(explanation(one) is None for one in unproved(judged))
            for key in ("rows", "survivors"):
                others = [row for row in content[key] if (row["arch"], row["kernel"]) != (arch, kernel)]
                content[key] = others + judged[key]
            tried = sum(row["tried"] for row in judged["rows"])
            shown = sum(sum(row["found"].values()) for row in judged["rows"])
            print(f"sm_{arch} {kernel}: {shown} of {tried} found", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(content, indent=1) + "\n")
    if not judged_rows:
        print(f"bench.mutants: --kernel must be part of a kernel's name, got {options.kernel!r}", file=sys.stderr)
        return 2
    print(table(content))
    if unexplained:
        print(f"{unexplained} not found, and explained by nobody: see EXPLAINED", file=sys.stderr)
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
