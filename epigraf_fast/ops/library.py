"""How a call reaches its kernel: at once, or as an op of torch's own library, or not at all.

A launcher is given addresses. Of a tensor that only stands for others (traced, fake, batched, dual) it would compute
nothing, or nothing right, and what looks at the operations that torch dispatches would see the memory alone that it
fills. So every call takes one of three routes:

  PLAIN      plain tensors in plain eager mode: the launcher at once, inside an autograd Function where one is recorded.
  LIBRARY    torch.compile, torch.export, make_fx, FakeTensor and whatever else looks at what is dispatched, tensors of
             other classes, negated views: the same launcher as `torch.ops.epigraf_fast.*`, which have schemas, fakes
             (shapes and layouts alone) and derivatives by further such ops.
  REFERENCE  torch.func's transforms, forward-mode derivatives, batched gradients, torch.jit.trace, ONNX: the reference,
             which is torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_tls_local_include_set,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    is_grad_enabled,
)
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.utils._device import DeviceContext

PLAIN, LIBRARY, REFERENCE = "plain", "library", "reference"

_library = torch.library.Library("epigraf_fast", "FRAGMENT")


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that torch.compile is to call once, and not to trace.

    torch.compiler.assume_constant_result does the same, and imports the compiler for it.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def _transforming() -> bool:
    return _are_functorch_transforms_active()


def route(*tensors: Tensor | None) -> str:
    """PLAIN, LIBRARY or REFERENCE: what a call with these tensors takes, here and now."""
    # Every call pays for these questions: each is the cheapest that there is.
    if forward_ad._current_level >= 0:
        return REFERENCE
    if is_dynamo_compiling():  # what follows cannot be traced
        return REFERENCE if _transforming() else LIBRARY
    if _are_functorch_transforms_active() or _get_tracing_state() is not None:
        return REFERENCE
    if _len_torch_dispatch_stack() or _len_torch_function_stack():
        if torch.onnx.is_in_onnx_export():
            return REFERENCE
        # `with torch.device(...)` and torch.set_default_device are for tensors that are made from nothing.
        modes = torch.overrides._get_current_function_mode_stack()
        if _len_torch_dispatch_stack() or any(type(mode) is not DeviceContext for mode in modes):
            return LIBRARY
    for x in tensors:
        if x is not None:
            kind = type(x)
            if (kind is not Tensor and kind is not Parameter) or x.is_neg():
                return LIBRARY
    return PLAIN


def register(schema: str) -> Callable[[type], type]:
    """Decorates a class that is the op `schema` of torch.ops.epigraf_fast, so that `call` can take any route.

    What the class holds takes (*tensors, settings, *more), `Settings` being the NamedTuple that is flat in the op:

      run        the op itself: launches, and fills what `empty` gives.
      empty      the results, with nothing in them: the op's fake, too.
      ready      the same arguments as those two read them (dense, alike in layout), differentiably; may be missing.
      reference  the same results by operations of torch.

    Where there are derivatives, it holds `backward(ctx, *grads)`, which applies further such classes, and
    `keep(ctx, inputs, outputs)`, which saves what that needs; `constants` names the tensors that get no gradient (which
    the public function does not let ask for one; what was exported may).

    Args:
        schema: As `torch.library.define` takes it, tensors first. A tensor that is returned may be None.
    """

    def registered(cls: type) -> type:
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"epigraf_fast::{name}"
        cls.op = getattr(torch.ops.epigraf_fast, name).default
        arguments = cls.op._schema.arguments
        cls.tensors = sum("Tensor" in str(argument.type) for argument in arguments)
        constants = getattr(cls, "constants", ())
        cls.Settings = getattr(cls, "Settings", None)
        cls.ready = staticmethod(getattr(cls, "ready", lambda *args: args))

        def run(*flat: Any) -> Any:
            outputs = cls.run(*cls.ready(*_nested(cls, flat)))
            return _apart(outputs) if isinstance(outputs, Tensor) else tuple(map(_apart, outputs))

        def fake(*flat: Any) -> Any:
            return cls.empty(*cls.ready(*_nested(cls, flat)))

        for key in ("CPU", "CUDA"):
            _library.impl(name, run, key)
        torch.library.register_fake(qualified, fake, lib=_library)
        cls.apply = None
        if not hasattr(cls, "backward"):
            return cls

        def forward(ctx: Any, *args: Any) -> Any:
            outputs = cls.run(*args)
            cls.keep(ctx, args, outputs)
            return outputs

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            for argument, needed in zip(arguments, ctx.needs_input_grad, strict=False):
                if needed and argument.name in constants:
                    raise NotImplementedError(
                        f'{name}: this op has no gradient to {argument.name}; use backend="reference", or detach it'
                    )
            cls.keep(ctx, _nested(cls, inputs), output)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            gradients = cls.backward(ctx, *grads)[: cls.tensors]
            return *gradients, *(None,) * (len(arguments) - cls.tensors)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.apply = type(cls.__name__, (torch.autograd.Function,), methods).apply
        torch.library.register_autograd(qualified, backward, setup_context=keep, lib=_library)
        return cls

    return registered


class Last:
    """Base of a registered class whose results have no further derivative: its backward raises `refusal`."""

    refusal: str  # {0} in it stands for the settings

    @classmethod
    def keep(cls, ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        ctx.settings = inputs[cls.tensors]

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(cls.refusal.format(ctx.settings))


def _apart(y: Tensor | None) -> Tensor | None:
    """What is part of a larger tensor, as contiguous memory of its own: results of an op must not share theirs."""
    if y is None or y.numel() * y.element_size() == y.untyped_storage().nbytes():
        return y
    return y.clone(memory_format=torch.contiguous_format)


def _flat(cls: type, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a class as its op takes them."""
    if cls.Settings is None:
        return tuple(args)
    count = cls.tensors
    return *args[:count], *args[count], *args[count + 1 :]


