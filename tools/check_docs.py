"""What can be checked of the site without Quarto: `make docs` and tests/test_docs.py call this.

    python tools/check_docs.py [--few]       (from the top level; exit code 1 and one line for each fault)

nbdev processes a copy of the notebooks as it does for Quarto: imports and exported cells run, and the
documentation of each function is made. Then these are checked:

- every notebook is in the sidebar, in order; front matter has a title and a description
- internal links, pictures and anchors exist; no notebook is named that is gone
- every figure has a caption; no output is over 300 kB, names a folder of this machine, or shows all 16 digits
- pages of results open with their figure; no page makes Quarto load scripts from another host
- every public function has a docstring, and every parameter a comment and a type that does not mislead

Where pandoc and Chromium are installed, the pages are looked at (tools/look_at_pages.py): all of them, or
with --few one of each kind."""
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

import look_at_pages
import render_pages
import yaml
from finish_pages import WIDGET, anchors, finish, mend_links, page_text

LARGEST = 300_000      # bytes of an output of a notebook
FIGURES = ("image/png", "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")
SKIPPED = (".*", "_proc", "_docs", "_pages", "runs", "data", "build", "dist", "*.egg-info", "__pycache__")

# Pages that show results, and pages of each kind for a short look.
RESULTS = re.compile(r"(?:22a?|23|51a?)_|studies/")
FEW = ("index", "api", "20_training", "22_evaluation", "51_benchmarks", "tutorials/01_first_steps")

# Outputs of these types make Quarto load scripts from another host.
LOADED = ("text/html", "application/javascript", WIDGET)
COLUMN = 88     # letters of code in a line of a page
DIGITS = 8      # a number with as many significant digits is a raw one
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]|e[-+]?\d)|(?<![\w.])\d\.\d+e[-+]?\d+")

# Folders of whoever ran the notebook.
MACHINE = re.compile(r"(?<![\w./:-])/(?:home|root|tmp|work|workspace|mnt|Users|var|opt)/[\w.-]+")

# Torch's own names, explained there.
UNNAMED = ("forward", "extra_repr", "step", "zero_grad", "state_dict", "load_state_dict", "param_groups")

# Names and numbers of notebooks that are gone.
GONE = re.compile(
    r"\b(?:00_geometry|01_direction|01a_reading|01b_prepared|02_data|02a_graphnet|03_simulation|03a_comparison"
    r"|05_packing|05a_features|06_attention|07_dom_transformer|08_accumulator|09_event_transformer"
    r"|09a_distributed|10_model|10a_augmentation|11_training|12_evaluation|12a_reference|12b_baselines"
    r"|12c_ablations|12d_pretrained|12e_attention_maps|12f_browser|12g_limit|12h_readout|13_benchmarks|14_cli"
    r"|14a_faults)\b|(?<![\w.-])(?:0[1-35-9][ab]|10a|12[a-h]|14a)(?![\w-])")
WRITTEN = (
    "*.md", "Makefile", "_quarto.yml", ".ci/*", ".github/**/*.yml", "nbs/**/*.ipynb", "nbs/images/*.py",
    "iceaggr/**/*.md", "iceaggr/**/*.py", "tools/*.py", "tests/**/*.py", "studies/**/*.py",
    "benchmarks/**/*.py", "data_scripts/*",
)
NAMES_GONE = ("tools/check_docs.py", "tests/test_docs.py")      # these files name them to find them


def one_line(text):
    return str(text).replace("\n", " ")[:300]


def process(root, out): # -> folder of the processed notebooks, faults
    "A copy of the project at `root` in `out`, processed by nbdev."
    from nbdev.serve import proc_nbs
    shutil.copytree(root, out, ignore=shutil.ignore_patterns(*SKIPPED), dirs_exist_ok=True)
    here = Path.cwd()
    os.chdir(out)
    folder, faults = Path("_proc"), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of cells with imports and other code: see mixed_faults
            folder = proc_nbs("nbs", n_workers=0)
    except Exception as error:
        faults.append(f"nbdev cannot process the notebooks: {one_line(error)}")
    finally:
        os.chdir(here)
    return out / folder, faults


def is_mixed(code):
    "True if a cell holds imports and other code. The line that sets the style of figures may follow imports."
    if "nbdev_export()" in code: return False
    if re.search(r"^#\|\s*(export|exports|exporti|exec_doc|eval: *false)\b", code, flags=re.M): return False
    try:
        body = ast.parse(code).body
    except SyntaxError:      # magics
        return False
    nodes = [node for statement in body for node in ast.walk(statement)]
    if not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes): return False
    other = [node for node in nodes if isinstance(node, (ast.Expr, ast.Assign))]
    return any(not ast.unparse(node).startswith(("plt.style.use(", "pd.set_option(")) for node in other)


