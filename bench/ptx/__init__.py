"""A machine that executes PTX on a CPU, checks every access, and counts: what stands in for a GPU where none is.

`Program(ptx).launch(...)` runs a kernel that Triton or nvcc compiled on CPU tensors.
"""

from .counts import Counts
from .faults import BarrierFault, Fault, Misaligned, OutOfRange, Race, Runaway, Uninitialized, UnknownOpcode
from .machine import Program
from .parse import Entry, Parameter

__all__ = [
    "BarrierFault",
    "Counts",
    "Entry",
    "Fault",
    "Misaligned",
    "OutOfRange",
    "Parameter",
    "Program",
    "Race",
    "Runaway",
    "Uninitialized",
    "UnknownOpcode",
]
