"""The rank grid: groups partition the ranks, derived sizes, neighbours, errors that name the axes."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.mesh import AXES, Mesh

sizes_of_axes = st.fixed_dictionaries({name: st.integers(1, 3) for name in AXES})


@settings(deadline=None, max_examples=50)
@given(sizes_of_axes, st.sets(st.sampled_from(AXES)))
def test_the_groups_over_any_axes_partition_the_ranks(sizes: dict[str, int], axes: set[str]) -> None:
    mesh = Mesh.build(prod(sizes.values()), **sizes)
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {mesh.size(*axes)}
    for group in groups:
        assert list(group) == sorted(group)
        assert mesh.group_of(group[-1], *axes) == group


@given(sizes_of_axes, st.data())
def test_a_coordinate_names_one_rank(sizes: dict[str, int], data: st.DataObject) -> None:
    mesh = Mesh.build(prod(sizes.values()), **sizes)
    rank = data.draw(st.integers(0, mesh.world_size - 1))
    position = mesh.coordinate(rank)
    assert list(position) == list(AXES)
    assert mesh.rank_at(**position) == rank


def test_without_sizes_all_ranks_are_one_data_parallel_group() -> None:
    mesh = Mesh.build(4)
    assert mesh.groups("dp") == mesh.groups("dp_shard") == ((0, 1, 2, 3),)
    assert mesh.groups("tp") == ((0,), (1,), (2,), (3,))
    assert str(mesh) == "Mesh(dp_shard=4)"


def test_a_shard_size_makes_replicas_of_neighbouring_shards() -> None:
    mesh = Mesh.build(8, dp_shard=4)
    assert mesh.groups("dp_shard") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert mesh.groups("dp_replicate") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups("dp") == (tuple(range(8)),)
    assert Mesh.build(8, dp_replicate=2) == mesh == Mesh.build(8, dp=8, dp_shard=4)


def test_tensor_parallel_ranks_are_neighbours_and_pipeline_stages_lie_farthest_apart() -> None:
    mesh = Mesh.build(8, pp=2, tp=2)
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.group_of(3, "dp", "tp") == (0, 1, 2, 3)
    assert mesh.size("dp") == 2 and mesh.size("pp", "tp") == 4 and mesh.size() == 1


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (6, {"pp": 2, "tp": 2}, "world_size=6 is not a multiple of pp=2 x tp=2 = 4"),
        (2, {"tp": 4}, "world_size=2 is not a multiple of tp=4 = 4"),
        (8, {"dp_shard": 3}, "dp_shard=3 does not divide the 8 data-parallel ranks"),
        (8, {"dp_shard": 16}, "dp_shard=16 does not divide the 8"),
        (8, {"dp_shard": 2, "dp_replicate": 2}, "dp_shard=2 x dp_replicate=2 use 4 ranks, got world_size=8"),
        (8, {"tp": 2, "dp": 8}, "dp=8 does not fit world_size=8 with tp=2, which leaves dp=4"),
        (8, {"tp": 0}, "tp must be at least 1, got 0"),
        (0, {}, "world_size must be at least 1, got 0"),
        (8, {"tensor": 2}, "unknown axis tensor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_axes_named(
    world_size: int, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh.build(world_size, **sizes)


def test_positions_outside_of_the_grid_are_refused() -> None:
    mesh = Mesh.build(4, tp=2)
    with pytest.raises(ValueError, match="a rank from 0 to 3, got 4"):
        mesh.coordinate(4)
    with pytest.raises(ValueError, match="axis tp has positions 0 to 1, got 2"):
        mesh.rank_at(tp=2)
    with pytest.raises(ValueError, match="unknown axis cp"):
        mesh.groups("cp")


def test_the_mesh_is_made_without_importing_torch() -> None:
    program = "import sys; import lorica.mesh; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
