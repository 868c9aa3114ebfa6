"""Triton's interpreter, told not to do again what it has done.

At every call of a device function it replaces the functions of `triton.language` by its own, and for every operation it
builds a table of types: a third of a test's time. Here the first is done once a launch, the second once a process. What
is computed stays the same.
"""

from __future__ import annotations

from typing import Any


def hasten() -> None:
    """Takes effect for the rest of the process; a Triton without these parts stays as it is."""
    from triton.runtime import interpreter  # not before TRITON_INTERPRET is set, which it reads

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype", "GridExecutor")):
        return
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
