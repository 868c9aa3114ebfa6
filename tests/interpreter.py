"""Triton's interpreter, told not to do again what it has done, and to take the number out of an array of one.

At every call of a device function it replaces the functions of `triton.language` by its own, for every operation it
builds tables and types anew, and for every sum of integers it computes whether it overflows, which nobody then asks.
Here each is done once a launch, once a process, and not. What is computed stays the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def hasten() -> None:
    """Takes effect for the rest of the process; a Triton without these parts stays as it is."""
    from triton.runtime import interpreter  # not before TRITON_INTERPRET is set, which it reads

    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype", "GridExecutor")):
        _patch_once_a_launch(interpreter)
    if all(hasattr(interpreter, name) for name in ("interpreter_builder", "interpreter_semantic")):
        _ask_for_what_is_used(interpreter)
    if hasattr(interpreter, "_patch_lang_tensor"):
        _count_by_arrays_of_one(interpreter)
    _build_types_once(interpreter.tl.core)


def _count_by_arrays_of_one(interpreter: Any) -> None:
    """`range(n)` of a number that a kernel has computed: Triton 3.6 asks numpy for what numpy 2.4 gives no more."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


def _patch_once_a_launch(interpreter: Any) -> None:
    patch, find_dtype, launch = interpreter._patch_lang, interpreter._get_np_dtype, interpreter.GridExecutor.__call__
    languages = interpreter.tl, interpreter.tl.core
    sees: dict[Any, tuple[bool, ...]] = {}
    patched: dict[tuple[bool, ...], Any] = {}
    dtypes: dict[str, Any] = {}

    def patch_once(fn: Any) -> Any:
        # A function sees the modules that its file has imported: kernels `tl`, Triton's own functions `core`.
        if fn not in sees:
            sees[fn] = tuple(any(value is part for value in fn.__globals__.values()) for part in languages)
        if sees[fn] not in patched:
            patched[sees[fn]] = patch(fn)
        return patched[sees[fn]]

    def find_dtype_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # a launch puts back what it has replaced
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = find_dtype_once
    interpreter.GridExecutor.__call__ = launch_anew


def _ask_for_what_is_used(interpreter: Any) -> None:
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    options = builder.options
    if dataclasses.is_dataclass(options) and hasattr(options, "sanitize_overflow"):
        # What is found goes to a device_assert, which does nothing without `debug`.
        builder.options = dataclasses.replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)
    broadcast = semantic.broadcast_impl_value

    def broadcast_if_needed(lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block() and rhs.type.is_block()
        return (lhs, rhs) if blocks and lhs.type.shape is rhs.type.shape else broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_if_needed


def _build_types_once(core: Any) -> None:
    """A type of blocks, and what a tensor says of its shape, are taken from the last one of that name."""
    build, build_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    sizes: dict[str, tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key in types:
            self.__dict__.update(types[key], element_ty=element_ty)
        else:
            build(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1], self.shape)
            types[key] = dict(self.__dict__)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        name = type.name if type.is_block() else ""
        if name in sizes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = sizes[name]
        else:
            build_tensor(self, handle, type)
            sizes[name] = self.shape, self.numel

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
