"""The site, as far as it can be checked without Quarto (tools/check_docs.py), and that the check finds faults."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_docs, finish_pages


def notebook(*cells, front="title: A\ndescription: b\noutput-file: a.html"):
    "A processed notebook of Markdown cells, or of cells that are given whole."
    cells = [c if isinstance(c, dict) else dict(cell_type="markdown", source=c) for c in cells]
    return dict(cells=[dict(cell_type="raw", source=f"---\n{front}\n---")] + cells, metadata={})


def test_site_is_in_order():
    "A process of its own: nbdev runs the notebooks' imports and exported cells in it."
    run = subprocess.run([sys.executable, "tools/check_docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3_000:]


@pytest.mark.parametrize("link, fault", [("[x](b.ipynb)", False), ("[x](b.ipynb#two-words)", False), ("[x](c.ipynb)", True), ("[x](b.ipynb#no)", True), ("[x](#here)", False), ("[x](#there)", True),
                                         ("![x](images/event.png)", False), ("![x](images/none.png)", True), ("https://a.org", False), ("[x](https://a.org/b)", False), ("`[x](c.ipynb)`", False),
                                         ("[x](https://site.org/docs/b.html#two-words)", False), ("[x](https://site.org/docs/b.html#no)", True), ('<a href="d/e.ipynb">', False), ('<img src="f.png">', True),
                                         ("[s](https://github.com/iceaggr/iceaggr/blob/main/iceaggr/data.py#L3)", False), ("[s](https://github.com/iceaggr/iceaggr/blob/main/iceaggr/data.py#L99999)", True)])
def test_broken_links_are_found(link, fault):
    pages = {Path("a.ipynb"): notebook("## Here", link), Path("b.ipynb"): notebook("## Two words", front="title: b\noutput-file: b.html"), Path("d/e.ipynb"): notebook("[back](../a.ipynb#here)")}
    assert len(check_docs.link_faults(pages, ROOT, "https://site.org/docs")) == fault


def test_missing_front_matter_and_captions_are_found():
    drawn = dict(cell_type="code", source="plot()", outputs=[dict(data={"image/png": ""})])
    assert check_docs.page_faults("a", notebook(dict(drawn, source='#| fig-cap: "A."\nplot()'))) == []
    assert len(check_docs.page_faults("a", notebook(drawn))) == 1
    large = dict(cell_type="code", source="show()", outputs=[dict(data={"text/html": "x" * 300_000})])
    assert ["output of 300 kB" in f for f in check_docs.page_faults("a", notebook(large))] == [True]
    assert len(check_docs.page_faults("a", notebook(front="title: A\noutput-file: a.html"))) == 1
    assert len(check_docs.page_faults("a", dict(cells=[dict(cell_type="markdown", source="text")]))) == 3


@pytest.mark.parametrize("output, fault", [(dict(text=["saved to /home/ada/runs\n"]), True), (dict(data={"text/plain": ["PosixPath('/Users/ada/a.png')"]}), True), (dict(data={"text/html": "<p>/mnt/disk/a</p>"}), True),
                                           (dict(text="runs/a.png at https://a.org/home/b, 3/mnt/4\n"), False), (dict(data={"image/png": "/home/abc"}), False)])
def test_folders_of_the_machine_are_found_in_outputs(output, fault):
    assert ["a folder of the machine" in f for f in check_docs.page_faults("a", notebook(dict(cell_type="code", source="show()", outputs=[output | dict(output_type="stream")])))
            if "fig-cap" not in f] == [True] * fault


def test_undocumented_functions_are_found(tmp_path):
    (tmp_path / "iceaggr").mkdir(); (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/api.ipynb").write_text(json.dumps(notebook("| parameter | |\n|---|---|\n| `seed` | of random numbers |")))
    (tmp_path / "iceaggr/m.py").write_text('# File to edit: ../nbs/m.ipynb.\nclass Known: "k"\ndef good(\n    a, # x\n    b:Known,\n    seed:int=0,\n):\n    "Fine."\ndef typed(a:int): "Fine."\n'
                                           'def _hidden(a): pass\ndef silent(a:int):\n    pass\ndef bare(\n    a:int,\n):\n    "No comment."\ndef untyped(a):\n    "No type."\n')
    assert [re.sub(".*: ", "", f) for f in check_docs.documentation_faults(tmp_path)] == ["silent has no docstring", "parameter a has no comment", "parameter a has no comment"]


def test_broken_links_of_the_readme_are_found(tmp_path):
    (tmp_path / "README.md").write_text("[a](nbs/a.ipynb) [b](https://b.org) ![c](c.png)")
    (tmp_path / "c.png").touch()
    assert check_docs.readme_faults(tmp_path) == ["README.md: nbs/a.ipynb does not exist"]


def test_sidebar_must_hold_every_notebook_in_order(tmp_path):
    (tmp_path / "nbs").mkdir()
    for name in ("index", "00_a", "01_b"): (tmp_path / f"nbs/{name}.ipynb").write_text(json.dumps(notebook("(00_a.ipynb) (01_b.ipynb)")))
    def faults(*entries):
        (tmp_path / "nbs/sidebar.yml").write_text("website:\n  sidebar:\n    contents:\n" + "".join(f"      - {e}\n" for e in entries))
        return check_docs.sidebar_faults(tmp_path)
    assert faults("index.ipynb", "00_a.ipynb", "01_b.ipynb") == []
    assert len(faults("index.ipynb", "00_a.ipynb")) == len(faults("index.ipynb", "01_b.ipynb", "00_a.ipynb")) == len(faults("index.ipynb", "00_a.ipynb", "01_b.ipynb", "02_c.ipynb")) == 1


def test_figures_work_without_a_network():
    figure = dict(data=[dict(type="scatter", x=[0, 1], y=[1, 2])], layout=dict(width=300))
    nb = notebook(dict(cell_type="code", source="", outputs=[dict(data={finish_pages.PLOTLY: figure}), dict(data={finish_pages.WIDGET: {}})]))
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": dict(state={})}
    assert finish_pages.finish(nb, 1) and nb["metadata"] == {}
    html = nb["cells"][1]["outputs"][0]["data"]["text/html"]
    assert '<script src="../plotly.min.js">' in html and "newPlot" in html and not re.search(r'src="http', html)
    assert "JupyterLab" in nb["cells"][1]["outputs"][1]["data"]["text/markdown"] and not finish_pages.finish(nb, 1)


def commands():
    "Calls of `iceaggr` in the blocks of shell code of the notebooks and the README: where, and their arguments."
    texts = {p.name: check_docs.source(p) for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not p.name.startswith(".")} | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    for name, text in texts.items():
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if (m := re.match(r"(?:\S*/)?iceaggr +(.*)|torchrun .*-m iceaggr\.cli +(.*)", line)): yield name, shlex.split(m[1] or m[2], comments=True)


def test_commands_in_the_docs_are_ones_that_exist():
    from iceaggr.cli import make_parser
    found = list(commands())
    assert {"README.md", "03_kaggle.ipynb"} <= {name for name, _ in found}
    for name, arguments in found:
        try: make_parser().parse_args(arguments)
        except SystemExit: pytest.fail(f"{name}: iceaggr {' '.join(arguments)}")


def test_no_links_inside_code():
    text = "[`a`](u)\n\n```python\nf(x) # see [`a`](u)\n```\n\n[`b`](u)"
    nb = notebook(dict(cell_type="code", source="", outputs=[dict(data={"text/markdown": text})]))
    assert finish_pages.finish(nb) and nb["cells"][1]["outputs"][0]["data"]["text/markdown"] == "[`a`](u)\n\n```python\nf(x) # see `a`\n```\n\n[`b`](u)" and not finish_pages.finish(nb)
