"""Events like those of a data set with truth: what its cascades shine onto the DOMs is learned from their pulses, and new events, whose cascades shine like that, are simulated.

    python data_scripts/learn_light.py DATA OUT --files 1,2,3 --events 80000 --seed 1

The photo-electrons of a cascade fall onto the DOMs independently of each other. So much light is expected on a DOM, with such delays, as the simulation's law says times what two small networks say of where the cascade and the DOM are, which way it looks, and how the ice is there; the networks
are fitted to every pulse (the likelihood of a Poisson process with the noise on top, of all DOMs, lit and dark), with vertex, direction and energy of the truth, and for each cascade a time and a brightness of its own. That a DOM without neighbours records its first photo-electron alone is allowed for.
Of the events, in the order of the files, every tenth (--held-out) is left out: training keeps these back. The fit stops after --epochs; OUT is a data set as the simulation writes them, with the law in light.safetensors. With --law FILE the law is written to FILE as soon as it is found, and taken from there if FILE exists: after an interruption, or for other events."""
from pathlib import Path

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

from iceaggr.direction import angles_to_vector
from iceaggr.geometry import SPEED_OF_LIGHT
from iceaggr.common import atomic_write
from iceaggr.simulation.dataset import CHUNK, pulse_frame, simulate_chunk
from iceaggr.simulation.light import (
    COS_C, GROUP_INDEX, METRES_PER_GEV, ONSET, cascade_expectation, point_pairs, shower_maximum)
from iceaggr.simulation.readout import AFTER_PULSES, LATE_SHARE, NOISE_FOLLOWERS, NOISE_RATE, STAMP

EDGES = 10 * np.sinh(np.linspace(np.arcsinh(-6), np.arcsinh(400), 49))          # ns: bins of the delay after unscattered light
WIDTH, BINS = np.diff(EDGES), len(EDGES) - 1
NOISE = NOISE_RATE * (1 + NOISE_FOLLOWERS)                                      # 1/ns, of a DOM
FARTHEST, MOST_CHARGE, STEADY = 650., 300, 40.                                  # m; photo-electrons that a pulse counts for at most; a cascade's brightness is drawn to one by so many
ENERGIES = (100., 1e6)                                                          # GeV: beyond these a cascade is as at the limit


def light_features(centre, u, energy, xyz, r, optics): # (n, 34) float32
    "What the networks are told of pairs of cascades (centre (n, 3), direction, energy) and DOMs (xyz (n, 3)) at distances r in ice with scattering and absorption lengths."
    k = (xyz - centre) / np.maximum(r, 0.5)[:, None]
    cosine, level, phi, middle = (k * u).sum(1), np.hypot(k[:, 0], k[:, 1]), np.arctan2(k[:, 1], k[:, 0]), (centre + xyz) / 2
    parts = [r / 200, np.log(np.maximum(r, 1) / 50), np.exp(-r / 25), cosine, cosine**2, np.sqrt(np.abs(cosine - COS_C)), k[:, 2], middle[:, 0] / 500, middle[:, 1] / 500]
    parts += [np.log10(np.clip(energy, *ENERGIES)) - 3.5, np.log(optics[0] / 30), np.log(optics[1] / 120)]
    parts += [level**m * wave(m * phi) for m in (1, 2) for wave in (np.cos, np.sin)]
    for z in (centre[:, 2], xyz[:, 2]): parts += [z / 500, *(wave(2 * np.pi * z / period) for period in (1000, 500, 250, 125) for wave in (np.sin, np.cos))]
    return np.stack(parts, 1).astype(np.float32)


def prior_bins(shape, scale): # (n, BINS) float32
    "Shares of the delays by the simulation's law, none of them zero."
    below = gammainc(shape[:, None], np.maximum((EDGES[1:] - ONSET) / scale[:, None], 0))
    anywhere = (EDGES[1:] > -10) / (EDGES[1:] > -10).sum()
    return (0.9 * np.diff(below, axis=1, prepend=0) + 0.1 * anywhere + 1e-6).astype(np.float32)


