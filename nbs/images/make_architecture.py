"""The architecture as a picture, for README, tour and site: architecture.svg and architecture_dark.svg.

    python nbs/images/make_architecture.py"""
from pathlib import Path

LIGHT = dict(ink="#1c2430", soft="#5b6675", line="#9aa4b2", card="#f4f6f9", page="#ffffff")
DARK = dict(ink="#e8ecf1", soft="#a9b4c2", line="#6b7686", card="#232a33", page="#14181d")
BLUE, ORANGE, GREEN, PINK, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
DOMS = [BLUE, ORANGE, GREEN, PINK, AMBER, SKY]      # one colour per DOM
FONT = "font-family='Helvetica, Arial, sans-serif'"
WIDTH, HEIGHT, TOP = 1000, 372, 74                  # of the picture; where the drawings begin
COLUMNS = [14, 212, 410, 608, 806]                  # left edge of each step
STEP = 180                                          # its width


def text(x, y, words, fill, size=13, anchor="middle", weight="normal"):
    return (f"<text x='{x}' y='{y}' fill='{fill}' font-size='{size}' text-anchor='{anchor}' "
            f"font-weight='{weight}' {FONT}>{words}</text>")


def rectangle(x, y, width, height, fill, stroke="none", radius=2):
    return (f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' "
            f"rx='{radius}' fill='{fill}' stroke='{stroke}'/>")


def circle(x, y, radius, fill, stroke="none"):
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:.1f}' fill='{fill}' stroke='{stroke}'/>"


def line(x1, y1, x2, y2, stroke, width=1.5, arrow=False):
    head = " marker-end='url(#head)'" if arrow else ""
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{stroke}' stroke-width='{width}'{head}/>"


# (string, DOM) of the hits
HITS = {(1, 1): ORANGE, (2, 2): BLUE, (2, 3): GREEN, (3, 3): PINK, (4, 4): AMBER, (3, 4): SKY}


def place(x, string, dom):
    "Where a DOM is drawn."
    return x + 30 + 24 * string, TOP + 16 + 24 * dom


def event(x, c):
    "Strings of DOMs; those that were hit are coloured."
    parts = []
    for string in range(6):
        sx, _ = place(x, string, 0)
        parts.append(line(sx, TOP + 8, sx, TOP + 142, c["line"], 1))
        for dom in range(6):
            colour = HITS.get((string, dom))
            parts.append(circle(*place(x, string, dom), 7 if colour else 2.5, colour or c["line"]))
    parts.append(line(x + 22, TOP + 22, x + 158, TOP + 144, c["ink"], 1.5, arrow=True))
    return parts


def packing(x, c):
    "Three sequences, filled with DOMs; the rest is padding."
    rows = [[(5, BLUE), (3, ORANGE)],
            [(4, GREEN), (2, PINK), (1, AMBER), (1, SKY)],
            [(3, BLUE), (2, GREEN), (1, ORANGE)]]
    parts, cell = [], 19
    for row, doms in enumerate(rows):
        y, left = TOP + 22 + 42 * row, x + 14
        parts.append(rectangle(left, y, 8 * cell, 22, c["page"], c["line"]))
        for n, colour in doms:
            parts.append(rectangle(left + 1, y + 1, n * cell - 2, 20, colour))
            left += n * cell
    return parts


def block_mask(x, c):
    "The mask of one sequence: pulses attend inside their DOM."
    parts, size, start = [rectangle(x + 22, TOP + 8, 136, 136, c["page"], c["line"])], 17, 0
    for n, colour in [(4, GREEN), (2, PINK), (1, AMBER), (1, SKY)]:
        a, b = x + 22 + start * size, TOP + 8 + start * size
        parts.append(rectangle(a + 1, b + 1, n * size - 2, n * size - 2, colour))
        start += n
    return parts


def accumulator(x, c):
    "Three events wait for their DOMs; two of them are complete."
    parts = []
    for row, (colours, expected) in enumerate([(DOMS[:6], 6), (DOMS[1:5], 4), (DOMS[2:4], 5)]):
        y = TOP + 22 + 42 * row
        for k in range(expected):
            filled = k < len(colours)
            parts.append(rectangle(x + 16 + 21 * k, y, 17, 22, colours[k] if filled else c["page"],
                                   "none" if filled else c["line"]))
        if expected == len(colours):
            parts.append(text(x + 158, y + 16, "✓", c["ink"], 15, weight="bold"))
    return parts


def attention(x, c):
    "DOMs at their places attend to each other; the direction points to where the neutrino came from."
    places = [place(x, *where) for where in HITS]
    parts = [line(*a, *b, c["soft"], 0.8) for i, a in enumerate(places) for b in places[:i]]
    parts += [circle(px, py, 7, colour) for (px, py), colour in zip(places, HITS.values(), strict=True)]
    return parts + [line(x + 150, TOP + 104, x + 46, TOP + 6, c["ink"], 3, arrow=True)]


STEPS = [
    ("Event", event, "pulses (P, 4)", "time, charge,", "sensor, auxiliary"),
    ("Packing", packing, "sequences (S, L, 4)", "DOMs side by side,", "next to no padding"),
    ("T1", block_mask, "DOM embeddings (D, C)", "attention inside", "each DOM"),
    ("Accumulator", accumulator, "complete events", "DOMs of one event from", "any number of batches"),
    ("T2", attention, "direction (B, 3), kappa (B,)", "attention over the DOMs,", "with the geometry"),
]
LEGEND = ("P pulses · S sequences of L = 512 pulses · D (event, DOM) pairs · C channels · B events.  "
          "One colour per DOM.")


def draw(colours):
    "The whole picture as SVG."
    c = colours
    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
             "aria-label='From pulses to a direction: packing, T1, accumulator, T2'>",
             f"<defs><marker id='head' markerWidth='8' markerHeight='8' refX='6' refY='3' orient='auto'>"
             f"<path d='M0,0 L7,3 L0,6 z' fill='{c['ink']}'/></marker></defs>",
             rectangle(0, 0, WIDTH, HEIGHT, c["page"], radius=0)]
    for x, (name, drawing, shape, *words) in zip(COLUMNS, STEPS, strict=True):
        middle = x + STEP / 2
        parts.append(rectangle(x, 18, STEP, 300, c["card"], c["line"], 8))
        parts.append(text(middle, 50, name, c["ink"], 18, weight="bold"))
        parts += drawing(x, c)
        parts += [text(middle, 252, shape, c["ink"], 13, weight="bold")]
        parts += [text(middle, 276 + 18 * i, w, c["soft"], 13) for i, w in enumerate(words)]
    parts += [line(x + STEP + 2, 168, x + STEP + 15, 168, c["ink"], 1.8, arrow=True) for x in COLUMNS[:-1]]
    return "\n".join([*parts, text(WIDTH / 2, 350, LEGEND, c["soft"], 13), "</svg>"]) + "\n"


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "architecture.svg").write_text(draw(LIGHT), encoding="utf-8")
    (folder / "architecture_dark.svg").write_text(draw(DARK), encoding="utf-8")
