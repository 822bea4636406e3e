"""Diagrams of the model's parts: attention, pooling, the CPU's layout, T1 and T2.

    python nbs/images/make_model_part.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

BLUE, ORANGE, GREEN, PINK, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SEGMENTS = [BLUE, ORANGE, GREEN, PINK, AMBER, SKY]
INK, SOFT, CARD, SAND = "#1c2430", "#5b6675", "#e8ecf1", "#F6E3BF"


def cell(ax, x, y, width, height, colour, edge="white"):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8))


def box(ax, x, y, width, words, colour=CARD, ink=INK):
    options = dict(boxstyle="round,pad=0.04", facecolor=colour, edgecolor=SOFT)
    ax.add_patch(FancyBboxPatch((x, y - 0.35), width, 0.7, **options))
    ax.text(x + width / 2, y, words, ha="center", va="center", fontsize=9, color=ink)


def arrow(ax, start, stop, **options):
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=SOFT, **options))


def note(ax, x, y, words, colour=SOFT, **options):
    ax.text(x, y, words, ha=options.pop("ha", "center"), va="center", fontsize=9, color=colour, **options)


def canvas(width, height):
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax


def attention():
    "The mask of twelve tokens, and blocks of a long sequence."
    figure, ax = canvas(8, 3.3)
    size, start = 0.18, 0
    for n, colour in zip([4, 1, 2, 5], SEGMENTS, strict=False):
        cell(ax, 0.4 + start * size, 2.6 - (start + n) * size, n * size, n * size, colour)
        start += n
    cell(ax, 0.4 + 12 * size, 2.6 - 15 * size + 0.0, 3 * size, 3 * size, "#b9c0c9")
    ax.add_patch(Rectangle((0.4, 2.6 - 15 * size), 15 * size, 15 * size, fill=False, edgecolor=SOFT))
    note(ax, 1.75, 2.9, "12 tokens in 4 segments, 3 of padding")
    block = 0.675
    for i in range(4):
        for j in range(4):
            touched = abs(i - j) <= (1 if min(i, j) < 1 else 0)
            cell(ax, 4.6 + j * block, 2.6 - (i + 1) * block, block, block, SAND if touched else "white", SOFT)
    start = 0
    for n, colour in zip([1.3, 0.35, 0.3, 0.55, 0.2], SEGMENTS, strict=False):
        cell(ax, 4.6 + start, 2.6 - start - n, n, n, colour)
        start += n
    note(ax, 5.95, 2.9, "512 tokens: only the blocks in sand are computed")
    return figure


def pooling():
    "Tokens of three segments to three embeddings."
    figure, ax = canvas(8, 2)
    lengths, x = [3, 1, 4], 0.3
    for number, (n, colour) in enumerate(zip(lengths, SEGMENTS, strict=False)):
        for k in range(n): cell(ax, x + 0.45 * k, 0.9, 0.4, 0.7, colour)
        middle = 5.2 + 0.8 * number
        cell(ax, middle, 0.9, 0.4, 0.7, colour)
        x += 0.45 * n + 0.25
    arrow(ax, (4.45, 1.25), (5.05, 1.25))
    note(ax, 2.2, 0.5, "tokens (T, C) and their segments (T,)")
    note(ax, 6.2, 0.5, "embeddings (N, C)")
    return figure


def cpu_attention():
    "Segments as given, sorted, and grouped to dense arrays."
    figure, ax = canvas(9, 2.6)
    lengths, x = [2, 1, 3, 1, 2, 1, 3], 0.2
    for n, colour in zip(lengths, SEGMENTS + [SOFT], strict=True):
        for k in range(n): cell(ax, x + 0.2 * k, 1.2, 0.2, 0.4, colour)
        x += 0.2 * n
    arrow(ax, (2.95, 1.4), (3.5, 1.4))
    x = 3.6
    order = sorted(range(7), key=lambda i: lengths[i])
    for i in order:
        for k in range(lengths[i]): cell(ax, x + 0.2 * k, 1.2, 0.2, 0.4, (SEGMENTS + [SOFT])[i])
        x += 0.2 * lengths[i]
    arrow(ax, (6.35, 1.4), (6.9, 1.4))
    x = 7.0
    for length in (1, 2, 3):
        rows = [i for i in order if lengths[i] == length]
        for r, i in enumerate(rows):
            for k in range(length): cell(ax, x + 0.2 * k, 1.6 - 0.4 * r, 0.2, 0.4, (SEGMENTS + [SOFT])[i])
        x += 0.2 * length + 0.25
    for place, words in ((1.5, "as given"), (4.9, "sorted by length"), (7.9, "groups: (count, length, C)")):
        note(ax, place, 0.5, words)
    return figure


def dom_transformer():
    "From the pulses of a DOM to its embedding."
    figure, ax = canvas(10, 2.2)
    for k in range(4): cell(ax, 0.3, 0.75 + 0.25 * k, 0.9, 0.22, BLUE)
    note(ax, 0.75, 0.4, "pulses (P, 4)")
    arrow(ax, (1.3, 1.25), (1.8, 1.25))
    box(ax, 1.9, 1.25, 1.7, "Fourier features\nof time, charge")
    arrow(ax, (3.7, 1.25), (4.2, 1.25))
    box(ax, 4.3, 1.25, 1.7, "blocks: attention\ninside the DOM", BLUE, "white")
    arrow(ax, (6.1, 1.25), (6.6, 1.25))
    box(ax, 6.7, 1.25, 1.2, "pooling")
    arrow(ax, (8.0, 1.25), (8.5, 1.25))
    cell(ax, 8.6, 1.1, 1.1, 0.3, BLUE)
    note(ax, 9.15, 0.75, "embedding (D, C)")
    arrow(ax, (3.9, 1.35), (6.4, 1.35), connectionstyle="arc3,rad=-0.45")
    note(ax, 5.15, 2.08, "a single pulse bypasses the blocks")
    return figure


def event_transformer():
    "From DOM embeddings to a direction."
    figure, ax = canvas(10, 2.4)
    box(ax, 0.2, 1.75, 2.1, "DOM embeddings (D, C)", BLUE, "white")
    box(ax, 0.2, 0.75, 2.1, "place, ice, first time,\ncharge, vertex")
    arrow(ax, (2.4, 1.75), (3.0, 1.35))
    arrow(ax, (2.4, 0.75), (3.0, 1.15))
    box(ax, 3.1, 1.25, 0.9, "tokens")
    arrow(ax, (4.1, 1.25), (4.6, 1.25))
    box(ax, 4.7, 1.25, 1.8, "blocks: attention\ninside the event", ORANGE, "white")
    arrow(ax, (6.6, 1.25), (7.0, 1.25))
    box(ax, 7.1, 1.25, 1.0, "pooling,\nhead")
    arrow(ax, (8.2, 1.25), (8.6, 1.25))
    arrow(ax, (8.7, 0.9), (9.6, 1.75))
    note(ax, 9.1, 0.5, "direction (B, 3),\nlength = kappa")
    return figure


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    for draw in (attention, pooling, cpu_attention, dom_transformer, event_transformer):
        path = Path(__file__).with_name(f"{draw.__name__}.svg")
        draw().savefig(path, bbox_inches="tight", metadata={"Date": None})
