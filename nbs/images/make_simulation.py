"""Draw the pictures that open the notebooks of the simulation: neutrinos, light, readout, simulation.

    python nbs/images/make_simulation.py
"""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from iceaggr.geometry import load_geometry
from iceaggr.simulation import simulate_events
from iceaggr.simulation.light import COS_C, TAN_C
from iceaggr.simulation.neutrinos import KINDS
from iceaggr.style import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, new_axes

FOLDER = Path(__file__).parent


def save(figure, name):
    "Write an SVG that is the same each time."
    plt.rcParams["svg.hashsalt"] = name
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, dpi=150)
    plt.close(figure)


def detector_outline(ax):
    "Side view of the detector: strings, and the cylinder of vertices."
    for x in np.linspace(-500, 500, 9): ax.plot([x, x], [-500, 500], color=GREY, lw=0.4, alpha=0.6)
    ax.set(xlim=(-800, 800), ylim=(-700, 700), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_neutrinos():
    "The five kinds of event."
    figure, axes = new_axes(5, 10, 2.2)
    for ax in axes: detector_outline(ax)
    through, starting, cascade, double, bundle = axes
    through.plot([-780, 720], [300, -250], color=BLUE)
    along = np.array([0.35, 0.52, 0.81])
    through.scatter(-780 + 1500 * along, 300 - 550 * along, s=[40, 15, 25], color=ORANGE, zorder=3)
    starting.plot([-700, -100], [-500, -80], "--", color=GREY, lw=1)
    starting.plot([-100, 780], [-80, 540], color=BLUE)
    starting.scatter(-100, -80, s=130, color=ORANGE, zorder=3)
    cascade.plot([-600, 50], [520, 60], "--", color=GREY, lw=1)
    cascade.scatter(50, 60, s=250, color=ORANGE, zorder=3)
    double.plot([-700, -180], [-350, -60], "--", color=GREY, lw=1)
    double.plot([-180, 220], [-60, 163], color=GREEN)
    double.scatter([-180, 220], [-60, 163], s=[120, 220], color=ORANGE, zorder=3)
    for shift in np.array([-120, -70, -25, 0, 40, 95]):
        bundle.plot([-350 + shift, 250 + shift], [690, -600 + abs(shift)], color=BLUE, lw=1)
    for ax, title in zip(axes, KINDS, strict=True): ax.set_title(title, fontsize=9)
    save(figure, "neutrinos")


def draw_track_light(ax):
    "How light reaches a DOM from a track."
    s, d = 7.0, 4.0
    emission = s - d / TAN_C
    ax.annotate("", (11, 0), (-0.5, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 2})
    ax.annotate("", (s, d), (emission, 0), arrowprops={"arrowstyle": "->", "color": AMBER, "lw": 2})
    ax.plot([s, s], [0, d], ":", color=GREY)
    ax.plot(s, d, "o", color=GREEN, ms=11)
    sin_c = np.sqrt(1 - COS_C**2)
    for side in (1, -1):
        reach = 5.2
        ax.plot([10, 10 - reach * sin_c], [0, side * reach * COS_C * 0.75], color=AMBER, lw=1, alpha=0.6)
    angle = np.linspace(0, np.arccos(COS_C), 20)
    ax.plot(emission + 1.3 * np.cos(angle), 1.3 * np.sin(angle), color=GREY, lw=1)
    ax.text(emission + 1.5, 0.3, r"$\theta_c$")
    ax.text(s + 0.2, d / 2, "$d$")
    ax.text(s, d + 0.6, "DOM", ha="center", color=GREEN)
    ax.annotate("", (s, -0.9), (0, -0.9), arrowprops={"arrowstyle": "<->", "color": GREY})
    ax.text(s / 2, -1.6, "$s$", ha="center")
    ax.plot(0, 0, "o", color=BLUE, ms=5)
    ax.set_title("muon track")


def draw_cascade_light(ax):
    "How light reaches a DOM from a cascade."
    angle = np.linspace(0, 2 * np.pi, 361)
    shape = np.exp(-2.61 * np.hypot(np.cos(angle) - COS_C, 0.12) ** 0.39)
    radius = 4 * shape / shape.max()
    axis = 0.35
    ax.fill(radius * np.cos(angle + axis), radius * np.sin(angle + axis), color=AMBER, alpha=0.35)
    ax.annotate("", (5.5 * np.cos(axis), 5.5 * np.sin(axis)), (0, 0),
                arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2})
    ax.annotate("", (1.7, 4.6), (0, 0), arrowprops={"arrowstyle": "->", "color": AMBER, "lw": 2})
    ax.plot(1.8, 4.9, "o", color=GREEN, ms=11)
    ax.text(2.4, 4.8, "DOM", color=GREEN)
    ax.text(0.4, 2.6, "$r$")
    ax.text(1.0, 1.1, r"$\eta$")
    ax.plot(0, 0, "o", color=ORANGE, ms=10)
    ax.set_title("cascade (shaded: emission by angle)")


