"""The notebooks as a person meets them: JupyterLab on a loopback port, opened in headless Chromium, cells run, sliders moved. Screenshots stay in runs/screenshots."""
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

from conftest import write_tiny

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "runs/screenshots"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
SWITCHES = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
SETTINGS = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"}}      # all cells in the page, not only those in sight


@pytest.fixture(scope="module")
def chromium():
    "A headless browser."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: JupyterLab is not tested")
    if not CHROMIUM: pytest.skip("no Chromium on the PATH: JupyterLab is not tested (Debian: apt-get install chromium)")
    root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=SWITCHES + root)
        yield browser
        browser.close()


def copy_notebook(name, folder):
    "A notebook without its outputs and without the cells that belong to nbdev alone."
    nb = json.loads((ROOT / "nbs" / name).read_text())
    nb["cells"] = [c for c in nb["cells"] if not (c["cell_type"] == "code" and any("nbdev" in line for line in c["source"]))]
    for c in nb["cells"]:
        if c["cell_type"] == "code": c.update(outputs=[], execution_count=None)
    (folder / name).write_text(json.dumps(nb))


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    "Address of a JupyterLab that serves copies of the notebooks, with settings and state of its own."
    home = tmp_path_factory.mktemp("lab")
    for key, value in SETTINGS.items():
        path = home / f"settings/{key}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    (home / "notebooks").mkdir()
    for name in NOTEBOOKS: copy_notebook(name, home / "notebooks")
    cells = [dict(cell_type="code", metadata={}, source=BROWSER, outputs=[], execution_count=None)]
    (home / "notebooks/browser.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")), nbformat=4, nbformat_minor=4)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    environment = os.environ | {k: str(home / v) for k, v in places.items()} | {"TINY": str(write_tiny(home / "tiny")), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("MPLBACKEND", None)                                          # the kernel draws into the notebook
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'notebooks'}", "--LabApp.extension_manager=readonly"]
    with open(home / "log", "w") as log: server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home)
    try:
        until = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{port}/api/status?token={token}"):
            assert server.poll() is None and time.monotonic() < until, (home / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()


def answers(url):
    "Does a server answer there?"
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError: return False


class Notebook:
    "A notebook in JupyterLab."
    def __init__(self, chromium, url, theme="JupyterLab Light"):
        self.page = chromium.new_page(viewport=dict(width=1500, height=1000))
        self.page.set_default_timeout(60_000)
        self.page.goto(url)
        self.page.wait_for_function("""() => {const w = window.jupyterapp?.shell?.currentWidget;
            return w?.context?.isReady && w.content?.model?.cells?.length && w.sessionContext?.session?.kernel?.status === 'idle'}""")
        self.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)

    def run_all(self, seconds=240):
        "Run all cells; returns the errors."
        self.page.evaluate("() => {window.iceaggrDone = false; window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.iceaggrDone = true)}")
        self.page.wait_for_function("window.iceaggrDone", timeout=1000 * seconds)    # a promise that is only awaited may be garbage to the browser
        return self.page.evaluate("""() => {
            const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code').map(c => c.toJSON());
            return {count: cells.filter(c => c.execution_count).length, cells: cells.length, errors: cells.flatMap(c => c.outputs.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue))};
        }""")

    def shot(self, locator, name):
        "Pixels of a part of the page, also kept as a file."
        SHOTS.mkdir(parents=True, exist_ok=True)
        png = locator.screenshot(path=SHOTS / f"{name}.png")
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    def shown(self, figure):
        "Hit DOMs of a display that are shown."
        return figure.evaluate("g => g._fullData.find(t => t.meta === 'light').marker.size.filter(s => s > 0).length")

    def settled(self, figure, condition, *args):
        "Wait until a condition on the figure `g` holds."
        self.page.wait_for_function(f"([g, ...a]) => g._fullData && ({condition})", arg=[figure.element_handle(), *args])


