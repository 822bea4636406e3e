"""The site, as far as it can be checked without Quarto, and that tools/check_docs.py finds faults."""
import base64
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_docs  # noqa: E402
import finish_pages  # noqa: E402
import look_at_pages  # noqa: E402
import make_readme  # noqa: E402
import render_pages  # noqa: E402

FRONT = "title: A\ndescription: b\noutput-file: a.html"


def notebook(*cells, front=FRONT):
    "A processed notebook of Markdown cells, or of cells that are given whole."
    cells = [c if isinstance(c, dict) else dict(cell_type="markdown", source=c) for c in cells]
    return dict(cells=[dict(cell_type="raw", source=f"---\n{front}\n---")] + cells, metadata={})


def code_cell(source, *outputs):
    "A code cell with the data of its outputs."
    return dict(cell_type="code", source=source, outputs=[dict(data=data) for data in outputs])


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*cells)), encoding="utf-8")


def check_site(*options):
    "In a process of its own, since nbdev runs imports and exported cells of the notebooks."
    command = [sys.executable, "tools/check_docs.py", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3_000:]


def test_site_is_in_order():
    "Of the pages, six are looked at in a browser, where there is one."
    check_site("--few")


@pytest.mark.slow
def test_all_pages_fit_and_can_be_read():
    if look_at_pages.missing(): pytest.skip(f"install {look_at_pages.missing()}")
    check_site()


GOOD = """## Words

Text, `code` and a [link](b.html), **bold**, $x^2$.

> Quoted.

```python
def f(x: int = 1):  # a comment
    return "string"
```

| [a_name](b.html) | what |
|---|---|
| `another_name` | something |
"""
SEEN = {
    "faint": ('<p style="color: #999; background: #fff">faint</p>', "has a contrast of 2.8: faint"),
    "see-through": ('<p style="opacity: 0.5">pale words</p>', "pale words"),
    "wide": ('<div style="width: 2000px">wide</div>', "the page is"),
    "cut": ('<div style="overflow: hidden"><p style="width: 2000px">cut</p></div>', "is cut off: cut"),
    "broken": ('<table><td style="width: 1em; display: block"><a style="white-space: normal; '
               'word-break: break-all">a_broken_name</a></td></table>', "a name is broken: a_broken_name"),
    "loaded": ('<script src="http://127.0.0.1:9/jquery.js"></script>', "loads http://127.0.0.1:9/jquery.js"),
}


def test_what_cannot_be_read_or_does_not_fit_is_found(tmp_path):
    "On a page made of such things, and nothing on a page of all kinds of text."
    if look_at_pages.missing(): pytest.skip(f"pages are not looked at: install {look_at_pages.missing()}")
    table = {"text/html": "<table><tr><th>a</th></tr><tr><td>1</td></tr></table>"}
    good = notebook(GOOD, code_cell("print(1)", {"text/plain": "printed " * 50}, table))
    wrong = (f"```{{=html}}\n{html}\n```" for html, _ in SEEN.values())
    bad = notebook(*wrong, front=FRONT.replace("a.html", "bad.html"))
    pages = {Path("good.ipynb"): good, Path("bad.ipynb"): bad}
    paths = render_pages.render_site(pages, check_docs.front_matter, ROOT / "nbs", tmp_path)
    found = look_at_pages.look_faults(paths, tmp_path)
    assert not [fault for fault in found if not fault.startswith("bad")]
    assert not [kind for kind, (_, what) in SEEN.items() if not any(what in fault for fault in found)], found


def test_style_sheets_of_light_and_dark_set_the_same_colours():
    "A colour that only the light one sets would stay on a dark page."
    light, dark = (render_pages.scss_parts(ROOT / f"nbs/{name}.scss")[0] for name in ("styles", "dark"))
    colours = {name for name, value in light.items() if value.startswith("#") and "navbar" not in name}
    assert colours <= set(dark), colours - set(dark)
    assert "$body-emphasis-color" in dark and "$pre-color" in dark


def test_pages_of_results_open_with_their_figure():
    figure, folded = {"image/png": ""}, '#| code-fold: true\n#| fig-cap: "A."\nplot()'
    page, plain = Path("51_benchmarks.ipynb"), folded.partition("\n")[2]
    assert check_docs.opening_faults(page, notebook("In words.", code_cell(folded, figure))) == []
    for opening in (code_cell(plain, figure), code_cell("x = 1"), "```\na -> b\n```"):
        assert len(check_docs.opening_faults(page, notebook(opening, code_cell(folded, figure)))) == 1
        assert check_docs.opening_faults(Path("13_pooling.ipynb"), notebook(opening)) == []


