"""A lock has one owner. A stale one is broken; of a run that is going on nothing is touched."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, TINY, assert_refused, call, newest_step, scripts
from test_resume import assert_no_step_twice, assert_same_outcome

from modeling import evaluation, report
from modeling.errors import UserError
from modeling.run import lock
from modeling.run.files import RunFiles


def make_lock(path, description="run 'x' in here") -> lock.Lock:
    return lock.Lock([path], description=description, advice="give another --run-name")


def written(path, **changes) -> None:
    """Leave a lock of an owner that differs from this process by `changes`."""
    with make_lock(path) as held:
        owner = json.loads(held.content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(owner | changes))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)


def test_the_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    path = tmp_path / "new" / ".x.lock"
    with make_lock(path) as held:
        owner = json.loads(held.content)
        assert owner.keys() == {field.name for field in dataclasses.fields(lock.Owner)}
        with pytest.raises(
            UserError, match=f"in use by process {owner['pid']} of .*, since 20.*: give another"
        ):
            make_lock(path).acquire()
        assert path.read_bytes() == held.content
    assert not path.parent.exists(), "the lock and the folder that it needed are gone"
    with make_lock(path):
        assert path.exists()


def test_a_lock_in_two_folders_is_held_in_both_or_in_none(tmp_path):
    paths = [tmp_path / "a" / ".x.lock", tmp_path / "b" / ".x.lock"]
    with make_lock(paths[1]), pytest.raises(UserError, match="in use"):
        lock.Lock(paths, description="run", advice="").acquire()
    assert not paths[0].exists()


def test_a_run_locks_its_folders_once_each_where_they_are_links(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("checkpoints", "runs"):
        (tmp_path / name).symlink_to(tmp_path / "disk")
    assert RunFiles(tmp_path, "x").locks == [tmp_path / "disk" / ".x.lock"]


@pytest.mark.parametrize(
    "changes", [{"pid": 2**22 + 5, "ticks": "7"}, {"ticks": "7"}], ids=["ended", "reused"]
)
def test_the_lock_of_a_process_that_has_ended_is_broken_at_once(changes, tmp_path, capsys):
    path = tmp_path / ".x.lock"
    written(path, **changes)
    with make_lock(path) as held:
        assert path.read_bytes() == held.content
    assert capsys.readouterr().out == ""


def test_a_killed_process_that_its_parent_has_not_reaped_has_ended(tmp_path):
    path = tmp_path / ".x.lock"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    written(path, pid=process.pid, ticks=lock.start_ticks(process.pid))
    with pytest.raises(UserError, match=f"process {process.pid} "):
        make_lock(path).acquire()
    process.kill()
    while lock.start_ticks(process.pid):
        time.sleep(0.01)
    with make_lock(path):
        pass
    process.communicate()


@pytest.mark.parametrize(
    "content", [None, b"", b"half of a li", b"[1]"], ids=["other machine", "empty", "half", "odd"]
)
def test_a_lock_that_nobody_renews_is_broken_after_a_while_and_that_is_said(content, quick, tmp_path, capsys):
    path = tmp_path / ".x.lock"
    written(path, host="elsewhere", machine="another boot")
    if content is not None:
        path.write_bytes(content)
    with make_lock(path) as held:
        assert path.read_bytes() == held.content
    assert "to see whether that process still runs" in capsys.readouterr().out


def test_a_lock_of_another_machine_that_is_renewed_is_held(quick, tmp_path, monkeypatch):
    path = tmp_path / ".x.lock"
    monkeypatch.setattr(lock, "_machine", lambda: "one")
    with make_lock(path) as held:
        monkeypatch.setattr(lock, "_machine", lambda: "two")
        with pytest.raises(UserError, match="in use by process"):
            make_lock(path).acquire()
        assert path.read_bytes() == held.content


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    path = tmp_path / ".x.lock"
    for _ in range(20):
        written(path, ticks="7")
        barrier, winners, locks = threading.Barrier(8), [], [make_lock(path) for _ in range(8)]

        def acquire(one, barrier=barrier, winners=winners):
            barrier.wait()
            try:
                one.acquire()
            except UserError:
                return
            winners.append(one)

        threads = [threading.Thread(target=acquire, args=(one,)) for one in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert path.read_bytes() == winners[0].content
        winners[0].release()


def test_a_lock_works_without_flock(tmp_path, monkeypatch):
    def no_flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_flock)
    written(tmp_path / ".x.lock", ticks="7")
    with make_lock(tmp_path / ".x.lock"), pytest.raises(UserError, match="in use"):
        make_lock(tmp_path / ".x.lock").acquire()


def test_two_evaluations_of_one_folder_lose_no_row(trained, tmp_path, monkeypatch):
    """Another evaluation has read metrics.csv and has not yet written it, when ours wants to write."""
    traces, waits = tmp_path / "traces", threading.Event()
    table = traces / "metrics.csv"
    other_row = dict.fromkeys(report.CSV_COLUMNS, 1)
    real = lock.Owner.is_alive

    def is_alive(owner):
        waits.set()
        return real(owner)

    monkeypatch.setattr(lock.Owner, "is_alive", is_alive)
    held = lock.Lock([traces / evaluation.LOCK_FILE], description="")
    held.acquire()

    def write_late():
        while not waits.is_set() and not table.exists():
            time.sleep(0.01)
        table.write_text(report.csv_text([other_row], report.CSV_COLUMNS))
        held.release()

    other = threading.Thread(target=write_late)
    other.start()
    result = call("evaluate", "--ckpt", trained.best, "--limit-eval", 20, "--output-dir", tmp_path)
    other.join()
    assert result.status == 0, result.err
    assert f"waiting for process {os.getpid()} " in result.out
    assert [row["model"] for row in report.read_metrics_csv(table)] == ["1", "cnn_small"]
    assert not [*traces.glob(".*")]


def test_two_exports_into_one_folder(tmp_path):
    folder = tmp_path / "data"
    with lock.Lock([folder / scripts.export_data.LOCK], description=""):
        result = call("export_data", "--dataset", "digits", "--output-dir", folder)
    assert_refused(result, f"{folder} is in use by process {os.getpid()} of", "choose another --output-dir")
    assert not folder.exists() or not [*folder.iterdir()]


def test_an_owner_that_lost_its_lock_ends(tmp_path):
    path = tmp_path / ".x.lock"
    with make_lock(path) as held:
        held.check()
        path.unlink()
        held.check()
        assert path.read_bytes() == held.content, "nobody had it, so it is taken again"
        other = json.loads(held.content) | {"host": "elsewhere"}
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match="was taken over by process .* of elsewhere"):
            held.check()
    assert json.loads(path.read_text()) == other, "a lock of another process is not removed"


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--resume",)], ids=["new", "resume"])
def test_a_second_run_of_a_name_is_refused_and_the_first_ends_as_if_alone(flags, trained, tmp_path):
    argv = [sys.executable, ROOT / "train.py", *TINY, "--epochs", 3, "--checkpoint-every", 1]
    argv = [str(a) for a in (*argv, "--output-dir", tmp_path)]
    # it waits in its second step until the other has tried
    code = (
        "import pathlib, runpy, sys, time; sys.path.insert(0, '.'); from modeling import engine\n"
        "real, go = engine.train_step, pathlib.Path(sys.argv.pop(1))\n"
        "def slow(*args, step, **kwargs):\n"
        "    while step == 1 and not go.exists():\n"
        "        time.sleep(0.01)\n"
        "    return real(*args, step=step, **kwargs)\n"
        "engine.train_step = slow; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [argv[0], "-c", code, str(tmp_path / "go"), *argv[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and newest_step(tmp_path / "checkpoints" / "cnn_small_state") < 1:
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = call("train", *TINY, "--lr", 0.5, "--epochs", 1, "--output-dir", tmp_path, *flags)
    assert_refused(result, "run 'cnn_small' in", f"in use by process {process.pid} of", "--run-name")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert_same_outcome(tmp_path, trained.folder)
    assert_no_step_twice(tmp_path)
    assert not [*tmp_path.rglob("*.lock")]
    assert not (tmp_path / "previous").exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    assert_refused(call("train", *TINY, "--val-fraction", 0.0001, "--output-dir", tmp_path), "is empty")
    assert not [*tmp_path.iterdir()]
