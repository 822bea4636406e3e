"""An i3 file, from its frames down to the bits of a pulse: i3.svg.

    python nbs/images/make_i3.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Polygon, Rectangle

INK, SOFT, CARD = "#1c2430", "#5b6675", "#e8ecf1"
COLOURS = dict(I="#8A8A8A", G="#CC79A7", C="#CC79A7", D="#CC79A7", Q="#D55E00", P="#0072B2")
WIDTH, HEIGHT, SMALL = 12.0, 0.62, 8.5
FILE = [(letter, 1) for letter in "IGCDQPPQP"]
FRAME = [("[i3]", 1), ("version", 1.1), ("P", 0.7), ("objects: 243", 1.7), ("I3EventHeader", 2.1),
         ("SplitInIcePulses", 2.3), ("...", 0.8), ("checksum", 1.4)]
OBJECT = [("class", 1.2), ("version", 1.2), ("number", 1.2), ("base class", 1.6),
          ("source: InIcePulses", 2.6), ("bits of the DOMs", 2.2), ("bits of the pulses", 2.4)]
STAMP = [("last of its DOM", 2), ("local coincidence", 2.2), ("charge: 6 bits", 3.2),
         ("time since the one before: 8 bits", 4.6)]


def row(ax, y, parts, colour, title, note):
    "Boxes over the full width; left and right edge of each."
    scale, x, edges = WIDTH / sum(w for _, w in parts), 0., {}
    for words, width in parts:
        face = colour(words)
        ink = INK if face == CARD else "white"
        ax.add_patch(Rectangle((x, y), scale * width, HEIGHT, facecolor=face, edgecolor="white", lw=1.2))
        ax.text(x + scale * width / 2, y + HEIGHT / 2, words, ha="center", va="center", color=ink,
                fontsize=SMALL)
        edges[words], x = (x, x + scale * width), x + scale * width
    ax.text(0, y + HEIGHT + 0.14, title, fontsize=9.5, weight="bold", color=INK)
    ax.text(WIDTH, y + HEIGHT + 0.14, note, fontsize=SMALL, color=SOFT, ha="right")
    return edges


def zoom(ax, edge, y, colour):
    "From a part of a row to the whole row below."
    corners = [(edge[0], y), (edge[1], y), (WIDTH, y - 0.5), (0, y - 0.5)]
    ax.add_patch(Polygon(corners, color=colour, alpha=0.13, linewidth=0))


def draw(path):
    figure, ax = plt.subplots(figsize=(9, 4.3))
    step = 1.62
    edges = row(ax, 3 * step, FILE, COLOURS.get, "file.i3.gz: frames",
                "a P frame also shows the objects of the Q, G, C and D before it")
    zoom(ax, edges["P"], 3 * step, COLOURS["P"])
    marked = {"P": COLOURS["P"], "SplitInIcePulses": "#009E73"}
    edges = row(ax, 2 * step, FRAME, lambda w: marked.get(w, CARD), "a frame: objects by key",
                "each with its length, so it can be passed over")
    zoom(ax, edges["SplitInIcePulses"], 2 * step, "#009E73")
    edges = row(ax, step, OBJECT, lambda w: "#009E73" if "bits" in w or "source" in w else CARD,
                "an object: I3RecoPulseSeriesMapMask",
                "Boost's serialization: what the class is, then its values")
    zoom(ax, edges["source: InIcePulses"], step, "#E69F00")
    row(ax, 0, STAMP, lambda w: "#B07900", "what it points to in the end: the stamps of I3SuperDST",
        "16 bits per pulse")
    ax.set(xlim=(-0.1, WIDTH + 0.1), ylim=(-0.1, 3 * step + HEIGHT + 0.5))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("i3.svg"))
