"""The examples as a newcomer runs them: on two processes, by the command lines that they print or the README gives."""

from __future__ import annotations

import csv
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = Path("examples")
VOCAB_SIZE = 300


class Demo(NamedTuple):
    """A finished run of the demo."""

    output: str
    folder: Path

    def losses(self) -> list[dict[str, str]]:
        """The rows of the table of losses."""
        with (self.folder / "losses.csv").open() as file:
            return list(csv.DictReader(file))

    def validation_loss(self) -> float:
        """The last one, over the whole validation text."""
        return float(self.losses()[-1]["validation_loss"])


def run(words: list[str]) -> str:
    """Run a program from the root of the repository on the CPU and return what it wrote; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH", ""))))
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def lorica(*words: str | Path) -> list[str]:
    """A command line on two processes."""
    return [sys.executable, "-m", "lorica", "--num_gpus=2", *map(str, words)]


@pytest.fixture(scope="module")
def zero2(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo's own stage on a small text; both processes start without tokens."""
    runs = tmp_path_factory.mktemp("runs")
    texts = runs / "texts"
    texts.mkdir()
    for number in range(10):
        (texts / f"{number}.txt").write_text(f"Page {number} says what all pages say, over and over.\n" * 100)
    config = EXAMPLES / "gpt" / "ds_config_zero2.json"
    options = f"--steps 12 --size tiny --seq_len 32 --vocab_size {VOCAB_SIZE} --sample_tokens 4".split()
    words = lorica(EXAMPLES / "gpt" / "train.py", "--deepspeed", "--deepspeed_config", config, *options)
    return Demo(run([*words, "--data_path", str(texts), "--runs", str(runs)]), runs / "gpt-tiny-zero2")


@pytest.fixture(scope="module")
def zero3(zero2: Demo) -> Demo:
    """What the command line trains that the demo prints at its end."""
    command = re.search(r"^Go on with another ZeRO stage:\n  (.*)$", zero2.output, re.MULTILINE)
    assert command is not None, zero2.output
    runs = zero2.folder.parent
    return Demo(run([*shlex.split(command[1]), "--runs", str(runs)]), runs / "gpt-tiny-zero3")


def test_the_demo_learns_and_leaves_a_picture_and_a_table(zero2: Demo) -> None:
    rows = zero2.losses()
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(VOCAB_SIZE), abs=0.2)
    assert float(rows[-1]["train_loss"]) < 0.9 * float(rows[0]["train_loss"])
    assert zero2.validation_loss() < 0.9 * math.log(VOCAB_SIZE)
    assert (zero2.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "ZeRO-2, cpu x 2" in zero2.output
    assert "What it writes" in zero2.output


def test_two_processes_that_start_together_tokenise_the_text_once(zero2: Demo) -> None:
    assert zero2.output.count("training a BPE") == 1
    assert len(list((zero2.folder.parent / "text").glob("tokens-*/train.bin"))) == 1
    assert not list((zero2.folder.parent / "text").glob("*.draft*"))


def test_the_command_that_the_demo_prints_trains_the_same_model_under_the_next_stage(zero2: Demo, zero3: Demo) -> None:
    assert "ZeRO-3, cpu x 2" in zero3.output
    assert "training a BPE" not in zero3.output
    assert [row["train_loss"] for row in zero3.losses()] == [row["train_loss"] for row in zero2.losses()]
    assert zero3.validation_loss() == zero2.validation_loss()


def test_stages_two_and_three_write_the_same_text(zero2: Demo, zero3: Demo) -> None:
    texts = [re.search(r"What it writes(.*?)\n\n", demo.output, re.DOTALL) for demo in (zero2, zero3)]
    assert texts[0] is not None and texts[1] is not None
    assert texts[0][1] == texts[1][1]


def test_the_appendix_runs_as_it_stands() -> None:
    folder = EXAMPLES / "appendix"
    config = folder / "ds_config.json"
    output = run(lorica(folder / "my_train_script.py", "--deepspeed", "--deepspeed_config", config))
    losses = [float(loss) for loss in re.findall(r"step (?:10|20) \| loss ([0-9.]+)", output)]
    assert len(losses) == 2 and losses[1] < losses[0] < 1.0


def test_the_converted_loop_learns_as_the_plain_one_does() -> None:
    plain = run([sys.executable, str(EXAMPLES / "convert" / "before.py"), "--steps", "10"])
    config = EXAMPLES / "convert" / "ds_config.json"
    options = ("--deepspeed", "--deepspeed_config", config, "--steps", "10")
    converted = run(lorica(EXAMPLES / "convert" / "after.py", *options))
    before = float(re.findall(r"step 10 loss ([0-9.]+)", plain)[-1])
    after = float(re.findall(r"step 10 \| loss ([0-9.]+)", converted)[-1])
    assert before < 5.2
    assert after == pytest.approx(before, abs=0.5)  # other batches, twice as many: about the same, not the same