def late_bins(n=400): # (BINS, BINS)
    "What becomes of light of each bin: late pulses come later, after-pulses on top."
    fine = (EDGES[:-1, None] + WIDTH[:, None] * (np.arange(n) + 0.5) / n)
    onto = lambda delay: np.stack([np.histogram(t, EDGES)[0] / n for t in fine + delay])
    even, normal = (np.arange(n) + 0.5) / n, np.random.default_rng(0).standard_normal(n)
    into = (1 - LATE_SHARE) * np.eye(BINS) + LATE_SHARE * onto(np.random.default_rng(1).permutation(25 + 125 * even))
    return into + sum(share * onto(np.maximum(delay + spread * normal, 200)) for share, delay, spread in AFTER_PULSES)


class Light(nn.Module):
    "The law: expected photo-electrons and the shares of their delays, by what the simulation expects and the features."
    def __init__(self, features=34, hidden=96):
        super().__init__()
        part = lambda out: nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))
        self.amount, self.delay = part(1), part(BINS)
        for last in (self.amount[-1], self.delay[-1]): nn.init.zeros_(last.weight); nn.init.zeros_(last.bias)
        for name, value in (("mean", torch.zeros(features)), ("std", torch.ones(features)), ("late", torch.tensor(late_bins(), dtype=torch.float32))): self.register_buffer(name, value)

    def expected(self, x, mu): return mu * self.amount((x - self.mean) / self.std)[:, 0].clamp(-4, 3).exp()

    def shares(self, x, prior): return F.softmax(self.delay((x - self.mean) / self.std) + prior.log(), 1)

    @torch.inference_mode()
    def shine(self, rng, detector, position, u, time, energy): # source, sensor, time, weight of photo-electrons
        "In place of `cascade_light` of the simulation."
        metres, ahead = METRES_PER_GEV * energy, shower_maximum(energy)
        centre, time = position + ahead[:, None] * u, time + ahead / SPEED_OF_LIGHT
        source, sensor = point_pairs(detector, centre, np.minimum(detector.reach(2 * metres, 1) + 10, FARTHEST))
        x, mu, prior, r = pair_arrays(detector, centre[source], u[source], energy[source], sensor)
        count = rng.poisson(self.expected(x, mu).double().numpy())
        lit = np.flatnonzero(count); drawn = np.minimum(count[lit], 2_000)
        below = self.shares(x[lit], torch.from_numpy(prior(lit))).double().cumsum(1).numpy()
        row = np.repeat(np.arange(len(lit)), drawn)
        place = np.searchsorted((below / below[:, -1:] + np.arange(len(lit))[:, None]).ravel(), row + rng.random(len(row)), side="right") - BINS * row
        delay = EDGES[place.clip(0, BINS - 1)] + rng.random(len(row)) * WIDTH[place.clip(0, BINS - 1)]
        pair = lit[row]
        return source[pair], sensor[pair], time[source[pair]] + GROUP_INDEX * r[pair] / SPEED_OF_LIGHT + delay, (count[lit] / drawn)[row]


def pair_arrays(detector, centre, u, energy, sensor): # features, expectation by the simulation, function of rows that gives the shares of its delays, distance
    "What is known of pairs of cascades and sensors before anything is learned."
    xyz = detector.xyz[sensor]
    mu, shape, scale, r = cascade_expectation(detector.ice, centre, u, METRES_PER_GEV * energy, xyz, detector.efficiency[sensor])
    x = light_features(centre, u, energy, xyz, r, detector.ice.average(centre[:, 2], xyz[:, 2]))
    return torch.from_numpy(x), torch.from_numpy(mu.astype(np.float32)), lambda rows: prior_bins(shape[rows], scale[rows]), r


