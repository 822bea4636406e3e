"""Learn the light of cascades from the events of a data set with truth, and simulate new events with it.

    python data_scripts/learn_light.py DATA OUT --files 1,2,3 --events 80000 --seed 1

The photo-electrons of a cascade fall on the DOMs independently of each other. The expected light on a
DOM and its delays are those of the simulation's law times the outputs of two small networks. Their
inputs are the places of cascade and DOM, the direction, and the ice. They are fitted to every pulse: the
likelihood of a Poisson process with noise on top, over all DOMs, lit and dark. Vertex, direction and
energy are those of the truth; each cascade has a time and a brightness of its own. A DOM without
coincident neighbours records its first photo-electron only.

Every tenth event (--held-out), in the order of the files, is left out: training holds these out. The fit
stops after --epochs. OUT is a data set as the simulation writes it, with the law in light.safetensors.
With --law FILE the law is written to FILE after the fit, or read from there if FILE exists.
"""
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from event_files import command_line, refuse_existing, write_events
from safetensors.torch import load_file, save_file
from scipy.special import gammainc
from thin_events import Source
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from iceaggr.common import atomic_write, progress_bar
from iceaggr.direction import angles_to_vector
from iceaggr.geometry import SPEED_OF_LIGHT
from iceaggr.simulation import light
from iceaggr.simulation.dataset import CHUNK, pulse_frame, simulate_chunk
from iceaggr.simulation.light import (
    COS_C,
    GROUP_INDEX,
    METRES_PER_GEV,
    ONSET,
    cascade_expectation,
    point_pairs,
    shower_maximum,
)
from iceaggr.simulation.readout import AFTER_PULSES, LATE_SHARE, NOISE_FOLLOWERS, NOISE_RATE, STAMP

EDGES = 10 * np.sinh(np.linspace(np.arcsinh(-6), np.arcsinh(400), 49))  # ns: bins of the delay
WIDTH, BINS = np.diff(EDGES), len(EDGES) - 1
NOISE = NOISE_RATE * (1 + NOISE_FOLLOWERS)  # 1/ns, of a DOM
FARTHEST = 650.         # m: DOMs farther from a cascade are left out
MOST_CHARGE = 300       # photo-electrons that a pulse counts for at most
STEADY = 40.            # photo-electrons that draw the brightness of a cascade to 1
ENERGIES = (100., 1e6)  # GeV: beyond these a cascade is as at the limit
FEATURES = 34


# The law: expected light and delays of pairs of cascades and DOMs

def depth_waves(z):
    "Depth, linear and as waves of four periods, for the layers of the ice."
    waves = [wave(2 * np.pi * z / period) for period in (1000, 500, 250, 125) for wave in (np.sin, np.cos)]
    return [z / 500, *waves]


def light_features(centre, u, energy, xyz, r, optics): # (n, 34) float32
    """Inputs of the networks, for pairs of cascades and DOMs.

    centre, u (n, 3): shower maximum and direction; xyz (n, 3) of the DOMs; r (n,) distance;
    optics: scattering and absorption length on the path.
    """
    k = (xyz - centre) / np.maximum(r, 0.5)[:, None]
    cosine = (k * u).sum(1)
    level, phi = np.hypot(k[:, 0], k[:, 1]), np.arctan2(k[:, 1], k[:, 0])
    middle = (centre + xyz) / 2
    parts = [r / 200, np.log(np.maximum(r, 1) / 50), np.exp(-r / 25)]
    parts += [cosine, cosine**2, np.sqrt(np.abs(cosine - COS_C)), k[:, 2]]
    parts += [middle[:, 0] / 500, middle[:, 1] / 500]
    parts += [np.log10(np.clip(energy, *ENERGIES)) - 3.5, np.log(optics[0] / 30), np.log(optics[1] / 120)]
    parts += [level**m * wave(m * phi) for m in (1, 2) for wave in (np.cos, np.sin)]
    parts += depth_waves(centre[:, 2]) + depth_waves(xyz[:, 2])
    return np.stack(parts, 1).astype(np.float32)


