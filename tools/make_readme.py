"""README.md from nbs/index.ipynb: the Markdown cells, the pictures of the other cells, links that work from the top level.

    python tools/make_readme.py [--check]        (--check: exit code 1 if README.md is not what this would write)"""
import base64
import json
import re
import sys
from pathlib import Path

notebook, readme, picture = Path("nbs/index.ipynb"), Path("README.md"), Path("nbs/images/event.png")


def pages():
    "The parts of the README, and the picture's bytes."
    parts, png = [], b""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                png = base64.b64decode("".join(output["data"]["image/png"]))
                caption = re.search(r'fig-cap: "(.*)"', source)[1]
                parts.append(f"![An event in the detector]({picture})\n\n*{caption}*")
            elif "text/markdown" in output.get("data", {}):
                parts.append("".join(output["data"]["text/markdown"]))
    return re.sub(r"\]\(((?:\w+/)?\w+\.ipynb)\)", r"](nbs/\1)", "\n\n".join(parts)) + "\n", png


text, png = pages()
if "--check" in sys.argv:
    sys.exit(0 if readme.read_text(encoding="utf-8") == text and picture.read_bytes() == png else "README.md is not what nbs/index.ipynb says: run `make readme`")
readme.write_text(text, encoding="utf-8")
picture.parent.mkdir(exist_ok=True)
picture.write_bytes(png)
