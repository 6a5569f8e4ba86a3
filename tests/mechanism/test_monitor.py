"""Monitor, its three writers, the phase timers, throughput and the progress line."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorica.config.keys import info_of
from lorica.config.monitoring import CSVMonitor, MonitoringKeys, TensorBoard, WandB
from lorica.monitor import Monitor, Throughput, Timers, csv_files, progress_line, tensorboard, timers, training_events


def csv_config(folder: Path) -> MonitoringKeys:
    return MonitoringKeys(csv_monitor=CSVMonitor(enabled=True, output_path=str(folder), job_name="job"))


def rows(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


# -- events ------------------------------------------------------------------------------------------------------------


def test_the_events_of_a_step_carry_deepspeeds_tags_and_the_samples_so_far():
    events = training_events(64, loss=2.5, lr=0.1, loss_scale=1024.0, phase_ms={"forward": 3.0, "reduce": 1.0})
    assert events == [
        ("Train/Samples/train_loss", 2.5, 64),
        ("Train/Samples/lr", 0.1, 64),
        ("Train/Samples/loss_scale", 1024.0, 64),
        ("Train/Samples/elapsed_time_ms_forward", 3.0, 64),
        ("Train/Samples/elapsed_time_ms_backward_allreduce", 1.0, 64),
    ]


def test_what_is_not_known_makes_no_event():
    assert training_events(64, loss=None, lr=0.1) == [("Train/Samples/lr", 0.1, 64)]


# -- the monitor -------------------------------------------------------------------------------------------------------


def test_a_monitor_is_disabled_by_default_and_takes_events_all_the_same():
    monitor = Monitor(MonitoringKeys(), rank=0)
    monitor.write_events([("a", 1.0, 1)])
    assert (monitor.enabled, monitor.writes) == (False, False)


def test_only_rank_0_writes(tmp_path):
    other = Monitor(csv_config(tmp_path / "other"), rank=1)
    other.write_events([("a", 1.0, 1)])
    assert (other.enabled, other.writes) == (True, False)
    assert not (tmp_path / "other").exists()
    first = Monitor(csv_config(tmp_path / "first"), rank=0)
    first.write_events([("a", 1.0, 1)])
    assert (first.enabled, first.writes) == (True, True)
    assert (tmp_path / "first" / "job" / "a.csv").exists()


def test_a_value_may_be_a_tensor_of_one_element(tmp_path):
    Monitor(csv_config(tmp_path), rank=0).write_events([("a", torch.tensor([1.5], dtype=torch.bfloat16), 3)])
    assert rows(tmp_path / "job" / "a.csv") == [["step", "a"], ["3", "1.5"]]


@pytest.mark.parametrize("event", [("a", 1.0), ("a", "much", 1), ("a", torch.zeros(2), 1), ("a", 1.0, None)])
def test_an_event_that_is_not_tag_number_step_is_refused(tmp_path, event):
    with pytest.raises(ValueError, match=r"Event [\s\S]*expected \(tag, number, step\)[\s\S]*Fix: "):
        Monitor(csv_config(tmp_path), rank=0).write_events([event])


def test_a_closed_monitor_refuses_events_and_closes_twice(tmp_path):
    monitor = Monitor(csv_config(tmp_path), rank=0)
    monitor.close()
    monitor.close()
    with pytest.raises(RuntimeError, match="closed"):
        monitor.write_events([("a", 1.0, 1)])


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_csv_files_hold_one_metric_each_and_are_readable_at_once(tmp_path):
    monitor = Monitor(csv_config(tmp_path), rank=0)
    monitor.write_events([("Train/Samples/train_loss", 2.0, 8), ("Train/Samples/lr", 0.1, 8)])
    monitor.write_events([("Train/Samples/train_loss", float("nan"), 16)])
    assert rows(tmp_path / "job" / "Train_Samples_train_loss.csv") == [
        ["step", "train_loss"],
        ["8", "2.0"],
        ["16", "nan"],
    ]
    assert rows(tmp_path / "job" / "Train_Samples_lr.csv") == [["step", "lr"], ["8", "0.1"]]
    monitor.close()


def test_a_resumed_run_appends_to_its_csv_files_without_a_second_header(tmp_path):
    for step in (1, 2):
        monitor = Monitor(csv_config(tmp_path), rank=0)
        monitor.write_events([("a", 0.5, step)])
        monitor.close()
    assert rows(tmp_path / "job" / "a.csv") == [["step", "a"], ["1", "0.5"], ["2", "0.5"]]


def test_a_row_that_a_killed_run_left_unfinished_does_not_swallow_the_next_one(tmp_path):
    path = tmp_path / "job" / "a.csv"
    path.parent.mkdir()
    path.write_text("step,a\n1,0.5\n2,0.")
    Monitor(csv_config(tmp_path), rank=0).write_events([("a", 0.25, 3)])
    assert rows(path)[-1] == ["3", "0.25"]


def test_two_metrics_that_would_share_a_csv_file_are_refused(tmp_path):
    monitor = Monitor(csv_config(tmp_path), rank=0)
    with pytest.raises(ValueError, match="one metric per file, got 'a/b' and 'a_b'"):
        monitor.write_events([("a/b", 1.0, 1), ("a_b", 1.0, 1)])


def test_default_folders_are_those_that_the_configuration_shows():
    shown = {block: info_of(block.model_fields["output_path"]).shown_default for block in (CSVMonitor, TensorBoard)}
    assert shown == {CSVMonitor: csv_files.DEFAULT_FOLDER, TensorBoard: tensorboard.DEFAULT_FOLDER}


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def tensorboard_config(folder: Path) -> MonitoringKeys:
    return MonitoringKeys(tensorboard=TensorBoard(enabled=True, output_path=str(folder), job_name="job"))


def test_tensorboard_reads_back_what_two_runs_wrote_before_they_closed(tmp_path):
    pytest.importorskip("tensorboard", reason="optional; pip install lorica[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (8, 16):
        monitor = Monitor(tensorboard_config(tmp_path), rank=0)
        monitor.write_events([("Train/Samples/train_loss", step / 32, step)])
    events = EventAccumulator(str(tmp_path / "job")).Reload().Scalars("Train/Samples/train_loss")
    assert [(event.step, event.value) for event in events] == [(8, 0.25), (16, 0.5)]
    monitor.close()


def test_enabled_but_missing_tensorboard_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard.enabled: .*pip install lorica\[tensorboard\]"):
        Monitor(tensorboard_config(tmp_path), rank=0)
    assert Monitor(tensorboard_config(tmp_path), rank=1).enabled


# -- Weights & Biases --------------------------------------------------------------------------------------------------


class FakeWandB:
    """The part of the module `wandb` that a writer may use; records the calls."""

    def __init__(self, run: Any = None) -> None:
        self.run, self.settings, self.logged, self.num_finished = run, None, [], 0

    def init(self, **settings: Any) -> FakeWandB:
        self.settings = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.num_finished += 1


def wandb_monitor(monkeypatch, module: FakeWandB | None, rank: int = 0) -> Monitor:
    monkeypatch.setitem(sys.modules, "wandb", module)
    return Monitor(MonitoringKeys(wandb=WandB(enabled=True, group="g", team="t", project="p")), rank)


def test_wandb_starts_a_run_logs_a_step_in_one_call_and_finishes(monkeypatch):
    fake = FakeWandB()
    monitor = wandb_monitor(monkeypatch, fake)
    monitor.write_events([("a", 1.0, 8), ("b", 2.0, 8), ("a", 3.0, 16)])
    monitor.close()
    assert fake.settings == {"project": "p", "group": "g", "entity": "t"}
    assert fake.logged == [({"a": 1.0, "b": 2.0}, 8), ({"a": 3.0}, 16)]
    assert fake.num_finished == 1


def test_a_wandb_run_that_the_script_started_is_left_to_the_script(monkeypatch):
    fake = FakeWandB(run=object())
    wandb_monitor(monkeypatch, fake).close()
    assert fake.num_finished == 0


def test_no_wandb_run_starts_on_other_ranks(monkeypatch):
    fake = FakeWandB()
    wandb_monitor(monkeypatch, fake, rank=1).write_events([("a", 1.0, 8)])
    assert (fake.settings, fake.logged) == (None, [])


def test_enabled_but_missing_wandb_is_an_error_that_says_what_to_install(monkeypatch):
    with pytest.raises(ImportError, match=r"wandb.enabled: .*pip install wandb"):
        wandb_monitor(monkeypatch, None)


# -- timers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def host_clock(monkeypatch) -> SimpleNamespace:
    """The host's clock, moved by hand."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now.s)
    return now


