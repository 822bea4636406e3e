"""Other machines: Python versions, Windows and macOS, a bare environment, a wheel, torchrun."""
import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_supply_chain import imported

from iceaggr import cli
from iceaggr.common import display_library
from iceaggr.engine.checkpoints import claim_run

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "iceaggr").rglob("*.py"))
DISPLAY = {"matplotlib", "plotly", "ipywidgets", "anywidget"}
POSIX = {"fcntl", "resource", "termios", "tty", "pty", "grp", "pwd", "posix", "syslog", "crypt"}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# Versions and systems

def test_python_versions_are_the_same_everywhere():
    "settings.ini, classifiers, the workflow and the Makefile."
    versions = ["3.11", "3.12", "3.13", "3.14"]
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert settings["DEFAULT"]["min_python"] == versions[0]
    files = "setup.py", ".github/workflows/test.yml", "Makefile"
    setup, workflow, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in files)
    assert re.findall(r"Python :: (3\.\d+)", setup) == versions
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[.*\]", workflow)[0]) == versions
    check = re.search(r"sys\.version_info >= \((\d+), (\d+)\)", makefile)
    assert ".".join(check.groups()) == versions[0]
    assert "windows-latest" in workflow and "macos-latest" in workflow


def test_modules_import_nothing_of_posix_only():
    for path in MODULES:
        for node in parsed(path).body: assert not imported(node) & POSIX, path


def test_text_files_have_an_encoding():
    "Windows has another one than UTF-8 by default."
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call): continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in ("open", "read_text", "write_text", "fdopen"): continue
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if name == "open" and any("b" in mode for mode in modes): continue
            if ast.unparse(node.func) == "fits.open": continue
            assert any(k.arg == "encoding" for k in node.keywords), f"{path}:{node.lineno}"


def test_display_libraries_are_imported_by_one_helper():
    "Which says what to install; `plt.close` of a figure that exists needs no help."
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if path.name != "cli.py": assert not imported(node) & DISPLAY, f"{path}:{node.lineno}"


def test_missing_display_library_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "plotly.graph_objects", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ModuleNotFoundError, match=r"plotly.*pip install 'iceaggr\[display\]'"):
        display_library("plotly.graph_objects")


# A bare machine that spawns its processes

BARE = """
import sys

BLOCKED = {"matplotlib", "plotly", "ipywidgets", "anywidget", "IPython"} | {
    "fcntl", "resource", "termios", "grp"}

class Hidden:
    "A finder that finds everything but these."
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, *rest)

for name in BLOCKED: sys.modules.pop(name, None)
sys.meta_path[:] = map(Hidden, sys.meta_path)

def main():
    import importlib
    import multiprocessing
    import pkgutil
    multiprocessing.set_start_method("spawn")
    import iceaggr
    for found in pkgutil.walk_packages(iceaggr.__path__, "iceaggr."):
        if not found.name.startswith("iceaggr.studies"): importlib.import_module(found.name)
    assert not BLOCKED & sys.modules.keys()
    if "--import" in sys.argv: return
    sys.platform = "darwin"
    from iceaggr.cli import main
    data, run = ["--data", "data"], ["--device", "cpu", "--workers", "1"]
    for command in (
        ["simulate", "--events", "120", "--workers", "2", "--out", "data"],
        ["train", *data, *run, "--epochs", "1", "--out", "run"],
        ["predict", *data, "--run", "run", *run, "--out", "predictions.csv"],
    ):
        assert main(command) == 0, command
    assert main(["evaluate", *data, "--predictions", "predictions.csv", "--out", "report"]) == 1

if __name__ == "__main__": main()
"""


def run_bare(folder, *args):
    (folder / "bare.py").write_text(BARE, encoding="utf-8")
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "bare.py", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_every_module_imports_on_a_bare_machine(tmp_path):
    "Without display libraries and without the modules that only POSIX has."
    done = run_bare(tmp_path, "--import")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_simulate_train_and_predict_on_a_bare_machine_with_spawned_processes(tmp_path):
    done = run_bare(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pip install 'iceaggr[display]'" in done.stderr
    assert len((tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 121


def test_lock_of_a_run_is_held_and_freed(tmp_path):
    with claim_run(tmp_path / "run", dict(seed=1), False), pytest.raises(ValueError, match="another process"):
        claim_run(tmp_path / "run", dict(seed=1), True)
    claim_run(tmp_path / "run", dict(seed=1), True).close()


# The wheel

@pytest.mark.slow
def test_wheel_predicts_and_torchrun_takes_the_command_as_typed(tmp_path):
    "Built and installed on top of the packages at hand; run from another folder."
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    wheel, = tmp_path.glob("iceaggr-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = [p for p in (ROOT / "iceaggr").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in sources} <= set(names)
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    env = dict(os.environ, PYTHONPATH=str(target), OMP_NUM_THREADS="1")

    def run(*command):
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("iceaggr.cli", "simulate", "--events", "20", "--geometry", "small", "--workers", "1", "--out", "data")
    printed = run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "iceaggr.cli",
                  "predict", "--run", "small", "--data", "data", "--device", "cpu", "--out", "two.csv")
    assert printed.count("20 predictions in two.csv") == 1


@pytest.mark.parametrize("start", [["torchrun"], ["/usr/bin/torchrun"], ["-m", "torch.distributed.run"]])
@pytest.mark.parametrize("end", [[], ["--"]])
def test_torchrun_passes_run_on(monkeypatch, start, end):
    "torchrun's own parser takes --run for an abbreviation of --run-path, unless -- stands before the module."
    from torch.distributed.run import get_args_parser
    ours = ["iceaggr.cli", "predict", "--run", "small"]
    rest = ["--nproc-per-node", "2", "-m", *end, *ours]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *start, *rest])
    monkeypatch.setattr(sys, "argv", ["run", *rest])
    cli.end_torchrun_options()
    args = get_args_parser().parse_args(sys.argv[1:])
    assert [args.training_script, *args.training_script_args] == ours and args.nproc_per_node == "2"


def test_other_processes_keep_their_command_line(monkeypatch):
    for command in (["python", "-m", "iceaggr.cli", "predict"], ["python", "x.py"], ["torchrun", "train.py"]):
        monkeypatch.setattr(sys, "orig_argv", [*command])
        monkeypatch.setattr(sys, "argv", [*command])
        cli.end_torchrun_options()
        assert sys.argv == command
