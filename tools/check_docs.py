"""What can be checked of the site without Quarto: `make docs` and tests/test_docs.py call this.

    python tools/check_docs.py        (from the top level; exit code 1 and one line for each fault)

nbdev processes a copy of the notebooks as it does for Quarto: imports and exported cells run, and the documentation of each function is made.
Then: every notebook in the sidebar, in order, and in the table of index.ipynb; front matter with title and description; internal links, pictures and
anchors that exist; a caption for every figure, no output over 300 kB or with a folder of this machine; docstrings, and a comment for every parameter."""
import ast
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from urllib.parse import unquote

import yaml

LARGEST = 300_000                                             # bytes of an output of a notebook
MACHINE = re.compile(r"(?<![\w./:-])/(?:home|root|tmp|work|workspace|mnt|Users|var|opt)/[\w.-]+")       # folders of whoever ran the notebook
FIGURES = ("image/png", "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")
UNNAMED = ("forward", "step", "zero_grad", "state_dict", "load_state_dict", "param_groups")      # torch's own names, explained there


def process(root, out): # -> folder of the processed notebooks, faults
    "A copy of the project at `root` in `out`, processed by nbdev."
    shutil.copytree(root, out, ignore=shutil.ignore_patterns(".*", "_proc", "_docs", "runs", "data", "build", "dist", "*.egg-info", "__pycache__"), dirs_exist_ok=True)
    here = Path.cwd()
    os.chdir(out)
    try:
        from nbdev.serve import proc_nbs
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try: folder, failed = proc_nbs("nbs", n_workers=0), []
            except Exception as e: folder, failed = Path("_proc"), ["nbdev cannot process the notebooks: " + str(e)[:300].replace("\n", " ")]
    finally: os.chdir(here)
    return out / folder, failed + [str(w.message).replace("See FAQ.", "put the imports in a cell of their own").replace("\n", " ")[:300] for w in said if "Found cells" in str(w.message)]


def sidebar_faults(root): # -> faults
    "Every notebook once in nbs/sidebar.yml, those of a folder in order of their names; and in the table of index.ipynb."
    def entries(items):
        for i in items: yield from ([i] if isinstance(i, str) else entries(i["contents"]))
    listed = list(entries(yaml.safe_load((root / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]))
    have = sorted(p.relative_to(root / "nbs").as_posix() for p in (root / "nbs").rglob("*.ipynb") if not any(x.startswith((".", "_")) for x in p.relative_to(root).parts))
    table = source((root / "nbs/index.ipynb"))
    faults = [f"sidebar.yml: {p} is missing" for p in have if p not in listed] + [f"sidebar.yml: {p} does not exist" for p in listed if p not in have]
    faults += [f"sidebar.yml: {p} is listed twice" for p in have if listed.count(p) > 1]
    for folder in {Path(p).parent for p in listed}:
        order = [p for p in listed if Path(p).parent == folder and Path(p).name[0].isdigit()]
        if order != sorted(order): faults.append(f"sidebar.yml: {folder}: not in order")
    return faults + [f"index.ipynb: {p} is not in the table of notebooks" for p in have if p != "index.ipynb" and f"({p})" not in table]


def source(path): # -> str
    "The Markdown of a notebook."
    return "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")


def readme_faults(root): # -> faults
    "Relative links and pictures of README.md."
    links = re.findall(r"\]\(([^()\s]+)\)", (root / "README.md").read_text(encoding="utf-8"))
    return [f"README.md: {t} does not exist" for t in links if not re.match(r"[a-z]+:|#", t) and not (root / t.partition("#")[0]).exists()]


def page_text(notebook): # -> str
    "What a page says: Markdown cells and outputs, without code."
    parts = []
    for c in notebook["cells"]:
        if c["cell_type"] == "markdown": parts.append("".join(c["source"]))
        for o in c.get("outputs", []):
            data = o.get("data", {})
            if "text/markdown" in data: parts.append("".join(data["text/markdown"]))
    return re.sub(r"```.*?```", "", "\n\n".join(parts), flags=re.S)


def anchors(text): # -> set of names
    "Where links may lead within a page: headings as pandoc names them, and explicit ids."
    found = set(re.findall(r'(?:\{#|id=")([\w.-]+)', text))
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
        name = re.sub(r"[`*\[\]]|\(.*?\)|\{.*?\}", "", heading).strip().lower()
        found.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", name))))
    return found


def link_faults(pages, root, site): # {path: notebook}, folder of the project, address of the site -> faults
    "Links between pages, to pictures, to anchors and to lines of the source."
    text = {p: page_text(n) for p, n in pages.items()}
    names = {p: anchors(t) for p, t in text.items()}
    by_html = {p.parent / front_matter(n).get("output-file", ""): p for p, n in pages.items()}
    faults = []
    for page, body in text.items():
        body = re.sub(r"`[^`\n]*`", "", body)
        for target in re.findall(r"\]\(<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\)", body) + re.findall(r'(?:href|src)="([^"]+)"', body):
            if (m := re.match(r"https://github\.com/[\w-]+/iceaggr/blob/\w+/([^#]+)(?:#L(\d+))?$", target)):
                file = root / m[1]
                if not file.is_file() or int(m[2] or 1) > len(file.read_text(encoding="utf-8").splitlines()): faults.append(f"{page}: {target} does not exist")
                continue
            where, _, anchor = unquote(target.removeprefix(site).removeprefix("/") if target.startswith(site) else target).partition("#")
            if re.match(r"[a-z]+:", where): continue
            path = (Path() if target.startswith(site) else page.parent) / where if where else page
            path = Path(os.path.normpath(path))
            path = by_html.get(path, path)
            if path not in pages and not (root / "nbs" / path).exists() and not (where.endswith((".scss", ".yml"))): faults.append(f"{page}: {target} does not exist")
            elif anchor and path in pages and anchor not in names[path]: faults.append(f"{page}: {target}: {path} has no such heading")
    return faults