def test_timers_give_mean_milliseconds_per_call_since_the_last_question(host_clock):
    timer = Timers(enabled=True)
    for seconds in (0.010, 0.030):
        with timer("forward"):
            host_clock.s += seconds
    with timer("step"):
        host_clock.s += 0.005
    taken = timer.take()
    assert {phase: (pytest.approx(mean), count) for phase, (mean, count) in taken.items()} == {
        "forward": (20.0, 2),
        "step": (5.0, 1),
    }
    assert timer.take() == {}


def test_nested_phases_are_timed_apart(host_clock):
    timer = Timers(enabled=True)
    with timer("backward"):
        host_clock.s += 0.001
        with timer("reduce"):
            host_clock.s += 0.002
    taken = timer.take()
    assert (taken["backward"].mean_ms, taken["reduce"].mean_ms) == (pytest.approx(3.0), pytest.approx(2.0))


def test_a_phase_that_raises_does_not_count(host_clock):
    timer = Timers(enabled=True)
    with suppress(KeyError), timer("forward"):
        raise KeyError
    assert timer.lines() == []


def test_lines_name_the_phases_in_order_with_times_and_calls(host_clock):
    timer = Timers(enabled=True)
    for phase in ("forward", "backward", "forward"):
        with timer(phase):
            host_clock.s += 0.0125
    assert timer.lines() == ["time per call | forward 12.50 ms x 2 | backward 12.50 ms x 1"]


