"""The library leaves the reader's session alone: settings, random numbers, threads, figures to come."""
import json
import os
from pathlib import Path

import pytest
import session

PREPARE = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import session
import ipywidgets, matplotlib, plotly.graph_objects
import matplotlib.pyplot as plt
formatter = get_ipython().display_formatter

def renew():
    "As in a session that has drawn nothing yet: the kernel's backend is not loaded."
    plt._backend_mod = None
    formatter.formatters["image/png"].type_printers.pop(matplotlib.figure.Figure, None)
    sys.modules.pop("matplotlib_inline.backend_inline", None)
    matplotlib.interactive(False)

def call(plot):
    "What the first drawing of a session changes, besides what a plain figure does."
    renew()
    before = session.session_state()
    result = plot(given)
    found = session.session_state()
    found["picture of the result"] = before["picture of the result"] = True
    if isinstance(result, matplotlib.figure.Figure):
        found["picture of the result"] = "image/png" in formatter.format(result)[0]
    plt.close("all")
    for name in ("matplotlib's settings", "matplotlib's interactive flag"):
        if found[name] == alone[name]: found[name] = before[name]
    return session.differences(before, found)

plotly.graph_objects.FigureWidget()      # what it imports sets warning filters
given = session.Given().complete()
renew()
plt.close(plt.figure())
alone = session.session_state()
"""
CALL = """print(json.dumps(call(session.PLOTS[{!r}])))"""
NEXT = """plt.figure(figsize=(1, 1)); plt.plot([1, 2]);"""


@pytest.fixture(scope="module")
def given():
    "What the calls take. What they import on first use sets filters and variables of its own."
    import plotly.graph_objects  # noqa: F401
    import sklearn.ensemble  # noqa: F401
    return session.Given().complete(session.MADE_FOR_OTHERS)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    "Function that runs a cell in a Jupyter kernel and returns its outputs."
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    process, client = manager.start_new_kernel(kernel_name="python3", env=dict(os.environ))

    def run(cell):
        outputs = []
        reply = client.execute_interactive(cell, timeout=120, output_hook=outputs.append)["content"]
        assert reply["status"] == "ok", "\n".join(reply.get("traceback", []))
        return [o["content"] for o in outputs]

    yield run
    client.stop_channels()
    process.shutdown_kernel(now=True)


def test_no_public_function_is_left_out():
    "A new function that plots, predicts, simulates or trains needs a call in session.py."
    called = {*session.PLOTS, *session.OTHERS}
    assert not {*session.could_change_a_session()} - called - {*session.COVERED}
    assert {*session.COVERED.values()} <= called


@pytest.mark.parametrize("name", session.OTHERS)
def test_session_is_left_alone(name, given):
    "Settings, options, filters, threads, modes, random numbers, working directory, environment."
    before = session.session_state()
    session.OTHERS[name](given)
    changed = session.differences(before, session.session_state())
    assert not changed, f"{name} changes {', '.join(changed)}"


def test_plots_leave_a_notebook_alone(kernel):
    "Drawing changes nothing either, be it the first of a notebook, and the next figure is shown."
    kernel(PREPARE)
    failed = {}
    for name in session.PLOTS:
        printed = "".join(o["text"] for o in kernel(CALL.format(name)) if o.get("name") == "stdout")
        changed = json.loads(printed.splitlines()[-1])
        if not any("image/png" in o.get("data", {}) for o in kernel(NEXT)): changed += ["figures to come"]
        if changed: failed[name] = changed
    assert not failed
