"""The engine: the training loop's three calls, what may be asked of them, and the order of one optimizer step.

Owns counters, boundaries and decisions (skip, clip, schedule). Everything that touches bytes is below: planes and hooks
in `core/`, arithmetic in `optim/`, transport in `comm/`. `construct.py` builds an engine from the user's arguments.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorica.config import Config
from lorica.core.activations import HostActivations
from lorica.core.compiled import CompiledBlocks
from lorica.core.flat import Site
from lorica.core.grads import Reducer
from lorica.core.hooks import Hooks, in_backward
from lorica.core.interleave import Turns
from lorica.core.norm import global_square_sum
from lorica.core.peak import Peak, peak
from lorica.core.prefetch import Prefetcher
from lorica.core.streams import HostStreams
from lorica.core.unit import Unit
from lorica.data import RepeatingLoader, make_loader, route_shuffles
from lorica.export import consolidated_state_dict, load_whole_state_dict, save_safetensors
from lorica.log import logger
from lorica.micro_batch import (
    Evaluating,
    LossFn,
    MicroBatch,
    attributes,
    lives_outside,
    other_sum,
    take,
    warn_of_state,
)
from lorica.monitor import Monitor, Throughput, Timers, progress_line, training_events
from lorica.monitor.timers import breakdown_lines
from lorica.optimizer import ZeroOptimizer
from lorica.plan import STAGE, StateBytes
from lorica.precision import LossScale
from lorica.update.assumption import Assumptions, State, can_be_taken_back
from lorica.update.pieces import Work
from lorica.update.schedule import Update
from lorica.update.verdict import Verdict, decide

T = TypeVar("T")


class Memory(NamedTuple):
    """Model states of this rank in bytes: as the plan predicts, and as counted from the tensors that exist."""

    planned_bytes: StateBytes
    allocated_bytes: StateBytes


@dataclass
class Parts:
    """What `construct.py` puts together; the engine only connects it."""

    config: Config
    module: nn.Module
    site: Site
    units: list[Unit]
    reducer: Reducer
    prefetcher: Prefetcher
    loss_scale: LossScale
    monitor: Monitor
    timers: Timers
    update: Update | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    client_optimizer: torch.optim.Optimizer | None = None
    predivide: float = 1.0
    mpu: Any = None
    before_update: Sequence[Callable[[], None]] = ()  # what holds on to present parameter values lets go of them


class Engine(nn.Module):
    """A model under ZeRO. Call it, call `backward(loss)`, call `step()`.

    Unknown attributes are those of the user's model, which is `engine.module`.
    """

    def __init__(self, parts: Parts) -> None:
        """Install the hooks; use `lorica.initialize` to make an engine."""
        super().__init__()
        self.module = parts.module
        self._parts = parts
        self._config, self.config = parts.config, parts.config.raw
        self.mpu, self.monitor = parts.mpu, parts.monitor
        self.device = parts.site.device
        self.optimizer = self._make_optimizer(parts)
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self._training_batches: RepeatingLoader | None = None
        self._warned_of_sums = self._has_run_jointly = False
        self.micro_steps = self.global_steps = self.global_samples = self._skipped_steps = 0
        self._set_boundary: bool | None = None
        self._sync, self._explicit, self._step_applied = True, False, False
        self._update_count = 0
        self._grad_norm: Tensor | None = None
        self._assumed = Assumptions()
        self._streams = parts.site.streams
        self._activations = self._make_activations(parts)
        self._losses: list[Tensor] = []
        self._throughput = Throughput()
        for grad in parts.reducer.planes:
            grad.factor = self._grad_factor
        if parts.update is not None:
            parts.update.expected = self._expected_update
        parts.module.register_state_dict_pre_hook(_finish_before_reading(self))
        self._hooks = Hooks(
            parts.units,
            parts.prefetcher,
            parts.reducer,
            begin_backward=self._backward_began,
            max_reuse_numel=parts.config.zero_optimization.stage3_max_reuse_distance or 0,
        )
        self._compiled = CompiledBlocks(parts.module, parts.units)
        if parts.config.compile.enabled:
            self.compile()

    def _make_optimizer(self, parts: Parts) -> ZeroOptimizer | None:
        if parts.update is None:
            return None
        return ZeroOptimizer(
            parts.groups,
            parts.defaults,
            client=parts.client_optimizer,
            step=self._take_step,
            zero_grad=self.zero_grad,
            scale=self.loss_scale,
            settle=self._settle,
        )

    def _make_activations(self, parts: Parts) -> HostActivations | None:
        if not parts.config.lorica.offload.activations:
            return None
        planes = {flat.full.untyped_storage()._cdata for unit in parts.units for flat in unit.flats}

        def stays(tensor: Tensor) -> bool:
            return tensor.device != parts.site.device or tensor.untyped_storage()._cdata in planes

        return HostActivations(parts.site.streams or HostStreams(), parts.site.tiers["host"].alloc, stays)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        self._require_alive("forward")
        with self._parts.timers("forward"):
            return self._call_module(*args, **kwargs)

    def _call_module(self, *args: Any, **kwargs: Any) -> Any:
        if self._config.fp16.enabled and self._config.fp16.auto_cast:
            args, kwargs = _halved(args), _halved(kwargs)
        if self._activations is None or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        with self._activations.saving():
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Backpropagate `loss`, reducing gradients over the ranks while it runs.

        Args:
            loss: a scalar that depends on the model's output.
            retain_graph: as in `Tensor.backward`.
            scale_wrt_gas: divide by the number of accumulation steps.
        Returns:
            The loss as it entered the gradient (divided, not loss-scaled).
        Raises:
            RuntimeError: without an optimizer, or if `loss` has no graph.
            ValueError: if `loss` is not a scalar.
        """
        self._require_trainable(loss)
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        returned = loss / steps if steps > 1 else loss
        self._losses.append(loss.detach())
        self._backpropagate([_scaled(loss, self.loss_scale() / steps)], retain_graph=retain_graph)
        return returned

    def _backpropagate(self, scaled: Sequence[Tensor], *, retain_graph: bool = False) -> None:
        with self._parts.timers("backward"):
            self._explicit = True
            try:
                self._begin_backward()
                torch.autograd.backward(scaled, retain_graph=retain_graph)
                self._end_backward()
            except BaseException:
                self._abort_backward()
                raise
            finally:
                self._explicit = False

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At a boundary: clip, update, publish, schedule. Between boundaries: count the micro-step.

        Args:
            lr_kwargs: passed to the learning-rate scheduler's step.
        Raises:
            RuntimeError: at a boundary without a backward before it.
        """
        self._require_alive("step")
        if self.is_gradient_accumulation_boundary():
            self._take_step(lr_kwargs)
        self.micro_steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients of this rank and those already reduced. (`step()` does this by itself.)"""
        for unit in self._parts.units:
            for grad in unit.grads:
                grad.reset()
                grad.drop_local()
        self._parts.reducer.forget()

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale, for a direct `scaled.backward()` under fp16."""
        return loss.float() * self.loss_scale() if self._config.fp16.enabled else loss

    # -- whole batches -------------------------------------------------------------------------------------------------

    def train_batch(
        self,
        data_iter: Iterator[Any] | None = None,
        *,
        loss_fn: LossFn | None = None,
        unit_major: bool | None = None,
    ) -> Tensor:
        """One optimizer step: forward, backward and `step()` for `gradient_accumulation_steps` micro-batches.

        Args:
            data_iter: gives micro-batches: a tensor, a tuple or list (the model's arguments), or a mapping (its named
                arguments); tensors are moved to the engine's device. None: `training_dataloader`, epoch after epoch.
            loss_fn: makes the scalar loss of the model's output and the micro-batch. Without it the model returns the
                loss: alone, first in a tuple, or as `loss`.
            unit_major: run all micro-batches through a unit before the next unit, so that a unit is gathered once per
                direction and reduced once; takes the activations of all micro-batches. None: if parameters live
                outside of the device.
        Returns:
            The mean loss of this rank's micro-batches, without a graph.
        Raises:
            ValueError: if there are too few micro-batches or no scalar loss, or if `unit_major` is asked for and
                gradients are to be summed in another dtype than the parameters'.
            RuntimeError: without an optimizer, or in the middle of an accumulation.
            BaseException: what a micro-batch raises. Counters are as before then; to go on, call `zero_grad()` first.
        """
        self._require_optimizer("train_batch")
        if self._losses:
            raise RuntimeError(
                f"train_batch: expected to begin after an optimizer step, got {len(self._losses)} backward passes "
                "since the last one. Fix: finish that step with backward() and step()."
            )
        count = self.gradient_accumulation_steps()
        joint = self._is_unit_major(unit_major, count)
        source = self._training_iterator() if data_iter is None else data_iter
        batches = take(source, count, self.device, loss_fn, "train_batch")
        boundary, done = self._set_boundary, self.micro_steps
        try:
            if joint:
                self._set_boundary = True
                self._backward_jointly(batches)
                self.micro_steps += count - 1
            else:
                for index, batch in enumerate(batches):
                    if index:
                        self.step()
                    self._set_boundary = index + 1 == count
                    self.backward(batch.loss(self))
            loss = torch.stack(self._losses).float().mean()
            self.step()
        except BaseException:
            self._abort_backward()
            self._losses, self.micro_steps = [], done
            raise
        finally:
            self._set_boundary = boundary
        return loss

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        *,
        loss_fn: LossFn | None = None,
        num_micro_batches: int | None = None,
        unit_major: bool | None = None,
    ) -> Tensor:
        """The mean loss of the next micro-batches in evaluation mode, without gradients; counters stay.

        Args:
            data_iter, loss_fn, unit_major: as in `train_batch`.
            num_micro_batches: how many; None: `gradient_accumulation_steps`.
        Returns:
            The mean loss of this rank's micro-batches.
        Raises:
            ValueError: if there are too few micro-batches, or no scalar loss.
        """
        self._require_alive("eval_batch")
        count = self.gradient_accumulation_steps() if num_micro_batches is None else num_micro_batches
        joint = count > 1 and (lives_outside(self._parts.units) if unit_major is None else unit_major)
        batches = take(data_iter, count, self.device, loss_fn, "eval_batch")
        with Evaluating(self.module):
            losses = (
                self._hooks.take_turns(self._turns(lambda batch: batch.loss(self._call_module), batches))
                if joint
                else [batch.loss(self) for batch in batches]
            )
            return torch.stack(losses).float().mean()

    def _training_iterator(self) -> Iterator[Any]:
        if self.training_dataloader is None:
            raise ValueError(
                "train_batch: expected micro-batches, got neither data_iter nor training data. Fix: pass "
                "data_iter=iter(loader), or training_data to lorica.initialize."
            )
        if self._training_batches is None or self._training_batches.loader is not self.training_dataloader:
            self._training_batches = RepeatingLoader(self.training_dataloader)
        return self._training_batches

    def _is_unit_major(self, wish: bool | None, count: int) -> bool:
        if count == 1 or wish is False or (wish is None and not lives_outside(self._parts.units)):
            return False
        reason = other_sum(self._parts.units)
        if reason is not None and wish:
            raise ValueError(f"train_batch: {reason}. Fix: remove data_types.grad_accum_dtype, or unit_major=True.")
        if reason is not None and not self._warned_of_sums and self.global_rank == 0:
            logger.warning(
                f"train_batch: {reason}: so every unit is gathered for every micro-batch. Fix: remove "
                "data_types.grad_accum_dtype, or pass unit_major=False to keep it so."
            )
            self._warned_of_sums = True
        return reason is None

    def _turns(self, call: Callable[[MicroBatch], T], batches: Sequence[MicroBatch]) -> Turns[T]:
        return Turns([partial(call, batch) for batch in batches], self.device, salt=self.micro_steps)

    def _backward_jointly(self, batches: Sequence[MicroBatch]) -> None:
        """Forward unit by unit, and one backward through all of it."""
        factor = self.loss_scale() / len(batches)

        def forward(batch: MicroBatch) -> tuple[Tensor, Tensor]:
            loss = batch.loss(self._call_module)
            self._require_trainable(loss)
            return loss.detach(), _scaled(loss, factor)

        turns = self._turns(forward, batches)
        before = None if self._has_run_jointly else attributes(self.module)
        with self._parts.timers("forward"):
            losses, scaled = zip(*self._hooks.take_turns(turns), strict=True)
            turns.renumber([loss] for loss in scaled)
        self._has_run_jointly = True
        if before is not None and self.global_rank == 0:
            warn_of_state(before, attributes(self.module))
        self._losses += losses
        self._backpropagate(scaled)

    # -- backward ------------------------------------------------------------------------------------------------------

    def _begin_backward(self) -> None:
        reducer = self._parts.reducer
        if reducer.active:
            return
        reduce = self._sync and (self.zero_optimization_partition_gradients() or self._updates_next())
        reducer.begin(
            reduce=reduce,
            ran=lambda: self._parts.prefetcher.order,
            expects=self._hooks.expects,
            counts=self._hooks.is_whole_by_count,
        )

    def _backward_began(self) -> None:
        """A unit's backward begins; outside `engine.backward` this is how the engine learns of it."""
        if not self._parts.reducer.active and self._parts.update is not None:
            self._begin_backward()
            if not self._explicit:
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._parts.reducer.finish()
        self._hooks.end_backward()

    def _abort_backward(self) -> None:
        """An exception left backward half way: nothing of it may leak into the next one."""
        self._parts.reducer.active = False
        self._hooks.end_backward()

    # -- the optimizer step --------------------------------------------------------------------------------------------

    def _take_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        parts = self._parts
        if parts.update is None:
            raise RuntimeError("engine.step: expected an optimizer. Fix: pass or configure one at lorica.initialize.")
        self._settle(wait=parts.update.learns_late)
        with parts.timers("reduce"):
            parts.reducer.settle()
            self._hooks.free_all()
            squares = global_square_sum(parts.reducer.planes, parts.site)
            verdict = decide(squares, factor=self._grad_factor(), clip=self._config.gradient_clipping)
        with parts.timers("step"):
            self._grad_norm = verdict.norm
            if self._skips_nonfinite() and self._may_assume_finite(parts.update):
                self._assume(verdict, lr_kwargs)
            elif not self._skips_nonfinite() or verdict.finite.item():
                self._update(verdict, lr_kwargs)
            else:
                self._note_applied(False)
                self._note_skipped(self.global_steps + 1)
            self._end_step()

    def _expected_update(self) -> tuple[float, int] | None:
        """Factor and number of the update that follows this backward for certain, if nothing is clipped."""
        follows = self._sync and self._updates_next()
        return (self._grad_factor(), self._update_count + 1) if follows else None

    def _grad_factor(self) -> float:
        """What turns the reduced plane (a loss-scaled sum) into the gradient of the user's loss."""
        ranks = 1 if self._config.gradient_allreduce_op == "sum" else self._parts.site.num_replicas
        return self._parts.predivide / (ranks * self._parts.loss_scale.scale)

    def _skips_nonfinite(self) -> bool:
        return not self.bfloat16_enabled() or self._config.bf16.check_grad_overflow

    def _may_assume_finite(self, update: Update) -> bool:
        """Whether the device skips by itself, so that the host need not wait for the norm."""
        raises = self._config.lorica.on_nonfinite == "raise"
        reads_flag = self._streams is not None and update.runs_on_device
        return reads_flag and can_be_taken_back(self.lr_scheduler) and not raises

    def _assume(self, verdict: Verdict, lr_kwargs: dict[str, Any] | None) -> None:
        """Launch an update that the device skips if it must, and go on as if it did not."""
        assert self._streams is not None
        arriving, before = self._streams.fetch(verdict.finite), self._state()
        self._update(verdict, lr_kwargs, finite=verdict.finite)
        self._assumed.add(self.global_steps + 1, arriving, before, self._state())

    def _state(self) -> State:
        return State(self._parts.loss_scale, self.lr_scheduler, self._parts.groups)

    def _settle(self, *, wait: bool = True) -> None:
        """Learn which of the last steps were applied, where that was only assumed."""
        outcomes = self._assumed.settle(wait=wait)
        skipped = [outcome.number for outcome in outcomes if not outcome.applied]
        if not skipped or self._parts.update is None:
            return
        self._parts.update.know_skipped(len(skipped))
        self._update_count -= len(skipped)
        for number in skipped:
            self._note_skipped(number)
        self._note_applied(outcomes[-1].applied or len(self._assumed) > 0)

    def _update(self, verdict: Verdict, lr_kwargs: dict[str, Any] | None, finite: Tensor | None = None) -> None:
        """Update the parameters, and everything that follows a good step."""
        parts = self._parts
        assert parts.update is not None
        for let_go in parts.before_update:
            let_go()
        self._update_count += 1
        on_cpu = self.device.type == "cpu"
        coef = float(verdict.coef) if on_cpu else verdict.coef
        parts.update(Work(coef, self._update_count, finite, self._grad_factor()))
        self._note_applied(True)
        parts.loss_scale.update(overflow=False)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))

    def _note_applied(self, applied: bool) -> None:
        """Remember what became of the last step."""
        assert self.optimizer is not None
        self._step_applied = applied
        self.optimizer.note_update(applied=applied)

    def _note_skipped(self, number: int) -> None:
        """Step `number` found a gradient that is not finite."""
        self._skipped_steps += 1
        self._report_nonfinite(number)
        self._parts.loss_scale.update(overflow=True)

    def _end_step(self) -> None:
        for grad in self._parts.reducer.planes:
            grad.reset()
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self._report_step()

    def _report_nonfinite(self, number: int) -> None:
        scale = f", loss scale {self._parts.loss_scale.scale:g}" if self.fp16_enabled() else ""
        message = f"step {number}: the gradient holds inf or nan{scale}; the step is skipped"
        if self._config.lorica.on_nonfinite == "raise" and not self.dynamic_loss_scale():
            raise FloatingPointError(f"{message}. Fix: lower the learning rate, or find the loss that is not finite.")
        if self.global_rank == 0:
            logger.warning(message)

    def _report_step(self) -> None:
        self._throughput.add(self.train_batch_size())
        every = self._config.steps_per_print
        due = self.global_rank == 0 and every is not None and self.global_steps % every == 0
        losses, self._losses = self._losses, []
        if not due and not self.monitor.writes:
            return
        self._settle()
        loss = float(torch.stack(losses).float().mean()) if losses else None
        scale = self.loss_scale() if self.fp16_enabled() else None
        phases = self._parts.timers.take() if due else {}
        if due:
            rate = self._throughput.take()
            logger.info(progress_line(self.global_steps, loss, self.get_lr(), scale, rate, self.get_global_grad_norm()))
            for line in breakdown_lines(phases):
                logger.info(line)
            if self._config.memory_breakdown:
                logger.info(self._memory_line())
        times = {phase: time.mean_ms for phase, time in phases.items()}
        self.monitor.write_events(
            training_events(self.global_samples, loss=loss, lr=self.get_lr()[0], loss_scale=scale, phase_ms=times)
        )

    def _memory_line(self) -> str:
        states = self.memory().allocated_bytes._asdict()
        parts = [f"{kind} {count / 2**20:.1f} MiB" for kind, count in states.items()]
        if self.device.type == "cuda":
            parts.append(f"device peak {torch.cuda.max_memory_allocated(self.device) / 2**20:.1f} MiB")
        return "model states on this rank | " + " | ".join(parts)

    # -- data ----------------------------------------------------------------------------------------------------------

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader of this rank's share of `dataset`, in micro-batches of `batch_size` (default: the configured size).

        Args:
            route: "train" shuffles; "eval" and "predict" do not.
            data_sampler: decides alone which samples this rank reads.
            num_local_io_workers: processes that load; None or 0: none besides this one.
        """
        site = self._parts.site
        replica = site.replicate.rank if site.replicate is not None else 0
        return make_loader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            rank=replica * site.shard.world_size + site.shard.rank,
            world_size=site.num_replicas,
            collate_fn=collate_fn,
            drop_last=self._config.dataloader_drop_last,
            sampler=data_sampler,
            num_workers=num_local_io_workers or 0,
            pin_memory=pin_memory,
            shuffle=route_shuffles(route),
        )

    # -- boundaries ----------------------------------------------------------------------------------------------------

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates the parameters."""
        if self._set_boundary is not None:
            return self._set_boundary
        if not self._config.managed_gradient_accumulation:
            return True
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def _updates_next(self) -> bool:
        """Whether an update follows this backward for certain (without counting, only `step()` itself knows)."""
        return self._config.managed_gradient_accumulation and self.is_gradient_accumulation_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decide by hand whether the next `step()` updates; holds until the next call."""
        self._set_boundary = bool(is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in this context stay on this rank until the next one outside, at every stage."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """DeepSpeed's name for accumulating several backward passes and reducing once, at the next `step()`."""
        with self.no_sync():
            yield

    def was_step_applied(self) -> bool:
        """Whether the last boundary updated the parameters (False: skipped for a gradient that was not finite)."""
        self._settle()
        return self._step_applied

    @property
    def skipped_steps(self) -> int:
        """Boundaries at which the gradient was not finite and nothing was updated."""
        self._settle()
        return self._skipped_steps

    # -- updates under way ---------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Finish what `step()` has left under way: for a clock, or for code that reads memory behind torch's back.

        Updates of offloaded optimizer states go on in the background. Whoever touches a parameter waits for its unit.
        """
        self._require_alive("synchronize")
        if self._parts.update is not None:
            self._parts.update.settle()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in `nn.Module`, with their new values; raises if an update failed."""
        if self._parts is not _DESTROYED:
            self.synchronize()
        return super().named_parameters(*args, **kwargs)

    # -- compilation ---------------------------------------------------------------------------------------------------

    def compile(
        self,
        backend: str | Callable[..., Any] | None = None,
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the forward of every block at its next call; a second call compiles anew.

        Args:
            backend: of torch.compile; None: the configuration's.
            compile_kwargs: further arguments of torch.compile, before those of the configuration.
            schedule, compiled_autograd_enabled: DeepCompile's; only their defaults are there.
        Raises:
            NotImplementedError: for DeepCompile, compiled autograd, and CUDA graphs.
        """
        self._require_alive("compile")
        if schedule is not None or compiled_autograd_enabled:
            raise NotImplementedError(
                "engine.compile: schedules and compiled autograd are not there yet. Fix: leave them out; "
                "blocks are compiled, and gathering stays outside of them."
            )
        wanted = self._config.compile.model_dump(include={"backend", "mode", "dynamic", "fullgraph"})
        chosen = {} if backend is None else {"backend": backend}
        self._compiled.compile({**wanted, **(compile_kwargs or {}), **chosen}, log=self.global_rank == 0)

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled."""
        return self._compiled.active

    # -- state ---------------------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """Bytes of model states on this rank, planned and counted."""
        moments = len(self._moment_names())
        planned = allocated = StateBytes()
        for unit in self._parts.units:
            for flat in unit.flats:
                planned += flat.planned_bytes(moments)
                allocated += flat.held_bytes()
            for grad in unit.grads:
                allocated += StateBytes(grad=grad.held_bytes())
        return Memory(planned, allocated)

    def peak(self) -> Peak:
        """The most that model states will take on this rank: known before the first step, and the same in every run."""
        ahead, max_live = self._parts.prefetcher.budget
        ring = self._parts.update.ring_bytes if self._parts.update is not None else 0
        return peak(
            self._parts.units, len(self._moment_names()), ahead_numel=ahead, max_live_numel=max_live, ring_bytes=ring
        )

    def _moment_names(self) -> tuple[str, ...]:
        flats = [flat for unit in self._parts.units for flat in unit.flats]
        return next((flat.moment_names for flat in flats if flat.moment_names), ())

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank has sent to other ranks, by kind of collective."""
        total: dict[str, int] = {}
        for comm in (self._parts.site.shard, self._parts.site.replicate):
            for op, count in (comm.traffic.bytes_by_op if comm is not None else {}).items():
                total[op] = total.get(op, 0) + count
        return total

    def consolidated_state_dict(self, *, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The whole model in compute precision: a state dict on the CPU on rank 0, None elsewhere. Collective."""
        return consolidated_state_dict(
            self.module, exclude_frozen=exclude_frozen_parameters, keep=self.global_rank == 0
        )

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        return self.consolidated_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "model.safetensors", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the whole model in compute precision as one safetensors file. Collective.

        Returns:
            True, on all ranks.
        """
        state = self.consolidated_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        if state is not None:
            save_safetensors(state, Path(save_dir) / save_filename)
        for comm in (self._parts.site.shard, self._parts.site.replicate):
            if comm is not None:
                comm.barrier()
        return True

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The model's state dict; the consolidated one (rank 0 only) at stage 3."""
        if self.zero_optimization_partition_weights():
            return self.consolidated_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        return self.module.state_dict()

    def load_module_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Load a whole model's values: parameters, their masters, buffers. Moments and counters stay.

        Args:
            state_dict: whole tensors by name, the same on all ranks.
            strict: refuse names that are missing or left over.
        Raises:
            ValueError: for such names, or a tensor of another shape; nothing is changed then.
        """
        load_whole_state_dict(self.module, state_dict, strict=strict)

    def save_checkpoint(self, save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> bool:
        """Not there yet.

        Raises:
            NotImplementedError: always; says what works instead.
        """
        raise NotImplementedError(
            "engine.save_checkpoint: training checkpoints are not there yet. Fix: engine.save_16bit_model(save_dir) "
            "writes the whole model as safetensors."
        )

    def load_checkpoint(self, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> tuple[str, Any]:
        """Not there yet.

        Raises:
            NotImplementedError: always; says what works instead.
        """
        raise NotImplementedError(
            "engine.load_checkpoint: training checkpoints are not there yet. Fix: engine.load_module_state_dict() "
            "loads a model's weights."
        )

    def destroy(self) -> None:
        """Free everything: hooks, planes, moments, transports. The engine cannot be used afterwards."""
        if self._parts is _DESTROYED:
            return
        parts, self._parts = self._parts, _DESTROYED
        self._assumed.clear()
        self._compiled.restore()
        self._hooks.close()
        if parts.update is not None:
            parts.update.expected = lambda: None
            parts.update.close()
        parts.reducer.close()
        parts.monitor.close()
        for comm in (parts.site.shard, parts.site.replicate):
            if comm is not None:
                comm.close()
        for tier in parts.site.tiers.values():
            tier.close()
        for unit in parts.units:
            for flat in unit.flats:
                flat.leave()
            unit.flats.clear()
            unit.grads.clear()
        self.optimizer = self.lr_scheduler = self.training_dataloader = self._training_batches = None
        self._activations = None  # and with it its host buffers
        del self._hooks

    def _require_alive(self, what: str) -> None:
        if self._parts is _DESTROYED:
            raise RuntimeError(f"engine.{what}: expected a live engine, but it was destroyed. Fix: initialize again.")

    def _require_optimizer(self, what: str) -> None:
        self._require_alive(what)
        if self._parts.update is None:
            raise RuntimeError(
                f"engine.{what}: expected an optimizer, but this engine was made for inference. "
                "Fix: pass an optimizer to lorica.initialize, or configure one."
            )

    def _require_trainable(self, loss: Tensor) -> None:
        self._require_optimizer("backward")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"engine.backward: expected a scalar loss, got {shape}. Fix: reduce it (loss.mean()), or call "
                "tensor.backward(gradient) directly."
            )
        if not loss.requires_grad:
            raise RuntimeError(
                "engine.backward: expected a loss with a graph, but it does not require a gradient. Fix: compute it "
                "outside torch.no_grad(), from the output of the engine."
            )
        if in_backward():
            raise RuntimeError("engine.backward: called inside a backward pass. Fix: call it from the training loop.")

    # -- queries -------------------------------------------------------------------------------------------------------

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        """The index of this process's device on its host."""
        return self.device.index or 0 if self.device.type == "cuda" else _environment_int("LOCAL_RANK")

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    @property
    def dp_world_size(self) -> int:
        """Processes that see different data."""
        return self._parts.site.num_replicas

    @property
    def mp_world_size(self) -> int:
        """Processes that share one sample (tensor parallelism is not there yet)."""
        return 1

    @property
    def basic_optimizer(self) -> torch.optim.Optimizer | None:
        """The client's optimizer, or the engine's own."""
        return self.optimizer.optimizer if self.optimizer is not None else None

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.train_micro_batch_size_per_gpu() * self.gradient_accumulation_steps() * self.dp_world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward on one rank."""
        size = self._config.train_micro_batch_size_per_gpu
        assert size is not None
        return size

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._config.gradient_accumulation_steps or 1

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch, micro-batch, accumulation steps)."""
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the number of accumulation steps.

        Raises:
            ValueError: if it is not a multiple of micro-batch x ranks.
        """
        unit = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        if train_batch_size <= 0 or train_batch_size % unit:
            raise ValueError(
                f"set_train_batch_size: expected a multiple of micro-batch x ranks = {unit}, got {train_batch_size}. "
                f"Fix: use {max(unit, train_batch_size // unit * unit)}."
            )
        values = {"train_batch_size": train_batch_size, "gradient_accumulation_steps": train_batch_size // unit}
        self._config = self._config.replace(values)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch; the number of accumulation steps stays."""
        total = micro_batch_size * self.gradient_accumulation_steps() * self.dp_world_size
        self._config = self._config.replace(
            {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro_batch_size}
        )

    def get_lr(self) -> list[float]:
        """The learning rate of every param group."""
        self._settle()
        return [float(group["lr"]) for group in self._parts.groups]

    def get_mom(self) -> list[Any]:
        """Momentum, or betas, of every param group."""
        self._settle()
        return [group.get("momentum", group.get("betas")) for group in self._parts.groups]

    def get_type(self) -> list[str]:
        """The name of the optimizer, one per param group."""
        return [str(self.optimizer_name()) for _ in self._parts.groups]

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the averaged gradient at the last boundary, before clipping; None before the first."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def loss_scale(self) -> float:
        """The present loss scale; 1.0 without fp16."""
        if self.dynamic_loss_scale():
            self._settle()
        return self._parts.loss_scale.scale

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""
        return self._parts.loss_scale.dynamic

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self._config.zero_optimization.stage

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return STAGE[self.zero_optimization_stage()].grad

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return STAGE[self.zero_optimization_stage()].param

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """DeepSpeed's flag; Lorica gathers on request whatever it says."""
        return self._config.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def fp16_enabled(self) -> bool:
        """Whether the model computes in fp16."""
        return self._config.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        """Whether the model computes in bf16."""
        return self._config.bf16.enabled

    def gradient_clipping(self) -> float:
        """The largest gradient norm; 0: no clipping."""
        return self._config.gradient_clipping

    def steps_per_print(self) -> int | None:
        """Steps between two progress lines."""
        return self._config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether phases are timed."""
        return self._config.wall_clock_breakdown

    def optimizer_name(self) -> str | None:
        """The configured optimizer, or the class of the client's."""
        if self._parts.client_optimizer is not None:
            return type(self._parts.client_optimizer).__name__
        return self._config.optimizer.type if self._config.optimizer is not None else None

    def scheduler_name(self) -> str | None:
        """The configured schedule."""
        return self._config.scheduler.type if self._config.scheduler is not None else None

    @property
    def communication_data_type(self) -> torch.dtype:
        """The dtype in which gradients travel."""
        planes = self._parts.reducer.planes
        return planes[0].comm_dtype if planes else torch.float32

    def random_ltd_enabled(self) -> bool:
        """Random layer-token dropping is not offered."""
        return False


def _finish_before_reading(engine: Engine) -> Callable[..., None]:
    """A hook of the module that holds no engine: a state dict is of one step, or of none if its update failed."""
    weak = weakref.ref(engine)

    def hook(*_: Any) -> None:
        alive = weak()
        if alive is not None and alive._parts is not _DESTROYED:
            alive.synchronize()

    return hook


class _Destroyed:
    """Stands where the parts were; touching anything says what happened."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"engine ({name}): expected a live engine, but destroy() was called. Fix: initialize again.")


_DESTROYED: Any = _Destroyed()


def _environment_int(name: str) -> int:
    return int(os.environ.get(name, "0"))


def _scaled(loss: Tensor, factor: float) -> Tensor:
    """`loss` times `factor`, in fp32 if it is fp16."""
    wide = loss.float() if loss.dtype == torch.float16 else loss
    return wide * factor if factor != 1 else wide


def _halved(tree: Any) -> Any:
    cast: Callable[[Any], Any] = lambda x: x.half() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    return torch.utils._pytree.tree_map(cast, tree)
