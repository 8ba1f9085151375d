"""Damaged files give the right model or one line, never a traceback: a short form of benchmarks/fuzz.py."""

import importlib.util

from conftest import ROOT

NUM_MUTATIONS = 60


def test_damaged_files_are_refused_or_load_as_they_were(tmp_path, trained):
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    states = trained.folder / "checkpoints" / "cnn_small_state"
    material = fuzz.Material(tmp_path / "fuzz", trained.best, states)
    counts, failures = fuzz.fuzz(material, NUM_MUTATIONS)
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == NUM_MUTATIONS
    # A mutation may leave the file as it was.
    for what, outcome in (("state, damaged", "passed over"), ("checkpoint, damaged", "refused")):
        assert counts[what, outcome] + counts[what, "right"] == NUM_MUTATIONS // 6