def test_disabled_timers_hand_out_one_shared_context_and_make_no_event():
    timer = Timers(enabled=False, make_event=lambda: pytest.fail("made an event"))
    assert timer("forward") is timer("step")
    with timer("forward"), timer("forward"):
        pass
    assert timer.lines() == []


class FakeDevice:
    """A device whose work takes time but whose queue takes none: events are passed only when somebody waits."""

    def __init__(self) -> None:
        self.queued_ms = self.reached_ms = 0.0
        self.num_events = self.num_waits = 0

    def make_event(self) -> FakeEvent:
        self.num_events += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at_ms = device, 0.0

    def record(self) -> None:
        self.at_ms = self.device.queued_ms

    def query(self) -> bool:
        return self.device.reached_ms >= self.at_ms

    def synchronize(self) -> None:
        self.device.num_waits += 1
        self.device.reached_ms = max(self.device.reached_ms, self.at_ms)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "read before the device got there"
        return end.at_ms - self.at_ms


def test_device_times_come_from_events_and_wait_only_when_asked_for():
    device = FakeDevice()
    timer = Timers(enabled=True, make_event=device.make_event)
    for ms in (4.0, 8.0):
        with timer("forward"):
            device.queued_ms += ms
    assert device.num_waits == 0
    assert timer.take() == {"forward": (6.0, 2)}
    assert device.num_waits > 0


def test_events_are_used_again_after_they_were_read():
    device = FakeDevice()
    timer = Timers(enabled=True, make_event=device.make_event)
    for _ in range(3):
        with timer("forward"):
            device.queued_ms += 1.0
        assert timer.take() == {"forward": (1.0, 1)}
    assert device.num_events == 2


def test_a_run_that_never_asks_for_its_times_neither_waits_nor_collects_events_for_ever():
    device = FakeDevice()
    timer = Timers(enabled=True, make_event=device.make_event)
    for _ in range(10 * timers.MAX_PENDING):
        with timer("step"):
            device.queued_ms += 2.0
        device.reached_ms = device.queued_ms
    assert device.num_events <= 2 * (timers.MAX_PENDING + 1)
    assert timer.take() == {"step": (2.0, 10 * timers.MAX_PENDING)}


def test_a_device_far_behind_is_not_waited_for():
    device = FakeDevice()
    timer = Timers(enabled=True, make_event=device.make_event)
    for _ in range(2 * timers.MAX_PENDING):
        with timer("step"):
            device.queued_ms += 2.0
    assert device.num_waits == 0
    assert timer.take() == {"step": (2.0, 2 * timers.MAX_PENDING)}


# -- throughput and the progress line ----------------------------------------------------------------------------------


def test_throughput_leaves_out_the_first_step_and_starts_anew_at_each_question():
    now = SimpleNamespace(s=0.0)
    throughput = Throughput(clock=lambda: now.s)
    for seconds in (60.0, 0.5, 0.5):
        now.s += seconds
        throughput.add(samples=32)
    assert throughput.take() == pytest.approx(64.0)
    now.s += 2.0
    throughput.add(samples=32)
    assert throughput.take() == pytest.approx(16.0)


def test_throughput_is_unknown_before_the_second_step():
    throughput = Throughput()
    assert throughput.take() is None
    throughput.add(32)
    assert throughput.take() is None


def test_the_progress_line_shows_what_is_known():
    line = progress_line(20, 2.34567, 1.5e-4, loss_scale=65536.0, samples_per_second=123.44, grad_norm=0.98765)
    assert line == "step 20 | loss 2.3457 | lr 1.500e-04 | grad norm 0.988 | loss scale 65536 | 123.4 samples/s"
    assert progress_line(1, None, 0.0) == "step 1 | lr 0.000e+00"


def test_the_progress_line_shows_each_different_learning_rate_once():
    assert progress_line(1, float("inf"), [1e-3, 1e-3, 1e-4]) == "step 1 | loss inf | lr 1.000e-03, 1.000e-04"