def prior_bins(shape, scale): # (n, BINS) float32
    "Shares of the delays by the simulation's law, none of them zero."
    below = gammainc(shape[:, None], np.maximum((EDGES[1:] - ONSET) / scale[:, None], 0))
    anywhere = (EDGES[1:] > -10) / (EDGES[1:] > -10).sum()
    return (0.9 * np.diff(below, axis=1, prepend=0) + 0.1 * anywhere + 1e-6).astype(np.float32)


def late_bins(n=400): # (BINS, BINS)
    "Where the light of each bin is recorded: late pulses come later, after-pulses are added."
    even = (np.arange(n) + 0.5) / n
    normal = np.random.default_rng(0).standard_normal(n)
    fine = EDGES[:-1, None] + WIDTH[:, None] * (np.arange(n) + 0.5) / n

    def shifted(delay):
        return np.stack([np.histogram(t, EDGES)[0] / n for t in fine + delay])

    late = shifted(np.random.default_rng(1).permutation(25 + 125 * even))
    table = (1 - LATE_SHARE) * np.eye(BINS) + LATE_SHARE * late
    after = sum(share * shifted(np.maximum(delay + spread * normal, 200))
                for share, delay, spread in AFTER_PULSES)
    return table + after


def pair_arrays(detector, centre, u, energy, sensor):
    """Pairs of cascades and sensors before anything is learned.

    Gives features, the simulation's expectation, a function of rows that gives the shares of its delays,
    and distances.
    """
    xyz = detector.xyz[sensor]
    mu, shape, scale, r = cascade_expectation(
        detector.ice, centre, u, METRES_PER_GEV * energy, xyz, detector.efficiency[sensor])
    x = light_features(centre, u, energy, xyz, r, detector.ice.average(centre[:, 2], xyz[:, 2]))

    def prior(rows):
        return prior_bins(shape[rows], scale[rows])

    return torch.from_numpy(x), torch.from_numpy(mu.astype(np.float32)), prior, r


def network(outputs, hidden=96):
    "A small network of the features."
    return nn.Sequential(
        nn.Linear(FEATURES, hidden), nn.SiLU(),
        nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, outputs))


