"""Views, indexing, resizing, boxes and signals: what the node cases of the onnx package lack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim

pytest.importorskip("onnx_ir")

from onnx import TensorProto

from tests.onnx.operators import call, module
from torch_rtx.errors import OnnxError

X = torch.arange(60.0).reshape(3, 4, 5)
FAR = 2**63 - 1


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.float8_e5m2])
@pytest.mark.parametrize("step", [1, 2, -1, -3])
def test_slices(step: int, dtype: torch.dtype) -> None:
    x = torch.arange(7).to(dtype)
    for start in (-FAR, -9, -7, -3, -1, 0, 2, 6, 7, 9, FAR):
        for end in (-FAR - 1, -8, -7, -2, -1, 0, 3, 6, 7, 9, FAR):
            first, last = (place + 7 if place < 0 else place for place in (start, end))
            low, high = (0, 7) if step > 0 else (-1, 6)
            places = range(min(max(first, max(low, 0)), high), min(max(last, low), high), step)
            found = call("Slice", 13, x, ints(start), ints(end), ints(-1), ints(step))
            assert found.dtype == dtype
            assert found.float().tolist() == list(places), (start, end)


@pytest.mark.parametrize(("mode", "numpy_mode"), [("reflect", "reflect"), ("edge", "edge"), ("wrap", "wrap")])
def test_pads_that_are_wider_than_the_axis(mode: str, numpy_mode: Any) -> None:
    for before, after in ((0, 0), (2, 3), (9, 11), (0, 40)):
        expected = np.pad(X.numpy(), ((0, 0), (before, after), (1, 0)), mode=numpy_mode)
        pads = ints(before, 1, after, 0)
        assert np.array_equal(call("Pad", 19, X, pads, None, ints(1, -1), mode=mode).numpy(), expected)
    cropped = call("Pad", 19, X, ints(0, -1, 0, 0, 2, 0), mode=mode)
    assert np.array_equal(cropped.numpy(), np.pad(X[:, 1:].numpy(), ((0, 0), (0, 2), (0, 0)), mode=numpy_mode))


def test_pads_of_old_opsets() -> None:
    expected = torch.nn.functional.pad(X, (0, 2, -1, 0), value=7.0)
    pads = [0, -1, 0, 0, 0, 2]
    assert torch.equal(call("Pad", 2, X, pads=pads, value=7.0), expected)
    assert torch.equal(call("Pad", 1, X, paddings=pads, value=7.0), expected)
    assert torch.equal(call("Pad", 11, X, np.array(pads), np.float32(7)), expected)


def test_views_of_old_opsets() -> None:
    assert call("Reshape", 1, X, shape=[0, -1]).shape == (3, 20)
    assert call("Squeeze", 11, X[:1], axes=[0]).shape == (4, 5)
    assert call("Unsqueeze", 11, X, axes=[-1, 0]).shape == (1, 3, 4, 5, 1)
    assert torch.equal(call("Slice", 1, X, starts=[0, -2], ends=[FAR, -1], axes=[0, 1]), X[:, -2:-1])
    assert torch.equal(call("Tile", 1, X, np.float32([2]), np.float32([1])), X.tile(1, 2, 1))
    assert torch.equal(call("Concat", 1, X, X), torch.cat([X, X], 1))
    assert [part.shape[1] for part in call("Split", 2, X, outputs=2, axis=1, split=[1, 3])] == [1, 3]


def test_empty_tensors_take_a_shape() -> None:
    assert call("Reshape", 14, torch.zeros(0, 3), ints(0, -1)).shape == (0, 3)
    assert call("Reshape", 14, torch.zeros(0, 3), ints(3, 0), allowzero=1).shape == (3, 0)


@pytest.mark.parametrize(("length", "count", "sizes"), [(7, 3, [3, 3, 1]), (6, 2, [3, 3]), (5, 4, [2, 2, 1, 0])])
def test_uneven_splits(length: int, count: int, sizes: list[int]) -> None:
    if sizes[-1] == 0:
        sizes = [2, 2, 2, -1]  # no part may be negative
        with pytest.raises(OnnxError):
            call("Split", 18, torch.arange(length), outputs=count, num_outputs=count)
    else:
        parts = call("Split", 18, torch.arange(length), outputs=count, num_outputs=count)
        assert [len(part) for part in parts] == sizes


@pytest.mark.parametrize("name", ["int16", "int32", "int64", "float32", "float64"])
def test_ranges_have_the_type_of_their_bounds(name: str) -> None:
    for bounds in ((3, 20, 4), (3, -200, -2), (3, 1, 2), (0, 100, 1)):
        found = call("Range", 11, *(np.array(bound, name) for bound in bounds))
        assert found.dtype == getattr(torch, name)
        assert found.tolist() == list(range(*bounds))
    with pytest.raises(OnnxError, match="delta"):
        call("Range", 11, *(np.array(bound, name) for bound in (0, 1, 0)))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.int4, torch.bfloat16])
def test_elements_of_every_type_move(dtype: torch.dtype) -> None:
    """PyTorch has few kernels for some of them."""
    bits = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    x = bits.view(dtype) if dtype.itemsize == 1 else bits.to(dtype)

    def plain(x: Tensor) -> list[Any]:
        assert x.dtype == dtype
        return (x.view(torch.uint8) if dtype.itemsize == 1 else x.to(torch.int64)).tolist()

    assert plain(call("Gather", 13, x, ints(-1, 0), axis=1)) == [[2, 0], [5, 3]]
    assert plain(call("GatherElements", 13, x, np.array([[-1]]))) == [[3]]
    assert plain(call("Concat", 13, x, x, axis=0)) == [[0, 1, 2], [3, 4, 5]] * 2
    assert plain(call("Transpose", 13, x)) == [[0, 3], [1, 4], [2, 5]]
    assert plain(call("Reshape", 25, x, ints(3, 2))) == [[0, 1], [2, 3], [4, 5]]
    assert plain(call("Expand", 13, x, ints(2, 1, 1))) == [[[0, 1, 2], [3, 4, 5]]] * 2
    assert plain(call("Trilu", 14, x)) == [[0, 1, 2], [0, 4, 5]]
    assert plain(call("ScatterND", 18, x, np.array([[1, 1]]), x[0, :1])) == [[0, 1, 2], [3, 0, 5]]


@pytest.mark.parametrize("place", [1, -1])
def test_one_slice_that_is_known_is_a_view(place: int) -> None:
    for index, expected in ((np.array(place), X[:, place]), (ints(place), X[:, [place]])):
        found = call("Gather", 13, X, index, axis=-2)
        assert torch.equal(found, expected)
        assert found.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()
        assert torch.equal(call("Gather", 13, X, torch.from_numpy(index), axis=1), expected)
    with pytest.raises(OnnxError, match="Gather"):
        call("Gather", 13, X, np.array(4), axis=1)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_scattered_slices_meet(reduction: str) -> None:
    function = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    places, updates = np.array([[1], [-2], [1]]), np.array([[3, 9], [1, 1], [7, 2]])
    expected = np.array([[5, 5], [5, 5], [5, 5]])
    function.at(expected, places[:, 0], updates)
    found = call("ScatterND", 18, torch.full((3, 2), 5), places, torch.from_numpy(updates), reduction=reduction)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("name", ["int64", "float32", "uint64"])
def test_unique_elements(axis: int | None, name: str) -> None:
    x = np.random.default_rng(1).integers(0, 3, (6, 2)).astype(name)
    attributes = {} if axis is None else {"axis": axis}
    expected = np.unique(x, True, True, True, axis=axis)
    found = call("Unique", 11, torch.from_numpy(x), outputs=4, **attributes)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.numpy().reshape(other.shape), other)
    values, first, inverse, counts = call("Unique", 11, torch.from_numpy(x), outputs=4, sorted=0, **attributes)
    assert first.tolist() == sorted(expected[1])
    source = torch.from_numpy(x).reshape(-1) if axis is None else torch.from_numpy(x)
    at = axis or 0
    assert values.tolist() == np.take(source.numpy(), first.numpy(), at).tolist()
    assert np.take(values.numpy(), inverse.numpy(), at).tolist() == source.tolist()
    assert counts.sum() == len(inverse)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_nearest_before_opset_11() -> None:
    """Where an axis shrinks, places are rounded up."""
    x = torch.arange(1.0, 9).reshape(1, 1, 2, 4)
    assert call("Resize", 10, x, np.float32([1, 1, 0.6, 0.6])).tolist() == [[[[1, 3]]]]
    assert call("Upsample", 9, x, np.float32([1, 1, 1, 2])).tolist() == x.repeat_interleave(2, 3).tolist()
    assert call("Upsample", 7, x, scales=[1.0, 1, 2, 1]).tolist() == x.repeat_interleave(2, 2).tolist()
    assert call("Upsample", 1, x, height_scale=2.0, width_scale=1.0).tolist() == x.repeat_interleave(2, 2).tolist()


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("transformation", ["half_pixel", "align_corners"])
def test_interpolation_is_that_of_pytorch(mode: str, transformation: str) -> None:
    """The sum along each axis and F.interpolate agree: channels that are last can't be resized by the latter."""
    x = torch.randn(1, 2, 5, 6)
    options = {"mode": mode, "coordinate_transformation_mode": transformation}
    for size in ((10, 3), (1, 9), (7, 7)):
        first = call("Resize", 19, x, None, None, ints(1, 2, *size), **options)
        last = call("Resize", 19, x.permute(0, 2, 3, 1), None, None, ints(1, *size, 2), **options)
        torch.testing.assert_close(first, last.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_floors_of_float32_scales() -> None:
    """1.5 / 0.6 - 0.5 is 2 in float32, and its floor 1 in float64."""
    options = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "floor"}
    assert call("Resize", 19, torch.arange(5.0), None, np.float32([0.6]), **options).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("op", "opset", "inputs", "attributes"),
    [
        ("Resize", 19, (X, None, np.float32([1, 1, 2])), {"mode": "area"}),
        ("Resize", 19, (X, None, np.float32([1, 1, 2])), {"nearest_mode": "up"}),
        ("Resize", 19, (X, None, np.float32([1, 1, 2])), {"coordinate_transformation_mode": "half"}),
        ("Resize", 19, (X, None, None, ints(3, 4, 9)), {"keep_aspect_ratio_policy": "any"}),
        ("Resize", 19, (X,), {}),
        ("Pad", 19, (X, ints(0, 0, 1, 0, 0, 1)), {"mode": "mirror"}),
        ("Expand", 13, (X, ints(3, 2, 5)), {}),
        ("Squeeze", 13, (X, ints(1)), {}),
        ("ScatterND", 18, (X, ints(0)[None], X[:1]), {"reduction": "sum"}),
        ("GridSample", 20, (X[None], torch.zeros(1, 2, 2, 2)), {"mode": "area"}),
        ("DFT", 20, (X, None, ints(2)), {}),
        ("DepthToSpace", 13, (X[None],), {"blocksize": 1, "mode": "RGB"}),
        ("BitShift", 11, (X.to(torch.uint8), X.to(torch.uint8)), {"direction": "UP"}),
    ],
)
def test_what_an_operator_can_not_do(op: str, opset: int, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> None:
    with pytest.raises(OnnxError, match=op):
        call(op, opset, *inputs, **attributes)


def suppressed(boxes: Tensor, scores: Tensor, most: int, limit: float, least: float) -> list[list[int]]:
    """Greedy suppression, box by box."""
    found = []
    for batch in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            kept: list[int] = []
            for box in torch.argsort(-scores[batch, kind], stable=True).tolist():
                y1, x1, y2, x2 = boxes[batch, box].tolist()
                overlaps = []
                for other in kept:
                    a1, b1, a2, b2 = boxes[batch, other].tolist()
                    shared = max(min(y2, a2) - max(y1, a1), 0) * max(min(x2, b2) - max(x1, b1), 0)
                    overlaps.append(shared / ((y2 - y1) * (x2 - x1) + (a2 - a1) * (b2 - b1) - shared))
                if len(kept) < most and scores[batch, kind, box] > least and all(o <= limit for o in overlaps):
                    kept.append(box)
            found += [[batch, kind, box] for box in kept]
    return found


@pytest.mark.parametrize("most", [0, 4, 1000])
def test_suppression_of_overlaps(most: int) -> None:
    torch.manual_seed(0)
    corner = torch.rand(2, 40, 2)
    boxes, scores = torch.cat([corner, corner + 0.1 + torch.rand(2, 40, 2) / 2], 2), torch.rand(2, 3, 40)
    inputs = (boxes, scores, ints(most), np.float32([0.4]), np.float32([0.2]))
    expected = suppressed(boxes, scores, most, 0.4, 0.2)
    assert call("NonMaxSuppression", 11, *inputs).tolist() == expected
    centers = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], 2)
    assert call("NonMaxSuppression", 11, centers, *inputs[1:], center_point_box=1).tolist() == expected
    swapped = boxes[..., [2, 1, 0, 3]]
    assert call("NonMaxSuppression", 11, swapped, *inputs[1:]).tolist() == expected