def test_wide_diagrams_are_found():
    assert check_docs.diagram_faults("a", notebook(f"```sh\n{'a ' * 50}\n```\n\n```\n{'-' * 88}\n```")) == []
    assert len(check_docs.diagram_faults("a", notebook(f"Text.\n\n```\n{'-' * 89}\n```"))) == 1


@pytest.mark.parametrize("text, fault", [
    ("{'a': 0.30000000000000004}", True),
    ("7.2900002123788e-07", True),
    ("tensor([0.5024, 1.2345])", False),
    ("10516.000000", False),
    ("sha 0.1.20261201 and 2682373", False),
    ("geometry:NoneType=None", True),
    ("geometry:Geometry | None=None", False),
])
def test_raw_numbers_and_missing_types_are_found(text, fault):
    found = check_docs.page_faults("a", notebook(code_cell("", {"text/plain": text})))
    assert len(found) == fault


GITHUB = "https://github.com/iceaggr/iceaggr/blob/main/iceaggr/data.py"
LINKS = [
    ("[x](b.ipynb)", False),
    ("[x](b.ipynb#two-words)", False),
    ("[x](c.ipynb)", True),
    ("[x](b.ipynb#no)", True),
    ("[x](#here)", False),
    ("[x](#there)", True),
    ("![x](images/event.png)", False),
    ("![x](images/none.png)", True),
    ("https://a.org", False),
    ("[x](https://a.org/b)", False),
    ("`[x](c.ipynb)`", False),
    ("[x](https://site.org/docs/b.html#two-words)", False),
    ("[x](https://site.org/docs/b.html#no)", True),
    ('<a href="d/e.ipynb">', False),
    ('<img src="f.png">', True),
    ('<source srcset="images/none.svg">', True),
    (f"[s]({GITHUB}#L3)", False),
    (f"[s]({GITHUB}#L99999)", True),
]


@pytest.mark.parametrize("link, fault", LINKS)
def test_broken_links_are_found(link, fault):
    pages = {
        Path("a.ipynb"): notebook("## Here", link),
        Path("b.ipynb"): notebook("## Two words", front="title: b\noutput-file: b.html"),
        Path("d/e.ipynb"): notebook("[back](../a.ipynb#here)"),
    }
    assert len(check_docs.link_faults(pages, ROOT, "https://site.org/docs")) == fault


def test_missing_captions_are_found():
    drawn = {"image/png": ""}
    assert check_docs.page_faults("a", notebook(code_cell('#| fig-cap: "A."\nplot()', drawn))) == []
    assert len(check_docs.page_faults("a", notebook(code_cell("plot()", drawn)))) == 1


def test_large_outputs_are_found():
    large = notebook(code_cell("show()", {"text/html": "x" * 300_000}))
    assert ["output of 300 kB" in fault for fault in check_docs.page_faults("a", large)] == [True]


def test_missing_front_matter_is_found():
    assert len(check_docs.page_faults("a", notebook(front="title: A\noutput-file: a.html"))) == 1
    bare = dict(cells=[dict(cell_type="markdown", source="text")])
    assert len(check_docs.page_faults("a", bare)) == 3


OUTPUTS = [
    (dict(text=["saved to /home/ada/runs\n"]), True),
    (dict(data={"text/plain": ["PosixPath('/Users/ada/a.png')"]}), True),
    (dict(data={"text/html": "<p>/mnt/disk/a</p>"}), True),
    (dict(text="runs/a.png at https://a.org/home/b, 3/mnt/4\n"), False),
    (dict(data={"image/png": "/home/abc"}), False),
]


@pytest.mark.parametrize("output, fault", OUTPUTS)
def test_folders_of_the_machine_are_found_in_outputs(output, fault):
    cell = dict(cell_type="code", source='#| fig-cap: "A."', outputs=[output | dict(output_type="stream")])
    faults = check_docs.page_faults("a", notebook(cell))
    assert ["a folder of the machine" in text for text in faults] == [True] * fault


