"""The notebooks in JupyterLab: on a loopback port, opened in headless Chromium, cells run, sliders moved.

Screenshots stay in runs/screenshots."""
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iceaggr.testing import write_tiny

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "runs/screenshots"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
SWITCHES = ["--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run"]
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},    # all cells in the page
}
NOTEBOOKS = ["04_display.ipynb"]
BROWSER = """import os
import numpy as np
import pandas as pd
from iceaggr.browser import EventBrowser
meta = pd.read_parquet(f"{os.environ['TINY']}/train_meta.parquet")
rng = np.random.default_rng(0)
def guess():
    n = len(meta)
    return meta[["event_id"]].assign(azimuth=rng.uniform(0, 6, n), zenith=rng.uniform(0, 3, n), kappa=20.)
browser = EventBrowser(os.environ["TINY"], {"run A": guess(), "run B": guess()})
browser"""
READY = """() => {
    const w = window.jupyterapp?.shell?.currentWidget;
    const cells = w?.content?.model?.cells?.length;
    return w?.context?.isReady && cells && w.sessionContext?.session?.kernel?.status === 'idle';
}"""
RUN_ALL = """() => {
    window.iceaggrDone = false;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.iceaggrDone = true);
}"""
RESULTS = """() => {
    const all = [...window.jupyterapp.shell.currentWidget.content.model.cells];
    const cells = all.filter(c => c.type === 'code').map(c => c.toJSON());
    const errors = cells.flatMap(c => c.outputs.filter(o => o.output_type === 'error'));
    return {count: cells.filter(c => c.execution_count).length, cells: cells.length,
            errors: errors.map(o => o.ename + ': ' + o.evalue)};
}"""
LIT = "g._fullData.find(t => t.meta === 'light').marker.size.filter(s => s > 0).length"
HIT_BY = """(g, t) => g._fullData.find(t => t.meta === 'light')
    .customdata.filter(d => d[5] <= t + 1).length"""
PATHS = "g => g._fullData.filter(t => t.meta && t.meta.startsWith('path ') && t.visible === true).length"


@pytest.fixture(scope="module")
def chromium():
    "A headless browser."
    missing = "JupyterLab is not tested: install "
    sync_api = pytest.importorskip("playwright.sync_api", reason=missing + "playwright")
    if not CHROMIUM: pytest.skip(missing + "Chromium (Debian: apt-get install chromium)")
    root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=SWITCHES + root)
        yield browser
        browser.close()


def copy_notebook(name, folder):
    "A notebook without its outputs and without the cells that belong to nbdev alone."
    nb = json.loads((ROOT / "nbs" / name).read_text())
    cells = []
    for cell in nb["cells"]:
        code = cell["cell_type"] == "code"
        if code and "nbdev" in "".join(cell["source"]): continue
        if code: cell.update(outputs=[], execution_count=None)
        cells.append(cell)
    nb["cells"] = cells
    (folder / name).write_text(json.dumps(nb))


def write_settings(folder):
    "Settings of JupyterLab."
    for key, value in SETTINGS.items():
        path = folder / f"{key}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


def write_notebook(path, source):
    "A notebook of one cell."
    cell = dict(cell_type="code", metadata={}, source=source, outputs=[], execution_count=None)
    kernel = dict(name="python3", display_name="Python 3", language="python")
    notebook = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4)
    path.write_text(json.dumps(notebook))


