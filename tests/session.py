"""A reader's session: what of it is compared, and a short call of each function that could change it."""
import contextlib
import copy
import importlib
import io
import os
import pkgutil
import random
import re
import signal
import sys
import tempfile
import warnings
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch

import iceaggr
from iceaggr import (
    attention_maps,
    augmentation,
    benchmark,
    display,
    evaluation,
    geometry,
    report,
    sky_density,
    skymap,
    style,
    training,
)
from iceaggr.browser import EventBrowser
from iceaggr.data import IceCubeDataset
from iceaggr.line_fit import line_fit, line_fit_events
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation import dataset as simulation
from iceaggr.simulation import light, neutrinos
from iceaggr.studies import ablations, baselines, detector_faults
from iceaggr.training import TrainSettings
from iceaggr.yardsticks import pile_up

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)
SETTINGS = TrainSettings(epochs=1, batch_size=16, held_out=4, valid_events=20)
CAN_CHANGE = ("plot_", "display_", "save_display", "EventBrowser", "LiveCurves", "new_axes", "predict",
              "simulate_", "demo_", "detect$", "sample_neutrinos", "propagate_", "cascade_light", "line_fit",
              "train$", "train_step", "fit", "loss_backward", "validate$", "calibrate$", "evaluate",
              "perturb", "compare_", "run_", "pile_up", ".*_attention$")


def session_state():
    "What belongs to the session."
    _, numbers, *place = np.random.get_state()
    return {
        "matplotlib's settings": {k: v for k, v in dict.items(matplotlib.rcParams) if k != "backend"},
        "matplotlib's interactive flag": matplotlib.is_interactive(),
        "pandas options": copy.deepcopy(pd.options.d),
        "warning filters": list(warnings.filters),
        "numpy's settings": (np.geterr(), np.get_printoptions()),
        "threads": torch.get_num_threads(),
        "precision": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "default device": str(torch.get_default_device()),
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "Python's random numbers": random.getstate(),
        "numpy's random numbers": (numbers.tobytes(), place),
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "working directory": os.getcwd(),
        "environment": dict(os.environ),
        "import path": list(sys.path),
        "signal handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "standard streams": (sys.stdout, sys.stderr),
    }


def differences(before, after):
    "Names of what differs."
    return [name for name in before if before[name] != after[name]]


def could_change_a_session():
    "Names of the public functions that plot, predict, simulate or train, as module.name."
    names = []
    for module in pkgutil.walk_packages(iceaggr.__path__, "iceaggr."):
        public = importlib.import_module(module.name)
        home = module.name.removeprefix("iceaggr.")
        names += [f"{home}.{name}" for name in getattr(public, "__all__", [])
                  if getattr(public, name).__class__ in (type, type(line_fit))
                  and getattr(public, name).__module__ == module.name
                  and any(re.match(start, name) for start in CAN_CHANGE)]
    return names


MADE_FOR_OTHERS = ["model", "event", "sensor_id", "batch", "truth", "predictions", "optimizer"]


class Given:
    "What the calls take; each thing is made on first use."
    @cached_property
    def folder(self): return Path(tempfile.mkdtemp())

    @cached_property
    def root(self):
        options = dict(seed=5, events_per_file=40, mix="ppc", workers=1, progress=False)
        return simulation.simulate_dataset(self.folder / "data", 80, **options)

    @cached_property
    def data(self): return IceCubeDataset(self.root, batch_ids=[1])

    @cached_property
    def geometry(self): return self.data.geometry

    @cached_property
    def model(self): return HierarchicalTransformer(TINY, self.geometry).eval()

    @cached_property
    def event(self): return self.data[int(self.data.n_pulses.argmax())]

    @cached_property
    def sensor_id(self): return int(self.event["pulse_features"][:, 2].mode().values)

    @cached_property
    def batch(self): return collate_dom_packing(self.data.__getitems__(range(8)))

    @cached_property
    def maps(self): return attention_maps.dom_attention(self.model, self.event, self.sensor_id)

    @cached_property
    def event_maps(self): return attention_maps.event_attention(self.model, self.event)

    @cached_property
    def truth(self): return evaluation.event_truth(self.data, self.root)

    @cached_property
    def predictions(self): return predict_dataset(self.model, self.data, progress=False)

    @cached_property
    def errors(self):
        return evaluation.event_errors(self.predictions, self.truth, line_fit_events(self.data))

    @cached_property
    def metrics(self): return evaluation.metrics_of(self.errors)

    @cached_property
    def log(self):
        return pd.DataFrame(1.0, index=range(3), columns=training.LOG_COLUMNS)

    @cached_property
    def rng(self): return np.random.default_rng(0)

    @cached_property
    def detector(self): return light.Detector(self.geometry)

    @cached_property
    def optimizer(self): return training.MuonAdamW(self.model, 1e-3)

    def complete(self, names=None):
        "Make these things now, or all: making draws random numbers, a call must not."
        for name in names or [k for k, v in vars(Given).items() if isinstance(v, cached_property)]:
            getattr(self, name)
        return self

    def new_path(self, name):
        "A path that does not exist yet."
        return Path(tempfile.mkdtemp(dir=self.folder)) / name

    def axes(self):
        "New axes."
        import matplotlib.pyplot as plt
        return plt.subplots()[1]


def _save_static(g):
    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    for ending in ("pdf", "svg"): display.save_display(figure, g.new_path(f"event.{ending}"))


def _fit(g):
    run = g.new_path("run")
    run.mkdir()
    training.fit(copy.deepcopy(g.model), g.data, g.data, run, SETTINGS, progress=False)


def _train_settings(g): return dict(settings=SETTINGS, train_batches=[1], valid_batches=[2], progress=False)


