"""The script that compares baselines, with a few steps of each kind of method."""
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / "studies/compare_baselines.py"


@pytest.mark.parametrize("method, rows", [("hierarchy", ["hierarchy", "hierarchy, test-time augmentation"]), ("flat-plain", ["flat-plain"]), ("likelihood", ["likelihood"])])
def test_rows_are_appended(tiny_dataset, tmp_path, monkeypatch, capsys, method, rows):
    out = tmp_path / "results.csv"
    out.write_text("method,mean\nearlier,1.5\n")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), method, "--data", str(tiny_dataset), "--train-batches", "2,3", "--test-batch", "10", "--minutes", "0.005", "--events", "2", "--hardware", "a test", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = pd.read_csv(out)
    assert table.method.tolist() == ["earlier", *rows] and table["mean"].iloc[0] == 1.5
    new = table.iloc[1:]
    assert (new.hardware == "a test").all() and (new.seed == 0).all() and (new.events == (2 if method == "likelihood" else 7)).all() and new["mean"].between(0, 180).all() and new.line_fit_mean.between(0, 180).all()
    assert (new.steps == 0).all() if method == "likelihood" else (new.steps >= 1).all() and new.steps.nunique() == 1


def test_cascade_limits_of_several_runs(tmp_path, monkeypatch):
    "Rows that another process adds meanwhile stay; what is there is not worked out twice, unless the geometry is another."
    script, out, done = SCRIPT.with_name("cascade_limit.py"), tmp_path / "limits.csv", []
    def limit(detector, cascade, seed, dark=True):
        if dark:
            done.append(seed)
            if len(done) == 2: pd.concat([pd.read_csv(out, dtype=str), pd.read_csv(out, dtype=str).assign(seed="9")]).to_csv(out, index=False)      # of another process
        return dict(limit=1., expected=2., halves=0., rank=0.5)
    monkeypatch.setattr("iceaggr.studies.limit.cascade_limit", limit)
    def run(*more):
        done.clear()
        monkeypatch.setattr(sys, "argv", [str(script), "4", "--hardware", "a test", "--most", "100000", "--out", str(out), *more])
        runpy.run_path(str(script), run_name="__main__")
        return list(done), pd.read_csv(out)
    first, table = run()
    assert first == [0, 1, 2, 3] and table.event.tolist() == [0, 0, 1, 2, 3] and table.seed.tolist() == [0, 9, 0, 0, 0]
    again, table = run()
    assert again == [] and len(table) == 5
    other, table = run("--geometry", "small")
    assert other == [0, 1, 2, 3] and table.simulation.astype(str).nunique() == 2
