"""The notebooks as a user has them: in a Jupyter kernel, without a GPU and without ICEAGGR_PPC, every cell.

`make test` runs the tutorials and part II here, `make slow` the others. `nbdev_test` runs most of those with
the events of ICEAGGR_PPC, where it is set."""
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
QUICK = [p for p in NOTEBOOKS if re.match(r"nbs/(tutorials/|1\d_)", p.relative_to(ROOT).as_posix())]
WRITTEN = {"iceaggr", "nbs"}     # by nbdev_export in the last cell of a notebook
FIGURES = ("image/", "application/vnd.plotly", "application/vnd.jupyter.widget-view")


def test_no_notebook_runs_twice_or_never():
    "`nbdev_test` in .ci/check skips the notebooks that run here, and the studies of the night."
    command = next(s for s in (ROOT / ".ci/check").read_text().splitlines() if s.startswith("nbdev_test"))
    folders, files = (re.search(rf"--skip_{kind}_re '(.+?)'", command)[1] for kind in ("folder", "file"))
    skipped = [p for p in NOTEBOOKS if re.search(files, p.name) or re.search(folders, p.parent.name)]
    assert skipped == [p for p in NOTEBOOKS if p in QUICK or p.parent.name == "studies"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A copy of the repository with the settings of a user's machine."
    for path in ROOT.iterdir():
        if path.name in WRITTEN: shutil.copytree(path, tmp_path / path.name, ignore=_left_out)
        elif path.name not in (".git", "data", "runs"): (tmp_path / path.name).symlink_to(path)
    for name in ("ICEAGGR_PPC", "ICEAGGR_DATA", "MPLBACKEND"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def _left_out(folder, names):
    return {"pretrained", "__pycache__", ".ipynb_checkpoints"} & {*names}


def figures(cell):
    "Number of figures in the outputs of a cell."
    shown = [o.data for o in cell.outputs if o.output_type in ("display_data", "execute_result")]
    return sum(any(kind.startswith(FIGURES) for kind in data) for data in shown)


def printed(cell):
    "What a cell printed."
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def run_notebook(path):
    "Run all cells of a notebook from its folder; returns it with its new outputs."
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    options = dict(timeout=900, kernel_name="python3", shutdown_kernel="immediate", resources=where)
    nbclient.NotebookClient(notebook, **options).execute()
    return notebook


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[] if path in QUICK else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS
])
def test_notebook_runs_and_shows_its_figures(path, clone):
    "No cell fails; each that has a stored figure shows one, or says which data or device it needs."
    import nbformat
    stored = {cell.id: cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"}
    ran = [cell for cell in run_notebook(clone / path.relative_to(ROOT)).cells if cell.cell_type == "code"]
    lost = [cell.source for cell in ran if figures(stored[cell.id]) and not figures(cell)
            and "ICEAGGR_" not in printed(cell)]
    assert not lost, "\n\n".join(["figures of these cells are not shown:", *lost])
