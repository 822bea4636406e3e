"""Pages without Quarto, near enough to look at: pandoc and the site's own rules, light and dark.

    pip install pypandoc_binary
    python tools/render_pages.py [FOLDER, else _pages]      (from the top level; then open FOLDER/index.html)

nbdev processes the notebooks and finish_pages finishes them, as for Quarto. Each becomes the Markdown that
Quarto makes of it. The style sheet holds what matters of Bootstrap's and Quarto's rules, then those of
nbs/styles.scss and nbs/dark.scss."""
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

# What Bootstrap 5.3 and Quarto make of the variables of the site.
BASE = """
body { background: $body-bg; color: $body-color; }
a { color: $link-color; }
h1, h2, h3, h4 { color: $headings-color; }
pre { color: $pre-color; }
code { color: $code-color; }
pre code { color: inherit; }
p code:not(.sourceCode), li code:not(.sourceCode) { background: $code-bg; }
table { color: $table-color; }
td, th { border-bottom: 1px solid $border-color; }
figcaption, caption, blockquote { color: $body-secondary-color; }
div.sourceCode { background: $code-block-bg; }
nav { background: $navbar-bg; color: $navbar-fg; }
nav a { color: $navbar-fg; }
aside { background: $sidebar-bg; color: $sidebar-fg; }
footer { background: $footer-bg; color: $footer-fg; }
"""
LAYOUT = """
* { box-sizing: border-box; }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 800px; margin: 1em auto; padding: 0 1.5em; }
nav, aside, footer { padding: 0.7em 1.5em; }
nav a { margin-right: 1.5em; }
h1 { font-size: 2rem; }
h2 { font-size: 1.45rem; margin-top: 2rem; }
pre { overflow: auto; margin: 0 0 1rem; font-size: 0.875em; }
code { font-family: monospace; font-size: 0.875em; word-wrap: break-word; }
pre code { font-size: inherit; word-wrap: normal; }
div.sourceCode { margin: 1em 0; padding: 0.4em; border-radius: 4px; overflow-y: hidden; }
pre.sourceCode { margin: 0; overflow: visible; }
pre > code.sourceCode { white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; margin-bottom: 1rem; }
td, th { padding: 0.5rem; text-align: left; vertical-align: top; }
.table a { word-break: break-word; }
figure { margin: 0 0 1rem; }
blockquote { margin: 0 0 1rem; padding-left: 1rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="{up}pages.css"></head>
<body><nav><a href="{up}index.html">iceaggr</a><a href="{up}tour.html">Course</a>
<a href="{up}api.html">API</a></nav>
<aside>{title}</aside>
<main><header><div class="quarto-title"><h1 class="title">{title}</h1></div>
<div><div class="description">{description}</div></div></header>
{body}
</main><footer>Made without Quarto</footer></body></html>
"""


def scss_parts(path): # -> variables {"$name": value}, rules as CSS
    "The two parts of a style sheet of the site."
    text = re.sub(r"^\s*//.*$|\s//\s.*$", "", path.read_text(encoding="utf-8"), flags=re.M)
    defaults, rules = text.split("/*-- scss:rules --*/")
    return dict(re.findall(r"^(\$[\w-]+):\s*(.*?)(?: !default)?;$", defaults, flags=re.M)), rules


def filled(css, variables):
    "CSS with the values of its variables."
    for _ in range(3): css = re.sub(r"\$[\w-]+", lambda m: variables[m[0]], css)    # values may name others
    return css


def style_sheet(nbs): # folder of the style sheets -> CSS
    "For both colour schemes; the reader's system chooses."
    light, rules = scss_parts(nbs / "styles.scss")
    dark, dark_rules = scss_parts(nbs / "dark.scss")
    dark = light | dark
    return "\n".join([LAYOUT, filled(BASE + rules, light), "@media (prefers-color-scheme: dark) {",
                      ":root { color-scheme: dark; }", filled(BASE + rules + dark_rules, dark), "}"])


