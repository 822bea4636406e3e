"""The Makefile: quiet installation, and the last lines of the demo."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    "The commands of `make demo` in a fresh clone."
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "setup.py", "settings.ini", "constraints.txt"): shutil.copy(ROOT / name, folder)
    command = ["make", "--no-print-directory", "-n", "demo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", "").splitlines()


def test_pip_shows_errors_only(recipe):
    calls = [line for line in recipe if "/pip " in line]
    assert calls and all("-qq --disable-pip-version-check" in line for line in calls)


def test_the_demo_ends_with_errors_report_and_display(recipe, tmp_path):
    "The command is that of the Makefile; the folders hold two evaluations."
    *_, display, last = recipe
    _, script, run, pretrained = last.split()
    assert f"--out {run}/event.html" in display
    for folder, error in ((run, 31.26), (pretrained, 15.46)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        metrics = dict(n_events=4000, model=dict(mean_degrees=error), line_fit=dict(mean_degrees=35.16))
        (tmp_path / folder / "metrics.json").write_text(json.dumps(metrics))
    command = [sys.executable, ROOT / script, run, pretrained]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    errors, report, shown = done.stdout.splitlines()
    assert errors == "mean error of 4,000 events [degrees]: trained here 31.3, pretrained 15.5, line fit 35.2"
    assert f"{run}/report.html" in report and f"{pretrained}/report.html" in report
    assert shown.split() == ["display:", f"{run}/event.html"]