def draw_light():
    "Geometry of the two laws of light."
    figure, (left, right) = new_axes(2, 8, 3)
    draw_track_light(left)
    draw_cascade_light(right)
    left.set(xlim=(-1, 11.5), ylim=(-2.2, 5.6))
    right.set(xlim=(-4, 8), ylim=(-2.2, 5.6))
    for ax in (left, right):
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    save(figure, "light")


def draw_launch(ax, dom, start, length, hits, colour):
    "A launch and its hits."
    ax.barh(dom, length, left=start, height=0.5, color=colour, alpha=0.35)
    ax.vlines(hits, dom - 0.25, dom + 0.25, color=colour, lw=1.5)


def draw_readout():
    "Launch, coincidence and window on a time line."
    figure, ax = new_axes(1, 8.5, 2.9)
    ax.axvspan(6.0, 18.4, color=GREY, alpha=0.12)
    draw_launch(ax, 3, 10.0, 6.4, [10.0, 10.3, 11.2], BLUE)
    draw_launch(ax, 2, 10.7, 6.4, [10.7, 11.6, 12.9], BLUE)
    draw_launch(ax, 1, 12.4, 0.075, [12.4], ORANGE)
    draw_launch(ax, 0, 3.2, 0.075, [3.2], GREY)
    ax.annotate("", (10.75, 2.5), (9.95, 2.5), arrowprops={"arrowstyle": "<->", "color": PINK})
    ax.text(9.8, 2.5, "HLC: within 1 µs", ha="right", va="center", color=PINK)
    ax.text(16.5, 3, "launch, 6.4 µs", va="center", color=BLUE)
    ax.text(12.7, 1, "no neighbour: one charge stamp, auxiliary", va="center", color=ORANGE)
    ax.text(3.5, 0, "outside the window: lost", va="center", color=GREY)
    ax.axvline(10, color=GREY, ls=":")
    ax.text(10, 3.75, "trigger: 8 HLC launches in 5 µs", ha="center")
    ax.text(6.1, -0.75, "4 µs before", color=GREY)
    ax.text(18.3, -0.75, "6 µs after the last launch", ha="right", color=GREY)
    ax.set(xlim=(2, 20), ylim=(-1, 4.1), xlabel="time [microseconds]", yticks=range(4),
           yticklabels=["DOM 44", "DOM 17", "DOM 6", "DOM 5"])
    save(figure, "readout")


def draw_event(ax, pulses, row, xyz):
    "DOMs of one event in a side view."
    pulses = pulses[(pulses.event_id == row.event_id) & ~pulses.auxiliary]
    doms = pulses.groupby("sensor_id").agg(time=("time", "min"), charge=("charge", "sum"))
    ax.plot(xyz[:, 0], xyz[:, 2], ".", ms=0.5, color=GREY, alpha=0.5, rasterized=True)
    place = xyz[doms.index]
    ax.scatter(place[:, 0], place[:, 2], s=3 + 6 * np.sqrt(doms.charge), c=doms.time, cmap="plasma",
               vmax=doms.time.quantile(0.95), rasterized=True)
    ax.set(title=f"{row.type}, {row.energy / 1000:.0f} TeV", xlabel="x [m]", aspect="equal",
           xlim=(-650, 650), ylim=(-600, 600))


def draw_simulation():
    "A long track of each kind, and a bright cascade."
    pulses, truth = simulate_events(200, seed=8, energy=(3e3, 3e4))
    figure, axes = new_axes(3, 9, 3.2)
    xyz = load_geometry().xyz
    for ax, kind in zip(axes, ("track_through", "track_starting", "cascade"), strict=True):
        chosen = truth[truth.type == kind]
        hlc = pulses[~pulses.auxiliary & pulses.event_id.isin(chosen.event_id)]
        extent = pd.Series(xyz[hlc.sensor_id, 0]).groupby(hlc.event_id.to_numpy()).std()
        order = chosen.n_signal_pe if kind == "cascade" else extent
        draw_event(ax, pulses, truth.loc[order.sort_values().index[-2]], xyz)
    axes[0].set_ylabel("z [m]")
    save(figure, "simulation")


if __name__ == "__main__":
    plt.style.use("iceaggr.figures")
    draw_neutrinos()
    draw_light()
    draw_readout()
    draw_simulation()
