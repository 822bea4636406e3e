"""Properties for any events: packing, both paths of T1, the accumulator, the prepared form; damaged files."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iceaggr.accumulator import EventAccumulator
from iceaggr.data import IceCubeDataset
from iceaggr.dom_transformer import DOMTransformer
from iceaggr.engine.prepare import prepare
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.pulses import COLUMNS, ranges

# An event: pulses on DOMs, most with one, some with far more than a sequence holds.
pulses_of_a_dom = st.one_of(st.just(1), st.integers(1, 4), st.integers(1, 200))
some_events = st.lists(
    st.dictionaries(st.integers(0, 5159), pulses_of_a_dom, min_size=1, max_size=12),
    min_size=1,
    max_size=6,
)

few_events = st.lists(
    st.dictionaries(st.integers(0, 5159), st.integers(1, 40), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


def make(doms, event_id, seed=0):
    "An event with so many pulses on each DOM, in order of time, with ties."
    rng = np.random.default_rng([seed, event_id])
    sensor = rng.permutation(np.repeat(list(doms), list(doms.values())))
    n = len(sensor)
    pulses = np.stack(
        [
            np.sort(rng.integers(0, 3 * n, n)) * 100 + 6000,
            rng.integers(1, 4_000, n) * 0.025,
            sensor,
            rng.integers(0, 2, n),
        ],
        1,
    )
    return dict(
        pulse_features=torch.from_numpy(pulses.astype(np.float32)),
        event_id=torch.tensor(event_id),
        n_pulses=torch.tensor(n),
        target=torch.tensor([0.1, 0.2]) * event_id,
    )


def first_fit(sizes, capacity):
    "Sequences that whole pieces fill, the largest first: room left in each."
    rooms = []
    for n in sorted(sizes, reverse=True):
        k = next((k for k, room in enumerate(rooms) if room >= n), None)
        if k is None: rooms.append(capacity - n)
        else: rooms[k] -= n
    return rooms


@settings(max_examples=40, deadline=None)
@given(some_events, st.sampled_from([1, 7, 64, 512, "auto"]))
def test_packing_is_a_round_trip(doms, max_seq_len):
    events = [make(d, 7 * i + 3) for i, d in enumerate(doms)]
    batch = collate_dom_packing(events, max_seq_len)
    m, mask, packed = batch["metadata"], batch["dom_mask"], batch["packed_sequences"]
    (S, L), P = mask.shape, sum(len(e["pulse_features"]) for e in events)
    assert int(mask.sum()) == P and m["event_ids"].tolist() == [7 * i + 3 for i in range(len(doms))]
    pairs = [
        (i, s) for i, d in enumerate(doms) for s in sorted(d)
    ]  # DOMs are numbered by (event, sensor_id)
    assert list(zip(m["dom_to_event_idx"].tolist(), m["sensor_ids"].tolist(), strict=True)) == pairs and m[
        "total_doms"
    ] == len(pairs)
    assert m["event_dom_counts"].tolist() == [len(d) for d in doms]
    sequence, place = mask.nonzero().T
    dom, local = m["global_dom_ids"][mask], batch["dom_boundaries"][mask]
    for k, (i, s) in enumerate(
        pairs
    ):  # every pulse once, the chunks of a DOM after one another, in order of time
        source = events[i]["pulse_features"]
        source = source[source[:, 2] == s]
        mine = (m["pulse_positions"] >= 0) & (
            torch.repeat_interleave(torch.arange(len(pairs)), m["dom_pulse_counts"]) == k
        )
        assert torch.equal(packed.view(-1, 4)[m["pulse_positions"][mine]], source) and int(
            (dom == k).sum()
        ) == len(source)
        assert m["dom_features"][k].tolist() == [
            float(source[0, 0]),
            float(np.float32(source[:, 1].double().sum())),
            len(source),
        ]
        assert len(sequence[dom == k].unique()) == -(
            -len(source) // L
        )  # in no more sequences than it needs
    for q in range(
        S
    ):  # a sequence: local numbers 0, 1, ... without a gap, one DOM each, padding at the end
        here = local[sequence == q]
        assert (
            here[0] == 0
            and set(here.diff().tolist()) <= {0, 1}
            and place[sequence == q].tolist() == list(range(len(here)))
        )
        assert torch.equal(here.diff() == 1, dom[sequence == q].diff() != 0)
    pieces = [n for d in doms for size in d.values() for n in [L] * (size // L) + [size % L] * (size % L > 0)]
    assert S == len(first_fit(pieces, L)) <= 2 * -(-P // L)
    gaps = first_fit([n for n in pieces if n > 1], L)
    if pieces.count(1) >= sum(gaps):
        assert S == -(-P // L)  # enough DOMs with one pulse fill every gap


@settings(max_examples=25, deadline=None)
@given(few_events, st.sampled_from([4, 32]), st.sampled_from(["attention", "mean"]))
def test_grouped_path_is_the_dense_one_with_its_gradients(doms, max_seq_len, pool):
    "In double precision, so that nothing but a mistake is left; long DOMs in chunks."
    batch = collate_dom_packing([make(d, i) for i, d in enumerate(doms)], max_seq_len)
    torch.manual_seed(1)
    t1 = DOMTransformer(32, 2, 2, pool=pool).double()
    results = []
    for kernel in ("grouped", "dense"):
        t1.kernel = kernel
        t1.zero_grad()
        embeddings = t1(batch)[0]
        (
            embeddings
            * torch.linspace(-1, 1, embeddings.numel(), dtype=torch.float64).view_as(embeddings)
        ).sum().backward()
        results.append(
            [
                embeddings.detach(),
                *(torch.zeros_like(p) if p.grad is None else p.grad for p in t1.parameters()),
            ]
        )  # None: nothing to attend to
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(few_events, st.integers(0, 5))
def test_events_do_not_see_each_other(doms, other):
    "An event's embeddings are those that it has alone, whatever shares the batch."
    events = [make(d, i) for i, d in enumerate(doms)]
    torch.manual_seed(0)
    t1 = DOMTransformer(32, 2, 1).double().eval()
    with torch.no_grad(): together, m = t1(collate_dom_packing(events, 64))
    i = other % len(events)
    with torch.no_grad(): alone, _ = t1(collate_dom_packing([events[i]], 64))
    torch.testing.assert_close(together[m["dom_to_event_idx"] == i], alone, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(few_events, few_events, st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_accumulator_gives_each_event_once_and_whole(first, second, max_sequences, batch_size, random):
    "Two batches, cut in any way, their parts in any order. An embedding says whose it is."
    events = [make(d, 10 + i) for i, d in enumerate(first)] + [make(d, 50 + i) for i, d in enumerate(second)]
    parts = [
        p
        for some in (events[: len(first)], events[len(first) :])
        for p in split_batch(collate_dom_packing(some, 16), max_sequences)
    ]
    random.shuffle(parts)
    acc, found = EventAccumulator(), {}
    for k, part in enumerate(parts):
        m = part["metadata"]
        acc.add_batch(torch.stack([m["event_ids"][m["dom_to_event_idx"]], m["sensor_ids"]], 1).double(), m)
        if k < len(parts) - 1 and random.random() < 0.5: continue
        for t2 in acc.get_complete_events(batch_size):
            assert 1 <= t2["batch_size"] <= batch_size and t2["dom_to_event_idx"].tolist() == sorted(
                t2["dom_to_event_idx"].tolist()
            )
            for n, event in enumerate(t2["event_ids"].tolist()):
                assert event not in found
                mine = t2["dom_to_event_idx"] == n
                assert torch.equal(
                    t2["dom_embeddings"][mine],
                    torch.stack(
                        [torch.full((int(mine.sum()),), event), t2["dom_ids"][mine]], 1
                    ).double(),
                )
                found[event] = (
                    t2["dom_ids"][mine],
                    t2["dom_features"][mine],
                    t2["targets"][n],
                    t2["event_times"][n],
                )
    assert (
        not acc.incomplete()
        and not acc.events
        and sorted(found) == sorted(int(e["event_id"]) for e in events)
    )
    for e in events:
        sensors, features, target, _ = found[int(e["event_id"])]
        assert sorted(sensors.tolist()) == sorted(
            set(e["pulse_features"][:, 2].long().tolist())
        ) and torch.equal(target, e["target"].float())
        assert (
            int(features[:, 2].sum()) == len(e["pulse_features"])
            and features[:, 0].min() == e["pulse_features"][0, 0]
        )


files_of_events = st.dictionaries(
    st.integers(1, 700), st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(files_of_events, st.integers(0, 2**32 - 1), st.integers(1, 50), st.booleans(), st.booleans())
def test_prepared_form_is_the_parquet_bit_for_bit(
    tmp_path_factory, files, seed, row_group_size, in_order, shuffled
):
    "Events of any size, times with ties and out of order, a meta table and row groups of any kind."
    rng, root, metas = np.random.default_rng(seed), tmp_path_factory.mktemp("any"), []
    (root / "train").mkdir()
    for b, sizes in files.items():
        event = np.repeat(1000 * b + np.arange(len(sizes)), sizes)
        table = pd.DataFrame(
            dict(
                event_id=event,
                sensor_id=rng.integers(0, 5160, len(event)).astype(np.int16),
                time=rng.integers(0, 40, len(event)),
                charge=rng.exponential(1, len(event)) + 1e-6,
                auxiliary=rng.random(len(event)) < 0.5,
            )
        )
        if in_order: table = table.sort_values(["event_id", "time"], kind="stable")
        table.to_parquet(root / f"train/batch_{b}.parquet", index=False, row_group_size=row_group_size)
        last = np.cumsum(sizes) - 1
        metas.append(
            pd.DataFrame(
                dict(
                    batch_id=b,
                    event_id=1000 * b + np.arange(len(sizes)),
                    first_pulse_index=last - np.array(sizes) + 1,
                    last_pulse_index=last,
                    azimuth=rng.uniform(0, 6, len(sizes)),
                    zenith=rng.uniform(0, 3, len(sizes)),
                )
            )
        )
    meta = pd.concat(metas)
    (meta.sample(frac=1, random_state=seed % 2**31) if shuffled else meta).to_parquet(
        root / "train_meta.parquet", index=False
    )
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # times out of order are said
        a, b = IceCubeDataset(root, cache_size=3), IceCubeDataset(prepare(root, root / "out", progress=False))
        every = rng.permutation(len(a))
        for x, y in zip(a.__getitems__(every), b.__getitems__(every), strict=True):
            assert x.keys() == y.keys() and all(
                x[k].dtype == y[k].dtype and x[k].numpy().tobytes() == y[k].numpy().tobytes() for k in x
            )
        x, y = a.hits(every), b.hits(every)
    assert a.event_table().equals(b.event_table())
    for k in ("n_doms", "event_time"): assert np.array_equal(x[k], y[k])
    for c in x["doms"]:
        assert c == "first_pulse" or np.array_equal(x["doms"][c], y["doms"][c])
        assert x["doms"][c].dtype == y["doms"][c].dtype
    rows, own = (ranges(hits["doms"]["first_pulse"], hits["doms"]["n_pulses"]) for hits in (x, y))
    for c in COLUMNS:
        assert np.array_equal(x["columns"][c][rows], y["columns"][c][own])
        assert x["columns"][c].dtype == y["columns"][c].dtype


FUZZ = """
import collections, faulthandler, json, sys, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from iceaggr.data import IceCubeDataset
from iceaggr.engine.prepare import prepare
from iceaggr.testing import write_tiny
from iceaggr.common import DataError
warnings.simplefilter("ignore")
folder, form, name, checksums = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
n, seed = int(sys.argv[5]), int(sys.argv[6])
root = write_tiny(folder / "data")
for path in [root / "train_meta.parquet", *(root / "train").iterdir()]:
    groups = (1 << 20, 10)[seed % 2]
    pd.read_parquet(path).to_parquet(path, write_page_checksum=checksums, row_group_size=groups)