MODULE = '''# File to edit: ../nbs/m.ipynb.
class Known: "k"
def good(
    a, # x
    b:Known,
    seed:int=0,
):
    "Fine."
def typed(a:int): "Fine."
def _hidden(a): pass
def silent(a:int):
    pass
def bare(
    a:int,
):
    "No comment."
def untyped(a):
    "No type."
'''


def test_undocumented_functions_are_found(tmp_path):
    table = "| parameter | |\n|---|---|\n| `seed` | of random numbers |"
    write_notebook(tmp_path / "nbs/api.ipynb", table)
    (tmp_path / "iceaggr/io").mkdir(parents=True)
    (tmp_path / "iceaggr/m.py").write_text(MODULE)
    found = check_docs.documentation_faults(tmp_path)
    expected = ["silent has no docstring", "parameter a has no comment", "parameter a has no comment"]
    assert [re.sub(".*: ", "", fault) for fault in found] == expected
    (tmp_path / "iceaggr/io/n.py").write_text("# File to edit: ../../nbs/n.ipynb.\ndef f():\n    pass\n")
    assert check_docs.documentation_faults(tmp_path)[0] == "nbs/n.ipynb: f has no docstring"


def test_broken_links_of_the_readme_are_found(tmp_path):
    (tmp_path / "README.md").write_text("[a](nbs/a.ipynb) [b](https://b.org) ![c](c.png) `[d](d.png)`")
    (tmp_path / "c.png").touch()
    assert check_docs.readme_faults(tmp_path) == ["README.md: nbs/a.ipynb does not exist"]
    (tmp_path / "CONTRIBUTING.md").write_text('<img src="e.svg">')
    assert check_docs.readme_faults(tmp_path)[1:] == ["CONTRIBUTING.md: e.svg does not exist"]


@pytest.mark.parametrize("code, fault", [
    ("import os\nfrom a import b", False),
    ("import os\nx = 1", True),
    ("import os\nrun()", True),
    ("#| hide\nimport os\nx = 1", True),
    ("#| export\nimport os\nx = 1", False),
    ("#| eval: false\nimport os\nx = 1", False),
    ('import matplotlib.pyplot as plt\nplt.style.use("iceaggr.figures")', False),
    ("def f():\n    import os\n    return os.name", False),
    ("#| hide\nimport nbdev\n\nnbdev.nbdev_export()", False),
    ("x = 1", False),
    ("%timeit f()", False),
])
def test_imports_with_other_code_are_found(tmp_path, code, fault):
    write_notebook(tmp_path / "nbs/a.ipynb", code_cell(code))
    assert len(check_docs.mixed_faults(tmp_path)) == fault


def test_names_of_notebooks_that_are_gone_are_found(tmp_path):
    write_notebook(tmp_path / "nbs/a.ipynb", "See 05_packing.", code_cell("x = 1 # 12d has the reason"))
    write_notebook(tmp_path / "nbs/b.ipynb", "See 10_packing, 41a and commit 12d34.")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/c.py").write_text("# nbs/00_geometry.ipynb\n")
    (tmp_path / "README.md").write_text("12 a and 12b, 2 files")
    assert check_docs.gone_faults(tmp_path) == [
        "README.md: names notebooks that are gone: 12b",
        "nbs/a.ipynb: names notebooks that are gone: 05_packing, 12d",
        "tools/c.py: names notebooks that are gone: 00_geometry",
    ]


@pytest.mark.parametrize("entries, faults", [
    (["index", "00_a", "01_b"], 0),
    (["index", "00_a"], 1),
    (["index", "01_b", "00_a"], 1),
    (["index", "00_a", "01_b", "02_c"], 1),
    (["index", "00_a", "01_b", "01_b"], 1),
])
def test_sidebar_must_hold_every_notebook_once_and_in_order(tmp_path, entries, faults):
    for name in ("index", "00_a", "01_b"): write_notebook(tmp_path / f"nbs/{name}.ipynb", "text")
    lines = "".join(f"      - {entry}.ipynb\n" for entry in entries)
    (tmp_path / "nbs/sidebar.yml").write_text(f"website:\n  sidebar:\n    contents:\n{lines}")
    assert len(check_docs.sidebar_faults(tmp_path)) == faults


