"""Rectangles of images, each at its own place, and their transpose."""

from __future__ import annotations

import pytest
import torch

from checks import assert_close, draw
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
