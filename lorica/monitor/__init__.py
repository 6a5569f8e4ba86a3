"""Watching a run: events for TensorBoard, Weights & Biases and CSV files, phase times, the progress line."""

from lorica.monitor.events import Event, training_events
from lorica.monitor.monitor import Monitor
from lorica.monitor.throughput import Throughput, progress_line
from lorica.monitor.timers import PhaseTime, Timers

__all__ = ["Event", "Monitor", "PhaseTime", "Throughput", "Timers", "progress_line", "training_events"]
