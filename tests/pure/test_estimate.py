"""The memory estimators: every number here was computed by hand from bytes per parameter, none by the code under test.

Psi = 1,000,000 parameters; 2 nodes of 4 GPUs, so P = 8 ranks; 10,000 parameters gathered at a time.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from lorica import estimate
from lorica.estimate import ModelSize, ModelStates, ShardedModelStates

PSI, LARGEST, HARDWARE = 1e6, 1e4, {"num_gpus_per_node": 4, "num_nodes": 2}


def zero2(**options: object) -> ModelStates:
    return estimate.estimate_zero2_model_states_mem_needs(PSI, **HARDWARE, additional_buffer_factor=1, **options)


def zero3(**options: object) -> ShardedModelStates:
    return estimate.estimate_zero3_model_states_mem_needs(
        PSI, LARGEST, **HARDWARE, additional_buffer_factor=1, **options
    )


def test_stage_2_replicates_parameters_and_shards_the_rest():
    # 2 Psi + (2 + 2 + 8) Psi / 8; host: each of 4 processes builds the model in fp32.
    assert zero2(cpu_offload=False) == ModelStates(cpu_bytes=16_000_000, gpu_bytes=2_000_000 + 1_500_000)


def test_stage_2_with_offload_moves_half_of_the_master_and_moments_to_the_host():
    # 2 Psi + 2 Psi / 8; host: 4 x (2 + 8) Psi / 8 = 5,000,000 is less than building the model.
    assert zero2(cpu_offload=True) == ModelStates(cpu_bytes=16_000_000, gpu_bytes=2_000_000 + 250_000)


def test_one_rank_with_offload_holds_all_optimizer_states_in_host_memory():
    need = estimate.estimate_zero2_model_states_mem_needs(PSI, additional_buffer_factor=1)
    assert need == ModelStates(cpu_bytes=10_000_000, gpu_bytes=4_000_000)


@pytest.mark.parametrize(
    ("options", "cpu_bytes", "sharded_gpu_bytes"),
    [
        # host 4 x (2 + 2 + 8) Psi / 8; device: the gradient shard 2 Psi / 8
        ({}, 6_000_000, 250_000),
        ({"zero_init": False}, 16_000_000, 250_000),
        # host 4 x (2 + 8) Psi / 8; device (2 + 2) Psi / 8
        ({"cpu_offload_params": False}, 5_000_000, 500_000),
        # host: 4 modules of 10,000 fp32 parameters while the model is built; device 14 Psi / 8
        ({"cpu_offload": False}, 160_000, 1_750_000),
        ({"cpu_offload": False, "zero_init": False}, 16_000_000, 1_750_000),
    ],
)
def test_stage_3_shards_everything_and_adds_the_largest_unit(options, cpu_bytes, sharded_gpu_bytes):
    # the unit's weights and gradients in bf16: 4 x 10,000
    assert zero3(**options) == ShardedModelStates(cpu_bytes, sharded_gpu_bytes + 40_000, 40_000)


def test_results_unpack_like_those_of_deepspeed():
    cpu_mem, gpu_mem = zero2()
    cpu_mem_3, gpu_mem_3, largest_layer_memory = zero3()
    assert (cpu_mem, gpu_mem) == (16_000_000, 2_250_000)
    assert (cpu_mem_3, gpu_mem_3, largest_layer_memory) == (6_000_000, 290_000, 40_000)


def test_the_buffer_factor_multiplies_host_memory_only():
    exact = zero3()
    padded = estimate.estimate_zero3_model_states_mem_needs(PSI, LARGEST, **HARDWARE)
    assert padded == exact._replace(cpu_bytes=9_000_000)


def test_a_parameter_count_that_ranks_do_not_divide_is_rounded_up():
    need = estimate.estimate_zero3_model_states_mem_needs(9, 1, num_gpus_per_node=8, cpu_offload=False)
    assert need.gpu_bytes == 14 * 2 + 4


class Blocks(nn.Module):
    """A tied embedding (300,000), two blocks of 400,000 and one of 700,000."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 300)
        self.blocks = nn.ModuleList([nn.Linear(400_000, 1, bias=False) for _ in range(2)])
        self.blocks.append(nn.Linear(700_000, 1, bias=False))
        self.head = nn.Linear(300, 1000, bias=False)
        self.head.weight = self.embedding.weight


