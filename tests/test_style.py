"""The house rules that can be counted (tools/check_style.py): that the check finds what breaks them."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_style  # noqa: E402

TITLE, PICTURE = "# A\n\n> What it is for.", "![drawn](images/a.svg)"


def markdown(source):
    return dict(cell_type="markdown", source=source)


def code(source, drawn=False):
    return dict(cell_type="code", source=source, outputs=[dict(data={"image/png": ""})] if drawn else [])


@pytest.fixture
def project(tmp_path):
    "A folder with an empty project, and a function that writes files into it."
    def write(name, *content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(cells=content)) if path.suffix == ".ipynb" else content[0])
        return path

    write("README.md", "Short.")
    return tmp_path, write


def faults_of(project, *cells):
    root, write = project
    return check_style.notebook_faults(write("nbs/a.ipynb", *cells), root)[0]


def test_a_notebook_opens_with_title_and_purpose(project):
    "In a cell of their own: nbdev makes front matter of it and drops the rest."
    picture = markdown(PICTURE)
    assert faults_of(project, markdown(TITLE), picture) == []
    for wrong in ("## A\n\n> B.", "# A", f"{TITLE}\n\nMore."):
        assert ["must open" in fault for fault in faults_of(project, markdown(wrong), picture)] == [True]


def test_a_picture_comes_within_the_three_cells_below_the_title(project):
    title, text = markdown("# A\n\n> B."), markdown("text")
    hidden, imports = code("#| hide\nx = 1"), code("import os\nfrom a import b")
    figure = code("plot()", drawn=True)
    assert faults_of(project, title, hidden, imports, hidden, text, text, figure) == []
    assert len(faults_of(project, title, text, text, text, figure)) == 1
    assert len(faults_of(project, title, text, code("y = 1"), code("z = 1"), figure)) == 1


def test_long_exported_cells_are_found(project):
    body = "\n".join(f"    x{i} = {i}  # a comment" for i in range(60))
    for directive in ("#| export", "#| exporti"):
        long = code(f"{directive}\nclass Long:\n{body}")
        found = faults_of(project, markdown(TITLE), markdown(PICTURE), long)
        assert ["exported cell of Long has 61 lines" in fault for fault in found] == [True]
    assert faults_of(project, markdown(TITLE), markdown(PICTURE), code(f"class Long:\n{body}")) == []


def test_lengths_taken_together():
    assert check_style.length_faults([5] * 9 + [29]) == []
    assert ["median of 13" in fault for fault in check_style.length_faults([13] * 10)] == [True]
    found = check_style.length_faults([5] * 8 + [30, 30])
    assert ["30 lines or more" in fault for fault in found] == [True]


@pytest.mark.parametrize("module, line, fault", [
    ("packing", "from .data import x", False),
    ("packing", "from .model import x", True),
    ("packing", "from iceaggr.model import x", True),
    ("packing", "def f():\n    from .training import x", True),
    ("io/kaggle", "from ..common import x", False),
    ("io/kaggle", "from ..data import x", True),
    ("io/kaggle", "from .prepared import x", True),
    ("io/prepared", "from .kaggle import x", False),
    ("model", "from .studies.baselines import x", True),
    ("studies/baselines", "from ..model import x", False),
])
def test_imports_from_a_floor_above_are_found(project, module, line, fault):
    root, write = project
    write(f"iceaggr/{module}.py", line)
    assert len(check_style.floor_faults(root)) == fault


def test_a_module_without_a_floor_is_found(project):
    root, write = project
    write("iceaggr/new.py", "")
    assert check_style.floor_faults(root) == ["new.py: module new has no floor in tools/check_style.py"]


def test_readme_is_short(project):
    root, write = project
    write("README.md", "word " * 700 + "```sh\nnot counted\n``` <img not counted>")
    assert check_style.all_faults(root) == []
    write("README.md", "word " * 701)
    assert check_style.all_faults(root) == ["README.md has 701 words, more than 700"]


def test_public_names_are_counted_without_those_of_studies(project):
    root, write = project
    write("iceaggr/a.py", "__all__ = ['x',\n 'y']")
    write("iceaggr/io/b.py", "__all__ = ['z']")
    write("iceaggr/studies/c.py", "__all__ = ['w']")
    assert check_style.public_names(root) == 3


def test_only_notebooks_are_taken(project):
    root, write = project
    path = write("nbs/a.ipynb", markdown(TITLE))
    assert check_style.chosen_notebooks([str(path)]) == [path.resolve()]
    with pytest.raises(SystemExit, match="a.py is no notebook: give notebooks .*or nothing"):
        check_style.chosen_notebooks([str(path), "iceaggr/a.py"])
    with pytest.raises(SystemExit, match="b.ipynb: no such file"):
        check_style.chosen_notebooks([str(root / "b.ipynb")])
