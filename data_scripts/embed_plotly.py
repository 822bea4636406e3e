"""Interactive figures for the site, without a network: Quarto runs this in the folder of the processed notebooks.

Quarto leaves out outputs of plotly's own type. Here each gets an HTML form; plotly's script is written once, beside the pages.
Widgets need a kernel: the site says so in their place."""
import json
import sys
from pathlib import Path

import plotly.io
from plotly.offline import get_plotlyjs

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
SCRIPT = "plotly.min.js"


def figure_html(figure, depth): # figure as stored in a notebook; folders between its page and the script
    "A figure as HTML that loads the script beside the pages."
    figure = dict(figure, layout={k: v for k, v in figure["layout"].items() if k != "width"})
    html = plotly.io.to_html({k: figure[k] for k in ("data", "layout", "frames") if k in figure}, include_plotlyjs=False, full_html=False, validate=False,
                             config=dict(displaylogo=False, responsive=True), auto_play=False)
    return f'<script src="{"../" * depth}{SCRIPT}"></script>\n<div class="plotly-figure">{html}</div>'


def embed(notebook, depth=0): # dict
    "Give plotly's outputs and widgets a form that a page can show; True if the notebook changed."
    changed = not notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", True)
    if changed: del notebook["metadata"]["widgets"]                 # an empty one would make Quarto load the widgets' scripts from the network
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY in data and "text/html" not in data: output["data"] = {"text/html": figure_html(data[PLOTLY], depth)}
            elif WIDGET in data: output["data"] = {"text/markdown": "*Interactive: open this notebook in JupyterLab.*"}
            else: continue
            changed = True
    return changed


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for path in root.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if embed(notebook, len(path.relative_to(root).parts) - 1): path.write_text(json.dumps(notebook), encoding="utf-8")
    (root / SCRIPT).write_text(get_plotlyjs(), encoding="utf-8")