def fenced(text, kind):
    "A block of Markdown, fenced by more backticks than it holds."
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{kind}\n{text.rstrip()}\n{ticks}\n"


def output_markdown(output, caption):
    "What Quarto shows of an output: Markdown before HTML, pictures and text. `render` puts pictures in."
    every = output.get("data", {})
    data = {kind: "".join(value) for kind, value in every.items() if kind.startswith("text/")}
    if "text/markdown" in data: body = data["text/markdown"]
    elif "text/html" in data: body = fenced(data["text/html"], "{=html}")
    elif "image/png" in every:
        width = output.get("metadata", {}).get("image/png", {}).get("width")
        return f"![{caption}](png-{id(output)})" + (f"{{width={width}}}\n" if width else "\n")
    else: body = fenced("".join(output.get("text", "")) or data.get("text/plain", ""), "")
    return body + (f"\n{caption}\n" if caption else "")


def cell_markdown(cell):
    "Code, unless hidden, and outputs."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if cell["cell_type"] != "code": return ""
    options = yaml.safe_load("\n".join(re.findall(r"^#\| ?(.*: .*)$", source, flags=re.M))) or {}
    parts, code = [], re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
    if options.get("echo", True) and code:
        block = fenced(code, "{.python .cell-code}")
        if "code-fold" in options: block = f"<details><summary>Code</summary>\n\n{block}\n\n</details>"
        parts.append(block)
    for output in cell.get("outputs", []):
        shown = output_markdown(output, options.get("fig-cap", ""))
        kind = "display" if "data" in output else output.get("name", "stdout")
        as_is = options.get("output") == "asis"
        parts.append(shown if as_is else f":::: {{.cell-output .cell-output-{kind}}}\n{shown}\n::::")
    return "::::: {.cell}\n" + "\n\n".join(parts) + "\n:::::"


def render(path, notebook, front): # path of the page, processed notebook, its front matter -> HTML
    import pypandoc
    markdown = "\n\n".join(cell_markdown(cell) for cell in notebook["cells"])
    body = pypandoc.convert_text(markdown, "html", "markdown", ["--mathml", "--wrap=none"])
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        png = "".join(output.get("data", {}).get("image/png", "")).replace("\n", "")
        body = body.replace(f'"png-{id(output)}"', f'"data:image/png;base64,{png}"')
    body = body.replace("<table", '<table class="table"')
    body = re.sub(r'href="(?!https?:)([^"#]+)\.ipynb', r'href="\1.html', body)
    return PAGE.format(title=front["title"], description=front["description"], body=body,
                       up="../" * (len(path.parts) - 1))


def render_site(pages, front_matter, nbs, out): # {path: notebook}, function, folder of the notebooks, folder
    "Pages, style sheet and pictures in a folder; paths of the pages."
    out.mkdir(parents=True, exist_ok=True)
    (out / "pages.css").write_text(style_sheet(nbs), encoding="utf-8")
    for picture in (nbs / "images").glob("*.[sp][vn]g"):
        (out / "images").mkdir(exist_ok=True)
        (out / "images" / picture.name).write_bytes(picture.read_bytes())

    def write(path):
        to = out / path.parent / front_matter(pages[path])["output-file"]
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(render(path, pages[path], front_matter(pages[path])), encoding="utf-8")
        return to

    with ThreadPoolExecutor(2) as pool: return list(pool.map(write, pages))


if __name__ == "__main__":
    import check_docs
    import finish_pages
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "_pages")
    pages = check_docs.processed_pages(Path.cwd())[0]
    check_docs.finish_all(pages)
    paths = render_site(pages, check_docs.front_matter, Path("nbs"), out)
    (out / finish_pages.SCRIPT).write_text(finish_pages.get_plotlyjs(), encoding="utf-8")
    print(f"{len(paths)} pages in {out}")
