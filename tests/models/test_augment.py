"""The augmentation pipeline against numbers worked by hand, plain loops and differences (method.md 12)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import SIGMAS, assert_close, draw, draw_uniform, gradcheck, gradgradcheck
from epigraf_fast.config import AugmentConfig
from epigraf_fast.models import augment as pipelines
from epigraf_fast.models.augment import (
    COLOUR,
    GEOMETRY,
    SYM6,
    Augment,
    exact_margins,
    geometric_map,
    recolour,
    resample,
    sample_bilinear,
)

ALL = (*GEOMETRY, *COLOUR)
NEUTRAL_IS_ONE = ("scale", "aniso", "contrast", "saturation")


def only(*names: str, **settings) -> Augment:
    """The pipeline with these operations enabled."""
    return Augment(AugmentConfig(**{name: name in names for name in ALL}, **settings))


def augment(images: Tensor, name: str, percentile: float) -> Tensor:
    return only(name)(images, torch.zeros([]), percentile)


def normal(percentile: float) -> float:
    """erfinv(2 Q - 1) by bisection."""
    low, high = -6.0, 6.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < percentile / 50 - 1 else (low, middle)
    return low


def drawn(augment: Augment, num: int, p: float, **size) -> dict[str, Tensor]:
    return augment.draw(num, size.get("size", (16, 16)), torch.tensor(p), torch.float64)._asdict()


# Draws and gates


def test_nothing_is_on_at_zero() -> None:
    for name, value in drawn(only(*ALL), 1000, 0.0).items():
        neutral = float(name in NEUTRAL_IS_ONE)
        assert (value == neutral).all(), name


@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
def test_gates_open_with_probability_p(p: float) -> None:
    """An open gate shows except where the value it lets through is the neutral one."""
    torch.manual_seed(0)
    num = 20_000
    values = drawn(only(*ALL), num, p, size=(64, 64))
    rotation = 1 - math.sqrt(1 - p)
    shows = {"x_flip": p / 2, "rotate90": p * 3 / 4, "luma_flip": p / 2}
    shows |= {"rotate_before": rotation, "rotate_after": rotation}
    for name, value in values.items():
        neutral = float(name in NEUTRAL_IS_ONE)
        if name == "xint":
            continue  # looked at below
        open_gates = (value != neutral).double()
        if open_gates.ndim == 2:
            assert torch.equal(open_gates[:, 0], open_gates[:, 1]), f"{name}: one gate for both axes"
            open_gates = open_gates[:, 0]
        expected = shows.get(name, p)
        deviation = math.sqrt(max(expected * (1 - expected), 0) / num)
        assert abs(open_gates.mean().item() - expected) <= SIGMAS * deviation, name
    either = ((values["rotate_before"] != 0) | (values["rotate_after"] != 0)).double().mean().item()
    assert abs(either - p) <= SIGMAS * math.sqrt(p * (1 - p) / num)


def test_distributions() -> None:
    torch.manual_seed(1)
    num = 20_000
    values = drawn(only(*ALL), num, 1.0, size=(64, 32))
    logs = {"scale": 0.2, "aniso": 0.2, "contrast": 0.5, "saturation": 1.0}
    for name, std in logs.items():
        value = values[name].log2()
        assert abs(value.std().item() / std - 1) < SIGMAS / math.sqrt(2 * num), name
        assert abs(value.mean().item()) < SIGMAS * std / math.sqrt(num), name
    for name, std in (("brightness", 0.2), ("xfrac", 1 / 8)):
        assert abs(values[name].std().item() / std - 1) < SIGMAS / math.sqrt(2 * num), name
    for name in ("rotate_before", "rotate_after", "hue"):
        assert -math.pi <= values[name].min() < -0.99 * math.pi, name
        assert 0.99 * math.pi < values[name].max() < math.pi, name
    assert values["rotate90"].unique().tolist() == [0, 1, 2, 3]
    assert values["x_flip"].unique().tolist() == [0, 1]
    assert values["luma_flip"].unique().tolist() == [0, 1]
    x, y = values["xint"].T
    assert x.unique().tolist() == list(range(-8, 9))
    assert y.unique().tolist() == list(range(-4, 5))
    # Every number has its own draw.
    flat = {name: value.flatten()[:num] for name, value in values.items()}
    flat["xfrac_y"], flat["xint_y"] = values["xfrac"][:, 1], values["xint"][:, 1]
    matrix = torch.corrcoef(torch.stack([*flat.values()])) - torch.eye(len(flat))
    assert matrix.abs().max() < SIGMAS / math.sqrt(num) * 1.5


def test_percentiles() -> None:
    values = only(*ALL).draw(3, (16, 32), torch.zeros([]), torch.float64, 70.0)._asdict()
    n = normal(70.0)
    expected = {
        "x_flip": 1.0,
        "rotate90": 2.0,
        "xint": [1.0, 2.0],  # 16 * 0.05 = 0.8, 32 * 0.05 = 1.6
        "scale": 2 ** (0.2 * n),
        "rotate_before": 0.4 * math.pi,
        "aniso": 2 ** (0.2 * n),
        "rotate_after": 0.0,
        "xfrac": [n / 8, n / 8],
        "brightness": 0.2 * n,
        "contrast": 2 ** (0.5 * n),
        "luma_flip": 1.0,
        "hue": 0.4 * math.pi,
        "saturation": 2**n,
    }
    for name, value in expected.items():
        assert_close(values[name], torch.tensor([value] * 3, dtype=torch.float64), name, "hand")


def test_percentile_draws_nothing() -> None:
    state = torch.get_rng_state()
    augment(draw(1, 3, 8, 8, dtype=torch.float32), "hue", 30.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("percentile", [0.0, 100.0, -1.0])
def test_percentiles_end_before_the_infinite(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"percentile must be in \(0, 100\)"):
        augment(torch.zeros(1, 3, 8, 8), "hue", percentile)


def test_channels() -> None:
    with pytest.raises(ValueError, match="must have 1 channel or a multiple of 3, got 4"):
        only("hue")(torch.zeros(1, 4, 8, 8), torch.zeros([]))


# Colours by hand


@pytest.mark.parametrize(
    ("name", "percentile", "expected"),
    [
        # erfinv(2 * 0.7602499 - 1) = 0.5
        ("brightness", 76.024994, [0.3, 0.6, -0.4]),
        ("contrast", 76.024994, [0.2 * 2**0.25, 0.5 * 2**0.25, -0.5 * 2**0.25]),
        ("luma_flip", 60.0, [0.2 - 2 * 0.2 / 3, 0.5 - 2 * 0.2 / 3, -0.5 - 2 * 0.2 / 3]),
        # (2 Q - 1) pi = 2 pi / 3 carries red to green, green to blue, blue to red.
        ("hue", 500 / 6, [-0.5, 0.2, 0.5]),
        ("saturation", 76.024994, [0.2 / 3 + 2**0.5 * (v - 0.2 / 3) for v in (0.2, 0.5, -0.5)]),
    ],
)
def test_colours_by_hand(name: str, percentile: float, expected: list[float]) -> None:
    image = torch.tensor([0.2, 0.5, -0.5], dtype=torch.float64).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    result = augment(image, name, percentile)
    assert_close(result, torch.tensor(expected).double().view(1, 3, 1, 1).expand(2, 3, 8, 8), name, "hand")


def test_colours_follow_one_another() -> None:
    """Each operation alone, in the order of the table."""
    image = draw(2, 3, 8, 8)
    expected = image
    for name in COLOUR:
        expected = augment(expected, name, 65.0)
    assert_close(only(*COLOUR)(image, torch.zeros([]), 65.0), expected, "all colours")


def test_grey_is_three_equal_channels() -> None:
    """... averaged, without hue and saturation."""
    image = draw(2, 1, 8, 8)
    three = only("brightness", "contrast", "luma_flip")(image.expand(-1, 3, -1, -1), torch.zeros([]), 65.0)
    assert_close(only(*COLOUR)(image, torch.zeros([]), 65.0), three.mean(dim=1, keepdim=True), "grey")


def test_every_image_has_its_own_colours() -> None:
    image = draw(1, 3, 8, 8, dtype=torch.float32).expand(4, -1, -1, -1)
    result = only(*COLOUR)(image, torch.ones([]))
    assert len({tuple(x.flatten().tolist()) for x in result}) == 4


# Geometry by hand


@pytest.mark.parametrize("size", [(8, 8), (16, 32), (64, 64)])
@pytest.mark.parametrize("exact", [False, True])
def test_nothing_on_returns_the_image(size: tuple[int, int], exact: bool) -> None:
    image = draw_uniform(2, 3, *size, dtype=torch.float32) * 2 - 1
    assert_close(only(*ALL, exact_margins=exact)(image, torch.zeros([])), image, "at p = 0", "exact")


@pytest.mark.parametrize("margins", [None, (6, 6, 6, 6), (3, 7, 5, 6)])
def test_the_filter_is_orthonormal(margins: tuple[int, ...] | None) -> None:
    """Up, sampled at the pixels, and down again is nothing but roundings; beyond margins of 6 the border suffers."""
    image = draw_uniform(2, 3, 16, 24) * 2 - 1
    linear, shift = torch.eye(2).double().expand(2, -1, -1), torch.zeros(2, 2).double()
    taps = torch.tensor(SYM6, dtype=torch.float64)
    result = resample(image, linear, shift, taps / taps.sum(), margins)
    assert_close(result[..., 3:-3, 3:-3], image[..., 3:-3, 3:-3], "inside")
    if margins != (3, 7, 5, 6):
        assert_close(result, image, "resampled")
    single = resample(image.float(), linear.float(), shift.float(), (taps / taps.sum()).float(), margins)
    assert_close(single, result, "in fp32", "augment_identity")


@pytest.mark.parametrize(
    ("name", "percentile", "pad"),
    [
        # 16 * (2 Q - 1) / 8 = 1: one pixel to the right and down, the rest reflected.
        ("xint", 75.0, (1, -1, 1, -1)),
        ("xint", 25.0, (-1, 1, -1, 1)),
        # 16 * erfinv(2 Q - 1) / 8 = 1, by way of fractions.
        ("xfrac", 76.02499389065, (1, -1, 1, -1)),
    ],
)
def test_pixels_by_hand(name: str, percentile: float, pad: tuple[int, ...]) -> None:
    image = draw_uniform(2, 3, 16, 16) * 2 - 1
    moved = torch.nn.functional.pad(image, [max(n, 0) for n in pad], mode="reflect")
    moved = torch.nn.functional.pad(moved, [min(n, 0) for n in pad])
    assert_close(augment(image, name, percentile), moved, name, "hand")


def blob(x: Tensor, y: Tensor) -> Tensor:
    """A smooth bump at (5, -3), longer than wide."""
    return torch.exp(-((x - 5) ** 2) / 32 - (y + 3) ** 2 / 18)


@pytest.mark.parametrize("name", ["x_flip", "rotate90", "scale", "aniso", "rotate", "xfrac"])
@pytest.mark.parametrize("percentile", [30.0, 80.0])
def test_a_blob_is_moved_as_its_formula(name: str, percentile: float) -> None:
    """The filter's centre is not quite its tap 5: it shifts by d, and back by d after the map."""
    n, a = normal(percentile), (percentile / 50 - 1) * math.pi
    d = (5 - sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)) / 2
    axis = torch.arange(48, dtype=torch.float64) - 23.5
    y, x = torch.meshgrid(axis - d, axis - d, indexing="ij")
    source = {
        "x_flip": (x if percentile < 50 else -x, y),
        "rotate90": (-y, x) if percentile < 50 else (y, -x),
        "scale": (x / 2 ** (0.2 * n), y / 2 ** (0.2 * n)),
        "aniso": (x / 2 ** (0.2 * n), y * 2 ** (0.2 * n)),
        "rotate": (math.cos(a) * x - math.sin(a) * y, math.sin(a) * x + math.cos(a) * y),
        "xfrac": (x - 48 * n / 8, y - 48 * n / 8),
    }[name]
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    result = augment(blob(x, y)[None, None].expand(1, 3, -1, -1), name, percentile)
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))  # beyond is a reflection
    expected = blob(source[0] + d, source[1] + d).expand(1, 3, -1, -1)
    assert_close(result[inside], expected[inside], name, "augment_blob")


