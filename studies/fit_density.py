"""Train the head of densities of a finished model, all else frozen, and calibrate its regions.

    python studies/fit_density.py WEIGHTS OUT --events DIR:1,2 [DIR:3 ...] [--count 1 5 ...]

Each event passes the model once; then the head learns in minutes. Each tenth event is kept for the
calibration. With --count, the events of each DIR count so much."""
import argparse
from pathlib import Path

from fit_confidence import read_part

from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer
from iceaggr.sky_density import fit_density


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("out", type=Path)
    parser.add_argument("--events", type=read_part, nargs="+", required=True, metavar="DIR:FILES")
    parser.add_argument("--count", type=float, nargs="+", help="weight of an event of each DIR; default 1")
    args = parser.parse_args()
    model = HierarchicalTransformer.load(args.weights)
    datasets = [IceCubeDataset(folder, batch_ids=files) for folder, files in args.events]
    fit_density(model, datasets, args.count)
    model.save(args.out)
    factor, power = model.t2.sky.calibration.tolist()
    print(f"{args.out}: factor {factor:.3f}, power {power:.3f}")


if __name__ == "__main__": main()
