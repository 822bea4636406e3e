"""Make dimmer events of those of a data set with truth.

    python data_scripts/thin_events.py DATA OUT --files 1,2,3 --copies 4 --seed 1

Light adds up. If each photo-electron is kept with the same probability, what is left is what a dimmer
event of the same direction, place and kind would have shown. So some of the photo-electrons behind the
pulses are removed, the noise that went with them is put back, and the read-out triggers anew. The share
that is kept is drawn per event between --least and --most, evenly in its logarithm.

Every tenth event (--held-out), in the order of the files, is left out: training holds these out. OUT has
one file per copy, without the events that no longer trigger. Its truth is that of the source, with the
columns source_file, source_event and light (the share that is left).
"""
import numpy as np
import pandas as pd
from event_files import command_line, read_events, refuse_existing, write_events

from iceaggr.common import progress_bar
from iceaggr.geometry import DOMS_PER_STRING, N_STRINGS, load_geometry
from iceaggr.simulation.dataset import make_detector
from iceaggr.simulation.neutrinos import SimulationSettings
from iceaggr.simulation.readout import BEFORE, TRIGGER_TIME, noise_hits, read_out, spe_charge

PARTS = 200     # events are taken in so many parts
MARGIN = 500.   # ns: noise begins so long before the earliest possible pulse, and ends so long after the last


def lost_noise(rng, n, event, time, share, detector, covered):
    "Noise (event, sensor, time) that thinning removes together with light, drawn anew."
    begin = np.full(n, TRIGGER_TIME - BEFORE)
    end = begin.copy()
    np.maximum.at(end, event, time)
    dark = noise_hits(rng, detector, begin - MARGIN, end + MARGIN)
    kept = share[:, None] * (np.ones((n, N_STRINGS), bool) if covered is None else covered)
    lost = rng.random(len(dark[0])) < 1 - kept[dark[0], dark[1] // DOMS_PER_STRING]
    return [x[lost] for x in dark]


def thinned(rng, pulses, n, share, detector, settings, covered=None):
    """Read n events out again with a share (n,) of their light; results as of `read_out`.

    pulses: event (0 to n - 1), sensor_id, time, charge. covered (n, 86): strings that the pulses come from.
    """
    event, sensor = (pulses[c].to_numpy(np.int64) for c in ("event", "sensor_id"))
    time, charge = (pulses[c].to_numpy(np.float64) for c in ("time", "charge"))
    electrons = np.maximum(1, np.rint(charge)).astype(int)
    left = rng.binomial(electrons, share[event])
    dark = lost_noise(rng, n, event, time, share, detector, covered)
    some = left > 0
    hits = [np.concatenate(x) for x in zip((event[some], sensor[some], time[some]), dark, strict=True)]
    dark_charge = spe_charge(rng, np.ones(len(dark[0])))
    charge = np.concatenate([(charge * left / electrons)[some], dark_charge])
    return read_out(*hits, charge, n, detector.neighbours, settings)


class Source:
    "The events to make others of, and their detector."
    def __init__(self, args):
        self.args = args
        self.pulses, self.truth = read_events(args.data, args.files)
        self.geometry = load_geometry(args.data)
        dead = np.setdiff1d(np.arange(len(self.geometry)), self.pulses.sensor_id.unique())
        self.detector = make_detector(self.geometry, dead)
        number = np.arange(len(self.truth))
        self.events = np.flatnonzero(number % args.held_out != args.held_out - 1)
        self.start = np.searchsorted(self.pulses.event, np.arange(len(self.truth) + 1))
        self.settings = SimulationSettings(mix=args.mix)
        self.rng = np.random.default_rng(args.seed)

    def take(self, events):
        "Pulses (event: 0, 1, ...), truth, and the strings that the pulses are from (None: all)."
        rows = np.concatenate([np.arange(self.start[e], self.start[e + 1]) for e in events])
        count = self.start[events + 1] - self.start[events]
        pulses = self.pulses.iloc[rows].assign(event=np.repeat(np.arange(len(events)), count))
        return pulses, self.truth.iloc[events], None

    def dimmed(self, events):
        "Pulses and truth of the events that still trigger with less light."
        pulses, truth, covered = self.take(events)
        least, most = np.log(self.args.least), np.log(self.args.most)
        share = np.exp(self.rng.uniform(least, most, len(events)))
        made, triggered = thinned(
            self.rng, pulses, len(events), share, self.detector, self.settings, covered)
        columns = ("event", "sensor_id", "time", "charge", "auxiliary")
        made = pd.DataFrame(dict(zip(columns, made, strict=True)))[triggered[made[0]]]
        number = (np.cumsum(triggered) - 1)[made.event]
        made = made.assign(event=number, sensor_id=made.sensor_id.astype(np.int16))
        return made, truth[triggered].assign(light=share[triggered])

    def copies(self):
        "Files of the data set to make."
        names = {"batch_id": "source_file", "event_id": "source_event"}
        for copy in range(1, self.args.copies + 1):
            frames, truths, n = [], [], 0
            parts = np.array_split(self.events, min(PARTS, len(self.events)))
            for events in progress_bar(parts, f"copy {copy} of {self.args.copies}", leave=False):
                pulses, truth = self.dimmed(events)
                frames.append(pulses.assign(event=n + pulses.event))
                truths.append(truth)
                n += len(truth)
            print(f"copy {copy}: {n:,} of {len(self.events):,} events trigger", flush=True)
            truth = pd.concat(truths, ignore_index=True).rename(columns=names)
            yield copy, pd.concat(frames, ignore_index=True), truth


def parsed(doc, least, most):
    "Arguments of the command line."
    parser = command_line(doc)
    parser.add_argument("--copies", type=int, default=4, help="default %(default)s")
    parser.add_argument("--least", type=float, default=least,
                        help=f"smallest share of the light that is left; default {least}")
    parser.add_argument("--most", type=float, default=most, help=f"largest share; default {most}")
    args = parser.parse_args()
    refuse_existing(args.out)
    if not 0 < args.least <= args.most <= 1:
        parser.error("--least and --most are shares, above 0 and at most 1, the first not the larger one")
    if args.held_out < 2 or args.copies < 1:
        parser.error("--held-out must be at least 2, --copies at least 1")
    return args


if __name__ == "__main__":
    args = parsed(__doc__, 0.25, 0.95)
    source = Source(args)
    write_events(args.out, source.geometry, source.copies())
