"""What a kernel can do wrong."""

from __future__ import annotations


class Fault(RuntimeError):
    """A kernel did what it must not, or what is not defined. The message says where: block, thread, lines."""


class OutOfRange(Fault):
    """An access outside of every tensor, of the block's shared memory, or of the parameters."""


class Misaligned(Fault):
    """An address that the size of the access does not divide."""


class Uninitialized(Fault):
    """A register, a byte or an element was read that nobody had written."""


class Race(Fault):
    """Two threads met at one place, one of them writing, and nothing orders them."""


class BarrierFault(Fault):
    """Threads that should wait for each other do not, or wait for ever."""


class UnknownOpcode(Fault):
    """An instruction, or a form of it, that the machine has no meaning for."""


class Runaway(Fault):
    """More instructions than a launch may take: a loop that does not end."""
