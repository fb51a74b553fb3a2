"""utils_funcs: files are whole or absent, lesser runs never reach the committed results."""

import ctypes
import json
import platform
import subprocess
import sys

import pytest
import torch

from utils.utils_funcs import (
    ROOT,
    UserError,
    atomic_path,
    choose_device,
    keep_freed_memory,
    read_json,
    result_root,
    set_up_process,
    write_json,
)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "record.json"
    write_json(target, {"value": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half of a rec")
        raise KeyboardInterrupt
    assert json.loads(target.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [target], "no temporary file stays behind"


KILLED = """
import os, sys
from utils.utils_funcs import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half of a rec")
    print("written", flush=True)
    os.kill(os.getpid(), 9) if sys.argv[2] == "dies" else sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_the_next_write_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    target, other = tmp_path / "record.json", tmp_path / "record-2.json"
    command = [sys.executable, "-c", KILLED]
    for path in (target, other):
        subprocess.run([*command, str(path), "dies"], cwd=ROOT, stdout=subprocess.DEVNULL)
    living = subprocess.Popen(
        [*command, str(target), "lives"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert living.stdout.readline().strip() == b"written"
    assert len(list(tmp_path.glob(".record-*.tmp"))) == 3
    write_json(target, {"value": 1})
    left = sorted(path.name for path in tmp_path.glob("*.tmp"))
    assert len(left) == 2 and any(f"-{living.pid}-" in name for name in left), left
    living.communicate()  # it ends, and its file takes the place of the other
    assert target.read_text() == "half of a rec"


def test_nan_never_reaches_a_record(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "record.json", {"value": float("nan")})
    assert not (tmp_path / "record.json").exists()


def test_a_half_written_json_is_a_clear_error(tmp_path):
    (tmp_path / "record.json").write_text('{"value":')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "record.json")


@pytest.mark.parametrize(
    "profile,data",
    [("demo", "real"), ("demo", "phantom"), ("cpu", "phantom"), ("paper", "phantom")],
)
def test_lesser_runs_write_under_runs(profile, data, monkeypatch):
    monkeypatch.delenv("ALZHEIMER_RUNS", raising=False)
    assert result_root(profile, data) == ROOT / "runs" / f"{profile}-{data}"


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_only_full_runs_on_real_data_write_the_repository(profile):
    assert result_root(profile, "real") == ROOT


def test_freed_memory_is_kept_where_the_c_library_can_and_never_an_error(monkeypatch):
    assert keep_freed_memory.__wrapped__() is (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("no such library"))
    )
    assert keep_freed_memory.__wrapped__() is False


def test_float32_on_a_gpu_is_float32_once_a_process_is_set_up():
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        choose_device()
        assert all(backend.allow_tf32 for backend in backends), "choosing changes nothing"
        set_up_process()
        assert not any(backend.allow_tf32 for backend in backends)
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