def mixed_faults(root): # -> faults
    "Cells with imports and other code, which nbdev runs whenever it makes the pages."
    faults = []
    for path in sorted(p for p in (root / "nbs").rglob("*.ipynb") if visible(p, root)):
        mixed = [code for code in cell_sources(path, "code") if is_mixed(code)]
        name = path.relative_to(root / "nbs").as_posix()
        faults += [f"{name}: put the imports in a cell of their own: {code[:60]!r}" for code in mixed]
    return faults


def visible(path, root):
    "True if no folder of the path is hidden or made by a tool."
    return not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)


def sidebar_entries(items):
    for item in items:
        if isinstance(item, str): yield item
        else: yield from sidebar_entries(item["contents"])


def sidebar_faults(root): # -> faults
    "Every notebook once in nbs/sidebar.yml, those of a folder in order of their numbers."
    sidebar = yaml.safe_load((root / "nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    listed, nbs = list(sidebar_entries(sidebar["contents"])), root / "nbs"
    have = sorted(p.relative_to(nbs).as_posix() for p in nbs.rglob("*.ipynb") if visible(p, root))
    faults = [f"sidebar.yml: {p} is missing" for p in have if p not in listed]
    faults += [f"sidebar.yml: {p} does not exist" for p in listed if p not in have]
    faults += [f"sidebar.yml: {p} is listed twice" for p in have if listed.count(p) > 1]
    for folder in sorted({Path(p).parent for p in listed}):
        order = [p for p in listed if Path(p).parent == folder and Path(p).name[0].isdigit()]
        if order != sorted(order): faults.append(f"sidebar.yml: {folder}: not in order")
    return faults


def cell_sources(path, *kinds):
    "Sources of the cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] in kinds]


def source(path): # -> str
    "The Markdown of a notebook."
    return "\n".join(cell_sources(path, "markdown"))


def readme_faults(root): # -> faults
    "Relative links and pictures of README.md and CONTRIBUTING.md."
    faults = []
    for path in (root / "README.md", root / "CONTRIBUTING.md"):
        if not path.exists(): continue
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
        links = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'(?:href|src|srcset)="([^"]+)"', text)
        local = [t for t in links if not re.match(r"[a-z]+:|#", t)]
        missing = [t for t in local if not (root / t.partition("#")[0]).exists()]
        faults += [f"{path.name}: {t} does not exist" for t in missing]
    return faults


def gone_faults(root): # -> faults
    "Names of notebooks that are gone, in prose, code and comments."
    faults = []
    for path in sorted({p for pattern in WRITTEN for p in root.glob(pattern)}):
        name = path.relative_to(root).as_posix()
        if name in NAMES_GONE or name == "iceaggr/_modidx.py": continue
        if ".ipynb_checkpoints" in path.parts or not path.is_file(): continue
        if path.suffix == ".ipynb": text = "\n".join(cell_sources(path, "markdown", "code"))
        else: text = path.read_text(encoding="utf-8")
        found = sorted(set(GONE.findall(text)))
        if found: faults.append(f"{name}: names notebooks that are gone: {', '.join(found)}")
    return faults


def targets(text):
    "Where the links and pictures of a page lead."
    body = re.sub(r"`[^`\n]*`", "", text)
    links = re.findall(r"\]\(<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\)", body)
    return links + re.findall(r'(?:href|src|srcset)="([^"]+)"', body)


def source_link_fault(match, root):
    "True if a link to a line of the source on GitHub leads nowhere."
    file = root / match[1]
    return not file.is_file() or int(match[2] or 1) > len(file.read_text(encoding="utf-8").splitlines())


def link_faults(pages, root, site): # {path: notebook}, folder of the project, address of the site -> faults
    "Links between pages, to pictures, to anchors and to lines of the source."
    text = {path: page_text(notebook) for path, notebook in pages.items()}
    names = {path: anchors(body) for path, body in text.items()}
    by_html = {path.parent / front_matter(nb).get("output-file", ""): path for path, nb in pages.items()}
    faults = []
    for page, body in text.items():
        for target in targets(body):
            github = re.match(r"https://github\.com/[\w-]+/iceaggr/blob/\w+/([^#]+)(?:#L(\d+))?$", target)
            if github:
                if source_link_fault(github, root): faults.append(f"{page}: {target} does not exist")
                continue
            on_site = target.startswith(site)
            local = target.removeprefix(site).removeprefix("/") if on_site else target
            where, _, anchor = unquote(local).partition("#")
            if re.match(r"[a-z]+:", where): continue
            path = (Path() if on_site else page.parent) / where if where else page
            path = Path(os.path.normpath(path))
            path = by_html.get(path, path)
            exists = path in pages or (root / "nbs" / path).exists() or where.endswith((".scss", ".yml"))
            if not exists: faults.append(f"{page}: {target} does not exist")
            elif anchor and path in pages and anchor not in names[path]:
                faults.append(f"{page}: {target}: {path} has no such heading")
    return faults


def front_matter(notebook): # -> dict
    "The YAML that opens a processed notebook; {} where there is none."
    cell = notebook["cells"][0]
    if cell["cell_type"] != "raw": return {}
    found = re.fullmatch(r"---\s*\n(.*?)\n---\s*", "".join(cell["source"]).strip(), flags=re.S)
    front = yaml.safe_load(found[1]) if found else {}
    return front if isinstance(front, dict) else {}


def output_texts(output):
    "What an output says in words."
    yield from (output.get("text", ""), output.get("traceback", ""))
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"): yield value


def significant_digits(number):
    return len(number.partition("e")[0].replace(".", "").strip("0"))


def opening_faults(page, notebook): # path, processed notebook -> faults
    "A page of results shows its figure before code and diagrams of letters."
    if not RESULTS.match(str(page)): return []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        hidden = re.search(r"^#\| *(?:echo: *false|code-fold: *true)", source, flags=re.M)
        shows_code = "```" in source if cell["cell_type"] == "markdown" else cell["cell_type"] == "code"
        if shows_code and not hidden:
            return [f"{page}: code before the first figure, fold it (`#| code-fold: true`): {source[:60]!r}"]
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        if drawn or "![" in source: return []
    return []


def diagram_faults(page, notebook): # path, processed notebook -> faults
    "Diagrams of letters that are wider than the column of a page; commands and code wrap."
    faults = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown": continue
        blocks = re.findall(r"^```(.*)\n([^`]*)^```", "".join(cell["source"]), flags=re.M)
        for language, block in blocks:
            wide = [line for line in block.splitlines() if len(line) > COLUMN and not language]
            if wide: faults.append(f"{page}: a diagram is wider than {COLUMN} letters: {wide[0][:60]!r}")
    return faults


def loading_faults(page, notebook): # path, finished notebook -> faults
    "Outputs for which Quarto adds scripts of another host to the page."
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    found = sorted({kind for output in outputs for kind in output.get("data", {})} & set(LOADED))
    if "widgets" in notebook["metadata"]: found.append("the state of widgets")
    return [f"{page}: {kind} makes Quarto load scripts from another host" for kind in found]


def finish_all(pages): # {path: processed notebook}, changed in place
    for path, notebook in pages.items(): finish(notebook, len(path.parts) - 1)


def seen_faults(pages, root, few=False): # {path: finished notebook}, folder of the project -> faults
    "What a reader would see of the pages and of the drawings."
    if look_at_pages.missing():
        print("the pages were not looked at: install", look_at_pages.missing())
        return []
    chosen = {p: nb for p, nb in pages.items() if not few or p.with_suffix("").as_posix() in FEW}
    with tempfile.TemporaryDirectory() as out:
        paths = render_pages.render_site(chosen, front_matter, root / "nbs", Path(out))
        if not few: paths += sorted((Path(out) / "images").glob("*.svg"))
        return look_at_pages.look_faults(paths, out)


def page_faults(page, notebook): # path, processed notebook -> faults
    "Title and description, captions of figures, sizes of outputs, folders of the machine in them."
    wanted = ("title", "description", "output-file")
    faults = [f"{page}: no {what}" for what in wanted if not front_matter(notebook).get(what)]
    for cell in notebook["cells"]:
        outputs, code = cell.get("outputs", []), "".join(cell["source"])
        where = repr(code[:60])
        size = max((len(json.dumps(output)) for output in outputs), default=0)
        if size > LARGEST: faults.append(f"{page}: an output of {size / 1000:.0f} kB: {where}")
        for text in (text for output in outputs for text in output_texts(output)):
            folder = MACHINE.search("".join(text))
            if folder: faults.append(f"{page}: an output names {folder[0]}, a folder of the machine: {where}")
        printed = " ".join("".join(text) for output in outputs for text in output_texts(output))
        raw = [n for n in NUMBER.findall(printed) if significant_digits(n) >= DIGITS]
        if raw: faults.append(f"{page}: an output has a raw number, {raw[0]}; round it: {where}")
        if "NoneType" in printed: faults.append(f"{page}: a parameter without a type: {where}")
        drawn = any(kind in output.get("data", {}) for output in outputs for kind in FIGURES)
        if drawn and "fig-cap:" not in code: faults.append(f"{page}: a figure has no fig-cap: {where}")
    return faults


def lacks_docstring(function, lines):
    "A function without docstring; one of a single line may have a comment instead."
    if ast.get_docstring(function) or function.name in (*UNNAMED, "__init__"): return False
    return "#" not in lines[function.body[0].lineno - 1] + lines[function.lineno - 1]


def lacks_comment(argument, one_line_signature, lines, classes, known):
    "A parameter that is explained neither at its place, nor by its class, nor in the list of those known."
    if argument.arg in ("self", "cls", *known) or "#" in lines[argument.lineno - 1]: return False
    if one_line_signature and argument.annotation: return False
    words = re.findall(r"\w+", ast.unparse(argument.annotation)) if argument.annotation else []
    return not set(words) & classes


def function_faults(
    function,      # ast node
    name,          # as a reader knows it: `Class.method`
    lines,         # of the source
    classes,       # names of the package's classes
    known,         # parameters that are explained elsewhere
    path,          # of the notebook
): # -> faults
    "A docstring; types in a signature of one line, in others a comment at every parameter."
    faults = [f"{path}: {name} has no docstring"] if lacks_docstring(function, lines) else []
    if function.name in UNNAMED: return faults
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    distance = function.body[0].lineno - function.lineno
    one_line_signature = distance == 0 or bool(function.args.args) and distance <= 1
    return faults + [f"{path}: {name}: parameter {a.arg} has no comment" for a in arguments
                     if lacks_comment(a, one_line_signature, lines, classes, known)]


def explained_parameters(root):
    "Parameters that mean the same everywhere: api.ipynb explains them."
    rows = re.findall(r"^\| (`.*?`) \|", source(root / "nbs/api.ipynb"), flags=re.M)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def offered_names(tree):
    "What a module lists in `__all__`; None where it lists nothing."
    for node in tree.body:
        is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_list: return ast.literal_eval(node.value)
    return None


def public_functions(tree):
    "Functions and methods that a module offers, with the names that a reader knows."
    offered = offered_names(tree)
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        if offered is not None and node.name not in offered: continue
        if isinstance(node, ast.FunctionDef): yield node, node.name
        else: yield from public_methods(node)


def public_methods(node):
    for method in node.body:
        if not isinstance(method, ast.FunctionDef): continue
        hidden = method.name.startswith("_") and method.name != "__init__"
        if not hidden: yield method, f"{node.name}.{method.name}"


def documentation_faults(root): # -> faults
    "Public functions, classes and methods of the package and its subpackages."
    paths = [p for p in sorted((root / "iceaggr").rglob("*.py")) if not p.name.startswith("_")]
    texts = [p.read_text(encoding="utf-8") for p in paths]
    trees = [ast.parse(text) for text in texts]
    classes = {n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    known, faults = explained_parameters(root), []
    for text, tree in zip(texts, trees, strict=True):
        where = re.search(r"File to edit: (?:\.\./)+(\S+)\.", text)[1]
        for node in tree.body:
            public_class = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            if public_class and not ast.get_docstring(node):
                faults.append(f"{where}: class {node.name} has no docstring")
        for function, name in public_functions(tree):
            faults += function_faults(function, name, text.splitlines(), classes, known, where)
    return faults


def processed_pages(root): # -> {path: notebook}, faults
    with tempfile.TemporaryDirectory() as out:
        folder, faults = process(root, Path(out))
        paths = sorted(folder.rglob("*.ipynb"))
        pages = {p.relative_to(folder): json.loads(p.read_text(encoding="utf-8")) for p in paths}
    mend_links(pages)      # as the site does
    return pages, faults


def all_faults(root, few=False): # -> faults
    "Everything, of the project at `root`."
    pages, faults = processed_pages(root)
    settings = (root / "settings.ini").read_text(encoding="utf-8")
    config = dict(re.findall(r"^(doc_host|doc_baseurl) = (\S+)", settings, flags=re.M))
    for check in (sidebar_faults, readme_faults, mixed_faults, gone_faults, documentation_faults):
        faults += check(root)
    faults += link_faults(pages, root, config["doc_host"] + config["doc_baseurl"])
    for check in (page_faults, opening_faults, diagram_faults):
        for page, notebook in pages.items(): faults += check(page, notebook)
    finish_all(pages)
    for page, notebook in pages.items(): faults += loading_faults(page, notebook)
    return faults + seen_faults(pages, root, few)


if __name__ == "__main__":
    faults = all_faults(Path.cwd(), "--few" in sys.argv)
    for fault in faults: print(fault)
    in_order = "the site's pages, links and documentation are in order"
    print(f"{len(faults)} faults in the site" if faults else in_order)
    sys.exit(bool(faults))
