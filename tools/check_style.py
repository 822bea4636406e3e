"""House rules that can be counted: `make test` calls this.

    python tools/check_style.py [nbs/10_packing.ipynb ...]     (none: the whole project)

Notebooks: a title and one line of purpose, a picture within the next three cells that a reader sees, short
exported cells. Package: no module imports from a floor above its own. README: at most 700 words.
Ruff checks the width of lines (ruff.toml)."""
import ast
import json
import re
import statistics
import sys
from pathlib import Path

# Lines of exported cells.
MEDIAN = 12           # of all of them
MOST = 30             # 90 % are shorter
LONGEST = 60          # of any
README_WORDS = 700

# From the ground up. A module imports from floors below its own, or from modules of its own floor that are
# listed before it.
FLOORS = [
    ["common", "style"],
    ["geometry", "direction", "density", "sky", "skymap", "pulses", "display_page", "engine.distributed"],
    ["io.kaggle", "io.bad_events", "io.prepared", "io.frames", "io.writing", "io.i3", "io.graphnet",
     "io.convert"],
    ["data", "engine.prepare", "display", "line_fit"],
    ["packing", "features", "pooling", "attention", "engine.cpu_attention", "engine.loading"],
    ["dom_transformer", "accumulator", "event_transformer", "engine.budget"],
    ["weights", "model"],
    ["simulation.neutrinos", "simulation.light", "simulation.readout", "simulation.dataset"],
    ["augmentation", "evaluation", "report", "attention_maps"],
    ["sky_density", "engine.checkpoints", "engine.device_steps", "training"],
    ["yardsticks", "benchmark", "browser", "cli"],
    ["testing", "studies"],
]


def source(cell):
    return "".join(cell["source"])


def is_export(cell):
    return cell["cell_type"] == "code" and re.search(r"^#\|\s*export", source(cell), re.M)


def code_lines(cell):
    "Lines of code, without directives and empty lines."
    return [line for line in source(cell).splitlines() if line.strip() and not line.startswith("#|")]


def only_imports(cell):
    try:
        body = ast.parse("\n".join(code_lines(cell))).body
    except SyntaxError:
        return False
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def seen(cell):
    "True if a reader of the page sees this cell."
    if cell["cell_type"] != "code": return bool(source(cell).strip())
    return not re.search(r"^#\|\s*(hide|default_exp)", source(cell), re.M) and not only_imports(cell)


def has_picture(cell):
    if cell["cell_type"] == "markdown":
        return bool(re.search(r"!\[[^\]]*\]\(|<svg|<picture|<img", source(cell)))
    return any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))


def notebook_faults(path, root):
    "What is wrong with one notebook, and the lengths of its exported cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    name, faults, lengths = path.relative_to(root).as_posix(), [], []
    if not re.fullmatch(r"# .+\n+> .+\n*", source(cells[0])):
        faults.append(f"{name}: must open with a cell of `# title` and `> one line` only")
    visible = [c for c in cells[1:] if seen(c)][:3]
    if not any(has_picture(c) for c in visible):
        faults.append(f"{name}: no picture within the first three cells below the title")
    for cell in cells:
        if not is_export(cell) or only_imports(cell): continue
        n = len(code_lines(cell))
        lengths.append(n)
        what = (re.findall(r"^(?:class|def) (\w+)", source(cell), re.M) or ["a cell"])[0]
        if n > LONGEST: faults.append(f"{name}: exported cell of {what} has {n} lines, more than {LONGEST}")
    return faults, lengths


def imports(path, root):
    "Modules of the package that a module imports, wherever in its code."
    parts = path.relative_to(root / "iceaggr").with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[:len(parts) - node.level]
            yield ".".join([*base, *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iceaggr."):
            yield node.module.removeprefix("iceaggr.")


def floor_faults(root):
    "Imports from above."
    place = {m: (i, j) for i, floor in enumerate(FLOORS) for j, m in enumerate(floor)}
    faults = []
    for path in sorted((root / "iceaggr").rglob("*.py")):
        module = ".".join(path.relative_to(root / "iceaggr").with_suffix("").parts)
        if module.split(".")[-1].startswith("_"): continue
        mine = module if module in place else module.split(".")[0]
        if mine not in place:
            faults.append(f"{path.name}: module {module} has no floor in tools/check_style.py")
            continue
        for other in imports(path, root):
            other = other if other in place else other.split(".")[0]
            if other in place and other != mine and place[other] > place[mine]:
                faults.append(f"{module} imports from {other}, which lies on a floor above it")
    return faults


def public_names(root):
    "How many names the modules offer with a star."
    total = 0
    for path in (root / "iceaggr").rglob("*.py"):
        m = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.M | re.S)
        if m and "studies" not in path.parts: total += len(ast.literal_eval(m[1]))
    return total


def project_notebooks(root):
    "Notebooks of the project, without those made by tools."
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts): yield path


def length_faults(lengths):
    "What is wrong with the lengths of the exported cells taken together."
    if not lengths: return []
    ordered = sorted(lengths)
    median, most = statistics.median(ordered), ordered[int(0.9 * (len(ordered) - 1))]
    longest = f"the longest {ordered[-1]}"
    print(f"{len(ordered)} exported cells: median {median:g} lines, 90 % up to {most}, {longest}")
    faults = []
    if median > MEDIAN: faults.append(f"exported cells have a median of {median:g} lines, more than {MEDIAN}")
    if most >= MOST: faults.append(f"10 % of the exported cells have {most} lines or more, not under {MOST}")
    return faults


def readme_faults(root):
    "A README of too many words."
    text = (root / "README.md").read_text(encoding="utf-8")
    words = len(re.sub(r"```.*?```|<[^>]+>", " ", text, flags=re.S).split())
    print(f"README: {words} words; public names: {public_names(root)}")
    return [f"README.md has {words} words, more than {README_WORDS}"] if words > README_WORDS else []


def all_faults(root, chosen=()): # folder of the project; notebooks, all of the project where none is given
    faults, lengths = [], []
    for path in chosen or project_notebooks(root):
        if path.name in ("index.ipynb", "api.ipynb"): continue
        found, cell_lengths = notebook_faults(path, root)
        faults += found
        lengths += cell_lengths
    faults += length_faults(lengths)
    if chosen: return faults
    return faults + readme_faults(root) + floor_faults(root)


def chosen_notebooks(names):
    "Paths of the notebooks named on the command line; SystemExit says what to give in place of another file."
    for name in names:
        if Path(name).suffix != ".ipynb":
            sys.exit(f"{name} is no notebook: give notebooks (nbs/10_packing.ipynb), or nothing for the "
                     "whole project; `ruff check` takes modules")
        if not Path(name).is_file(): sys.exit(f"{name}: no such file; check the path")
    return [Path(name).resolve() for name in names]


if __name__ == "__main__":
    faults = all_faults(Path.cwd(), chosen_notebooks(sys.argv[1:]))
    for fault in faults: print(fault)
    sys.exit(f"{len(faults)} faults of style" if faults else 0)