def _run_benchmarks(g):
    with contextlib.redirect_stdout(io.StringIO()):
        benchmark.run_benchmarks(g.root, preset="small", device="cpu", quick=True, only=["packing"])


def _all_directions(directions): # ln of a density that is the same everywhere
    return np.full(len(directions), -np.log(4 * np.pi))


PLOTS = {
    "skymap.plot_map": lambda g: skymap.plot_map(skymap.sky_map(_all_directions, np.eye(3)[:1], [0.0])),
    "attention_maps.plot_pulse_train": lambda g: attention_maps.plot_pulse_train(g.axes(), g.maps),
    "attention_maps.plot_pooling": lambda g: attention_maps.plot_pooling(g.axes(), g.maps),
    "attention_maps.plot_head": lambda g: attention_maps.plot_head(g.axes(), g.maps.weights[0, 0], 1.),
    "attention_maps.plot_dom": lambda g: attention_maps.plot_dom(g.model, g.event, g.sensor_id),
    "attention_maps.plot_intervals": lambda g: attention_maps.plot_intervals(g.event_maps, [(0, 0), (0, 1)]),
    "attention_maps.plot_event_pooling":
        lambda g: attention_maps.plot_event_pooling(g.event_maps, g.geometry, g.event["target"]),
    "browser.EventBrowser": lambda g: EventBrowser(g.root, {"model": g.predictions}),
    "display.plot_event": lambda g: display.plot_event(g.event, g.geometry),
    "display.display_event":
        lambda g: display.display_event(g.event, g.geometry, panels=True)._repr_mimebundle_(),
    "display_page.save_display": _save_static,
    "evaluation.plot_errors": lambda g: evaluation.plot_errors(g.errors),
    "evaluation.plot_binned": lambda g: evaluation.plot_binned(g.metrics, "n_pulses"),
    "evaluation.plot_types": lambda g: evaluation.plot_types(g.metrics),
    "evaluation.plot_calibration": lambda g: evaluation.plot_calibration(g.errors, g.metrics),
    "evaluation.plot_angles": lambda g: evaluation.plot_angles(g.errors),
    "geometry.plot_top_view": lambda g: geometry.plot_top_view(g.geometry),
    "geometry.plot_side_view": lambda g: geometry.plot_side_view(g.geometry),
    "geometry.plot_detector_3d": lambda g: geometry.plot_detector_3d(g.geometry)._repr_mimebundle_(),
    "geometry.plot_ice": lambda g: geometry.plot_ice(),
    "report.evaluate_dataset":
        lambda g: report.evaluate_dataset(g.predictions, g.root, g.new_path("report"), progress=False),
    "style.new_axes": lambda g: style.new_axes(2),
    "training.plot_log": lambda g: training.plot_log(g.log),
    "training.LiveCurves": lambda g: training.LiveCurves()(g.log),
}
OTHERS = {
    "sky_density.fit_density": lambda g: sky_density.fit_density(g.model, g.data, epochs=1, progress=False),
    "attention_maps.dom_attention": lambda g: attention_maps.dom_attention(g.model, g.event, g.sensor_id),
    "attention_maps.event_attention": lambda g: attention_maps.event_attention(g.model, g.event),
    "augmentation.perturb": lambda g: augmentation.perturb(g.batch),
    "benchmark.run_benchmarks": _run_benchmarks,
    "evaluation.evaluate": lambda g: evaluation.evaluate(g.predictions, g.truth),
    "line_fit.line_fit": lambda g: line_fit(g.event["pulse_features"].numpy(), g.geometry.xyz),
    "line_fit.line_fit_events": lambda g: line_fit_events(g.data),
    "model.HierarchicalTransformer.from_pretrained":
        lambda g: HierarchicalTransformer.from_pretrained("small"),
    "model.HierarchicalTransformer.predict": lambda g: g.model.predict(g.batch),
    "model.predict_dataset": lambda g: predict_dataset(g.model, g.data, progress=False),
    "simulation.dataset.demo_dataset": lambda g: simulation.demo_dataset(20),
    "simulation.dataset.simulate_dataset": lambda g: simulation.simulate_dataset(
        g.new_path("data"), 20, geometry="small", progress=False),
    "simulation.dataset.simulate_events": lambda g: simulation.simulate_events(5),
    "simulation.neutrinos.propagate_muons": lambda g: neutrinos.propagate_muons(g.rng, np.array([1e3])),
    "studies.ablations.predict_rotated": lambda g: ablations.predict_rotated(g.model, g.data, progress=False),
    "studies.baselines.fit_tracks": lambda g: baselines.fit_tracks(g.data, [0], starts=1, progress=False),
    "studies.detector_faults.compare_faults":
        lambda g: detector_faults.compare_faults(g.model, g.data, g.truth),
    "training.calibrate": lambda g: training.calibrate(g.model, g.data, np.arange(40)),
    "training.fit": _fit,
    "training.loss_backward": lambda g: training.loss_backward(g.model, g.batch, SETTINGS),
    "training.predict_with_truth": lambda g: training.predict_with_truth(g.model, g.data),
    "training.train": lambda g: training.train(g.root, g.new_path("run"), TINY, **_train_settings(g)),
    "training.train_step": lambda g: training.train_step(g.model, g.optimizer, g.batch, SETTINGS, 1e-3),
    "training.validate": lambda g: training.validate(g.model, g.data),
    "yardsticks.pile_up": lambda g: pile_up(g.data.__getitems__(range(40)), 2_000, 500),
}
COVERED = {     # called by the function named
    "simulation.dataset.detect": "simulation.dataset.simulate_events",
    "simulation.light.cascade_light": "simulation.dataset.simulate_events",
    "simulation.neutrinos.sample_neutrinos": "simulation.dataset.simulate_events",
    "studies.baselines.fit_track": "studies.baselines.fit_tracks",
}
