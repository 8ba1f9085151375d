"""Damaged files give the right model or one line, never a traceback: a short form of benchmarks/fuzz.py."""

import importlib.util

import pytest
import torch
from conftest import ROOT

from modeling.errors import UserError
from modeling.run.header import validate_state
from modeling.run.state import read_newest

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


@pytest.mark.parametrize("name", ["position", "arguments", "versions", "optimizer", "ema_updates", "scaler"])
@pytest.mark.parametrize("value", [[], "x", {"x": []}, 0.5, "missing"])
def test_each_field_of_a_state_is_checked_before_it_is_used(name, value, trained):
    _, _, header = read_newest(trained.folder / "checkpoints" / "cnn_small_state")
    fields = set(header["position"])
    validate_state(header | {"scaler": torch.amp.GradScaler("cpu").state_dict()}, fields)
    edited = header | {name: value}
    if value == "missing":
        del edited[name]
    with pytest.raises(UserError, match=name):
        validate_state(edited, fields)