def changed(before, after):
    "Share of the pixels that changed visibly."
    return (np.abs(before - after).max(-1) > 24).mean()


NOTEBOOKS = ["04_display.ipynb"]
BROWSER = """import os
import numpy as np
import pandas as pd
from iceaggr.browser import EventBrowser
meta = pd.read_parquet(f"{os.environ['TINY']}/train_meta.parquet")
rng = np.random.default_rng(0)
runs = {name: meta[["event_id"]].assign(azimuth=rng.uniform(0, 6, len(meta)), zenith=rng.uniform(0, 3, len(meta)), kappa=20.) for name in ("run A", "run B")}
browser = EventBrowser(os.environ["TINY"], runs)
browser"""


def test_light_arrives_as_the_slider_moves(chromium, lab):
    nb = Notebook(chromium, lab("04_display.ipynb"))
    done = nb.run_all()
    assert not done["errors"] and done["count"] == done["cells"] > 20, done
    figure = nb.page.locator(".jp-OutputArea .js-plotly-plot", has=nb.page.locator(".slider-rail-touch-rect")).first
    figure.scroll_into_view_if_needed()
    scene, rail = figure.locator(".gl-container canvas").first, figure.locator(".slider-rail-touch-rect").first
    nb.settled(figure, "g._fullData.some(t => t.meta === 'light')")
    whole, before = nb.shown(figure), nb.shot(scene, "display_all_light")
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 50                    # something is drawn
    box = rail.bounding_box()
    nb.page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2)
    nb.settled(figure, "g._fullData.find(t => t.meta === 'light').marker.size.filter(s => s > 0).length < a[0]", whole)
    label = figure.locator(".slider-label").first.text_content()
    assert label.startswith("light until ") and label.endswith(" ns")
    until = float(label.split()[2].replace(",", ""))
    due = figure.evaluate("(g, t) => g._fullData.find(t => t.meta === 'light').customdata.filter(d => d[5] <= t + 1).length", until)
    early = nb.shown(figure)
    assert 0 < early < whole and abs(early - due) <= 1                           # the DOMs hit by then, and no others
    nb.page.wait_for_function("g => !g._transitioning", arg=figure.element_handle())
    assert changed(before, nb.shot(scene, "display_early_light")) > 1e-4
    figure.locator(".updatemenu-button").first.click()                           # play
    nb.settled(figure, "g._fullData.find(t => t.meta === 'light').marker.size.filter(s => s > 0).length === a[0]", whole)
    nb.page.close()


def test_browser_follows_its_widgets(chromium, lab):
    nb = Notebook(chromium, lab("browser.ipynb"))
    done = nb.run_all()
    assert not done["errors"], done
    figure = nb.page.locator(".jp-OutputArea .js-plotly-plot").first
    nb.settled(figure, "g._fullData.some(t => t.meta === 'light')")
    whole, title = nb.shown(figure), figure.evaluate("g => g._fullLayout.title.text")
    before = nb.shot(figure, "browser_all_light")
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 50
    names = "g => g.data.map(t => [t.name, t.meta])"
    traces, slider = figure.evaluate(names), nb.page.locator("[role=slider][aria-valuemax='39.0']")
    slider.focus()
    for _ in range(2): slider.press("PageDown")                                  # back in time
    nb.settled(figure, "g._fullData.find(t => t.meta === 'light').marker.size.filter(s => s > 0).length < a[0]", whole)
    assert changed(before, nb.shot(figure, "browser_early_light")) > 1e-4
    nb.page.get_by_role("button", name="▶").first.click()                        # the next event
    nb.settled(figure, "g._fullLayout.title.text !== a[0]", title)
    assert figure.evaluate("g => g._fullData.filter(t => t.meta && t.meta.startsWith('path ') && t.visible === true).length") == 3     # truth and two runs
    assert figure.evaluate(names) == traces                                      # and nothing else was lost on the way
    nb.page.close()
