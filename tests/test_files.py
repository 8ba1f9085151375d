"""Files are written whole or not at all, on any file system. What cannot be written is known at the start."""

import errno
import os
from pathlib import Path

import pytest
from conftest import TINY, assert_refused, call, scripts

from modeling import files
from modeling.errors import UserError
from modeling.run.files import RunFiles


def refuse(number: int, *, only_folders: bool = False):
    """Return an os function that fails with this error. only_folders: for a folder's descriptor alone."""
    real = os.fsync

    def function(descriptor, *arguments, **keywords):
        if only_folders and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return real(descriptor)
        raise OSError(number, os.strerror(number))

    return function


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS])
def test_a_folder_that_cannot_be_synced_and_a_file_system_without_modes_and_links_will_do(
    number, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", refuse(number, only_folders=True))
    for name in ("chmod", "fchmod", "link", "symlink"):
        monkeypatch.setattr(os, name, refuse(number))
    files.write_text(tmp_path / "a" / "b.txt", "whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    with pytest.raises(OSError, match="output"):  # but a disk that fails is no matter of taste
        monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
        files.write_text(tmp_path / "output", "x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EINVAL])
def test_a_files_own_data_must_reach_the_disk_and_the_error_names_the_file(number, tmp_path, monkeypatch):
    (tmp_path / "old.txt").write_text("old")
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(OSError) as failure:
        files.write_text(tmp_path / "old.txt", "new")
    assert failure.value.filename == str(tmp_path / "old.txt")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_file_gets_the_permissions_that_open_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_name_that_is_not_utf8_can_be_reported(tmp_path):
    files.write_text(tmp_path / "x", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "x").read_text() == "caf\\udce9"


# ---- known at the start --------------------------------------------------------------------------


def test_a_run_name_that_is_too_long_is_refused_before_the_data(tmp_path):
    longest = 255 - len("classification_report__final_validation.txt") - files.TEMPORARY_BYTES
    for length in (longest + 1, 300):
        result = call("train", *TINY, "--run-name", "n" * length, "--output-dir", tmp_path / "out")
        assert_refused(result, "too long", "--run-name")
        assert not (tmp_path / "out").exists()
    result = call(
        "train", *TINY, "--max-steps", 1, "--run-name", "n" * longest, "--output-dir", tmp_path / "out"
    )
    assert result.status == 0, result.err
    (best,) = (tmp_path / "out" / "checkpoints").glob("*_best.safetensors")
    result = call("evaluate", "--ckpt", best, "--output-dir", tmp_path / "out", "--limit-eval", 20)
    assert result.status == 0, result.err


def test_the_first_write_is_tried_before_the_first_step_by_the_function_that_writes_checkpoints(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    monkeypatch.delattr("modeling.setup.load_source")  # nothing is loaded
    result = call("train", *TINY, "--output-dir", tmp_path / "out")
    assert_refused(result, "cannot write to the output folder", "No space left on device", str(tmp_path))
    assert not (tmp_path / "out").exists()


# ---- an older run is moved aside -----------------------------------------------------------------


def older_run(folder: Path) -> RunFiles:
    run_files = RunFiles(folder, "run")
    for path in (run_files.best, run_files.final, run_files.states / "step", run_files.logs / "metrics"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return run_files


@pytest.fixture
def other_disk(tmp_path, monkeypatch):
    """A function that makes one folder of tmp_path, such as runs, another file system."""

    def make(name: str) -> None:
        real = Path.rename

        def rename(self, target):
            both = (self, Path(target))
            if len({(tmp_path / name) in path.parents for path in both}) == 2:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)

    return make


@pytest.mark.parametrize("name", ["checkpoints", "runs"])
def test_files_of_another_file_system_are_moved_aside_on_it(name, other_disk, tmp_path):
    run_files = older_run(tmp_path)
    other_disk(name)
    near, far = sorted(run_files.move_aside(), key=lambda folder: ".previous" in str(folder))
    assert near.parent == tmp_path / "previous"
    assert far.parent == tmp_path / name / ".previous"
    assert not any(path.exists() for path in run_files.all())
    moved = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(moved) == ["metrics", "run_best.safetensors", "run_final.safetensors", "step"]
    assert not any(not any(folder.iterdir()) for folder in near.iterdir()), "an empty folder is left"
    older_run(tmp_path)
    assert run_files.move_aside()  # and once more


def test_all_files_are_moved_aside_or_none(tmp_path, monkeypatch):
    run_files = older_run(tmp_path)
    real = Path.rename

    def rename(self, target):
        if self == run_files.states:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="run_state"):
        run_files.move_aside()
    assert all(path.exists() for path in (run_files.best, run_files.final, run_files.states, run_files.logs))


# ---- ~ is the home folder ------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.safetensors").symlink_to(trained.best)
    flags = ("--ckpt=~/best.safetensors", "--limit-eval", 20, "--output-dir=~/results")
    assert call("evaluate", *flags).status == 0
    assert (tmp_path / "results" / "traces" / "metrics.csv").exists()
    assert not (tmp_path / "~").exists()
    assert files.read_tensors(Path("~/best.safetensors"))
    result = call("export_data", "--verify", "--output-dir=~nobody-of-this-name/x")
    assert_refused(result, "--output-dir", "~nobody-of-this-name/x")
    with pytest.raises(UserError, match=str(tmp_path / "results")):
        scripts.export_data.verify_dataset("~/results")