def _nested(cls: type, flat: Sequence[Any]) -> tuple[Any, ...]:
    """And back."""
    if cls.Settings is None:
        return tuple(flat)
    first, last = cls.tensors, cls.tensors + len(cls.Settings._fields)
    return *flat[:first], cls.Settings(*flat[first:last]), *flat[last:]


def call(route: str, cls: type, *args: Any) -> Any:
    """What a registered class gives by a route."""
    if route is PLAIN:
        args = cls.ready(*args)
        if cls.apply is not None and is_grad_enabled():
            for x in args[: cls.tensors]:
                if x is not None and x.requires_grad:
                    return cls.apply(*args)
        return cls.run(*args)
    return cls.reference(*args) if route is REFERENCE else cls.op(*_flat(cls, args))


def _keys(*names: str) -> int:
    keys = DispatchKeySet(getattr(DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(DispatchKey, name))
    return keys.raw_repr()


# What of the dispatcher's keys a thread includes in eager mode, and beside it where Python looks at what is dispatched.
_UNBATCHED = _keys(
    "BackendSelect",
    "ADInplaceOrView",
    "Python",
    "PythonTLSSnapshot",
    "PythonDispatcher",
    "PreDispatch",
    "Functionalize",
)


def apply(cls: type, *args: Any) -> Any:
    """`call`, in a backward."""
    return call(route_of_gradients(*args[: cls.tensors]), cls, *args)


def route_of_gradients(*tensors: Tensor | None) -> str:
    """`route`, in a backward, where gradients may be batched.

    (`is_grads_batched=True` has a vmap of its own, of which only a key of the dispatcher tells.)
    """
    batched = not is_dynamo_compiling() and _dispatch_tls_local_include_set().raw_repr() & ~_UNBATCHED
    return REFERENCE if batched else route(*tensors)


def wanted(ctx: Any, place: int) -> bool:
    """In the backward of a Function: whether the gradient to the tensor at this place goes anywhere.

    Args:
        place: Among the tensors that the Function was given. (`needs_input_grad` says what the forward pass knew: that
            the tensor has a gradient, though this backward pass may be asked for others alone.)
    """
    node, _ = ctx.next_functions[place]
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # no answer from this torch, or about a leaf that `grad` is asked for
        return True


def pull_back(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients, to the inputs, of a function that is made of torch's operations; themselves of such operations."""
    if all(grad is None for grad in grads):
        return (None,) * len(inputs)
    given = [i for i, x in enumerate(inputs) if x is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        all_inputs = list(inputs)
        for i, x in zip(given, values, strict=True):
            all_inputs[i] = x
        results = function(*all_inputs)
        results = (results,) if isinstance(results, Tensor) else results
        return tuple(y for y, grad in zip(results, grads, strict=True) if grad is not None)

    _, pull = torch.func.vjp(outputs, *(inputs[i] for i in given))
    found = dict(zip(given, pull(tuple(grad for grad in grads if grad is not None)), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))