def front_matter(notebook): # -> dict
    "The YAML that opens a processed notebook; {} where there is none."
    cell = notebook["cells"][0]
    found = re.fullmatch(r"---\s*\n(.*?)\n---\s*", "".join(cell["source"]).strip(), flags=re.S) if cell["cell_type"] == "raw" else None
    front = yaml.safe_load(found[1]) if found else {}
    return front if isinstance(front, dict) else {}


def page_faults(page, notebook): # path, processed notebook -> faults
    "Title and description, captions of figures, sizes of outputs, folders of the machine in them."
    faults = [f"{page}: no {what}" for what in ("title", "description", "output-file") if not front_matter(notebook).get(what)]
    for c in notebook["cells"]:
        size = max((len(json.dumps(o)) for o in c.get("outputs", [])), default=0)
        if size > LARGEST: faults.append(f"{page}: an output of {size / 1000:.0f} kB: {''.join(c['source'])[:60]!r}")
        for o in c.get("outputs", []):
            for text in (o.get("text", ""), o.get("traceback", ""), *(v for k, v in o.get("data", {}).items() if k.startswith("text/"))):
                if (m := MACHINE.search("".join(text))): faults.append(f"{page}: an output names {m[0]}, a folder of the machine: {''.join(c['source'])[:60]!r}")
        drawn = any(k in o.get("data", {}) for o in c.get("outputs", []) for k in FIGURES)
        if drawn and "fig-cap:" not in "".join(c["source"]): faults.append(f"{page}: a figure has no fig-cap: {''.join(c['source'])[:60]!r}")
    return faults


def function_faults(f, name, lines, classes, known, path): # ast node, name, source lines, names of classes, of parameters explained elsewhere, path -> faults
    "A docstring; in a signature of one line types, in others a comment at every parameter that is not explained elsewhere."
    short = f.args.args and f.body[0].lineno - f.lineno <= 1 or f.body[0].lineno == f.lineno
    faults = [] if ast.get_docstring(f) or f.name in UNNAMED or f.name == "__init__" or "#" in lines[f.body[0].lineno - 1] + lines[f.lineno - 1] else [f"{path}: {name} has no docstring"]
    for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs:
        kind = set(re.findall(r"\w+", ast.unparse(a.annotation))) if a.annotation else set()
        if a.arg not in ("self", "cls", *known) and not kind & classes and "#" not in lines[a.lineno - 1] and f.name not in UNNAMED and not (short and a.annotation):
            faults.append(f"{path}: {name}: parameter {a.arg} has no comment")
    return faults


def documentation_faults(root): # -> faults
    "Public functions, classes and methods of the package."
    modules = {p: p.read_text(encoding="utf-8") for p in sorted((root / "iceaggr").glob("*.py")) if not p.name.startswith("_")}
    classes, faults = {n.name for text in modules.values() for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}, []
    known = [name for row in re.findall(r"^\| (`.*?`) \|", source(root / "nbs/api.ipynb"), flags=re.M) for name in re.findall(r"`(\w+)`", row)]      # parameters that mean the same everywhere are explained there; those whose type is a class of the package, by the class
    for p, text in modules.items():
        where = re.search(r"File to edit: \.\./(\S+)\.", text)[1]
        for n in ast.parse(text).body:
            if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name.startswith("_"): continue
            if isinstance(n, ast.ClassDef) and not ast.get_docstring(n): faults.append(f"{where}: class {n.name} has no docstring")
            for f, name in [(n, n.name)] if isinstance(n, ast.FunctionDef) else [(m, f"{n.name}.{m.name}") for m in n.body if isinstance(m, ast.FunctionDef)]:
                if f.name == "__init__" or not f.name.startswith("_"): faults += function_faults(f, name, text.splitlines(), classes, known, where)
    return faults


def all_faults(root): # -> faults
    "Everything, of the project at `root`."
    with tempfile.TemporaryDirectory() as out:
        folder, faults = process(root, Path(out))
        pages = {p.relative_to(folder): json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.ipynb"))}
    config = dict(re.findall(r"^(doc_host|doc_baseurl) = (\S+)", (root / "settings.ini").read_text(), flags=re.M))
    faults += sidebar_faults(root) + readme_faults(root) + documentation_faults(root) + link_faults(pages, root, config["doc_host"] + config["doc_baseurl"])
    for page, notebook in pages.items(): faults += page_faults(page, notebook)
    return faults


if __name__ == "__main__":
    faults = all_faults(Path.cwd())
    for f in faults: print(f)
    print(f"{len(faults)} faults in the site" if faults else "the site's pages, links and documentation are in order")
    sys.exit(bool(faults))