class Cascade:
    "What the fit needs of a cascade: its DOMs, lit and dark, and its pulses."
    def __init__(self, detector, truth, pulses):
        u = -angles_to_vector(*torch.tensor([[truth.azimuth], [truth.zenith]], dtype=torch.float64))[0].numpy()
        energy = np.array([truth.e_deposited], float)
        centre = np.array([truth.vertex_x, truth.vertex_y, truth.vertex_z], float) + shower_maximum(energy) * u
        reach = min(detector.reach(2 * METRES_PER_GEV * energy, 1)[0] + 10, FARTHEST)
        doms = np.flatnonzero((detector.efficiency > 0) & (np.linalg.norm(detector.xyz - centre, axis=1) < reach))
        whole = lambda a: np.broadcast_to(a, (len(doms), *np.shape(a)[1:]))
        self.x, self.mu, prior, r = pair_arrays(detector, whole(centre[None]), whole(u[None]), whole(energy), doms)
        pulses = pulses[np.isin(pulses.sensor_id, doms)]
        at, lone = np.searchsorted(doms, pulses.sensor_id), pulses.auxiliary.to_numpy(bool)
        time = pulses.time.to_numpy(float) - GROUP_INDEX * r[at] / SPEED_OF_LIGHT
        alone = np.ones(len(doms), bool); alone[at[~lone]] = False
        order = np.argsort(time, kind="stable"); at, time, charge = at[order], time[order], pulses.charge.to_numpy()[order]
        keep = ~alone[at]; keep[np.unique(at, return_index=True)[1]] = True             # of a DOM without neighbours the first pulse
        self.time, charge = time[keep], charge[keep]
        lit, self.hit = np.unique(at[keep], return_inverse=True)                        # DOMs with pulses; of each pulse the place among them
        self.lit, self.prior, self.alone = torch.from_numpy(lit), torch.from_numpy(prior(lit)), torch.from_numpy(alone[lit])
        self.hit, self.charge = torch.from_numpy(self.hit), torch.from_numpy(np.clip(np.rint(charge), 1, MOST_CHARGE).astype(np.float32))
        self.weight = min(1., 150 / max(float(self.charge.sum()), 1))                   # bright ones are few, and must not be everything
        self.zero, start = 0., 0.                                                       # ns: the cascade's time, for what has been learned and at first
        if len(self.time): start = self.earliest(self.mu[self.lit], self.prior, np.quantile(self.time, 0.2) + np.arange(-1_000, 1_000, 10.))
        self.time = torch.from_numpy((self.time - start).astype(np.float32))

    def earliest(self, expected, shares, times): # ns
        "The time of the cascade for which its pulses are most probable."
        late = torch.as_tensor(self.time, dtype=torch.float32) - torch.tensor(times, dtype=torch.float32)[:, None]
        rate = expected[self.hit] * density(shares, self.hit, late)
        return float(times[int((self.charge.clamp(max=3) * torch.log1p(rate / NOISE)).sum(1).argmax())])


def place_in(delay): # of the bin, in which there may be none; (...) bool
    at = torch.searchsorted(torch.tensor(EDGES, dtype=torch.float32), delay.contiguous(), right=True) - 1
    return at.clamp(0, BINS - 1), (at >= 0) & (at < BINS)


def density(shares, row, delay): # (...) 1/ns
    "Of delays (..., n) by the shares of rows (n,)."
    at, inside = place_in(delay)
    return torch.where(inside, shares[row.expand(at.shape), at] / torch.tensor(WIDTH, dtype=torch.float32)[at], 0.)


def log_likelihood(law, some, update=False): # (len(some),) against noise alone
    "Of the pulses of cascades; with `update` their times are moved towards what is most probable."
    n, lit = [len(c.x) for c in some], [len(c.lit) for c in some]
    event, row0, lit0 = torch.arange(len(some)).repeat_interleave(torch.tensor(n)), np.cumsum([0, *n]), np.cumsum([0, *lit])
    x = torch.cat([c.x for c in some])
    mu = law.expected(x, torch.cat([c.mu for c in some]))
    rows, hit = (torch.cat([getattr(c, name) + int(first) for c, first in zip(some, start)]) for name, start in (("lit", row0), ("hit", lit0)))
    charge, alone, owner = torch.cat([c.charge for c in some]), torch.cat([c.alone for c in some]), event[rows[hit]]
    delay = torch.cat([c.time - c.zero for c in some])
    shares = law.shares(x[rows], torch.cat([c.prior for c in some])) @ law.late
    rate = mu[rows][hit] * density(shares, hit, delay)
    # a DOM without neighbours is blind after its charge stamp
    end = torch.full((len(rows),), float(EDGES[-1])).scatter_reduce(0, hit, delay + STAMP, "amin")
    at, _ = place_in(end)
    edges, width = (torch.tensor(a, dtype=torch.float32)[at] for a in (EDGES[:-1], WIDTH))
    part = ((end - edges) / width).clamp(0, 1)[:, None]
    seen = (shares * ((torch.arange(BINS) < at[:, None]) + part * (torch.arange(BINS) == at[:, None]))).sum(1)
    total = mu.index_put((rows,), mu[rows] * torch.where(alone, seen, shares.sum(1)))
    sums = lambda value, of: torch.zeros(len(some)).index_add(0, of, value)
    expected = sums(total, event)
    with torch.no_grad(): brightness = (sums(charge * rate / (rate + NOISE), owner) + STEADY) / (expected + STEADY)
    if update:
        for k, c in enumerate(some):
            own = slice(lit0[k], lit0[k + 1])
            c.zero += 0.7 * (c.earliest(brightness[k] * mu[rows[own]], shares[own], c.zero + np.arange(-24, 25, 2.)) - c.zero)
    return sums(charge * torch.log1p(brightness[owner] * rate / NOISE), owner) - brightness * expected


