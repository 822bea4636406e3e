"""Diagram of a tutorial: kaggle_files.svg (what each file is for).

    python nbs/images/make_tutorials.py"""
from pathlib import Path

INK, SOFT, LINE, CARD = "#1c2430", "#5b6675", "#9aa4b2", "#f4f6f9"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
FONT = "font-family='Helvetica, Arial, sans-serif' text-anchor='middle'"


def text(x, y, words, fill=INK, size=13, weight="normal"):
    style = f"fill='{fill}' font-size='{size}' font-weight='{weight}' {FONT}"
    return f"<text x='{x}' y='{y}' {style}>{words}</text>"


def box(x, y, width, height, title, note, colour=LINE, fill=CARD):
    "A rectangle with a title and a line below it."
    middle = x + width / 2
    frame = f"x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{fill}' stroke='{colour}'"
    return (f"<rect {frame}/>"
            + text(middle, y + height / 2 - 3, title, weight="bold")
            + text(middle, y + height / 2 + 15, note, SOFT, 11))


def picture(width, height, label, *parts):
    page = f"<rect width='{width}' height='{height}' fill='#ffffff'/>"
    size = f"xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'"
    head = f"<svg {size} role='img' aria-label='{label}'>"
    return "\n".join([head, page, *parts, "</svg>", ""])


def kaggle_files():
    return picture(
        900, 110, "What each of the 660 files is for",
        box(10, 15, 560, 55, "files 1 to 655: training", "10 % of their events are held out", BLUE),
        box(580, 15, 160, 55, "656 to 659: test", "the results to report", GREEN),
        box(750, 15, 140, 55, "660: validation", "after every epoch", ORANGE),
        text(290, 95, "held-out events choose the epoch and calibrate kappa", SOFT, 12),
        text(735, 95, "neither chooses anything", SOFT, 12),
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("kaggle_files.svg")
    path.write_text(kaggle_files(), encoding="utf-8")
