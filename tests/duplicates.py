"""Tracks that are nearly the same, found by the network itself.

    python tests/duplicates.py music held-music --checkpoint out/mt2/checkpoint.pt

Each 4 s window is a vector: its class tokens, each of length 1. Likeness of two tracks: the best cosine of each window
among those of the other track, its mean over all windows, and the mean of both directions.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import probe  # noqa: E402


def likeness(x, owner):
    """x (windows, dim) unit vectors, owner (windows,) the track of each, 0 .. in order -> (tracks, tracks), -1..1."""
    begin, found = np.flatnonzero(np.diff(owner, prepend=-1)), []
    for windows in x.split(np.diff(begin, append=len(owner)).tolist()):
        found.append(np.maximum.reduceat((windows @ x.T).numpy(), begin, axis=1).mean(axis=0))
    return (np.array(found) + np.array(found).T) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+", help="folders of music or frame stores")
    parser.add_argument("--checkpoint", help="default: as for probe.py")
    parser.add_argument("--device", default="cpu", help="of the network")
    parser.add_argument("--top", type=int, default=20, help="pairs to print")
    args = parser.parse_args()
    (_, model), names, vectors, owners = probe.open_model(args), [], [], []
    for store in data.open_data(args.data):
        long = np.flatnonzero(store.lengths >= data.SEGMENT)
        items = probe.embeddings(model, [store.track(i) for i in long], args.device, windows=True)
        parts = [F.normalize(items[name], dim=1) for name in model.tokens]
        vectors.append(F.normalize(torch.cat(parts, dim=1), dim=1))
        owners.append(items["track"] + len(names))
        names += [store.paths[i] for i in long]
    alike = likeness(torch.cat(vectors), np.concatenate(owners))
    first, second = np.triu_indices(len(names), 1)
    pairs = alike[first, second]
    print(f"{len(names)} tracks; likeness {np.median(pairs):.2f} (median), {np.percentile(pairs, 99.9):.2f} (99.9 %)")
    for n in np.argsort(-pairs)[:args.top]:
        print(f"{pairs[n]:.3f}  {names[first[n]]}  {names[second[n]]}")


if __name__ == "__main__":
    data.run_cli(main)
