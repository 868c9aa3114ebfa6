"""Rectangles of images, each at its own place, and their transpose."""

from __future__ import annotations

import functools

import pytest
import torch

from checks import assert_close, draw
from compiled import on_triton
from epigraf_fast import ops
from epigraf_fast.reference.cut import cut as reference_cut
from epigraf_fast.reference.cut import paste as reference_paste

PLACES = torch.tensor([[0, 0], [2, 5], [4, 3]])


def by_hand(x, first, size):
    return torch.stack(
        [image[:, r : r + size[0], c : c + size[1]] for image, (r, c) in zip(x, first.tolist(), strict=True)]
    )


@pytest.mark.parametrize("function", [ops.cut, reference_cut])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (3, 7), (7, 9)])
def test_every_image_is_cut_at_its_place(function, dtype, layout, size):
    x = draw(3, 5, 7, 12, dtype=dtype).contiguous(memory_format=layout)
    first = PLACES.minimum(torch.tensor([7, 12]) - torch.tensor(size))
    for integers in (first, first.int()):
        y = function(x, integers, size)
        assert y.dtype == dtype
        assert torch.equal(y, by_hand(x, first, size))
    if layout == torch.channels_last:
        assert function(x, first, size).is_contiguous(memory_format=layout)


def test_the_whole_image_is_itself():
    x = draw(2, 3, 4, 5)
    assert ops.cut(x, torch.zeros(2, 2, dtype=torch.long), (4, 5)) is x


def test_paste_is_the_transpose():
    x, y = draw(3, 5, 7, 12), draw(3, 5, 3, 4, seed=1)
    pasted = reference_paste(y, PLACES, (7, 12))
    assert_close((pasted * x).sum(), (y * reference_cut(x, PLACES, (3, 4))).sum(), "transpose")
    assert (pasted != 0).sum() == y.numel()


def test_derivatives_of_every_order():
    x = draw(2, 3, 5, 6).requires_grad_(True)
    first = torch.tensor([[1, 2], [0, 3]])
    torch.autograd.gradcheck(lambda x: ops.cut(x, first, (3, 2)), x)
    torch.autograd.gradgradcheck(lambda x: ops.cut(x, first, (3, 2)).square(), x)
    y = ops.cut(x, first, (3, 2))
    (grad,) = torch.autograd.grad(y.pow(4).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    inside = reference_paste(torch.ones_like(y), first, (5, 6))
    assert_close(third, 24 * x * inside, "third derivative")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_come_in_any_layout(layout):
    x = draw(3, 5, 7, 12).contiguous(memory_format=layout).requires_grad_(True)
    grad_y = draw(3, 3, 4, 5, seed=1).permute(0, 3, 1, 2)
    for incoming in (grad_y, grad_y.contiguous(), grad_y[:, :1].expand(-1, 5, -1, -1)):
        (grad_x,) = torch.autograd.grad(ops.cut(x, PLACES, (3, 4)), x, incoming)
        assert torch.equal(grad_x, reference_paste(incoming, PLACES, (7, 12)))


@pytest.mark.parametrize(
    ("first", "size", "error", "message"),
    [
        (torch.zeros(2, 2), (2, 2), TypeError, "first must be int32 or int64"),
        (torch.zeros(3, 2, dtype=torch.long), (2, 2), ValueError, r"first must have shape \[2, 2\]"),
        (torch.zeros(2, 2, dtype=torch.long), (2, 6), ValueError, "size must be two numbers from 1 to"),
        (torch.zeros(2, 2, dtype=torch.long), (0, 2), ValueError, "size must be two numbers from 1 to"),
        (torch.tensor([[0, 0], [3, 0]]), (2, 2), ValueError, "first must leave room"),
        (torch.tensor([[0, 0], [0, -1]]), (2, 2), ValueError, "first must leave room"),
    ],
    ids=str,
)
def test_wrong_arguments(first, size, error, message):
    with pytest.raises(error, match=f"cut: {message}"):
        ops.cut(draw(2, 3, 4, 5), first, size)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
triton_cut = functools.partial(ops.cut, backend="triton")
device = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape, dtype=torch.float64, seed=0):
    """On the device of the Triton tests."""
    return (draw(*shape, seed=seed) * 50).to(dtype).to(device)


@on_triton()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("channels", "size"), [(8, (3, 4)), (5, (7, 9)), (1, (1, 1)), (16, (3, 12))], ids=str)
def test_triton_copies(dtype, layout, channels, size):
    x = numbers(3, channels, 7, 12, dtype=dtype).contiguous(memory_format=layout)
    first = PLACES.minimum(torch.tensor([7, 12]) - torch.tensor(size)).to(device)
    for integers in (first, first.int(), first.repeat_interleave(2, dim=1)[:, ::2]):
        y = triton_cut(x, integers, size)
        assert y.dtype == dtype
        assert torch.equal(y, by_hand(x, first, size))
        assert y.is_contiguous(memory_format=layout)