def lab_environment(home):
    "Settings and state of JupyterLab in a folder of its own; the kernel draws into the notebook."
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    environment["TINY"] = str(write_tiny(home / "tiny"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment.pop("MPLBACKEND", None)
    return environment


def free_port():
    "A port that is free now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    "Address of a JupyterLab that serves copies of the notebooks."
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    notebooks = home / "notebooks"
    notebooks.mkdir()
    write_settings(home / "settings")
    for name in NOTEBOOKS: copy_notebook(name, notebooks)
    write_notebook(notebooks / "browser.ipynb", BROWSER)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}",
               "--LabApp.extension_manager=readonly"]
    address = f"http://127.0.0.1:{port}"
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=lab_environment(home), stdout=log, stderr=log, cwd=home)
    try:
        until = time.monotonic() + 60
        while not answers(f"{address}/api/status?token={token}"):
            running = server.poll() is None and time.monotonic() < until
            assert running, (home / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield lambda name: f"{address}/lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()


def answers(url):
    "True if a server answers at an address."
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError: return False


class Notebook:
    "A notebook in JupyterLab."
    def __init__(self, chromium, url, theme="JupyterLab Light"):
        self.page = chromium.new_page(viewport=dict(width=1500, height=1000))
        self.page.set_default_timeout(60_000)
        self.page.goto(url)
        self.page.wait_for_function(READY)
        change = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
        self.page.evaluate(change, theme)

    def run_all(self, seconds=240):
        "Run all cells; returns the errors."
        self.page.evaluate(RUN_ALL)      # the page keeps the promise, lest it be collected
        self.page.wait_for_function("window.iceaggrDone", timeout=1000 * seconds)
        return self.page.evaluate(RESULTS)

    def shot(self, locator, name):
        "Pixels of a part of the page, also kept as a file."
        SHOTS.mkdir(parents=True, exist_ok=True)
        png = locator.screenshot(path=SHOTS / f"{name}.png")
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    def shown(self, figure):
        "Hit DOMs of a display that are shown."
        return figure.evaluate(f"g => {LIT}")

    def settled(self, figure, condition, *args):
        "Wait until a condition on the figure `g` holds."
        arguments = [figure.element_handle(), *args]
        self.page.wait_for_function(f"([g, ...a]) => g._fullData && ({condition})", arg=arguments)


def changed(before, after):
    "Share of the pixels that changed visibly."
    return (np.abs(before - after).max(-1) > 24).mean()


@pytest.mark.slow
def test_light_arrives_as_the_slider_moves(chromium, lab):
    "The slider shows the DOMs hit by its time and no others; play shows all of them."
    nb = Notebook(chromium, lab("04_display.ipynb"))
    done = nb.run_all()
    assert not done["errors"] and done["count"] == done["cells"] > 20, done
    slider = nb.page.locator(".slider-rail-touch-rect")
    figure = nb.page.locator(".jp-OutputArea .js-plotly-plot", has=slider).first
    figure.scroll_into_view_if_needed()
    scene = figure.locator(".gl-container canvas").first
    rail = figure.locator(".slider-rail-touch-rect").first
    nb.settled(figure, "g._fullData.some(t => t.meta === 'light')")
    whole, before = nb.shown(figure), nb.shot(scene, "display_all_light")
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 50                    # something is drawn
    box = rail.bounding_box()
    nb.page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2)
    nb.settled(figure, f"{LIT} < a[0]", whole)
    label = figure.locator(".slider-label").first.text_content()
    assert label.startswith("light until ") and label.endswith(" ns")
    until = float(label.split()[2].replace(",", ""))
    due, early = figure.evaluate(HIT_BY, until), nb.shown(figure)
    assert 0 < early < whole and abs(early - due) <= 1    # the DOMs hit by then
    nb.page.wait_for_function("g => !g._transitioning", arg=figure.element_handle())
    assert changed(before, nb.shot(scene, "display_early_light")) > 1e-4
    figure.locator(".updatemenu-button").first.click()                           # play
    nb.settled(figure, f"{LIT} === a[0]", whole)
    nb.page.close()


@pytest.mark.slow
def test_browser_follows_its_widgets(chromium, lab):
    "Back in time, then the next event: the figure changes and keeps its traces."
    nb = Notebook(chromium, lab("browser.ipynb"))
    done = nb.run_all()
    assert not done["errors"], done
    figure = nb.page.locator(".jp-OutputArea .js-plotly-plot").first
    nb.settled(figure, "g._fullData.some(t => t.meta === 'light')")
    nb.settled(figure, "Math.abs(g._fullLayout.width - g.closest('.jp-OutputArea-output').clientWidth) < 25")
    whole, title = nb.shown(figure), figure.evaluate("g => g._fullLayout.title.text")
    before = nb.shot(figure, "browser_all_light")
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 50
    names = "g => g.data.map(t => [t.name, t.meta])"
    traces, slider = figure.evaluate(names), nb.page.locator("[role=slider][aria-valuemax='39.0']")
    slider.focus()
    for _ in range(2): slider.press("PageDown")                                  # back in time
    nb.settled(figure, f"{LIT} < a[0]", whole)
    assert changed(before, nb.shot(figure, "browser_early_light")) > 1e-4
    nb.page.get_by_role("button", name="▶").first.click()                        # the next event
    nb.settled(figure, "g._fullLayout.title.text !== a[0]", title)
    assert figure.evaluate(PATHS) == 3                                           # truth and two runs
    assert figure.evaluate(names) == traces    # nothing else was lost
    nb.page.close()