def test_order_of_the_matrices() -> None:
    """M written out as a chain of point maps, from the output back to the input."""
    augment = only(*ALL)
    torch.manual_seed(3)
    values = augment.draw(5, (32, 16), torch.ones([]), torch.float64)
    point = draw(5, 2, seed=1) * 8
    at = point - values.xfrac * torch.tensor([32.0, 16.0])

    def rotated(at: Tensor, angle: Tensor) -> Tensor:
        c, s = angle.cos(), angle.sin()
        return torch.stack([c * at[:, 0] - s * at[:, 1], s * at[:, 0] + c * at[:, 1]], dim=1)

    at = rotated(at, values.rotate_after)
    at = at * torch.stack([1 / values.aniso, values.aniso], dim=1)
    at = rotated(at, values.rotate_before) / values.scale[:, None] - values.xint
    at = rotated(at, values.rotate90 * math.pi / 2)
    at = at * torch.stack([1 - 2 * values.x_flip, torch.ones(5)], dim=1)
    linear, shift = geometric_map(values, (32, 16))
    assert_close((linear @ point[..., None])[..., 0] + shift, at, "point")


def test_resampling_equals_plain_loops() -> None:
    """Padding, zero insertion, filters and bilinear taps written out for one channel, with margins of their own."""
    width, height, margins = 8, 10, (3, 2, 4, 1)
    image = draw(1, 1, height, width)
    linear = torch.tensor([[[0.9, -0.3], [0.2, 1.1]]], dtype=torch.float64)
    shift = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    taps = torch.tensor(SYM6, dtype=torch.float64)
    taps = taps / taps.sum()
    left, right, top, bottom = margins

    def mirrored(i: int, size: int) -> int:
        return abs(i) if i < size else 2 * (size - 1) - i

    padded = torch.zeros(height + top + bottom, width + left + right, dtype=torch.float64)
    for row in range(padded.shape[0]):
        for column in range(padded.shape[1]):
            padded[row, column] = image[0, 0, mirrored(row - top, height), mirrored(column - left, width)]
    rows, columns = (2 * n for n in padded.shape)

    def spread(size: int) -> Tensor:
        """Zero insertion, 6 zeros before, 5 after, convolution, gain 2 along one side: [2 size, size]."""
        out = torch.zeros(2 * size, size, dtype=torch.float64)
        for o in range(2 * size):
            for k in range(12):
                i = o + 11 - k - 6
                if 0 <= i < 2 * size and i % 2 == 0:
                    out[o, i // 2] += 2 * taps[k]
        return out

    upsampled = spread(padded.shape[0]) @ padded @ spread(padded.shape[1]).T
    sampled = torch.zeros(2 * (height + 6), 2 * (width + 6), dtype=torch.float64)
    for row in range(sampled.shape[0]):
        for column in range(sampled.shape[1]):
            # In pixels around the centre of the output image, whose first pixel lies 6 upsampled ones from the border.
            x, y = (column - sampled.shape[1] / 2) / 2 + 0.5, (row - sampled.shape[0] / 2) / 2 + 0.5
            x, y = (linear[0] @ torch.tensor([x, y], dtype=torch.float64) + shift[0]).tolist()
            x, y = x + (left - right) / 2, y + (top - bottom) / 2
            x, y = 2 * x - 0.5 + columns / 2 - 0.5, 2 * y - 0.5 + rows / 2 - 0.5
            for j in (math.floor(y), math.floor(y) + 1):
                for i in (math.floor(x), math.floor(x) + 1):
                    if 0 <= j < rows and 0 <= i < columns:
                        sampled[row, column] += (1 - abs(x - i)) * (1 - abs(y - j)) * upsampled[j, i]

    def gather(size: int) -> Tensor:
        """Crop 1, correlation, every second: [size, 2 (size + 6)]."""
        out = torch.zeros(size, 2 * (size + 6), dtype=torch.float64)
        for o in range(size):
            out[o, 1 + 2 * o : 13 + 2 * o] = taps
        return out

    expected = gather(height) @ sampled @ gather(width).T
    assert_close(resample(image, linear, shift, taps, margins)[0, 0], expected, "resampled")


def test_margins_by_hand() -> None:
    """A shift by (3, -2) and an enlargement by 2 of a 16x8 image: corners at +-7.5 and +-3.5, then at +-15 and +-7."""
    one, shift, none = torch.eye(2)[None], torch.tensor([[3.0, -2.0]]), torch.zeros(1, 2)
    assert exact_margins(one, shift, (16, 8)) == (3, 9, 7, 4)  # 7.5 - 3 + 6 - 7.5, ..., 3.5 + 2 + 6 - 3.5 = 8 > 7
    assert exact_margins(2 * one, none, (16, 8)) == (14, 14, 7, 7)  # 15 + 6 - 7.5, 7 + 6 - 3.5 = 9.5 > 7
    assert exact_margins(torch.cat([one, 2 * one]), torch.cat([shift, none]), (16, 8)) == (14, 14, 7, 7)


@pytest.mark.parametrize("seed", range(4))
def test_fixed_margins_show_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw_uniform(4, 3, 32, 32, seed=seed, dtype=torch.float32) * 2 - 1
    results, margins, original = [], [], pipelines.resample

    def resample(images: Tensor, linear: Tensor, shift: Tensor, taps: Tensor, given: Any, **options: Any) -> Tensor:
        margins.append(given)
        return original(images, linear, shift, taps, given, **options)

    monkeypatch.setattr(pipelines, "resample", resample)
    for exact in (False, True):
        torch.manual_seed(seed)
        results.append(only(*GEOMETRY, exact_margins=exact)(image, torch.ones([])))
    assert margins[0] is None
    assert margins[1] is not None
    assert_close(results[0], results[1], "margins", "augment_margins")


# Derivatives


def test_sampling_is_torchs() -> None:
    images, grid = draw(2, 3, 5, 7), draw_uniform(2, 4, 6, 2) * 2.6 - 1.3
    expected = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    assert torch.equal(sample_bilinear(images, grid), expected)


def test_sampling_is_differentiable_twice() -> None:
    grid = draw_uniform(2, 4, 3, 2) * 2.6 - 1.3
    inputs = {"images": draw(2, 2, 5, 4)}

    def squared(images: Tensor) -> Tensor:
        return sample_bilinear(images, grid).square()

    gradcheck(squared, inputs, "sample_bilinear")
    gradgradcheck(squared, inputs, "sample_bilinear")


def test_pipeline_is_differentiable_twice() -> None:
    """Through the square: the pipeline itself is affine."""
    pipeline = only(*ALL)

    def squared(patches: Tensor) -> Tensor:
        return pipeline(patches, torch.zeros([]), 62.0).square()

    inputs = {"patches": draw(1, 3, 4, 4) / 4}
    gradcheck(squared, inputs, "augment")
    gradgradcheck(squared, inputs, "augment")


def test_a_choice_is_differentiable_twice() -> None:
    """To what was chosen and to what was not: images that nothing moves have their gradients, once."""
    where, zero = torch.tensor([True, False])[:, None], torch.zeros([], dtype=torch.float64)

    def squared(first: Tensor, second: Tensor) -> Tensor:
        return pipelines.choose(where, first, second, zero).square()

    inputs = {"first": draw(2, 3), "second": draw(2, 3, seed=1)}
    gradcheck(squared, inputs, "choose")
    gradgradcheck(squared, inputs, "choose")


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_every_p_from_1_on_is_1(p: float) -> None:
    """ADA's adjustment may go beyond."""
    image, results = draw_uniform(4, 3, 16, 16, dtype=torch.float32) * 2 - 1, []
    for value in (1.0, p):
        torch.manual_seed(0)
        results.append(only(*ALL)(image, torch.tensor(value)))
    assert torch.equal(*results)
    assert results[0].isfinite().all()


def test_pipeline_is_affine() -> None:
    pipeline = only(*ALL)
    a, b = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1)
    at = [pipeline(x, torch.zeros([]), 35.0) for x in (a, b, 0.3 * a + 0.7 * b)]
    assert_close(at[2], 0.3 * at[0] + 0.7 * at[1], "mixture")


def test_recolour_is_a_matrix_on_every_pixel() -> None:
    images, matrix, shift = draw(2, 3, 4, 5), draw(2, 3, 3, seed=1), draw(2, 3, seed=2)
    expected = torch.einsum("bij,bjhw->bihw", matrix, images) + shift[:, :, None, None]
    assert_close(recolour(images, matrix, shift), expected, "recoloured")


def test_further_images_are_moved_and_recoloured_alike() -> None:
    first, second = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1)
    results = []
    for images in (first, second, torch.cat([first, second], dim=1)):
        torch.manual_seed(0)
        results.append(only(*ALL)(images, torch.ones([])))
    assert_close(results[2], torch.cat(results[:2], dim=1), "two images in one")


def test_no_parameters_and_nothing_to_store() -> None:
    pipeline = only(*ALL)
    assert not list(pipeline.parameters())
    assert not pipeline.state_dict()


def test_disabled_operations_do_nothing() -> None:
    """A setting for every operation; nothing enabled returns the images themselves."""
    names = {f.name for f in dataclasses.fields(AugmentConfig)}
    assert set(ALL) <= names
    image = draw(2, 3, 8, 8, dtype=torch.float32)
    assert only()(image, torch.ones([])) is image
