"""Run notebooks and store their outputs, leaving out what is flagged: `make notebooks` calls this.

    python tools/execute_notebooks.py [nbs/01_geometry.ipynb ...]     (none: all of them)

Cells flagged `eval: false` or with one of the `tst_flags` of settings.ini are not run and keep their outputs.
A notebook whose run fails is left as it was, and the exit code is 1."""
import os
import re
import sys
import time
import traceback
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.config import get_config


def flagged(cell, flags):
    "True if an ordinary run leaves the cell out."
    directives = re.findall(r"^\s*#\s*\|\s*(.+?)\s*$", cell.source, flags=re.M)
    return any(re.fullmatch(r"eval\s*:\s*false", d) or set(d.split()) & flags for d in directives)


def execute(path, flags):
    "Run one notebook from its own folder and store its outputs; returns the seconds it took."
    start, nb, shell = time.perf_counter(), read_nb(path), CaptureShell(mpl_format="png")
    here = Path.cwd()
    os.chdir(path.parent)

    def left_out(cell):
        return cell.cell_type == "code" and flagged(cell, flags)

    for cell in nb.cells:      # without this, a cell that prints nothing any more would keep its old output
        if cell.cell_type == "code" and not left_out(cell): cell.outputs = []
    try:
        shell.run_all(nb, exc_stop=True, preproc=left_out)
    finally:
        os.chdir(here)
    write_nb(nb, path)
    return time.perf_counter() - start


if __name__ == "__main__":
    flags = set(get_config().tst_flags.split())
    every = [p for p in Path("nbs").resolve().rglob("*.ipynb")
             if not p.name.startswith((".", "_")) and ".ipynb_checkpoints" not in p.parts]
    paths = [Path(p).resolve() for p in sys.argv[1:]] or sorted(every)
    failed = []
    for path in paths:
        pid = os.fork()                     # a process each: no state passes from one notebook to the next
        if pid == 0:
            try:
                print(f"{path.name}: {execute(path, flags):.1f} s", flush=True)
            except BaseException as e:
                traceback.print_exception(e)
                print(f"{path.name}: failed", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            failed.append(path.name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