def test_regions_with_samples_of_their_own_number() -> None:
    """Each as alone, where the number of samples is that of the largest region."""
    x, rois = torch.randn(2, 3, 8, 9), torch.tensor([[0.0, 0, 6, 5], [1.5, 2, 9, 9.5], [-2, -3, 40, 4], [3, 3, 3, 3]])
    batch = torch.tensor([0, 1, 1, 0])
    for mode in ("avg", "max"):
        options = {"mode": mode, "output_height": 3, "output_width": 2}
        whole = call("RoiAlign", 16, x, rois, batch, **options)
        alone = [call("RoiAlign", 16, x, rois[i : i + 1], batch[i : i + 1], **options) for i in range(4)]
        torch.testing.assert_close(whole, torch.cat(alone))
    assert call("RoiAlign", 16, x, rois[:0], batch[:0]).shape == (0, 3, 1, 1)


def test_blocks_of_volumes_come_together() -> None:
    """All blocks of ones: each voxel is the number of blocks that cover it."""
    found = call("Col2Im", 18, torch.ones(1, 2 * 8, 2 * 2 * 3), ints(3, 3, 4), ints(2, 2, 2))
    counts = torch.tensor([1.0, 2, 1])
    expected = counts[:, None, None] * counts[:, None] * torch.tensor([1.0, 2, 2, 1])
    assert torch.equal(found, expected.expand(1, 2, 3, 3, 4))


