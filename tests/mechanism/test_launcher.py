"""The launcher with real processes: what a script sees, what is written. How jobs end: test_launcher_failures.py."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RECORD = """
import json, os, sys
seen = {
    "argv": [os.fsencode(word).hex() for word in sys.argv],
    "name": __name__, "file": __file__, "package": __package__, "spec": getattr(__spec__, "name", None),
    "loader": type(__loader__).__name__, "path0": sys.path[0], "main": sys.modules["__main__"].__dict__ is globals(),
    "cached": __cached__, "doc": __doc__, "torch": "torch" in sys.modules, "lorica": "lorica" in sys.modules,
}
name = os.path.join(os.environ["OUT"], "seen" + os.environ.get("RANK", "") + ".json")
with open(name, "w") as file:
    json.dump(dict(seen, environ={key: os.fsencode(value).hex() for key, value in os.environ.items()}), file)
"""


def environ(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LORICA", "OMP", "CUDA"))}
    return kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | extra  # several ranks, also beside one GPU


def lorica(*words: str | bytes, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in `cwd`; OUT names `cwd` for the scripts."""
    command = [sys.executable, "-m", "lorica", *words]
    return subprocess.run(
        command, cwd=cwd, env=environ(OUT=str(cwd), **extra), capture_output=True, text=True, timeout=60, check=False
    )


def seen(folder: Path, rank: int | str = "") -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"seen{rank}.json").read_text())
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "record.py").write_text(RECORD)
    return tmp_path / "record.py"


def hostile_words(number: int) -> list[bytes]:
    """Words that a shell, an option parser or a decoder would change, and random mixtures of their parts."""
    parts = [
        b"$(touch touched)", b"`touch touched`", b";", b"touch touched", b"&", b"|", b">", b"'", b'"', b"\\", b"\n",
        b"\r", b"\t", b" ", b"*", b"?", b"~", b"{a,b}", b"!", b"#", b"%s", b"--", b"-", b"=", b"@", b"\xff\xfe",
        "\u00fc\u6f22\U0001f600".encode(), b"--num_gpus=3", b"--help", b"-oProxyCommand=touch touched", b"\x80" * 99,
    ]  # fmt: skip
    choose = random.Random(0)
    mixed = [b"".join(choose.choices(parts, k=choose.randint(1, 4))) for _ in range(number - len(parts) - 2)]
    return [*parts, *mixed, b"", b"y" * 100_000]