@on_triton()
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [8, 5])
def test_triton_gradients_have_the_places_of_the_cut(dtype, layout, channels):
    x = numbers(3, channels, 7, 12, dtype=dtype).contiguous(memory_format=layout).requires_grad_(True)
    places, grad_y = PLACES.to(device), numbers(3, channels, 3, 4, dtype=dtype, seed=1)
    y = triton_cut(x, places, (3, 4))
    for incoming in (grad_y, grad_y.contiguous(memory_format=torch.channels_last), grad_y[:, :1].expand_as(grad_y)):
        (grad_x,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        assert grad_x.dtype == dtype
        assert torch.equal(grad_x, reference_paste(incoming, places, (7, 12)))


@on_triton(compiled=False)
def test_triton_derivatives_of_every_order():
    x = numbers(2, 1, 3, 4).div(50).requires_grad_(True)
    first = torch.tensor([[1, 2], [0, 1]], device=device)
    torch.autograd.gradcheck(lambda x: triton_cut(x, first, (2, 2)), x)
    torch.autograd.gradgradcheck(lambda x: triton_cut(x, first, (2, 2)).square(), x)


@on_triton()
def test_triton_of_any_strides():
    whole = numbers(2, 24, 9, 7, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    first = torch.tensor([[1, 2], [4, 0]], device=device)
    views = {
        "some channels": whole[:, 8:16],
        "some rows and columns": whole[:, :, 1:8, 1:6],
        "transposed": whole.transpose(2, 3),
        "one image for all": whole[:1].expand(2, -1, -1, -1),
        "one noise image for all": whole[0, 0].contiguous().expand(2, 1, -1, -1),
        "rows of a wider image": whole.contiguous()[:, :, :, :5],
        "every second column": whole.contiguous()[:, :, :, ::2],
        "one column": whole[:, :, :, :1],
        "nothing": whole[:, :0],
    }
    for name, x in views.items():
        size = (min(3, x.shape[2]), min(2, x.shape[3]))
        places = first.minimum(first.new_tensor(x.shape[2:]) - first.new_tensor(size))
        assert torch.equal(triton_cut(x, places, size), by_hand(x, places, size)), name


@on_triton(compiled=False)
def test_triton_rows_longer_than_a_tile():
    x = numbers(2, 24, 3, 150, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    first = torch.tensor([[1, 9], [0, 0]], device=device)
    assert torch.equal(triton_cut(x, first, (2, 140)), by_hand(x, first, (2, 140)))
    x = x[:, :2].contiguous().repeat(1, 1, 20, 10)
    assert torch.equal(triton_cut(x, first, (50, 1400)), by_hand(x, first, (50, 1400)))


@on_triton()
def test_triton_reads_and_writes_nothing_outside():
    """Where a GPU is asked for a place outside of the image, which nothing checks there: zeros."""
    from epigraf_fast.kernels import cut as kernels

    x = numbers(1, 8, 4, 5, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    y = kernels.cut(x, torch.tensor([[2, -1]], device=device), (3, 3))
    expected = torch.zeros_like(y)
    expected[:, :, :2, 1:] = x[:, :, 2:, :2]
    assert torch.equal(y, expected)
    back = kernels.paste(y, torch.tensor([[2, -1]], device=device), (4, 5))
    expected = torch.zeros_like(x)
    expected[:, :, 2:, :2] = x[:, :, 2:, :2]
    assert torch.equal(back, expected)


@on_triton(compiled=False)
def test_triton_is_one_launch_each_way(monkeypatch):
    from epigraf_fast.kernels import cut as kernels

    launched = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args: launched.append(args[2:]) or launch(*args))
    x = numbers(3, 8, 7, 12).requires_grad_(True)
    triton_cut(x, PLACES.to(device), (3, 4)).sum().backward()
    assert launched == [((3, 4), False), ((7, 12), True)]


@on_triton(compiled=False)
def test_triton_copies_no_number_of_16_bytes():
    x = torch.zeros(2, 3, 4, 5, dtype=torch.complex128, device=device)
    with pytest.raises(TypeError, match=r"cut: x must have numbers of at most 8 bytes .* got torch.complex128"):
        triton_cut(x, torch.zeros(2, 2, dtype=torch.long, device=device), (2, 2))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_other_backends_agree(backend):
    x = draw(3, 5, 7, 12).requires_grad_(True)
    y = ops.cut(x, PLACES, (3, 4), backend=backend)
    assert torch.equal(y, by_hand(x, PLACES, (3, 4)))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, reference_paste(2 * y, PLACES, (7, 12)))