# ---- captures --------------------------------------------------------------------------------------------------------

Y = torch.arange(480.0).reshape(6, 8, 10)
CAPTURED: list[tuple[str, int, tuple[Any, ...], dict[str, Any]]] = [
    ("Reshape", 14, (Y, ints(0, -1)), {}),
    ("Flatten", 13, (Y,), {"axis": 2}),
    ("Split", 18, (Y,), {"axis": 1, "num_outputs": 2}),
    ("Slice", 13, (Y, ints(-1, 1), ints(-FAR, FAR), ints(0, 1), ints(-2, 1)), {}),
    ("Expand", 13, (Y, ints(2, 1, 1, 1)), {}),
    ("Tile", 13, (Y, ints(1, 2, 1)), {}),
    ("Pad", 19, (Y, ints(0, 2, 1, 0, 1, 2)), {"mode": "reflect"}),
    ("Gather", 13, (Y, ints(-1, 0)), {"axis": 1}),
    ("TopK", 11, (Y, ints(2)), {"axis": 1}),
    ("SpaceToDepth", 13, (Y[None],), {"blocksize": 2}),
    ("Resize", 19, (Y[None], None, np.float32([1, 1, 2, 0.5])), {"mode": "linear"}),
    ("Resize", 19, (Y[None], None, None, ints(1, 3, 6, 7)), {"mode": "cubic", "antialias": 1}),
    ("GridSample", 20, (Y[None], torch.rand(1, 6, 2, 2)), {}),
    ("NonZero", 13, (Y,), {}),
    ("NonMaxSuppression", 11, (torch.rand(1, 8, 4), torch.rand(1, 2, 8), ints(3), np.float32([0.3])), {}),
    ("STFT", 17, (torch.randn(2, 32, 1), ints(4), None, ints(8)), {}),
]