def test_every_byte_of_the_arguments_reaches_the_script(script: Path) -> None:
    words = hostile_words(300)
    done = lorica("--num_procs", "1", "--no_local_rank", "record.py", *words, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    assert seen(script.parent, 0)["argv"] == [word.hex() for word in (b"record.py", *words)]
    assert not (script.parent / "touched").exists()


def test_every_byte_of_an_environment_variable_and_of_a_path_reaches_the_script(script: Path) -> None:
    odd = os.fsdecode(b"od d\xff;$(touch touched)'")
    os.rename(script, script.parent / odd)
    done = lorica("--no_local_rank", odd, cwd=script.parent, HOSTILE=odd)
    assert done.returncode == 0, done.stderr
    found = seen(script.parent, 0)
    assert found["argv"] == [os.fsencode(odd).hex()]
    assert found["environ"]["HOSTILE"] == os.fsencode(odd).hex()  # type: ignore[index]
    assert not (script.parent / "touched").exists()


def test_local_rank_is_passed_before_the_arguments_of_the_script(script: Path) -> None:
    assert lorica("--num_gpus=2", "record.py", "train", "--lr", "1", cwd=script.parent).returncode == 0
    for rank in range(2):
        words = ("record.py", f"--local_rank={rank}", "train", "--lr", "1")
        assert seen(script.parent, rank)["argv"] == [word.encode().hex() for word in words]


@pytest.mark.parametrize(
    ("plain", "launched"),
    [
        (["record.py"], ["record.py"]),
        (["inner/record"], ["inner/record"]),
        (["./inner/../record.py"], ["./inner/../record.py"]),
        (["-m", "package"], ["--module", "package"]),
        (["-m", "package.part"], ["--module", "package.part"]),
        (["folder"], ["folder"]),
        (["archive.zip"], ["archive.zip"]),
    ],
    ids=lambda words: words[-1],
)
def test_a_script_sees_what_python_shows_it(script: Path, plain: list[str], launched: list[str]) -> None:
    folder = script.parent
    for name in ("inner/record", "package/__main__.py", "package/part.py", "folder/__main__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(("from . import sibling\n" if "package" in name else "") + RECORD)
    (folder / "package/__init__.py").touch()
    (folder / "package/sibling.py").touch()
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", RECORD)
    subprocess.run([sys.executable, *plain, "a"], cwd=folder, env=environ(OUT=str(folder)), check=True, timeout=60)
    done = lorica("--no_local_rank", *launched, "a", cwd=folder)
    assert done.returncode == 0, done.stderr
    expected, found = seen(folder), seen(folder, 0)
    del expected["environ"], found["environ"]
    if plain[0] in ("folder", "archive.zip"):  # ours are absolute, so that a script may change its folder
        expected["file"] = str(folder / str(expected["file"]))
    assert found == expected


def test_classes_of_the_script_can_be_pickled_by_spawned_processes_and_at_exit(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import atexit, multiprocessing, pickle\n"
        "class Batch:\n    pass\n"
        "def work(batch):\n    return type(batch).__name__\n"
        "if __name__ == '__main__':\n"
        "    atexit.register(lambda: print('at exit', pickle.loads(pickle.dumps(Batch())).__class__.__name__))\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print('spawned', pool.map(work, [Batch()]))\n"
    )
    done = lorica("train.py", cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["spawned ['Batch']", "at exit Batch"], done.stderr


def test_the_environment_is_torchruns_and_deepspeeds(script: Path) -> None:
    assert lorica("--num_procs=2", "record.py", cwd=script.parent, TORCHELASTIC_USE_AGENT_STORE="True").returncode == 0
    for rank in range(2):
        hexed: dict[str, str] = seen(script.parent, rank)["environ"]  # type: ignore[assignment]
        found = {key: bytes.fromhex(value).decode() for key, value in hexed.items()}
        expected = {
            "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
            "CROSS_RANK": "0", "CROSS_SIZE": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_RANK": f"{rank}",
            "ROLE_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        assert {key: found[key] for key in expected} == expected
        assert int(found["MASTER_PORT"]) > 0
        assert ("LORICA_STORE_FD" in found) == (rank == 0)
        assert "TORCHELASTIC_USE_AGENT_STORE" not in found


def test_threads_are_shared_out_unless_the_user_has_said_how_many(script: Path) -> None:
    from lorica.launcher.cores import num_cores

    for extra, expected in ({}, str(max(1, num_cores() // 2))), ({"OMP_NUM_THREADS": "5"}, "5"):
        assert lorica("--num_procs=2", "record.py", cwd=script.parent, **extra).returncode == 0
        hexed: dict[str, str] = seen(script.parent, 1)["environ"]  # type: ignore[assignment]
        assert bytes.fromhex(hexed["OMP_NUM_THREADS"]).decode() == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="binding needs Linux")
def test_ranks_are_bound_to_cores_of_their_own(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    (tmp_path / "train.py").write_text("import os; print(os.environ['RANK'], sorted(os.sched_getaffinity(0)))")
    done = lorica("--num_procs=2", "--bind_core_list", f"{cpus[1]},{cpus[0]}", "train.py", cwd=tmp_path)
    assert sorted(done.stdout.splitlines()) == [f"0 [{cpus[1]}]", f"1 [{cpus[0]}]"], done.stderr


def test_a_program_that_is_not_python_is_run_as_it_is(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nprintf "%s," "$RANK" "$@"\nexit 4\n')
    program.chmod(0o755)
    done = lorica("--no_python", "./program", "a b", "*", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("0,--local_rank=0,a b,*,", 4), done.stderr


def test_rank_0_reads_the_launchers_input_and_the_others_read_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os, sys; print(os.environ['RANK'], repr(sys.stdin.read()))")
    done = subprocess.run(
        [sys.executable, "-m", "lorica", "--num_procs=2", "train.py"],
        cwd=tmp_path, env=environ(), input="typed", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert sorted(done.stdout.splitlines()) == ["0 'typed'", "1 ''"]


def test_each_rank_writes_a_log_and_the_failed_one_is_shown(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys, time\nprint('hello from', os.environ['RANK'], flush=True)\n"
        "time.sleep(0.2)\nif os.environ['RANK'] == '1': raise ValueError('wrong')\ntime.sleep(60)\n"
    )
    done = lorica("--num_procs=2", "--enable_each_rank_log", "logs/here", "train.py", cwd=tmp_path)
    logs = sorted((tmp_path / "logs/here").iterdir())
    assert [log.name.partition("_")[2] for log in logs] == ["rank0.log", "rank1.log"]
    assert logs[0].read_text() == "hello from 0\n"
    assert logs[1].read_text().startswith("hello from 1\nTraceback")
    assert done.stdout == ""
    assert "  | ValueError: wrong" in done.stderr
    assert done.returncode == 1


def test_the_pid_file_is_there_while_the_job_runs(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os\npid = os.getppid()\n"
        "print(open(os.path.join(os.environ['TMPDIR'], f'{pid}.lorica')).read() == f'{pid}\\n')"
    )
    done = lorica("--save_pid", "train.py", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.stdout == "True\n", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]  # nor is anything else left


def test_a_machine_without_accelerators_says_that_it_starts_cpu_processes(script: Path) -> None:
    done = lorica("--num_gpus=2", "record.py", cwd=script.parent, CUDA_VISIBLE_DEVICES="")
    assert done.stderr.count("\n") == 1 and "--num_gpus=2 starts 2 CPU processes" in done.stderr
    assert lorica("-q", "--num_gpus=2", "record.py", cwd=script.parent, CUDA_VISIBLE_DEVICES="").stderr == ""


def test_a_script_that_does_not_exist_is_refused_with_the_nearest_name(script: Path) -> None:
    done = lorica("recrod.py", cwd=script.parent)
    assert done.returncode == 2
    assert "'recrod.py' does not exist" in done.stderr and "did you mean record.py?" in done.stderr


def test_a_port_that_is_taken_is_refused(script: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = lorica(f"--master_port={server.getsockname()[1]}", "record.py", cwd=script.parent)
    assert done.returncode == 2 and "Address already in use" in done.stderr


def test_an_address_of_another_machine_is_refused(script: Path) -> None:
    done = lorica("--master_addr=192.0.2.1", "record.py", cwd=script.parent)
    assert done.returncode == 2 and "192.0.2.1" in done.stderr


def test_rank_0_can_listen_on_the_reserved_port_by_its_descriptor_or_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, socket\n"
        "place = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])\n"
        "with socket.create_server(place): print('by number', socket.create_connection(place).getpeername() == place)\n"
        "with socket.socket(fileno=int(os.environ['LORICA_STORE_FD'])) as server:\n"
        "    server.listen()\n"
        "    print('by descriptor', socket.create_connection(place).getpeername() == place)\n"
    )
    done = lorica("train.py", cwd=tmp_path)
    assert done.stdout == "by number True\nby descriptor True\n", done.stderr
