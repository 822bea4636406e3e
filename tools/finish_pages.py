"""Pages as the site shows them, without a network: Quarto runs this in the folder of the processed notebooks.

Quarto leaves out outputs of plotly's own type. Here each gets an HTML form; plotly's script is written once,
next to the pages. Widgets need a kernel: the site says so in their place. A page with an output of type
text/html (as each table of pandas has) or a widget makes Quarto load scripts from another host. Therefore
HTML becomes a block of Markdown. Signatures of functions are folded below what they do.
Links that nbdev put inside code are removed. Links to functions that a page does not document (those that the
package keeps to itself) lead to the page."""
import json
import re
import sys
from pathlib import Path

import plotly.io
from plotly.offline import get_plotlyjs

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
SCRIPT = "plotly.min.js"


def figure_html(figure, depth): # figure as stored in a notebook; folders between its page and the script
    "A figure as HTML that loads the script next to the pages."
    figure = dict(figure, layout={k: v for k, v in figure["layout"].items() if k != "width"})
    html = plotly.io.to_html(
        {k: figure[k] for k in ("data", "layout", "frames") if k in figure},
        include_plotlyjs=False, full_html=False, validate=False, auto_play=False,
        config=dict(displaylogo=False, responsive=True))
    return f'<script src="{"../" * depth}{SCRIPT}"></script>\n<div class="plotly-figure">{html}</div>'


def unlink_code(text):
    "Markdown without links inside its blocks of code."
    def without_links(block):
        return re.sub(r"\[(`[^`]+`)\]\([^)]+\)", r"\1", block[0])

    return re.sub(r"^```.*?^```", without_links, text, flags=re.S | re.M)


def as_markdown(html):
    "HTML as the block of Markdown that Quarto makes of it."
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", html)), default=0))
    return f"{ticks}{{=html}}\n{html.strip()}\n{ticks}\n"


def fold_signature(text):
    "The documentation of a function: first what it does, then its signature, folded."
    found = re.search(r"(?<=\n)```python\n(?:def|class) .*?^```\n", text, flags=re.S | re.M)
    head = text[:found.start()] if found else ""
    if "[source](" not in head or "<details" in head: return text
    signature = found[0].replace("__main__.", "")      # where nbdev runs the cells
    folded = f'\n\n<details class="signature"><summary>Signature</summary>\n\n{signature}\n</details>\n'
    return text[:found.start()] + text[found.end():].strip() + folded


def page_text(notebook): # -> str
    "What a page says: Markdown cells and outputs, without code."
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown": parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            parts.append("".join(output.get("data", {}).get("text/markdown", "")))
    return re.sub(r"```.*?```", "", "\n\n".join(parts), flags=re.S)


def anchors(text): # -> set of names
    "Where links may lead within a page: headings as pandoc names them, and explicit ids."
    found = set(re.findall(r'(?:\{#|id=")([\w.-]+)', text))
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
        name = re.sub(r"[`*\[\]]|\(.*?\)|\{.*?\}", "", heading).strip().lower()
        name = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", name))
        found.add(re.sub(r"^[^a-z]+", "", name))
    return found


def page_name(notebook): # -> str, "" where it has none
    "The file that Quarto makes of a processed notebook, from its front matter."
    front = "".join(notebook["cells"][0]["source"]) if notebook["cells"][0]["cell_type"] == "raw" else ""
    found = re.search(r"^output-file: *(\S+)", front, flags=re.M)
    return found[1] if found else ""


def mend_links(notebooks): # {path: processed notebook}, changed in place
    "Links that nbdev made of names that their page does not document lead to the page."
    documented = {}
    for path, notebook in notebooks.items():
        name = (path.parent / page_name(notebook)).as_posix().removeprefix("./")
        documented[name] = anchors(page_text(notebook))

    def mend(link):
        page = next((p for p in documented if link[2].endswith("/" + p)), None)
        return link[0] if page is None or link[3] in documented[page] else f"{link[1]}({link[2]})"

    def mended(text): # a string or lines -> lines
        linked = re.sub(r"(\[`[^`]+`\])\((https://[^()#\s]+)#([^()\s]+)\)", mend, "".join(text))
        return linked.splitlines(keepends=True)

    for notebook in notebooks.values():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = mended(cell["source"])
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/markdown" in data: data["text/markdown"] = mended(data["text/markdown"])


def page_data(data, depth): # data of an output, folders between its page and the script
    "The data in a form that a page can show; None where they need no change."
    html = "".join(data.get("text/html", ""))
    if PLOTLY in data and not html: html = figure_html(data[PLOTLY], depth)
    if html: return {"text/markdown": as_markdown(html)}
    if WIDGET in data: return {"text/markdown": "*Interactive: open this notebook in JupyterLab.*"}
    text = "".join(data.get("text/markdown", ""))
    plain = fold_signature(unlink_code(text))
    return {"text/markdown": plain} if plain != text else None


def finish(notebook, depth=0): # dict, folders between its page and the script
    "Give outputs a form that a page can show; True if the notebook changed."
    changed = notebook["metadata"].pop("widgets", None) is not None      # widgets need a kernel
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])
        shown = [output for output in outputs if output.get("data", True)]      # Quarto warns of empty ones
        if len(shown) < len(outputs): cell["outputs"], changed = shown, True
        for output in shown:
            data = page_data(output.get("data", {}), depth)
            if data is None: continue
            output["data"], changed = data, True
    return changed


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    paths = [path.relative_to(root) for path in root.rglob("*.ipynb")]
    notebooks = {path: json.loads((root / path).read_text(encoding="utf-8")) for path in paths}
    mend_links(notebooks)
    for path, notebook in notebooks.items():
        finish(notebook, len(path.parts) - 1)
        (root / path).write_text(json.dumps(notebook), encoding="utf-8")
    (root / SCRIPT).write_text(get_plotlyjs(), encoding="utf-8")