def test_figures_work_without_a_network():
    figure = dict(data=[dict(type="scatter", x=[0, 1], y=[1, 2])], layout=dict(width=300))
    nb = notebook(code_cell("", {finish_pages.PLOTLY: figure}, {}, {finish_pages.WIDGET: {}}))
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    assert finish_pages.finish(nb, 1) and nb["metadata"] == {}
    drawn, widget = (output["data"] for output in nb["cells"][1]["outputs"])
    html = drawn["text/markdown"]
    assert '<script src="../plotly.min.js">' in html and "newPlot" in html
    assert not re.search(r'src="http', html)
    assert "JupyterLab" in widget["text/markdown"]
    assert not finish_pages.finish(nb, 1)


def test_pages_load_no_script_of_another_host():
    "Quarto adds scripts to a page with HTML outputs or widgets; finished pages have none."
    table = {"text/html": "<table></table>", "text/plain": "a"}
    nb = notebook(code_cell("", table, {finish_pages.WIDGET: {}}))
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    assert len(check_docs.loading_faults("a", nb)) == 3
    finish_pages.finish(nb)
    assert check_docs.loading_faults("a", nb) == []
    assert nb["cells"][1]["outputs"][0]["data"] == {"text/markdown": "```{=html}\n<table></table>\n```\n"}


def test_signatures_are_folded_below_what_a_function_does():
    head, signature = "[source](u)\n\n### f\n\n", "```python\ndef f(\n    s:__main__.S, # sizes\n)\n```\n"
    folded = finish_pages.fold_signature(f"{head}{signature}\n*Does it.*")
    before, _, after = folded.partition("<details")
    assert before.strip() == f"{head}*Does it.*" and "    s:S, # sizes" in after
    assert finish_pages.fold_signature(folded) == folded
    assert finish_pages.fold_signature(f"Text.\n\n{signature}") == f"Text.\n\n{signature}"


def test_no_links_inside_code():
    text = "[`a`](u)\n\n```python\nf(x) # see [`a`](u)\n```\n\n[`b`](u)"
    nb = notebook(code_cell("", {"text/markdown": text}))
    assert finish_pages.finish(nb)
    plain = "[`a`](u)\n\n```python\nf(x) # see `a`\n```\n\n[`b`](u)"
    assert nb["cells"][1]["outputs"][0]["data"]["text/markdown"] == plain
    assert not finish_pages.finish(nb)


def test_readme_holds_text_pictures_and_links_from_the_top_level():
    png = base64.b64encode(b"picture").decode()
    text, figures = make_readme.make(notebook(
        '[tour](00_tour.ipynb) [first](tutorials/01_first_steps.ipynb#a) ![x](images/x.svg) [how](../HOW.md)',
        '<source srcset="images/x_dark.svg"><img src="images/x.svg">',
        code_cell('#| label: errors\n#| fig-cap: "Errors."', {"image/png": png}),
        code_cell('#| label: front\n#| fig-cap: "A."\n#| readme: false', {"image/png": png}),
        code_cell("#| echo: false", {"text/markdown": "| a |"}, {"text/plain": "left out"}),
    ))
    assert text.split("\n\n") == [
        "[tour](nbs/00_tour.ipynb) [first](nbs/tutorials/01_first_steps.ipynb#a) "
        "![x](nbs/images/x.svg) [how](HOW.md)",
        '<source srcset="nbs/images/x_dark.svg"><img src="nbs/images/x.svg">',
        "![Errors.](nbs/images/errors.png)",
        "*Errors.*",
        "| a |\n",
    ]
    assert figures == {"errors.png": b"picture", "front.png": b"picture"}


def commands():
    "Calls of `iceaggr` in the blocks of shell code of notebooks and README: where, and their arguments."
    notebooks = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not p.name.startswith(".")]
    texts = {p.name: check_docs.source(p) for p in notebooks}
    texts["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, text in texts.items():
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                call = re.match(r"(?:(?:\S*/)?iceaggr|torchrun .*-m iceaggr\.cli) +(.*)", line)
                if call: yield name, shlex.split(call[1], comments=True)


def test_commands_in_the_docs_are_ones_that_exist():
    from iceaggr.cli import make_parser
    found = list(commands())
    assert {"01_first_steps.ipynb", "03_kaggle.ipynb"} <= {name for name, _ in found}
    for name, arguments in found:
        try:
            make_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{name}: iceaggr {' '.join(arguments)}")