if form == "prepared": root = prepare(root, folder / "prepared", progress=False)
before, path = list(IceCubeDataset(root)), root / name
good, rng, found = path.read_bytes(), np.random.default_rng(seed), collections.Counter()
for i in range(n):
    data, at, some = bytearray(good), int(rng.integers(len(good))), int(rng.integers(1, 20))
    kind = ("bit", "byte", "bytes", "cut", "doubled", "short", "swapped")[i % 7]
    if kind == "bit": data[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte": data[at] = int(rng.integers(256))
    elif kind == "bytes":
        data[at:at + some] = rng.integers(0, 256, len(data[at:at + some]), dtype=np.uint8).tobytes()
    elif kind == "cut": del data[at:at + some]
    elif kind == "doubled": data[at:at] = data[at:at + some]
    elif kind == "short": del data[at:]
    else:                                                         # two whole words, often of one column
        a = at // 8 * 8
        b = a + 8 * int(rng.integers(1, 8))
        data[a:a + 8], data[b:b + 8] = data[b:b + 8], data[a:a + 8]
    path.write_bytes(data)
    print(kind, at, some, i, file=sys.stderr)                     # the last one told where a crash happened
    faulthandler.dump_traceback_later(60, exit=True)              # a hang
    for skip in ("error", "skip"):
        try: events = list(ds := IceCubeDataset(root, on_bad_event=skip))
        except DataError: found[skip, "refused"] += 1; continue
        at_hand = {int(e["event_id"]): e for e in events}
        assert len(at_hand) == len(events)
        assert all(len(e["pulse_features"]) == e["n_pulses"] > 0 for e in events)
        flat = torch.cat([e["pulse_features"] for e in events]) if events else torch.ones(1, 4)
        assert torch.isfinite(flat).all() and (flat[:, 1] > 0).all() and flat[:, 0].min() >= 0
        assert flat[:, 2].min() >= 0 and flat[:, 2].max() < 5160
        pairs = [(e, at_hand[int(e["event_id"])]) for e in before if int(e["event_id"]) in at_hand]
        equal = all(torch.equal(e[k], b[k]) for e, b in pairs for k in e)
        if skip == "error": whole = len(events) == len(before)
        else: whole = len(events) + len(ds.skipped) >= len(before) or ds.skipped.event_id.isna().any()
        found[skip, "same" if equal and whole else "other"] += 1
    faulthandler.cancel_dump_traceback_later()
print(json.dumps({" ".join(k): v for k, v in found.items()}))
"""


def fuzz(folder, form, name, checksums, n, seed):
    "Read a file damaged in n ways, in its own process: how often refused, the same events, others."
    run = subprocess.run(
        [sys.executable, "-c", FUZZ, *map(str, (folder, form, name, checksums, n, seed))],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2_000:]
    found = json.loads(run.stdout)
    print(name, checksums, found)
    assert sum(found.values()) == 2 * n and found["error refused"] > n / 4
    return found


FUZZED = [
    ("kaggle", "train/batch_3.parquet", True),
    ("kaggle", "train/batch_3.parquet", False),
    ("kaggle", "train_meta.parquet", True),
    ("kaggle", "train_meta.parquet", False),
    ("prepared", "train/batch_3.pulses.arrow", True),
    ("prepared", "train/batch_3.doms.arrow", True),
    ("prepared", "train/batch_3.events.arrow", True),
]


@pytest.mark.parametrize("form, name, checksums", FUZZED)
@pytest.mark.parametrize("n", [40, pytest.param(3_000, marks=pytest.mark.slow)])
def test_damaged_files_never_give_wrong_events_in_silence(tmp_path, form, name, checksums, n):
    "With checksums: refused, or the same events. Without: no crash, no hang, only possible values."
    found = fuzz(tmp_path, form, name, checksums, n, 11)
    if checksums: assert not found.get("error other") and not found.get("skip other")
