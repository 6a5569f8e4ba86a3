"""The blocks about watching a run: tensorboard, wandb, csv_monitor, comet, profilers, timers. Writes no event."""

from __future__ import annotations

from typing import ClassVar

from lorica.config.keys import Block, block, detail, key, no_effect, not_yet

_POSITIVE = {"ge": 1}


class TensorBoard(Block):
    """TensorBoard event files."""

    enabled: bool = key(False, "Write TensorBoard events.")
    output_path: str = key("", "Folder of the event files.", shown_default="runs")
    job_name: str = key("DeepSpeedJobName", "Folder of this run below output_path.")


class WandB(Block):
    """Weights & Biases."""

    enabled: bool = key(False, "Log to Weights & Biases.")
    group: str | None = key(None, "Group of the run.")
    team: str | None = key(None, "Entity that owns the run.")
    project: str = key("deepspeed", "Project of the run.")


class CSVMonitor(Block):
    """One CSV file per metric."""

    enabled: bool = key(False, "Write metrics as CSV files.")
    output_path: str = key("", "Folder of the files.", shown_default="csv_monitor")
    job_name: str = key("DeepSpeedJobName", "Folder of this run below output_path.")


class Comet(Block):
    """Comet."""

    enabled: bool = not_yet(False, "Log to Comet.", "use tensorboard, wandb or csv_monitor")
    samples_log_interval: int = detail(100, "Samples between two events.")
    project: str | None = detail(None, "Project of the run.")
    workspace: str | None = detail(None, "Workspace of the run.")
    api_key: str | None = detail(None, "Key of the account.")
    experiment_name: str | None = detail(None, "Name of the run.")
    experiment_key: str | None = detail(None, "Identifier of the run.")
    online: bool | None = detail(None, "Send at once.")
    mode: str | None = detail(None, "Create or go on with a run.")


class FlopsProfiler(Block):
    """Counts operations of the model."""

    enabled: bool = not_yet(
        False, "Print the operations of every module.", 'use "wall_clock_breakdown": true for times per phase'
    )
    profile_step: int = detail(1, "Step to profile.", bounds=_POSITIVE)
    module_depth: int = detail(-1, "Depth of the printed modules.")
    top_modules: int = detail(1, "Modules in the summary.", bounds=_POSITIVE)
    detailed: bool = detail(True, "Print the whole tree.")
    output_file: str | None = detail(None, "File instead of standard output.")
    recompute_fwd_factor: float = detail(0.0, "Share of the forward that is recomputed.")


class CommsLogger(Block):
    """Times every collective."""

    enabled: bool = not_yet(False, "Log every collective.", 'use "wall_clock_breakdown": true for times per phase')
    verbose: bool = detail(False, "Print every operation.")
    prof_all: bool = detail(True, "Log every kind of operation.")
    debug: bool = detail(False, "Print the caller's name.")
    prof_ops: tuple[str, ...] = detail((), "Kinds of operation to log.")


class ThroughputTimer(Block):
    """The throughput figure of the progress line."""

    enabled: bool = no_effect(
        True, "Measure throughput.", "throughput is part of the progress line (steps_per_print) and costs nothing"
    )
    synchronized: bool = no_effect(
        True, "Synchronise the device to measure it.", "throughput is measured without synchronising the device"
    )


class Timers(Block):
    """Timers of the engine."""

    throughput: ThroughputTimer = block(ThroughputTimer, "The throughput figure.")


class Autotuning(Block):
    """Search for settings by trial runs."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(
        False, "Search for settings by trial runs.", "leave it false; `lorica check` shows what a setting means"
    )
    fast: bool = detail(True, "Tune micro-batch and stage only.")
    results_dir: str | None = detail(None, "Folder of the results.")
    exps_dir: str | None = detail(None, "Folder of the experiments.")
    overwrite: bool = detail(True, "Overwrite earlier results.")
    metric: str = detail("throughput", "What to maximise.")
    start_profile_step: int = detail(3, "First measured step.")
    end_profile_step: int = detail(5, "Last measured step.")
    tuner_type: str = detail("gridsearch", "How to search.")
    tuner_early_stopping: int = detail(5, "Trials without gain before stopping.")
    tuner_num_trials: int = detail(50, "Trials at most.")
    arg_mappings: dict[str, str] | None = detail(None, "Script arguments for tuned keys.")


class MonitoringKeys(Block):
    """Monitoring at the top level."""

    tensorboard: TensorBoard = block(TensorBoard, "TensorBoard event files.")
    wandb: WandB = block(WandB, "Weights & Biases.")
    csv_monitor: CSVMonitor = block(CSVMonitor, "One CSV file per metric.")
    comet: Comet = block(Comet, "Comet.")
    flops_profiler: FlopsProfiler = block(FlopsProfiler, "Operations per module.")
    comms_logger: CommsLogger = block(CommsLogger, "Log of collectives.")
    timers: Timers = block(Timers, "Timers of the engine.")
    autotuning: Autotuning = block(Autotuning, "Search for settings by trial runs.")
