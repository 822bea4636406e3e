"""Progress: a bar in a terminal; a line now and then in a log."""
import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iceaggr.common import progress_bar

ROOT = Path(__file__).parents[1]
# Each look at the clock is a second.
SCRIPT = """
import itertools, tqdm.std
seconds = itertools.count(1000.0)
tqdm.std.time = lambda: next(seconds)
from iceaggr.common import progress_bar
for step in progress_bar(range({steps}), "fit", leave={leave}): pass
"""


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(leave):
    script = SCRIPT.format(steps=100, leave=leave)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and all(line.startswith("fit: ") for line in lines)
    assert 3 <= len(lines) - leave <= 4 and ("100/100" in lines[-1]) == leave


def test_a_terminal_gets_a_bar():
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    script = SCRIPT.format(steps=20, leave=True)     # few, since nobody reads until the end
    subprocess.run([sys.executable, "-c", script], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    *_, last = shown = os.read(mine, 100_000).decode().strip().split("\r")
    assert len(shown) > 15 and "20/20" in last and "█" in last


def test_every_bar_is_made_by_the_same_function():
    "tqdm itself is called nowhere else."
    for folder in ("iceaggr", "studies", "data_scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                assert not named or node.func.id != "tqdm", (path, node.lineno)


def test_an_iterable_is_started_once():
    "A loader would start its processes twice."
    class Loader:
        started = 0

        def __len__(self): return 3

        def __iter__(self):
            self.started += 1
            return iter(range(3))

    for disable in (False, True):
        loader = Loader()
        bar = progress_bar(loader, "some", disable=disable, file=io.StringIO())
        assert list(bar) == [0, 1, 2] and loader.started == 1 and (disable or bar.total == 3)
