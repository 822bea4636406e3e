"""Diagrams of two tutorials: your_events.svg (formats), kaggle_files.svg (what each file is for).

    python nbs/images/make_tutorials.py"""
from pathlib import Path

INK, SOFT, LINE, CARD = "#1c2430", "#5b6675", "#9aa4b2", "#f4f6f9"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
FONT = "font-family='Helvetica, Arial, sans-serif' text-anchor='middle'"
ARROW_HEAD = ("<defs><marker id='head' markerWidth='8' markerHeight='8' refX='6' refY='3' orient='auto'>"
              f"<path d='M0,0 L7,3 L0,6 z' fill='{INK}'/></marker></defs>")


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


def arrow(x1, y1, x2, y2):
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{INK}' marker-end='url(#head)'/>"


def picture(width, height, label, *parts):
    page = f"<rect width='{width}' height='{height}' fill='#ffffff'/>"
    size = f"xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'"
    head = f"<svg {size} role='img' aria-label='{label}'>"
    return "\n".join([head, ARROW_HEAD, page, *parts, "</svg>", ""])


def your_events():
    return picture(
        900, 200, "Three formats of events lead to predictions",
        box(10, 15, 200, 50, "i3 files", "icetray exports pulses"),
        box(10, 135, 200, 50, "GraphNeT files", "SQLite or Parquet"),
        box(350, 15, 230, 50, "frame of pulses", "event, sensor, time, charge", BLUE),
        box(350, 135, 230, 50, "data set", "folder in the Kaggle layout", BLUE),
        box(700, 75, 190, 50, "predictions", "azimuth, zenith, kappa, r68", GREEN),
        arrow(210, 40, 343, 40), arrow(210, 160, 343, 160),
        text(277, 152, "convert_graphnet", SOFT, 11),
        arrow(580, 40, 693, 90), arrow(580, 160, 693, 110),
        text(655, 52, "model.predict", SOFT, 11), text(655, 156, "iceaggr predict", SOFT, 11),
    )


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
    for draw in (your_events, kaggle_files):
        path = Path(__file__).parent / f"{draw.__name__}.svg"
        path.write_text(draw(), encoding="utf-8")
