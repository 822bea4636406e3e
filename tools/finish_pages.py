"""Pages as the site shows them, without a network: Quarto runs this in the folder of the processed notebooks.

Quarto leaves out outputs of plotly's own type. Here each gets an HTML form; plotly's script is written once, beside the pages.
Widgets need a kernel: the site says so in their place. Links that nbdev put inside code are taken out again."""
import json
import re
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


def unlink_code(text):
    "Markdown without links inside its blocks of code."
    return re.sub(r"^```.*?^```", lambda block: re.sub(r"\[(`[^`]+`)\]\([^)]+\)", r"\1", block[0]), text, flags=re.S | re.M)


def finish(notebook, depth=0): # dict, folders between its page and the script
    "Give outputs a form that a page can show; True if the notebook changed."
    changed = not notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", True)
    if changed: del notebook["metadata"]["widgets"]                 # an empty one would make Quarto load the widgets' scripts from the network
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY in data and "text/html" not in data: output["data"] = {"text/html": figure_html(data[PLOTLY], depth)}
            elif WIDGET in data: output["data"] = {"text/markdown": "*Interactive: open this notebook in JupyterLab.*"}
            elif (text := "".join(data.get("text/markdown", ""))) != (plain := unlink_code(text)): output["data"] = {"text/markdown": plain}
            else: continue
            changed = True
    return changed


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for path in root.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if finish(notebook, len(path.relative_to(root).parts) - 1): path.write_text(json.dumps(notebook), encoding="utf-8")
    (root / SCRIPT).write_text(get_plotlyjs(), encoding="utf-8")
