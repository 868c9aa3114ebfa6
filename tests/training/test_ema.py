"""The average generator."""

from __future__ import annotations

import torch
from torch import nn

from checks import assert_close
from epigraf_fast.training.ema import average_of, update_average


def network(value: float, count: int) -> nn.Module:
    """One layer of equal weights, and a buffer of each kind."""
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    module.register_buffer("running", torch.full((3,), value))
    module.register_buffer("count", torch.tensor(count))
    return module


def test_parameters_are_averaged_and_buffers_copied() -> None:
    average, module = average_of(network(1.0, 1)), network(5.0, 7)
    update_average(average, module, 0.75)
    for parameter in average.parameters():
        assert_close(parameter, torch.full_like(parameter, 2.0), "0.75 * 1 + 0.25 * 5", "hand")
    assert_close(average.running, torch.full((3,), 5.0), "buffer", "exact")
    assert average.count == 7


def test_decay_zero_copies_and_decay_one_keeps() -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 5)
    average = average_of(nn.Linear(5, 5))
    before = average.weight.clone()
    update_average(average, module, 1.0)
    assert torch.equal(average.weight, before)
    update_average(average, module, 0.0)
    assert torch.equal(average.weight, module.weight)


def test_the_average_is_a_copy_in_evaluation_mode_without_gradients() -> None:
    module = network(1.0, 1)
    average = average_of(module)
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    update_average(average, network(3.0, 2), 0.5)
    assert_close(module.weight, torch.ones(2, 2), "the module itself", "exact")
    assert module.count == 1
