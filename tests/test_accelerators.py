import pytest

from cai_jax.accelerators import ACCELERATORS, GIB, by_device_kind, parse_slice, slices_of
from cai_jax.errors import UserError


@pytest.mark.parametrize(
    "name, chips, machines, shape",
    [
        ("v4-8", 4, 1, (2, 2, 1)),
        ("v4-16", 8, 2, (2, 2, 2)),
        ("v4-32", 16, 4, (2, 2, 4)),
        ("v4-64", 32, 8, (2, 4, 4)),
        ("v4-128", 64, 16, (4, 4, 4)),
        ("v4-256", 128, 32, (4, 4, 8)),
        ("v4-512", 256, 64, (4, 8, 8)),
        ("v5p-8", 4, 1, (2, 2, 1)),
        ("v5p-16", 8, 2, (2, 2, 2)),
        ("v5p-32", 16, 4, (2, 2, 4)),
        ("v5p-2048", 1024, 256, (8, 8, 16)),
        ("v5e-1", 1, 1, (1, 1)),
        ("v5e-4", 4, 1, (2, 2)),
        ("v5e-8", 8, 1, (2, 4)),
        ("v5e-16", 16, 4, (4, 4)),
        ("v5litepod-16", 16, 4, (4, 4)),
        ("v5e-128", 128, 32, (8, 16)),
        ("v6e-8", 8, 1, (2, 4)),
        ("v6e-16", 16, 4, (4, 4)),
        ("v6e-256", 256, 64, (16, 16)),
        ("V4-32", 16, 4, (2, 2, 4)),
        ("h100x8", 8, 1, ()),
        ("h100x32", 32, 4, ()),
        ("h200x2", 2, 1, ()),
    ],
)
def test_names_of_slices(name, chips, machines, shape):
    piece = parse_slice(name)
    assert (piece.chips, piece.machines, piece.shape) == (chips, machines, shape)


@pytest.mark.parametrize(
    "name, wraps",
    [
        ("v4-64", (False, False, False)),
        ("v4-128", (True, True, True)),
        ("v5p-512", (True, True, True)),
        ("v5e-64", (False, False)),
        ("v6e-128", (False, True)),
        ("v5e-256", (True, True)),
    ],
)
def test_where_a_torus_closes(name, wraps):
    assert parse_slice(name).wraps == wraps


@pytest.mark.parametrize("chip, compilers", [("v4", 30.75), ("v5e", 15.75), ("v5p", 95.74), ("v6e", 31.25)])
def test_a_plan_fills_no_more_than_the_compiler_gives(chip, compilers):
    assert 0.9 * compilers < ACCELERATORS[chip].usable / GIB < compilers


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("v4-33", "v4-32"),
        ("v4-30", "v4-32"),
        ("v4", "v4-8"),
        ("v5-32", "v5e-32"),
        ("h100-8", "h100x8"),
        ("tpu", "v4-32"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"no accelerator '{name}'; nearest: .*{nearest}"):
        parse_slice(name)


def test_slices_multiply_out_and_grow():
    for chip in ACCELERATORS.values():
        sizes = [piece.chips for piece in slices_of(chip)]
        assert sizes == sorted(sizes)
        for piece in slices_of(chip):
            assert parse_slice(piece.name) == piece


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_device_kinds(kind, name):
    chip = by_device_kind(kind)
    assert (chip and chip.name) == name


def test_what_a_plan_may_fill_and_the_slowest_hop():
    assert ACCELERATORS["v4"].usable == 30 * GIB
    assert parse_slice("h100x8").link == 450e9
    assert parse_slice("h100x16").link == 50e9  # between machines
    assert parse_slice("v4-512").link == 300e9
