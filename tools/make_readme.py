"""README.md from nbs/index.ipynb: its Markdown cells, what its other cells show, links from the top level.

    python tools/make_readme.py [--check]      (--check: exit code 1 if README.md differs from the notebook)

A figure is stored as nbs/images/NAME.png, with NAME from `#| label: NAME` of its cell. What a cell with
`#| readme: false` shows is for the site's front page only; its figure is stored all the same."""
import base64
import json
import re
import sys
from pathlib import Path

NOTEBOOK, README, IMAGES = Path("nbs/index.ipynb"), Path("README.md"), Path("nbs/images")


def from_top(text):
    "Links to notebooks and pictures, as they lead from the top level."
    text = re.sub(r"\]\(((?:\w+/)?\w+\.ipynb)", r"](nbs/\1", text)
    text = re.sub(r"(\]\(|(?:src|srcset)=\")(images/)", r"\1nbs/\2", text)
    return text.replace("](../", "](")


def directive(source, name):
    "Value of `#| name: value` in a cell; None where it has none."
    found = re.search(rf'^#\|\s*{name}:\s*"?(.*?)"?\s*$', source, flags=re.M)
    return found[1] if found else None


def shown(cell):
    "Markdown of what the outputs of a code cell show, and the figures among them by file name."
    source, parts, figures = "".join(cell["source"]), [], {}
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            name, caption = f"{directive(source, 'label')}.png", directive(source, "fig-cap")
            figures[name] = base64.b64decode("".join(data["image/png"]))
            parts.append(f"![{caption}](images/{name})\n\n*{caption}*")
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
    return ([] if directive(source, "readme") == "false" else parts), figures


def make(notebook): # -> text of the README, {file name: bytes of a figure}
    parts, figures = [], {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append("".join(cell["source"]))
        elif cell["cell_type"] == "code":
            text, drawn = shown(cell)
            parts += text
            figures |= drawn
    return from_top("\n\n".join(parts)) + "\n", figures


def is_current(text, figures):
    "True if README.md and the figures hold what the notebook says."
    if README.read_text(encoding="utf-8") != text: return False
    paths = {IMAGES / name: png for name, png in figures.items()}
    return all(path.exists() and path.read_bytes() == png for path, png in paths.items())


if __name__ == "__main__":
    text, figures = make(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    if "--check" in sys.argv:
        sys.exit(0 if is_current(text, figures) else f"README.md differs from {NOTEBOOK}: run `make readme`")
    README.write_text(text, encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for name, png in figures.items(): (IMAGES / name).write_bytes(png)
