"""Dimmer events made of those of a data set with truth: some of the photo-electrons behind the pulses are taken away, as if less light had been made, the noise that went with them is put back, and the read-out triggers anew.

    python data_scripts/thin_events.py DATA OUT --files 1,2,3 --copies 4 --seed 1

Light adds up: with each photo-electron kept with the same probability, what is left is what a dimmer event of the same direction, place and kind would have shown. The probability of an event is drawn between --least and --most, its logarithm evenly.
Of the events, in the order of the files, every tenth (--held-out) is left out: training keeps these back. OUT has a file for each copy, without the events that no longer trigger; its truth is that of the source, and says
which it was (source_file, source_event) and what share of the light is left (light)."""
import numpy as np
import pandas as pd
from event_files import command_line, read_events, refuse_existing, write_events
from tqdm import tqdm

from iceaggr.geometry import DOMS_PER_STRING, N_STRINGS, load_geometry
from iceaggr.simulation.dataset import make_detector
from iceaggr.simulation.neutrinos import SimulationSettings
from iceaggr.simulation.readout import BEFORE, TRIGGER_TIME, noise_hits, read_out, spe_charge

PARTS, MARGIN = 200, 500.       # events are taken in so many parts; ns: noise begins so long before the earliest pulse that there can be, and ends so long after the last


def thinned(rng, pulses, n, share, detector, settings, covered=None):
    "Pulses of n events, as `read_out` gives them, with a share (n,) of their light, and which of them trigger; pulses: event (0 to n - 1), sensor_id, time, charge; covered (n, 86): strings that they were looked for on, None for all."
    event, sensor, time, charge = (pulses[c].to_numpy(t) for c, t in (("event", np.int64), ("sensor_id", np.int64), ("time", np.float64), ("charge", np.float64)))
    electrons = np.maximum(1, np.rint(charge)).astype(int)
    left = rng.binomial(electrons, share[event])
    begin = np.full(n, TRIGGER_TIME - BEFORE)
    end = begin.copy()
    np.maximum.at(end, event, time)
    dark = noise_hits(rng, detector, begin - MARGIN, end + MARGIN)
    there = share[:, None] * (np.ones((n, N_STRINGS), bool) if covered is None else covered)
    back, some = rng.random(len(dark[0])) < 1 - there[dark[0], dark[1] // DOMS_PER_STRING], left > 0
    dark = [x[back] for x in dark]
    hits = [np.concatenate(x) for x in zip((event[some], sensor[some], time[some]), dark)]
    return read_out(*hits, np.concatenate([(charge * left / electrons)[some], spe_charge(rng, np.ones(len(dark[0])))]), n, detector.neighbours, settings)


class Source:
    "The events to make others of, and what their detector is."
    def __init__(self, args):
        (self.pulses, self.truth), self.geometry = read_events(args.data, args.files), load_geometry(args.data)
        self.detector = make_detector(self.geometry, np.setdiff1d(np.arange(len(self.geometry)), self.pulses.sensor_id.unique()))
        self.events = np.flatnonzero(np.arange(len(self.truth)) % args.held_out != args.held_out - 1)
        self.start = np.searchsorted(self.pulses.event, np.arange(len(self.truth) + 1))
        self.args, self.settings, self.rng = args, SimulationSettings(mix=args.mix), np.random.default_rng(args.seed)

    def take(self, some):
        "Of some events: pulses, truth, and the strings that the pulses are from (None: all)."
        rows = np.concatenate([np.arange(self.start[e], self.start[e + 1]) for e in some])
        return self.pulses.iloc[rows].assign(event=np.repeat(np.arange(len(some)), self.start[some + 1] - self.start[some])), self.truth.iloc[some], None

    def copies(self):
        "The files of the data set to make."
        args, rng = self.args, self.rng
        for copy in range(1, args.copies + 1):
            frames, truths, n = [], [], 0
            for some in tqdm(np.array_split(self.events, min(PARTS, len(self.events))), f"copy {copy} of {args.copies}", leave=False):
                pulses, truth, covered = self.take(some)
                share = np.exp(rng.uniform(np.log(args.least), np.log(args.most), len(some)))
                made, triggered = thinned(rng, pulses, len(some), share, self.detector, self.settings, covered)
                made = pd.DataFrame(dict(zip(("event", "sensor_id", "time", "charge", "auxiliary"), made)))[triggered[made[0]]]
                frames.append(made.assign(event=n + (np.cumsum(triggered) - 1)[made.event], sensor_id=made.sensor_id.astype(np.int16)))
                truths.append(truth[triggered].assign(light=share[triggered]))
                n += int(triggered.sum())
            print(f"copy {copy}: {n:,} of {len(self.events):,} events trigger", flush=True)
            yield copy, pd.concat(frames, ignore_index=True), pd.concat(truths, ignore_index=True).rename(columns={"batch_id": "source_file", "event_id": "source_event"})


def parsed(doc, least, most):
    "The command line."
    parser = command_line(doc)
    parser.add_argument("--copies", type=int, default=4, help="default %(default)s")
    parser.add_argument("--least", type=float, default=least, help=f"share of the light that is left at least; default {least}")
    parser.add_argument("--most", type=float, default=most, help=f"and at most; default {most}")
    args = parser.parse_args()
    refuse_existing(args.out)
    if not 0 < args.least <= args.most <= 1: parser.error("--least and --most are shares, above 0 and at most 1, the first not the larger one")
    if args.held_out < 2 or args.copies < 1: parser.error("--held-out must be at least 2, --copies at least 1")
    return args


if __name__ == "__main__":
    args = parsed(__doc__, 0.25, 0.95)
    source = Source(args)
    write_events(args.out, source.geometry, source.copies())
