"""Progress without a terminal."""

from modeling import progress


def test_a_resumed_job_counts_from_where_it_was_but_measures_its_rate_from_its_own_start(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = progress.Progress(1000, "epoch 3/5", done=400)
    now = 120.0
    bar.update(100)  # too early for a line
    now = 140.0
    bar.update(100)
    line = "epoch 3/5:  60% 600/1000 [00:40<01:20,  5.00 images/s]\n"
    assert capsys.readouterr().err == line