@pytest.mark.parametrize(("op", "opset", "inputs", "attributes"), CAPTURED, ids=[row[0] for row in CAPTURED])
def test_sizes_stay_symbolic(op: str, opset: int, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> None:
    """A capture serves inputs of twice the size."""
    tensors = tuple(x for x in inputs if isinstance(x, Tensor))
    made = module(op, opset, inputs, 2 if op in ("Split", "TopK") else 1, **attributes)
    sizes = [{axis: Dim.AUTO for axis, size in enumerate(x.shape) if size > 4} for x in tensors]
    program = torch.export.export(made, tensors, dynamic_shapes=tuple(sizes), strict=False)
    larger = [
        x.repeat([2 if axis in free else 1 for axis in range(x.dim())]) for x, free in zip(tensors, sizes, strict=True)
    ]
    for given in (tensors, tuple(larger)):
        found, expected = program.module()(*given), made(*given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_constant_has_the_type_of_its_value() -> None:
    for dtype in (np.int8, np.float16, bool):
        found = call("ConstantOfShape", 20, ints(2, 3), value=np.array([1], dtype))
        assert found.tolist() == [[1] * 3] * 2
        assert found.numpy().dtype == dtype
    assert call("EyeLike", 22, X[0], dtype=TensorProto.INT8, k=-1).dtype == torch.int8
