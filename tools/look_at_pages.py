"""What a reader would see of the pages: tools/check_docs.py opens them in headless Chromium, if there is one.

Light and dark, in windows of 1,400 and 400 px: contrast of all text, pages wider than their window, contents
that are cut off, names broken in the middle, and whatever a page loads from another host."""
import os
import shutil
from pathlib import Path

WIDTHS = (1_400, 400)      # of the window [px]
CONTRAST = 4.5             # of text, at least (WCAG AA)
NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ["--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run"]

ASK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
UNFOLD = "document.querySelectorAll('details').forEach(d => d.open = true)"


def find_chromium(): # -> path or None
    return next((path for path in map(shutil.which, NAMES) if path), None)


def missing(): # -> str
    "What the look at the pages lacks here; empty where nothing is missing."
    try:
        import playwright.sync_api  # noqa: F401
        import pypandoc
        pypandoc.get_pandoc_version()
    except (ImportError, OSError) as error:
        return f"pypandoc_binary and playwright ({error})"
    return "" if find_chromium() else "Chromium (Debian: apt-get install chromium)"


def asked(page, question): # page of playwright, a call of a function of look_at_pages.js
    return page.evaluate(f"() => {{{ASK}\nreturn {question}; }}")


def faults_of(page, path, requests): # page of playwright, file, list that grows with each request -> faults
    "All that is wrong with one page or drawing."
    requests.clear()
    page.set_viewport_size(dict(width=WIDTHS[0], height=900))
    page.goto(path.as_uri())
    page.evaluate(UNFOLD)
    faults = [f"loads {url}" for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        faults += [f"{scheme}: {fault}" for fault in asked(page, f"faintText({CONTRAST})")]
    if path.suffix == ".svg": return faults
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        faults += [f"{width} px: {fault}" for fault in asked(page, "misfits()")]
    return faults


def look_faults(paths, root): # pages and drawings, the folder that holds them -> faults
    "All of them, one after the other in one browser."
    from playwright.sync_api import sync_playwright
    as_root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_chromium(), args=SWITCHES + as_root)
        page, requests = browser.new_page(), []
        page.on("request", lambda request: requests.append(request.url))
        page.route("**/plotly.min.js", lambda route: route.abort())      # figures fill boxes of fixed sizes
        faults = [f"{Path(path).relative_to(root)}: {fault}" for path in paths
                  for fault in faults_of(page, path, requests)]
        browser.close()
    return faults
