"""Cascades moved sideways, made of those of a data set with truth: by vectors of the grid on which the strings stand, so that the light falls onto other strings; some of it is taken away, and the read-out triggers anew.

    python data_scripts/move_cascades.py DATA OUT --files 1,2,3 --copies 6 --seed 5

The ice is layered, and nearly the same sideways: what a cascade shows on its strings it would have shown on those as far away from another place. A hit goes to the DOM of the other string that is at its depth, and its time changes by what unscattered light takes
for the metres by which strings stand off the grid. What a DOM would see of more noise, and all noise of strings without a counterpart, is drawn. Not moved are tracks, whose light is everywhere; no cascade comes near DeepCore, whose strings are off the grid,
farther from the centre than 590 m, or so that a string near to it has no counterpart (for near see NEAR). Places near the edge, of which there are more, are drawn with a quarter of the weight. Otherwise as data_scripts/thin_events.py."""
import numpy as np
import pandas as pd
from event_files import write_events
from thin_events import Source, parsed

from iceaggr.augmentation import grid_axis
from iceaggr.geometry import DOMS_PER_STRING, FIRST_DEEPCORE_STRING, N_STRINGS, SPEED_OF_LIGHT
from iceaggr.simulation.light import GROUP_INDEX

NEAR = ((100, 200.), (400, 280.), (np.inf, 400.))    # photo-electrons of a cascade, up to which its light ends so many metres away
OFF_GRID, LEVEL, FARTHEST, EDGE = 22., 12., 590., 450.    # m: a string from where the vector leads; a DOM above or below; a cascade from the centre, and from where on it is at the edge


def string_grid(xy):
    "Whole numbers (n, 2) of strings that stand on a triangular grid, and its two vectors (2, 2) [m]."
    spacing, axis = grid_axis(xy)
    vectors, corner = spacing * np.array([[np.cos(axis + a), np.sin(axis + a)] for a in (0, np.pi / 3)]), xy[len(xy) // 2]
    for _ in range(20):
        numbers = np.rint((xy - corner) @ np.linalg.inv(vectors))
        vectors, corner = np.split(np.linalg.lstsq(np.c_[numbers, np.ones(len(xy))], xy, rcond=None)[0], [2])
    return numbers.astype(int), vectors


class MovedSource(Source):
    "The same with the cascades moved, and without what cannot be."
    def __init__(self, args):
        super().__init__(args)
        xy = self.geometry.string_xy[:FIRST_DEEPCORE_STRING]
        numbers, vectors = string_grid(xy)
        at, far = {tuple(n): k for k, n in enumerate(numbers)}, np.ptp(numbers, axis=0).max()
        moves = []
        for step in ((i, j) for i in range(-far, far + 1) for j in range(-far, far + 1) if (i, j) != (0, 0)):
            vector, origin = step @ vectors, np.array([at.get(tuple(n - step), -1) for n in numbers])
            origin[np.linalg.norm(xy - xy[origin] - vector, axis=1) > OFF_GRID] = -1
            if (origin >= 0).any(): moves.append((vector, origin))
        self.vectors, self.origins = map(np.stack, zip(*moves))     # (M, 2) [m]; (M, 78) for each string the one whose light it gets, or -1
        t = self.truth
        self.vertex = t[["vertex_x", "vertex_y", "vertex_z"]].to_numpy(float)
        self.places = {e: self.places_of(e) for e in self.events if t.type[e] == "cascade"}
        self.events = np.array([e for e, (moves, _) in self.places.items() if len(moves)], int)

    def places_of(self, e):
        "Where a cascade can go: numbers of the moves, and their probabilities."
        xy, near = self.geometry.string_xy, next(r for most, r in NEAR if self.truth.n_signal_pe[e] <= most)
        place = self.vertex[e, :2] + self.vectors
        distance = np.linalg.norm(xy - place[:, None], axis=2)
        on_grid, core = np.split(distance, [FIRST_DEEPCORE_STRING], axis=1)
        complete = ((on_grid > near) | (self.origins >= 0)).all(1)
        radius = np.linalg.norm(place, axis=1)
        moves = np.flatnonzero(complete & (core.min(1) > 0.8 * near) & (on_grid.min(1) < 120) & (radius < FARTHEST))
        weight = np.where(radius[moves] > EDGE, 0.25, 1.)
        return moves, weight / weight.sum()

    def moved(self, e, move):
        "The pulses of a cascade on their new sensors, which strings they are from, the new vertex."
        vector, origin, z = self.vectors[move], self.origins[move], self.geometry.xyz[:, 2].reshape(N_STRINGS, DOMS_PER_STRING)
        pulses, vertex = self.pulses[self.start[e]:self.start[e + 1]], self.vertex[e] + [*vector, 0]
        goes_to = np.full(N_STRINGS, -1)
        goes_to[origin[origin >= 0]] = np.flatnonzero(origin >= 0)
        old = pulses.sensor_id.to_numpy(np.int64)
        string = goes_to[old // DOMS_PER_STRING]
        height = np.abs(z[string] - self.geometry.xyz[old, 2, None])
        new = string * DOMS_PER_STRING + height.argmin(1)
        keep = (string >= 0) & (height.min(1) < LEVEL) & np.isin(new, self.detector.alive)
        length = lambda sensors, source: np.linalg.norm(self.geometry.xyz[sensors] - source, axis=1)
        later = GROUP_INDEX / SPEED_OF_LIGHT * (length(new, vertex) - length(old, self.vertex[e]))
        return pulses.assign(sensor_id=new, time=pulses.time + later)[keep], np.isin(np.arange(N_STRINGS), goes_to[goes_to >= 0]), vertex

    def take(self, some):
        made = [self.moved(e, self.rng.choice(moves, p=p)) for e, (moves, p) in ((e, self.places[e]) for e in some)]
        pulses = pd.concat([p.assign(event=k) for k, (p, _, _) in enumerate(made)])
        vertex = np.stack([v for _, _, v in made])
        return pulses, self.truth.iloc[some].assign(vertex_x=vertex[:, 0], vertex_y=vertex[:, 1]), np.stack([c for _, c, _ in made])


if __name__ == "__main__":
    args = parsed(__doc__, 0.6, 1.0)
    source = MovedSource(args)
    if not len(source.events): raise SystemExit(f"{args.data}: no cascade of the files {args.files} can be moved: name files with more events")
    write_events(args.out, source.geometry, source.copies())
