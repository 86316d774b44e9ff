"""Who may use one GPU at a time."""

import os

import pytest

from shared.errors import ResourceError
from shared.gpu_lease import GpuLease, lease_folder
from tests.shared.process_trees import no_process_left, start  # noqa: F401  autouse

CARD, OTHER_CARD = "GPU-8f2c6a31-0000-0000-0000-000000000001", "GPU-8f2c6a31-0000-0000-0000-000000000002"


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("evaluator", "evaluator", False),
        ("evaluator", "sharing trainer", True),
        ("evaluator", "exclusive trainer", False),
        ("sharing trainer", "evaluator", True),
        ("sharing trainer", "sharing trainer", True),
        ("sharing trainer", "exclusive trainer", False),
        ("exclusive trainer", "evaluator", False),
        ("exclusive trainer", "sharing trainer", False),
        ("exclusive trainer", "exclusive trainer", False),
    ],
)
def test_who_may_join_whom(first, second, together):
    newcomer = GpuLease(CARD, second)
    with GpuLease(CARD, first), GpuLease(OTHER_CARD, second):
        if together:
            newcomer.acquire().release()
        else:
            with pytest.raises(ResourceError, match=f"GPU {CARD} is in use by pid {os.getpid()} .*waited 0.2 s"):
                newcomer.acquire(timeout_s=0.2)
    with newcomer:
        assert len(newcomer.filenos()) == (2 if second == "evaluator" else 1)


def test_a_refused_evaluator_keeps_no_part_of_the_lease():
    with GpuLease(CARD, "exclusive trainer"), pytest.raises(ResourceError):
        GpuLease(CARD, "evaluator").acquire()
    GpuLease(CARD, "evaluator").acquire().release()


def test_a_lease_ends_with_the_process_that_held_it():
    script = f"""
        import time
        from shared.gpu_lease import GpuLease
        GpuLease("{CARD}", "exclusive trainer").acquire()
        print("held", flush=True)
        time.sleep(60)
    """
    other_study = start(script)
    assert other_study.stdout.readline() == "held\n"
    with pytest.raises(ResourceError, match=f"pid {other_study.pid}"):
        GpuLease(CARD, "evaluator").acquire()
    other_study.kill()
    other_study.communicate()
    GpuLease(CARD, "evaluator").acquire().release()


def test_the_folder_follows_the_runtime_directory(runtime_folder):
    assert lease_folder() == runtime_folder / "lora-tuner"
    assert lease_folder().stat().st_mode & 0o777 == 0o700


def test_without_a_usable_runtime_directory_everybody_meets_in_one_place(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    assert lease_folder().name == f"lora-tuner-{os.getuid()}"


def test_a_folder_that_is_a_link_is_not_trusted(runtime_folder):
    (runtime_folder / "lora-tuner").symlink_to(runtime_folder)
    with pytest.raises(ResourceError, match="belongs to somebody else"):
        GpuLease(CARD, "evaluator")


def test_a_name_that_could_leave_the_folder_is_refused():
    with pytest.raises(ValueError, match="no GPU UUID"):
        GpuLease("../../etc/passwd", "evaluator")
