"""Pin what the project needs, and what that needs in turn, in constraints.txt: the newest versions within the bounds of settings.ini.

    make constraints          in a fresh environment; run `make test` with it and commit
    ... --here                the versions of the running environment, without a network
"""
import configparser
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# Every dependency, pinned to the version that this project was tested with: first those named in settings.ini, then what they bring along.
# `make install` and CI use this file; settings.ini only states the bounds. Written by `make constraints`.
"""
NOT_PINNED = re.compile(r"(nvidia|cuda|triton|intel|tbb|mkl|pip$|setuptools$|wheel$|iceaggr$)")       # torch pins its own libraries, which differ by machine


def plain(name): return re.sub(r"[-_.]+", "-", name).lower()


def direct(): # names with their bounds, as in settings.ini
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    return (settings["DEFAULT"]["requirements"] + " " + settings["DEFAULT"]["dev_requirements"]).split()


def needed(name, found):
    "Take up an installed package and what it requires here."
    from packaging.requirements import Requirement
    try: package = distribution(name)
    except PackageNotFoundError: return
    if plain(name) in found or NOT_PINNED.match(plain(name)): return
    found[plain(name)] = package.version.split("+")[0]
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}): needed(requirement.name, found)


def write():
    "Pin what is installed in the running environment."
    found, names = {}, [plain(re.split(r"[<>=!~;\[ ]", r)[0]) for r in direct()]
    for name in names: needed(name, found)
    missing = [n for n in names if n not in found]
    if missing: sys.exit(f"not installed: {', '.join(missing)}")
    lines = [f"{n}=={found.pop(n)}" for n in names]
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join(lines) + "\n\n" + "\n".join(f"{n}=={v}" for n, v in sorted(found.items())) + "\n")
    print(f"constraints.txt: {len(lines)} named, {len(found)} brought along")


def main():
    if "--here" in sys.argv: return write()
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/bin/python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        index = ["--no-deps", "--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
        subprocess.run([python, "-m", "pip", "install", "-q", *index, next(r for r in direct() if r.startswith("torch"))], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "packaging", *direct()], check=True)
        subprocess.run([python, __file__, "--here"], check=True)


if __name__ == "__main__": main()
