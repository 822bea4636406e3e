"""What the project needs is pinned, and nothing fetches anything at run time."""
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def number(version):
    return tuple(int(n) for n in re.findall(r"\d+", version))


def test_every_dependency_is_pinned_within_its_bounds():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines)      # exact versions
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    for group in ("requirements", "display_requirements", "sky_requirements", "dev_requirements"):
        for requirement in settings["DEFAULT"][group].split():
            name, bound, version = re.fullmatch(r"([\w-]+)(==|>=|<)([\d.]+)", requirement).groups()
            have, want = number(pinned[plain(name)]), number(version)
            assert {"==": have == want, ">=": have >= want, "<": have < want}[bound], requirement


FETCHERS = {
    "urllib", "urllib3", "http", "requests", "ftplib", "httpx", "aiohttp", "socket", "ssl", "smtplib",
    "xmlrpc", "huggingface_hub", "pooch", "wget",
}


def imported(node):
    "Top-level packages that a statement imports."
    if isinstance(node, ast.Import): return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level: return {node.module.split(".")[0]}
    return set()


def test_no_module_imports_what_fetches():
    paths = sorted((ROOT / "iceaggr").rglob("*.py"))
    assert {"data.py", "kaggle.py"} <= {path.name for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not imported(node) & FETCHERS, path


OFFLINE = """
import socket
import sys
from pathlib import Path

def refused(*args, **kwargs):
    raise AssertionError(f"network: {args}")

class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refused(address)
    connect_ex = connect
    def sendto(self, *args):
        refused(*args)

socket.socket = Socket
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refused

from iceaggr.cli import main
out = Path(sys.argv[1])
data = ["--data", out / "data"]
verbs = [
    ["simulate", "--events", 40, "--out", out / "data", "--workers", 1],
    ["prepare", *data, "--out", out / "prepared"],
    ["train", *data, "--out", out / "run", "--epochs", 1, "--batch-size", 8, "--workers", 1],
    ["predict", *data, "--run", out / "run", "--out", out / "p.parquet"],
    ["evaluate", *data, "--predictions", out / "p.parquet", "--out", out / "report"],
    ["display", *data, "--event", "brightest", "--run", out / "run", "--out", out / "event.html"],
]
for verb in verbs:
    assert main([str(argument) for argument in verb]) == 0, verb
try:
    socket.create_connection(("127.0.0.1", 9))
except AssertionError:
    print("offline")
"""
NAMES_OF_STANDARDS = r"https?://(www\.w3\.org|plotly\.com|github\.com)\S*"      # named, not loaded


def test_no_verb_needs_a_network(tmp_path):
    run = subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip().endswith("offline"), run.stderr[-2_000:]
    report = (tmp_path / "report/report.html").read_text()
    assert "://" not in re.sub(NAMES_OF_STANDARDS, "", report)      # the report loads nothing either
