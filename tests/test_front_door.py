"""`import iceaggr`: quick, without heavy imports, and with the names that most users start with."""
import json
import subprocess
import sys

import pytest

import iceaggr

HEAVY = ["torch", "numpy", "pandas", "pyarrow", "matplotlib", "plotly"]
NAMES = [
    "HierarchicalTransformer", "DOMTransformer", "EventAccumulator", "EventTransformer", "IceCubeDataset",
    "collate_dom_packing", "split_batch", "train", "evaluate", "mean_angular_error", "line_fit",
    "display_event", "plot_event", "EventBrowser", "simulate_dataset", "Geometry", "load_geometry",
    "convert", "write_dataset",
]


def run(code):
    "Output of a fresh interpreter, from JSON."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_quick_and_light():
    """The shortest of five imports takes under 0.2 s and brings no heavy package along."""
    code = (
        "import json, sys, time\n"
        "start = time.perf_counter()\n"
        "import iceaggr\n"
        "seconds = time.perf_counter() - start\n"
        f"print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    results = [run(code) for _ in range(5)]
    assert min(seconds for seconds, _ in results) < 0.2
    assert all(heavy == [] for _, heavy in results)


def test_dir_lists_every_name_and_the_version():
    assert {*NAMES, "__version__"} <= set(dir(iceaggr))
    assert sorted(iceaggr.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_the_function_or_class_of_its_module(name):
    value = getattr(iceaggr, name)
    assert callable(value) and value.__name__ == name
    assert value is getattr(sys.modules[value.__module__], name)
    assert value.__module__.startswith("iceaggr.")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"): _ = iceaggr.no_such_name
    with pytest.raises(ImportError, match="no_such_name"): exec("from iceaggr import no_such_name")


@pytest.mark.parametrize("first", [
    "import iceaggr.line_fit",
    "import iceaggr.evaluation",
    "from iceaggr.line_fit import line_fit",
    "from iceaggr import line_fit",
    "iceaggr.line_fit",
])
def test_line_fit_is_the_function_in_any_order_of_imports(first):
    """A module and a function share the name: the attribute of the package is always the function."""
    code = (
        f"import iceaggr, json, pickle\n{first}\n"
        "from iceaggr import line_fit as door\n"
        "import iceaggr.line_fit\n"
        "from iceaggr.line_fit import line_fit, line_fit_events\n"
        "print(json.dumps([iceaggr.line_fit is line_fit, door is line_fit,\n"
        "                  pickle.loads(pickle.dumps(door)) is line_fit, callable(line_fit_events)]))"
    )
    assert run(code) == [True] * 4


def test_submodules_can_be_imported_from_the_package():
    assert run("import json\nfrom iceaggr import data\nprint(json.dumps(data.__name__))") == "iceaggr.data"


def test_star_import_gives_the_names():
    code = "import json\nfrom iceaggr import *\nprint(json.dumps([callable(train), callable(line_fit)]))"
    assert run(code) == [True, True]
