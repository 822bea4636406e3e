"""Pin what the project needs, and what that needs in turn, in constraints.txt.

The newest versions within the bounds of settings.ini are taken.

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
HEAD = """# Every dependency, pinned to the version that this project was tested with.
# First those named in settings.ini, then those that they require. Written by `make constraints`.
# `make install` and CI use this file; settings.ini only states the bounds.
"""

# Torch pins its own libraries, which differ from machine to machine.
NOT_PINNED = re.compile(r"(nvidia|cuda|triton|intel|tbb|mkl|pip$|setuptools$|wheel$|iceaggr$)")


def plain(name):
    "The name as package registries compare it."
    return re.sub(r"[-_.]+", "-", name).lower()


def direct():
    "Names with their bounds, as in settings.ini."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    parts = ("requirements", "display_requirements", "sky_requirements", "dev_requirements")
    return " ".join(settings["DEFAULT"][part] for part in parts).split()


def needed(name, found):
    "Take up an installed package and what it requires here."
    from packaging.requirements import Requirement
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    if plain(name) in found or NOT_PINNED.match(plain(name)): return
    found[plain(name)] = package.version.split("+")[0]
    for text in package.requires or ():
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies: needed(requirement.name, found)


def write():
    "Pin what is installed in the running environment."
    found = {}
    names = [plain(re.split(r"[<>=!~;\[ ]", r)[0]) for r in direct()]
    for name in names: needed(name, found)
    missing = [n for n in names if n not in found]
    if missing: sys.exit(f"not installed: {', '.join(missing)}")
    lines = [f"{n}=={found.pop(n)}" for n in names]
    indirect = [f"{n}=={v}" for n, v in sorted(found.items())]
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join([*lines, "", *indirect, ""]), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} direct, {len(indirect)} indirect requirements")


def main():
    if "--here" in sys.argv: return write()
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/bin/python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        index = os.environ.get("TORCH_INDEX")
        options = ["--no-deps", "--index-url", index] if index else []
        torch = next(r for r in direct() if r.startswith("torch"))
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, *options, torch], check=True)
        subprocess.run([*install, "packaging", *direct()], check=True)
        subprocess.run([python, __file__, "--here"], check=True)


if __name__ == "__main__":
    main()