class Light(nn.Module):
    "The law: expected photo-electrons and the shares of their delays."
    def __init__(self):
        super().__init__()
        self.amount, self.delay = network(1), network(BINS)
        for last in (self.amount[-1], self.delay[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        self.register_buffer("late", torch.tensor(late_bins(), dtype=torch.float32))

    def expected(self, x, mu): # (n,) from features (n, 34) and the simulation's expectation (n,)
        return mu * self.amount((x - self.mean) / self.std)[:, 0].clamp(-4, 3).exp()

    def shares(self, x, prior): # (n, BINS)
        return F.softmax(self.delay((x - self.mean) / self.std) + prior.log(), 1)

    @torch.inference_mode()
    def cascade_light(self, rng, detector, position, u, time, energy): # source, sensor, time, weight
        "Draw photo-electrons: arguments and results as `iceaggr.simulation.light.cascade_light`."
        metres, ahead = METRES_PER_GEV * energy, shower_maximum(energy)
        centre, time = position + ahead[:, None] * u, time + ahead / SPEED_OF_LIGHT
        reach = np.minimum(detector.reach(2 * metres, 1) + 10, FARTHEST)
        source, sensor = point_pairs(detector, centre, reach)
        x, mu, prior, r = pair_arrays(detector, centre[source], u[source], energy[source], sensor)
        count = rng.poisson(self.expected(x, mu).double().numpy())
        lit = np.flatnonzero(count)
        drawn = np.minimum(count[lit], light.MAX_PE)
        shares = self.shares(x[lit], torch.from_numpy(prior(lit))).double().numpy()
        row = np.repeat(np.arange(len(lit)), drawn)
        delay = draw_delays(rng, shares, row)
        pair = lit[row]
        arrival = time[source[pair]] + GROUP_INDEX * r[pair] / SPEED_OF_LIGHT
        return source[pair], sensor[pair], arrival + delay, (count[lit] / drawn)[row]


def draw_delays(rng, shares, row): # (len(row),) ns
    "Delays from the histograms (n, BINS) of some rows."
    below = torch.from_numpy(shares).cumsum(1).numpy()
    ladder = (below / below[:, -1:] + np.arange(len(shares))[:, None]).ravel()
    place = np.searchsorted(ladder, row + rng.random(len(row)), side="right") - BINS * row
    place = place.clip(0, BINS - 1)
    return EDGES[place] + rng.random(len(row)) * WIDTH[place]


# What is fitted: the pulses of cascades

class Cascade:
    "DOMs of a cascade, lit and dark, and its pulses."
    def __init__(self, detector, truth, pulses):
        direction = torch.tensor([[truth.azimuth], [truth.zenith]], dtype=torch.float64)
        u = -angles_to_vector(*direction)[0].numpy()
        energy = np.array([truth.e_deposited], float)
        vertex = np.array([truth.vertex_x, truth.vertex_y, truth.vertex_z], float)
        centre = vertex + shower_maximum(energy) * u
        reach = min(detector.reach(2 * METRES_PER_GEV * energy, 1)[0] + 10, FARTHEST)
        near = np.linalg.norm(detector.xyz - centre, axis=1) < reach
        doms = np.flatnonzero((detector.efficiency > 0) & near)
        whole = (np.broadcast_to(a, (len(doms), *np.shape(a)[1:])) for a in (centre[None], u[None], energy))
        self.x, self.mu, prior, r = pair_arrays(detector, *whole, doms)
        time, charge = self.read_pulses(pulses, doms, r)
        self.prior = torch.from_numpy(prior(self.lit.numpy()))
        self.charge = torch.from_numpy(np.clip(np.rint(charge), 1, MOST_CHARGE).astype(np.float32))
        self.weight = min(1., 150 / max(float(self.charge.sum()), 1))  # so that bright ones do not dominate
        self.set_time(time)

    def read_pulses(self, pulses, doms, r): # times after unscattered light, charges
        "Keep the pulses that the fit takes, with the DOMs that they are on."
        pulses = pulses[np.isin(pulses.sensor_id, doms)]
        at, auxiliary = np.searchsorted(doms, pulses.sensor_id), pulses.auxiliary.to_numpy(bool)
        time = pulses.time.to_numpy(float) - GROUP_INDEX * r[at] / SPEED_OF_LIGHT
        single = np.ones(len(doms), bool)  # DOMs without a coincident neighbour
        single[at[~auxiliary]] = False
        order = np.argsort(time, kind="stable")
        at, time, charge = at[order], time[order], pulses.charge.to_numpy()[order]
        keep = ~single[at]
        keep[np.unique(at, return_index=True)[1]] = True  # of a single DOM the first pulse
        lit, hit = np.unique(at[keep], return_inverse=True)
        self.lit, self.single = torch.from_numpy(lit), torch.from_numpy(single[lit])
        self.hit = torch.from_numpy(hit)  # place of each pulse among the lit DOMs
        return time[keep], charge[keep]

    def set_time(self, time):
        "Count times from the most probable time of the cascade by the simulation's law."
        self.time, self.zero, start = time, 0., 0.
        if len(time):
            times = np.quantile(time, 0.2) + np.arange(-1_000, 1_000, 10.)
            start = self.most_probable_time(self.mu[self.lit], self.prior, times)
        self.time = torch.from_numpy((time - start).astype(np.float32))

    def most_probable_time(self, expected, shares, times): # ns
        "The time of the cascade, of some, for which its pulses are most probable."
        time = torch.as_tensor(self.time, dtype=torch.float32)
        late = time - torch.tensor(times, dtype=torch.float32)[:, None]
        rate = expected[self.hit] * density(shares, self.hit, late)
        score = (self.charge.clamp(max=3) * torch.log1p(rate / NOISE)).sum(1)
        return float(times[int(score.argmax())])


def place_in(delay): # (...) bin, (...) bool: it is in one
    "Bin of each delay."
    edges = torch.tensor(EDGES, dtype=torch.float32)
    at = torch.searchsorted(edges, delay.contiguous(), right=True) - 1
    return at.clamp(0, BINS - 1), (at >= 0) & (at < BINS)


def density(shares, row, delay): # (..., n) 1/ns
    "Density of delays (..., n) by the shares of rows (n,)."
    at, inside = place_in(delay)
    width = torch.tensor(WIDTH, dtype=torch.float32)
    return torch.where(inside, shares[row.expand(at.shape), at] / width[at], 0.)


# The fit

class Batch:
    "Arrays of several cascades, joined."
    def __init__(self, cascades):
        self.cascades, self.n = cascades, len(cascades)
        doms, lit = [len(c.x) for c in cascades], [len(c.lit) for c in cascades]
        first_dom, self.first_lit = np.cumsum([0, *doms]), np.cumsum([0, *lit])
        self.event = torch.arange(self.n).repeat_interleave(torch.tensor(doms))
        self.x, self.mu, self.prior = (self.join(name) for name in ("x", "mu", "prior"))
        self.charge, self.single = self.join("charge"), self.join("single")
        self.rows, self.hit = self.join("lit", first_dom), self.join("hit", self.first_lit)
        self.owner = self.event[self.rows[self.hit]]
        self.delay = torch.cat([c.time - c.zero for c in cascades])

    def join(self, name, first=None):
        "Arrays of the cascades in a row; numbers are counted on from `first`."
        parts = [getattr(c, name) for c in self.cascades]
        if first is not None:
            parts = [part + int(start) for part, start in zip(parts, first[:-1], strict=True)]
        return torch.cat(parts)

    def sums(self, value, event):
        "Sums per cascade."
        return torch.zeros(self.n).index_add(0, event, value)


def visible(batch, shares): # (lit DOMs,) share of the light that a single DOM records before it is blind
    "A DOM without coincident neighbours is blind after its charge stamp."
    end = torch.full((len(batch.rows),), float(EDGES[-1]))
    end = end.scatter_reduce(0, batch.hit, batch.delay + STAMP, "amin")
    at, _ = place_in(end)
    edges, width = (torch.tensor(a, dtype=torch.float32)[at] for a in (EDGES[:-1], WIDTH))
    part = ((end - edges) / width).clamp(0, 1)[:, None]
    bins = torch.arange(BINS)
    return (shares * ((bins < at[:, None]) + part * (bins == at[:, None]))).sum(1)


def move_times(batch, brightness, mu, shares):
    "Move the times of cascades towards what is most probable."
    for k, cascade in enumerate(batch.cascades):
        own = slice(batch.first_lit[k], batch.first_lit[k + 1])
        times = cascade.zero + np.arange(-24, 25, 2.)
        best = cascade.most_probable_time(brightness[k] * mu[batch.rows[own]], shares[own], times)
        cascade.zero += 0.7 * (best - cascade.zero)


def log_likelihood(law, cascades, update=False): # (len(cascades),) against noise alone
    "Log-likelihood of the pulses of cascades; `update` also moves their times."
    batch = Batch(cascades)
    mu, rows = law.expected(batch.x, batch.mu), batch.rows
    shares = law.shares(batch.x[rows], batch.prior) @ law.late
    rate = mu[rows][batch.hit] * density(shares, batch.hit, batch.delay)
    recorded = torch.where(batch.single, visible(batch, shares), shares.sum(1))
    expected = batch.sums(mu.index_put((rows,), mu[rows] * recorded), batch.event)
    with torch.no_grad():
        signal = batch.sums(batch.charge * rate / (rate + NOISE), batch.owner)
        brightness = (signal + STEADY) / (expected + STEADY)
    if update: move_times(batch, brightness, mu, shares)
    gain = batch.charge * torch.log1p(brightness[batch.owner] * rate / NOISE)
    return batch.sums(gain, batch.owner) - brightness * expected


def mean_likelihood(law, cascades, update=False):
    "Mean of the weighted log-likelihood."
    weight = torch.tensor([c.weight for c in cascades])
    return (weight * log_likelihood(law, cascades, update)).mean()


def fit_step(law, cascades, optimizer, schedule): # log-likelihood
    "One step of the optimizer."
    value = mean_likelihood(law, cascades)
    optimizer.zero_grad()
    (-value).backward()
    nn.utils.clip_grad_norm_(law.parameters(), 20.)
    optimizer.step()
    schedule.step()
    return value.item()


def fitted(cascades, epochs, seed): # Light
    "The law that makes the pulses of cascades most probable."
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    law, size = Light(), min(64, len(cascades))
    sample = torch.cat([c.x for c in cascades[::10]])
    law.mean.copy_(sample.mean(0))
    law.std.copy_(sample.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(law.parameters(), weight_decay=0.01)
    steps = epochs * (len(cascades) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for epoch in progress_bar(range(epochs), "fit", unit="epoch"):
        order = rng.permutation(len(cascades))
        starts = range(0, len(order) - size + 1, size)
        parts = [[cascades[k] for k in order[first:first + size]] for first in starts]
        found = [fit_step(law, part, optimizer, schedule) for part in parts]
        if epoch % 3 == 2:
            with torch.no_grad():
                for first in range(0, len(cascades), size):
                    log_likelihood(law, cascades[first:first + size], update=True)
        tqdm.write(f"epoch {epoch + 1}: log-likelihood per cascade {np.mean(found):.3f}")
    return law.eval()


# From a data set to a data set

def read_law(path): # Light
    "A law from its file."
    law = Light()
    try: law.load_state_dict(load_file(path))
    except Exception as e:
        raise SystemExit(f"{path} holds no law of light ({e}): remove it, or name another file") from None
    return law.eval()


def law_of(source): # Light
    "The law in --law, or else that of the cascades of the data set."
    args = source.args
    if args.law and args.law.exists(): return read_law(args.law)
    is_cascade = (source.truth.type == "cascade").to_numpy()
    chosen = source.events[is_cascade[source.events]]
    if not len(chosen): raise SystemExit(f"{args.data}: the files {args.files} have no cascade: name others")
    cascades = []
    for e in progress_bar(chosen, "cascades"):
        pulses = source.pulses[source.start[e]:source.start[e + 1]]
        cascades.append(Cascade(source.detector, source.truth.iloc[e], pulses))
    law = fitted(cascades, args.epochs, args.seed)
    if args.law:
        with atomic_write(args.law) as part: save_file(law.state_dict(), part)
    return law


def simulated(source):
    "Files of the data set to make."
    args, done, number, chunk, held = source.args, 0, 0, 0, []
    with progress_bar(total=args.events, unit=" events", desc="simulate") as bar:
        while done < args.events:
            pulses, truth = simulate_chunk(source.detector, args.seed, chunk, source.settings)
            held.append((pulse_frame(pulses, chunk * CHUNK), truth))
            chunk += 1
            bar.update(min(CHUNK, args.events - bar.n))
            n = min(args.per_file, args.events - done)
            if len(held) * CHUNK < n: continue
            pulses, truth = (pd.concat(x, ignore_index=True) for x in zip(*held, strict=True))
            pulses = pulses.assign(event=pulses.event_id - pulses.event_id.iloc[0])
            done, number, held = done + n, number + 1, []
            yield number, pulses[pulses.event < n], truth[:n]


def parsed():
    "Arguments of the command line."
    parser = command_line(__doc__)
    parser.add_argument("--events", type=int, default=80_000, help="events to make; default %(default)s")
    parser.add_argument("--per-file", type=int, default=5_000, help="events per file; default %(default)s")
    parser.add_argument("--law", type=Path,
                        help="file of a fitted law; written after the fit if it does not exist")
    parser.add_argument("--epochs", type=int, default=36, help="of the fit; default %(default)s")
    args = parser.parse_args()
    refuse_existing(args.out)
    if args.held_out < 2 or min(args.events, args.per_file, args.epochs) < 1:
        parser.error("--held-out must be at least 2, --events, --per-file and --epochs at least 1")
    return args


if __name__ == "__main__":
    source = Source(parsed())
    law = law_of(source)
    with mock.patch.object(light, "cascade_light", law.cascade_light):  # the simulation looks it up there
        write_events(source.args.out, source.geometry, simulated(source))
    save_file(law.state_dict(), source.args.out / "light.safetensors")
