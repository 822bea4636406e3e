"""Move the cascades of a data set with truth sideways, so that their light falls onto other strings.

    python data_scripts/move_cascades.py DATA OUT --files 1,2,3 --copies 6 --seed 5

The ice is layered, and nearly the same sideways: what a cascade shows on its strings it would have shown
on those as far away from another place. The move is a vector of the triangular grid on which the strings
stand. A hit goes to the DOM of the other string at its depth. Its time changes by what unscattered light
takes for the metres by which strings stand off the grid. Some of the light is removed, and the read-out
triggers anew, as in data_scripts/thin_events.py. Noise of strings without a counterpart is drawn.

Tracks are not moved, since their light is everywhere. No cascade is moved near DeepCore, whose strings
are off the grid, nor farther from the centre than 590 m, nor to where a near string has no counterpart
(see NEAR). Places near the edge, of which there are more, have a quarter of the weight.
"""
import numpy as np
import pandas as pd
from event_files import write_events
from thin_events import Source, parsed

from iceaggr.augmentation import grid_axis
from iceaggr.geometry import DOMS_PER_STRING, FIRST_DEEPCORE_STRING, N_STRINGS, SPEED_OF_LIGHT
from iceaggr.simulation.light import GROUP_INDEX

NEAR = ((100, 200.), (400, 280.), (np.inf, 400.))  # up to so many photo-electrons light reaches so far [m]
OFF_GRID = 22.    # m: a string from where the vector leads
LEVEL = 12.       # m: a DOM above or below the one that it stands for
FARTHEST = 590.   # m: a cascade from the centre
EDGE = 450.       # m: from where on a cascade is at the edge


def string_grid(xy):
    "Whole numbers (n, 2) of strings that stand on a triangular grid, and its two vectors (2, 2) [m]."
    spacing, axis = grid_axis(xy)
    vectors = spacing * np.array([[np.cos(axis + a), np.sin(axis + a)] for a in (0, np.pi / 3)])
    corner = xy[len(xy) // 2]
    for _ in range(20):
        numbers = np.rint((xy - corner) @ np.linalg.inv(vectors))
        design = np.c_[numbers, np.ones(len(xy))]
        vectors, corner = np.split(np.linalg.lstsq(design, xy, rcond=None)[0], [2])
    return numbers.astype(int), vectors


def grid_moves(xy):
    "Vectors (M, 2) [m], and (M, 78) for each string the one whose light it gets, or -1."
    numbers, grid = string_grid(xy)
    string_at = {tuple(n): k for k, n in enumerate(numbers)}
    far = np.ptp(numbers, axis=0).max()
    vectors, origins = [], []
    for step in np.ndindex(2 * far + 1, 2 * far + 1):
        step = np.array(step) - far
        if not step.any(): continue
        vector = step @ grid
        origin = np.array([string_at.get(tuple(n - step), -1) for n in numbers])
        origin[np.linalg.norm(xy - xy[origin] - vector, axis=1) > OFF_GRID] = -1
        if (origin >= 0).any():
            vectors.append(vector)
            origins.append(origin)
    return np.stack(vectors), np.stack(origins)


class MovedSource(Source):
    "The cascades of a source that can be moved."
    def __init__(self, args):
        super().__init__(args)
        self.vectors, self.origins = grid_moves(self.geometry.string_xy[:FIRST_DEEPCORE_STRING])
        self.vertex = self.truth[["vertex_x", "vertex_y", "vertex_z"]].to_numpy(float)
        cascades = [e for e in self.events if self.truth.type[e] == "cascade"]
        self.places = {e: self.places_of(e) for e in cascades}
        self.events = np.array([e for e, (moves, _) in self.places.items() if len(moves)], int)

    def places_of(self, e):
        "Numbers of the moves that a cascade can make, and their probabilities."
        near = next(r for most, r in NEAR if self.truth.n_signal_pe[e] <= most)
        place = self.vertex[e, :2] + self.vectors
        distance = np.linalg.norm(self.geometry.string_xy - place[:, None], axis=2)
        on_grid, core = np.split(distance, [FIRST_DEEPCORE_STRING], axis=1)
        complete = ((on_grid > near) | (self.origins >= 0)).all(1)
        inside = np.linalg.norm(place, axis=1)
        possible = complete & (core.min(1) > 0.8 * near) & (on_grid.min(1) < 120) & (inside < FARTHEST)
        moves = np.flatnonzero(possible)
        weight = np.where(inside[moves] > EDGE, 0.25, 1.)
        return moves, weight / weight.sum()

    def new_sensors(self, old, origin):
        "New sensor of each pulse, and whether there is one; strings (86,) that get light."
        xyz = self.geometry.xyz
        z = xyz[:, 2].reshape(N_STRINGS, DOMS_PER_STRING)
        goes_to = np.full(N_STRINGS, -1)
        goes_to[origin[origin >= 0]] = np.flatnonzero(origin >= 0)
        string = goes_to[old // DOMS_PER_STRING]
        height = np.abs(z[string] - xyz[old, 2, None])
        new = string * DOMS_PER_STRING + height.argmin(1)
        keep = (string >= 0) & (height.min(1) < LEVEL) & np.isin(new, self.detector.alive)
        return new, keep, np.isin(np.arange(N_STRINGS), goes_to[goes_to >= 0])

    def moved(self, e, move):
        "Pulses of a cascade on their new sensors, the strings they are from, the new vertex."
        pulses = self.pulses[self.start[e]:self.start[e + 1]]
        vertex = self.vertex[e] + [*self.vectors[move], 0]
        old = pulses.sensor_id.to_numpy(np.int64)
        new, keep, covered = self.new_sensors(old, self.origins[move])
        xyz = self.geometry.xyz
        before = np.linalg.norm(xyz[old] - self.vertex[e], axis=1)
        after = np.linalg.norm(xyz[new] - vertex, axis=1)
        later = GROUP_INDEX / SPEED_OF_LIGHT * (after - before)
        return pulses.assign(sensor_id=new, time=pulses.time + later)[keep], covered, vertex

    def take(self, events):
        "Moved pulses, truth with the new vertices, and the strings that the pulses are from."
        made = []
        for e in events:
            moves, probability = self.places[e]
            made.append(self.moved(e, self.rng.choice(moves, p=probability)))
        pulses = pd.concat([p.assign(event=k) for k, (p, _, _) in enumerate(made)])
        vertex = np.stack([v for _, _, v in made])
        truth = self.truth.iloc[events].assign(vertex_x=vertex[:, 0], vertex_y=vertex[:, 1])
        return pulses, truth, np.stack([covered for _, covered, _ in made])


if __name__ == "__main__":
    args = parsed(__doc__, 0.6, 1.0)
    source = MovedSource(args)
    if not len(source.events):
        raise SystemExit(f"{args.data}: no cascade of the files {args.files} can be moved: "
                         "name files with more events")
    write_events(args.out, source.geometry, source.copies())
