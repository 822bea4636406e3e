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
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines)              # exact versions
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    for group in ("requirements", "dev_requirements"):
        for requirement in settings["DEFAULT"][group].split():
            name, bound, version = re.fullmatch(r"([\w-]+)(==|>=|<)([\d.]+)", requirement).groups()
            have, want = number(pinned[plain(name)]), number(version)
            assert {"==": have == want, ">=": have >= want, "<": have < want}[bound], requirement


FETCHERS = {"urllib", "urllib3", "http", "requests", "ftplib", "httpx", "aiohttp", "socket", "ssl", "smtplib", "xmlrpc", "huggingface_hub", "pooch", "wget"}


def test_no_module_imports_what_fetches():
    for path in sorted((ROOT / "iceaggr").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {n.split(".")[0] for n in names} & FETCHERS, path


OFFLINE = """
import socket, sys
from pathlib import Path
def refused(*args, **kwargs): raise AssertionError(f"network: {args}")
class Socket(socket.socket):
    def connect(self, address): return super().connect(address) if self.family == socket.AF_UNIX else refused(address)
    connect_ex = connect
    def sendto(self, *args): refused(*args)
socket.socket, socket.create_connection, socket.getaddrinfo, socket.gethostbyname = Socket, refused, refused, refused
from iceaggr.cli import main
out = Path(sys.argv[1])
data = ["--data", out / "data"]
for verb in (["simulate", "--events", 40, "--out", out / "data", "--workers", 1], ["prepare", *data, "--out", out / "prepared"],
             ["train", *data, "--out", out / "run", "--epochs", 1, "--batch-size", 8, "--workers", 1], ["predict", *data, "--run", out / "run", "--out", out / "p.parquet"],
             ["evaluate", *data, "--predictions", out / "p.parquet", "--out", out / "report"], ["display", *data, "--event", "brightest", "--run", out / "run", "--out", out / "event.html"]):
    assert main([str(a) for a in verb]) == 0, verb
try: socket.create_connection(("127.0.0.1", 9))
except AssertionError: print("offline")
"""


def test_no_verb_needs_a_network(tmp_path):
    run = subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip().endswith("offline"), run.stderr[-2_000:]
    assert "://" not in re.sub(r"https?://(www\.w3\.org|plotly\.com|github\.com)\S*", "", (tmp_path / "report/report.html").read_text())          # the report loads nothing either