def fitted(cascades, epochs, seed): # Light
    "The law that makes the pulses of cascades most probable."
    torch.manual_seed(seed); rng = np.random.default_rng(seed)
    law, size = Light(), min(64, len(cascades))
    sample = torch.cat([c.x for c in cascades[::10]])
    law.mean.copy_(sample.mean(0)); law.std.copy_(sample.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(law.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(cascades) // size), pct_start=0.1)
    mean = lambda some, **kw: (torch.tensor([c.weight for c in some]) * log_likelihood(law, some, **kw)).mean()
    for epoch in tqdm(range(epochs), "fit", unit="epoch"):
        order, found = rng.permutation(len(cascades)), []
        for first in range(0, len(order) - size + 1, size):
            value = mean([cascades[k] for k in order[first:first + size]])
            optimizer.zero_grad(); (-value).backward(); nn.utils.clip_grad_norm_(law.parameters(), 20.); optimizer.step(); schedule.step()
            found.append(value.item())
        if epoch % 3 == 2:
            with torch.no_grad():
                for first in range(0, len(cascades), size): mean(cascades[first:first + size], update=True)
        tqdm.write(f"epoch {epoch + 1}: log-likelihood a cascade {np.mean(found):.3f}")
    return law.eval()


def law_of(source): # Light
    "The law that was found before, or else that of the cascades of the data set."
    args = source.args
    if args.law and args.law.exists():
        law = Light()
        try: law.load_state_dict(load_file(args.law))
        except Exception as e: raise SystemExit(f"{args.law} holds no law of light ({e}): remove it, or name another file") from None
        return law.eval()
    chosen = source.events[(source.truth.type == "cascade").to_numpy()[source.events]]
    if not len(chosen): raise SystemExit(f"{args.data}: the files {args.files} have no cascade: name others")
    law = fitted([Cascade(source.detector, source.truth.iloc[e], source.pulses[source.start[e]:source.start[e + 1]]) for e in tqdm(chosen, "cascades")], args.epochs, args.seed)
    if args.law:
        with atomic_write(args.law) as part: save_file(law.state_dict(), part)
    return law


def simulated(source, law):
    "The files of the data set to make."
    args, done, number, chunk, held = source.args, 0, 0, 0, []
    with tqdm(total=args.events, unit=" events", desc="simulate") as bar:
        while done < args.events:
            pulses, truth = simulate_chunk(source.detector, args.seed, chunk, source.settings, law.shine)
            held.append((pulse_frame(pulses, chunk * CHUNK), truth)); chunk += 1; bar.update(min(CHUNK, args.events - bar.n))
            n = min(args.per_file, args.events - done)
            if len(held) * CHUNK < n: continue
            pulses, truth = (pd.concat(x, ignore_index=True) for x in zip(*held))
            pulses = pulses.assign(event=pulses.event_id - pulses.event_id.iloc[0])
            done += n; number += 1; held = []
            yield number, pulses[pulses.event < n], truth[:n]


def parsed():
    "The command line."
    parser = command_line(__doc__)
    parser.add_argument("--events", type=int, default=80_000, help="how many to make; default %(default)s")
    parser.add_argument("--per-file", type=int, default=5_000, help="events of a file; default %(default)s")
    parser.add_argument("--law", type=Path, help="file of a law that was fitted before; written after the fit if it does not exist")
    parser.add_argument("--epochs", type=int, default=36, help="of the fit; default %(default)s")
    args = parser.parse_args()
    refuse_existing(args.out)
    if args.held_out < 2 or min(args.events, args.per_file, args.epochs) < 1: parser.error("--held-out must be at least 2, --events, --per-file and --epochs at least 1")
    return args


if __name__ == "__main__":
    source = Source(parsed())
    law = law_of(source)
    write_events(source.args.out, source.geometry, simulated(source, law))
    save_file(law.state_dict(), source.args.out / "light.safetensors")
