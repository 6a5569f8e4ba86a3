"""Which devices the job uses and how many processes it has: pure functions of flags, machine and environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import NamedTuple

from lorica.launcher.devices import Accelerators
from lorica.launcher.flags import LaunchError, NotYetError, Options

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Slots(NamedTuple):
    """Devices as CUDA_VISIBLE_DEVICES names them (none: CPU processes), a number of processes, remarks for people."""

    devices: tuple[str, ...]
    num_procs: int
    notes: tuple[str, ...] = ()


def local_names() -> frozenset[str]:
    """The names by which a hostfile or --include may call this machine."""
    host = socket.gethostname()
    return frozenset({"localhost", "127.0.0.1", host, host.partition(".")[0]})


def choose_slots(
    options: Options, machine: Accelerators, environ: Mapping[str, str], hostfile_slots: int | None = None
) -> Slots:
    """Turn flags into devices and a number of processes.

    Without flags: every accelerator that CUDA_VISIBLE_DEVICES leaves, one process each; one process where there is
    none. As in DeepSpeed, --include, --exclude and --num_gpus count the machine's devices, not the visible ones, unless
    CUDA_VISIBLE_DEVICES hides them all: then the job runs on the CPU.

    Args:
        hostfile_slots: `slots=` of this machine's line in a hostfile, or None.
    Raises:
        LaunchError: for flags that contradict each other or ask for devices that are not there.
    """
    _check_exclusive(options)
    visible = environ.get(VISIBLE)
    if visible is not None and _hides_all(visible):
        machine = Accelerators(0, f"{VISIBLE}={visible!r} hides all accelerators")
    if machine.count == 0:
        return _on_cpu(options, machine.reason, hostfile_slots)
    share = options.share_gpu or environ.get("LORICA_SHARE_GPU", "0") not in ("", "0")
    return _on_devices(options, machine.count, visible, hostfile_slots, share=share)


def _check_exclusive(options: Options) -> None:
    if options.include and options.exclude:
        raise LaunchError("--include and --exclude exclude each other. Fix: leave one out.")
    if options.num_gpus is not None and (options.include or options.exclude):
        raise LaunchError("--num_gpus does not go with --include or --exclude. Fix: name the devices or their number.")


def _hides_all(visible: str) -> bool:
    return visible.strip() in ("", "-1", "NoDevFiles")


def _on_cpu(options: Options, reason: str, hostfile_slots: int | None) -> Slots:
    if options.exclude:
        raise LaunchError(
            f"--exclude={options.exclude}: {reason}, so there is nothing to exclude. "
            "Fix: leave it out; --num_procs N starts N CPU processes."
        )
    number, asked_by = _number_on_cpu(options, hostfile_slots)
    if options.num_procs is not None and not asked_by:
        return Slots((), options.num_procs)
    num_procs = options.num_procs or number
    what = "1 CPU process" if num_procs == 1 else f"{num_procs} CPU processes"
    return Slots((), num_procs, (f"{reason}: {asked_by + ' starts' if asked_by else 'starting'} {what}",))


def _number_on_cpu(options: Options, hostfile_slots: int | None) -> tuple[int, str]:
    """How many accelerators were asked for on a machine without any, and by what ("": by nothing)."""
    if options.include:
        return len(parse_filter(options.include, "--include") or (0,)), f"--include={options.include}"
    if options.num_gpus is not None:
        return options.num_gpus, f"--num_gpus={options.num_gpus}"
    if hostfile_slots is not None:
        return hostfile_slots, f"slots={hostfile_slots} in the hostfile"
    return 1, ""


def _on_devices(options: Options, count: int, visible: str | None, hostfile_slots: int | None, *, share: bool) -> Slots:
    if hostfile_slots is not None and hostfile_slots > count:
        raise LaunchError(f"the hostfile says slots={hostfile_slots}, but this machine has {count}. Fix: correct it.")
    notes: tuple[str, ...] = ()
    if visible is None:
        devices = _named_devices(options, hostfile_slots or count)
    elif options.include or options.exclude or options.num_gpus is not None or hostfile_slots is not None:
        devices = _named_devices(options, hostfile_slots or count)
        notes = (f"{VISIBLE}={visible} is ignored, because a flag or the hostfile says which devices to use",)
    else:
        devices = _visible_devices(visible, count)
    num_procs = options.num_procs or options.num_gpus or len(devices)
    if num_procs > len(devices) and not share:
        flag = "--num_procs" if options.num_procs else "--num_gpus"
        raise LaunchError(
            f"{flag}={num_procs} asks for {num_procs} accelerators, but there are {len(devices)} to use. "
            "Fix: ask for fewer, or let ranks share one with --share_gpu."
        )
    return Slots(devices[:num_procs], num_procs, notes)


def _named_devices(options: Options, count: int) -> tuple[str, ...]:
    """The devices that --include, --exclude or --num_gpus leave of the first `count`."""
    pool = tuple(range(count))
    chosen = pool if options.num_gpus is None else pool[: options.num_gpus]
    if options.include:
        chosen = _filtered(pool, parse_filter(options.include, "--include"), "--include", options.include)
    if options.exclude:
        chosen = _filtered(pool, parse_filter(options.exclude, "--exclude"), "--exclude", options.exclude)
    return tuple(map(str, chosen))


def _filtered(pool: tuple[int, ...], slots: tuple[int, ...] | None, flag: str, text: str) -> tuple[int, ...]:
    for slot in slots or ():
        if slot not in pool:
            raise LaunchError(
                f"{flag}={text}: no slot {slot} on localhost, which has {_span(pool)}. Fix: name one of them."
            )
    if flag == "--include":
        return pool if slots is None else slots
    left = () if slots is None else tuple(slot for slot in pool if slot not in slots)
    if not left:
        raise LaunchError(f"{flag}={text} leaves no accelerator of {_span(pool)}. Fix: exclude fewer.")
    return left


def _span(pool: tuple[int, ...]) -> str:
    return f"slot {pool[0]}" if len(pool) == 1 else f"slots {pool[0]} to {pool[-1]}"


def _visible_devices(visible: str, count: int) -> tuple[str, ...]:
    devices = tuple(dict.fromkeys(name.strip() for name in visible.split(",") if name.strip()))
    for name in devices:
        if name.isdigit() and int(name) >= count:
            raise LaunchError(
                f"{VISIBLE}={visible}: there is no device {name}, this machine has {count}. Fix: correct it."
            )
    return devices


def parse_filter(text: str, flag: str) -> tuple[int, ...] | None:
    """`localhost:2,0` -> (2, 0); `localhost` -> None, which means all of its slots.

    Raises:
        LaunchError: for a host that is not this machine, or text that is not NODE[:SLOT,...][@NODE...].
    """
    slots: list[int] = []
    whole = False
    for node in text.split("@"):
        host, colon, listed = node.strip().partition(":")
        if host not in local_names():
            raise LaunchError(
                f"{flag}={text}: unknown host {host!r}. Fix: localhost is the only one; write localhost:0,1."
            )
        if not colon:
            whole = True
            continue
        for slot in listed.split(","):
            if not (slot.strip().isascii() and slot.strip().isdigit()):
                raise LaunchError(f"{flag}={text}: expected slot numbers, got {slot!r}. Fix: write {host}:0,1.")
            slots.append(int(slot))
    return None if whole else tuple(dict.fromkeys(slots))


def parse_hostfile(text: str, path: str) -> int:
    """Read a hostfile that names this machine only, and return its number of slots.

    Raises:
        LaunchError: for a line that is not `host slots=N`, a host named twice, or no host at all.
        NotYetError: if it names other machines.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        host, _, rest = content.partition(" ")
        key, _, slots = rest.strip().partition("=")
        if key.strip() != "slots" or not slots.strip().isdigit() or int(slots) < 1:
            raise LaunchError(f"{path}:{number}: expected `host slots=N`, got {content!r}. Fix: correct the line.")
        if host in hosts:
            raise LaunchError(f"{path}:{number}: host {host!r} is named twice. Fix: one line per host.")
        hosts[host] = int(slots)
    others = [host for host in hosts if host not in local_names()]
    if others:
        raise NotYetError(
            f"{path} names {', '.join(others)}: more than one node is not launched yet. Fix: a hostfile with the line "
            "`localhost slots=N` alone, or torchrun on every node (docs/launcher.md)."
        )
    if len(hosts) != 1:
        raise LaunchError(f"{path}: expected one line `localhost slots=N`, got {len(hosts)}. Fix: correct the file.")
    return next(iter(hosts.values()))
