"""Which devices a job gets and how many processes: tables of flags, machine and environment."""

from __future__ import annotations

import socket

import pytest

from lorica.launcher.cores import cpu_quota, parse_core_list, physical_cores, share_cores
from lorica.launcher.devices import Accelerators, built_without_cuda
from lorica.launcher.flags import LaunchError, NotYetError, Options
from lorica.launcher.slots import choose_slots, parse_filter, parse_hostfile

NONE = Accelerators(0, "no NVIDIA GPU was found on this machine")
FOUR = Accelerators(4)


@pytest.mark.parametrize(
    ("options", "visible", "devices", "num_procs"),
    [
        (Options(), None, "0 1 2 3", 4),
        (Options(num_gpus=2), None, "0 1", 2),
        (Options(num_procs=2), None, "0 1", 2),
        (Options(num_procs=6, share_gpu=True), None, "0 1 2 3", 6),
        (Options(num_gpus=2, num_procs=4, share_gpu=True), None, "0 1", 4),
        (Options(num_gpus=8, share_gpu=True), None, "0 1 2 3", 8),
        (Options(include="localhost"), None, "0 1 2 3", 4),
        (Options(include="localhost:3,1"), None, "3 1", 2),
        (Options(include="localhost:1@localhost:2,1"), None, "1 2", 2),
        (Options(exclude="localhost:0,2"), None, "1 3", 2),
        (Options(), "2,3", "2 3", 2),
        (Options(), "GPU-8f2a,GPU-77b1", "GPU-8f2a GPU-77b1", 2),
        (Options(num_procs=1), "2,3", "2", 1),
        (Options(num_gpus=2), "2,3", "0 1", 2),
        (Options(include="localhost:0"), "2,3", "0", 1),
        (Options(), "", "", 1),
        (Options(num_gpus=3), "-1", "", 3),
    ],
)
def test_devices_on_a_machine_with_four(options: Options, visible: str | None, devices: str, num_procs: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    slots = choose_slots(options, FOUR, environ)
    assert (slots.devices, slots.num_procs) == (tuple(devices.split()), num_procs)


@pytest.mark.parametrize(
    ("options", "hostfile_slots", "num_procs", "note"),
    [
        (Options(), None, 1, "starting 1 CPU process"),
        (Options(num_gpus=8), None, 8, "--num_gpus=8 starts 8 CPU processes"),
        (Options(num_procs=2), None, 2, ""),
        (Options(include="localhost:0,1"), None, 2, "--include=localhost:0,1 starts 2 CPU processes"),
        (Options(), 3, 3, "slots=3 in the hostfile starts 3 CPU processes"),
    ],
)
def test_cpu_processes_on_a_machine_without_accelerators(
    options: Options, hostfile_slots: int | None, num_procs: int, note: str
) -> None:
    slots = choose_slots(options, NONE, {}, hostfile_slots)
    assert (slots.devices, slots.num_procs) == ((), num_procs)
    assert slots.notes == ((f"{NONE.reason}: {note}",) if note else ())


@pytest.mark.parametrize(
    ("options", "machine", "environ", "message"),
    [
        (Options(num_gpus=8), FOUR, {}, "--num_gpus=8 asks for 8 accelerators, but there are 4 to use"),
        (Options(num_procs=5), FOUR, {}, "--num_procs=5 asks for 5 accelerators, but there are 4 to use"),
        (Options(num_procs=3), FOUR, {"CUDA_VISIBLE_DEVICES": "0,1"}, "there are 2 to use"),
        (Options(include="localhost:0", exclude="localhost:1"), FOUR, {}, "exclude each other"),
        (Options(include="localhost:0", num_gpus=1), FOUR, {}, "does not go with"),
        (Options(include="localhost:4"), FOUR, {}, "no slot 4 on localhost, which has slots 0 to 3"),
        (Options(exclude="localhost:0,1,2,3"), FOUR, {}, "leaves no accelerator"),
        (Options(exclude="localhost"), FOUR, {}, "leaves no accelerator"),
        (Options(exclude="localhost:0"), NONE, {}, "nothing to exclude"),
        (Options(include="worker-1:0"), FOUR, {}, "unknown host 'worker-1'"),
        (Options(include="worker-1:0"), NONE, {}, "unknown host 'worker-1'"),
        (Options(include="localhost:a"), FOUR, {}, "expected slot numbers, got 'a'"),
        (Options(include="localhost:"), FOUR, {}, "expected slot numbers, got ''"),
        (Options(), FOUR, {"CUDA_VISIBLE_DEVICES": "0,7"}, "there is no device 7, this machine has 4"),
    ],
)
def test_impossible_wishes_are_refused(
    options: Options, machine: Accelerators, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        choose_slots(options, machine, environ)
    assert message in str(caught.value) and "Fix: " in str(caught.value)


def test_sharing_can_be_allowed_by_the_environment_and_overriding_visible_devices_is_said() -> None:
    assert choose_slots(Options(num_procs=5), FOUR, {"LORICA_SHARE_GPU": "1"}).num_procs == 5
    with pytest.raises(LaunchError):
        choose_slots(Options(num_procs=5), FOUR, {"LORICA_SHARE_GPU": "0"})
    assert "is ignored" in choose_slots(Options(num_gpus=1), FOUR, {"CUDA_VISIBLE_DEVICES": "2"}).notes[0]


def test_a_filter_names_this_machine_in_any_of_its_ways() -> None:
    host = socket.gethostname()
    assert parse_filter(f"localhost:0@127.0.0.1:1@{host}:2", "--include") == (0, 1, 2)
    assert parse_filter(host, "--include") is None


def test_a_hostfile_of_this_machine_gives_its_slots() -> None:
    assert parse_hostfile("# ours\n\nlocalhost slots=4  # four\n", "hostfile") == 4
    with pytest.raises(NotYetError, match="worker-1"):
        parse_hostfile("localhost slots=4\nworker-1 slots=4\n", "hostfile")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost slots=",
        "localhost slots=x",
        "localhost cores=2",
        "localhost slots=1\nlocalhost slots=2",
    ],
)
def test_a_bad_hostfile_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="hostfile"):
        parse_hostfile(text, "hostfile")


@pytest.mark.parametrize(("text", "cpus"), [("3", (3,)), ("0-2,8", (0, 1, 2, 8)), ("4, 1", (4, 1))])
def test_core_lists_are_read(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_core_list(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "1,1", "0-2,2"])
def test_bad_core_lists_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="--bind_core_list"):
        parse_core_list(text)


def test_hardware_threads_are_grouped_by_core_and_cores_by_socket(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for cpu, (package, core) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0)]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    assert physical_cores(range(6), tmp_path) == ((0, 4), (2,), (1, 5), (3,))


def test_the_smallest_quota_of_the_control_groups_counts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    for folder, content in (("", "max 100000"), ("job", "150000 100000"), ("job/step", "400000 100000")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(content)
    assert cpu_quota(tmp_path, membership) == 1.5
    assert cpu_quota(tmp_path, tmp_path / "missing") == float("inf")


def test_more_ranks_than_cores_cannot_be_bound() -> None:
    with pytest.raises(LaunchError, match="a core per rank: expected at least 2 cores, got 1"):
        share_cores(2, bind=False, core_list=str(next(iter(physical_cores([0])[0]))))


def test_the_version_file_of_torch_says_whether_it_has_cuda() -> None:
    assert built_without_cuda("debug = False\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    assert not built_without_cuda("debug = False\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