def test_a_live_model_is_measured_with_tied_weights_once_and_the_root_beside_the_largest_block():
    model = Blocks().to("meta")
    model.head.weight = model.embedding.weight
    assert estimate.measure(model) == ModelSize(total_params=1_800_000, largest_layer_params=1_000_000)


def test_live_and_cold_print_the_same_table(capsys):
    model = Blocks()
    estimate.estimate_zero3_model_states_mem_needs_all_live(model, 4, 2)
    live = capsys.readouterr().out
    estimate.estimate_zero3_model_states_mem_needs_all_cold(1.8e6, 1e6, 4, 2)
    assert live == capsys.readouterr().out
    estimate.estimate_zero2_model_states_mem_needs_all_live(model, 4, 2)
    live = capsys.readouterr().out
    estimate.estimate_zero2_model_states_mem_needs_all_cold(1.8e6, 4, 2)
    assert live == capsys.readouterr().out


def test_a_table_has_a_row_per_choice_with_host_and_device_memory(capsys):
    estimate.estimate_zero2_model_states_mem_needs_all_cold(2**30, 2, 1, additional_buffer_factor=1)
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert "ZeRO-2" in title and "1074M parameters" in title and "GPUs per node: 2" in title
    assert [column.strip() for column in heads.split("|")] == ["host per node", "GPU", "options"]
    # 2 ranks: 2 + 2/2 and 2 + 12/2 GiB per rank; 2 x 10/2 GiB on the host, or 2 x 4 to build the model
    assert [[column.strip() for column in row.split("|")] for row in rows] == [
        ["10.00 GiB", "3.00 GiB", "offload_optimizer=cpu"],
        ["8.00 GiB", "8.00 GiB", "offload_optimizer=none"],
    ]
    estimate.estimate_zero3_model_states_mem_needs_all_cold(2**30, 2**28, 2, 1, additional_buffer_factor=1)
    rows = [[column.strip() for column in row.split("|")] for row in capsys.readouterr().out.splitlines()[2:]]
    # 2 ranks and a unit of a quarter: 1 + 1, 2 + 1 and 7 + 1 GiB per rank
    assert rows == [
        ["12.00 GiB", "2.00 GiB", "offload_param=cpu, offload_optimizer=cpu, zero_init=1"],
        ["12.00 GiB", "2.00 GiB", "offload_param=cpu, offload_optimizer=cpu, zero_init=0"],
        ["10.00 GiB", "3.00 GiB", "offload_param=none, offload_optimizer=cpu, zero_init=1"],
        ["10.00 GiB", "3.00 GiB", "offload_param=none, offload_optimizer=cpu, zero_init=0"],
        ["2.00 GiB", "8.00 GiB", "offload_param=none, offload_optimizer=none, zero_init=1"],
        ["8.00 GiB", "8.00 GiB", "offload_param=none, offload_optimizer=none, zero_init=0"],
    ]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: estimate.estimate_zero2_model_states_mem_needs(0), "total_params"),
        (lambda: estimate.estimate_zero2_model_states_mem_needs(1.5), "total_params"),
        (lambda: estimate.estimate_zero2_model_states_mem_needs(10, num_nodes=0), "num_nodes"),
        (lambda: estimate.estimate_zero2_model_states_mem_needs(10, additional_buffer_factor=0), "additional_buffer"),
        (lambda: estimate.estimate_zero3_model_states_mem_needs(10, 11), "largest_layer_params"),
        (lambda: estimate.estimate_zero2_model_states_mem_needs_all_live(nn.ReLU()), "total_params"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(call, named):
    with pytest.raises(ValueError, match=f"{named}.*expected.*Fix"):
        call()


def test_importing_the_estimators_does_not_import_torch():
    code = "import sys, lorica.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
