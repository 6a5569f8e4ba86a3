"""The equivalence matrix: whatever the stage, precision, world size, accumulation, clipping, buckets: the oracle's run.

Tolerances and their reasons (a GPT of 43 thousand parameters, 50 AdamW steps at lr 3e-3, loss 4.3 -> 1.7):

fp32. The engine and the oracle add the same fp32 gradients in a different order. Reversing the order inside the oracle
moves its own losses by 6e-8 (relative) and its parameters by 1.7e-5, so 1e-6 and 1e-4 leave no room for an error of
substance. (eps is 1e-6 because the gradient of an attention key's bias is zero but for rounding: AdamW with eps 1e-8
makes steps of the size of lr from that noise.)

bf16, fp16. The oracle adds in fp32; an engine may keep the sum in the gradient's dtype and then rounds at most once per
micro-step and once in the reduction: A + 1 <= 4 roundings, each of relative size u = 2^-8 (bf16) or 2^-11 (fp16).
AdamW's step has the size of lr whatever the gradient's, so a weight moves by at most lr * 4u = 5e-5 (bf16) from the
oracle's in a step, in a random direction: after 50 steps, with a gradient norm of 2, the loss by 2 * 5e-5 * sqrt(50) =
7e-4. A master that moved by d rounds to another bf16 neighbour, 2u|w| away, with probability d / 2u|w|: for |w| = 0.2
that adds 2 * sqrt(5e-5 * 2 * 0.2u) = 5e-4. Together 1e-3 of a loss of 2: 6e-4, and twice that in an unlucky run. fp16
is an eighth of it. Rounding the oracle's own sum gives 7e-4 and 1.3e-4, with norms 1.1e-2 and 1.3e-3 apart.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.equivalence.training import (
    LARGE_BUCKET,
    SMALL_BUCKET,
    Trained,
    Training,
    adamw,
    expected,
    largest_difference,
    relative_difference,
    rms_difference,
)

LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 1.5e-3, "fp16": 3e-4}
NORM_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
FULL_MATRIX = [
    Training(stage=stage, precision=precision, world_size=size, accumulation=accumulation, clip=clip, bucket=bucket)
    for precision, size, accumulation, clip, bucket, stage in itertools.product(
        ("fp32", "bf16", "fp16"), (1, 2, 4), (1, 3), (1.0, 0.0), (SMALL_BUCKET, LARGE_BUCKET), (0, 1, 2, 3)
    )
]


def is_quick(training: Training) -> bool:
    """The part of the matrix that every commit runs: every value of every choice, each pair of them at two ranks."""
    many_small = training.clip > 0 and training.bucket == SMALL_BUCKET
    if training.world_size != 2:
        return many_small and training.accumulation == (3 if training.world_size == 1 else 1)
    return (many_small and training.accumulation == 3) or (training.clip == 0 and training.accumulation == 1)


def cells(wanted: Callable[[Training], bool] = lambda _: True) -> list[object]:
    """Matrix entries as test parameters; those outside the quick part are marked slow."""
    return [
        pytest.param(training, id=str(training), marks=() if is_quick(training) else pytest.mark.slow)
        for training in FULL_MATRIX
        if wanted(training)
    ]


@pytest.mark.parametrize("training", cells())
def test_training_follows_the_oracle(trained: Trained, training: Training) -> None:
    run, oracle = trained.run(training), trained.oracle(training)
    assert relative_difference(run.losses, oracle.losses) < LOSS_TOLERANCE[training.precision]
    assert relative_difference(run.norms, oracle.norms) < NORM_TOLERANCE[training.precision]
    if training.precision == "fp32":
        assert largest_difference(run.parameters, oracle.parameters) < 1e-4
    else:  # 50 steps at lr 3e-3 move a weight by up to 1.5e-1
        assert rms_difference(run.parameters, oracle.parameters) < 3e-3
    if training.precision == "fp16":
        assert run.scales == oracle.scales


@pytest.mark.parametrize("training", cells(lambda t: t.stage == 3))
def test_stages_2_and_3_agree_in_every_bit(trained: Trained, training: Training) -> None:
    second, third = trained.run(replace(training, stage=2)), trained.run(training)
    assert second.losses == third.losses
    assert second.norms == third.norms
    assert second.digest == third.digest


@pytest.mark.parametrize("training", cells(lambda t: t.bucket == LARGE_BUCKET))
def test_the_bucket_size_changes_no_bit(trained: Trained, training: Training) -> None:
    small, large = trained.run(replace(training, bucket=SMALL_BUCKET)), trained.run(training)
    assert small.losses == large.losses
    assert small.norms == large.norms
    assert small.digest == large.digest


@pytest.mark.parametrize("training", cells(lambda t: t.stage == 0))
def test_all_stages_agree_within_the_order_of_summation(trained: Trained, training: Training) -> None:
    plain = trained.run(training)
    for stage in (1, 2, 3):
        run = trained.run(replace(training, stage=stage))
        assert relative_difference(run.losses, plain.losses) < LOSS_TOLERANCE[training.precision]


WRONG = {
    "weight decay off by 1 %": {"optimizer": functools.partial(adamw, weight_decay=0.101)},
    "learning rate off by 0.1 %": {"optimizer": functools.partial(adamw, lr=3.003e-3)},
    "clipping off by 1 %": {"clip": 1.01},
    "no clipping": {"clip": 0.0},
}


@pytest.mark.parametrize(
    ("precision", "wrong"),
    [*(("fp32", name) for name in WRONG), ("bf16", "no clipping"), ("fp16", "no clipping")],
)
def test_the_tolerances_notice_a_wrong_step(trained: Trained, precision: Any, wrong: str) -> None:
    training = Training(precision=precision, accumulation=3)
    difference = relative_difference(expected(training, **WRONG[wrong]).losses, trained.oracle(training).losses)
    assert difference > 2 * LOSS_TOLERANCE[precision]
