"""Zero-shot key taken apart: variants of the key template, or a network's crops and offsets.

    python tests/keys.py excerpts held_majority.csv pop909 keys.csv
    python tests/keys.py excerpts held_majority.csv --checkpoint out/mt2/checkpoint.pt
    python tests/keys.py --profiles

Pairs of a folder and a CSV (columns file,key), one column each: key signature (key) in %. Of a network also: offsets,
tracks by their output before calibration minus the true signature, in semitones; and over windows the share of crop
pairs in which the output turns with the crop, the share of the most frequent output at the middle crop, the mean |z|.
--profiles prints the profiles of losses.py, measured on the synthetic songs.
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
from losses import CPSD, KEY_PROFILES, centred, circle_point, sum_relatives  # noqa: E402
from model import load_checkpoint  # noqa: E402

ALBRECHT = ([.238, .006, .111, .006, .137, .094, .016, .214, .009, .080, .008, .081],
            [.220, .006, .104, .123, .019, .103, .012, .214, .062, .022, .061, .052])
PROFILES = {  # major, minor, from the tonic
    "Albrecht and Shanahan 2013": ALBRECHT, "the square root of these": tuple(np.sqrt(pair) for pair in ALBRECHT),
    "Krumhansl and Kessler 1982": ([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88],
                                   [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]),
    "Temperley 2001": ([.748, .060, .488, .082, .670, .460, .096, .715, .104, .366, .057, .400],
                       [.712, .084, .474, .618, .049, .460, .105, .747, .404, .067, .133, .330])}
VARIANTS = {"as in losses.template_keys": {}, "peaks and whitening alone": dict(deviation=np.inf, fifth=0.0),
            "no harmonic subtracted": dict(fifth=0.0), "fifth harmonic 0.1": dict(fifth=0.1),
            "fifth harmonic 0.3": dict(fifth=0.3), "third harmonic 0.3 instead": dict(fifth=0.0, third=0.3),
            "third harmonic 0.15 too": dict(third=0.15), "bell of 20 bins": dict(deviation=20),
            "bell of 30 bins": dict(deviation=30), "square root of the level": dict(power=0.5),
            "square of the level": dict(power=2), "no peaks: every bin": dict(peaks=False)}
VARIANTS |= {name: dict(profiles=pair) for name, pair in PROFILES.items()}


def cqt_of(track):
    """(frames, 224) uint8 -> (1, frames, 96) in [0, 1]."""
    return torch.from_numpy(track[None, :, :data.N_BINS].astype(np.float32) / 255)


def rotated(profiles):
    """Two profiles of 12 -> (24, 12), as losses.KEY_PROFILES."""
    return torch.stack([torch.as_tensor(p, dtype=torch.float32).roll(tonic) for p in profiles for tonic in range(12)])


def template(cqt, profiles=None, **options):
    """losses.template_keys with its numbers as arguments: cqt (1, frames, 96) in [0, 1] -> correlations (1, 24)."""
    return centred(chroma(cqt, **options)) @ centred(KEY_PROFILES if profiles is None else rotated(profiles)).T


def chroma(cqt, deviation=24, fifth=0.2, third=0.0, power=1.0, peaks=True):
    """The chroma of losses.template_keys: (1, frames, 96) -> (1, 12), C = 0."""
    x = cqt ** power
    x = x.where(x >= F.max_pool1d(x, 3, stride=1, padding=1), 0) if peaks else x
    white = (x - F.avg_pool1d(x, 13, 1, 6, count_include_pad=False)).clamp(min=0)
    harmonics = third * F.pad(white[..., :-19], (19, 0)) + fifth * F.pad(white[..., :-28], (28, 0))
    spectrum = (white - harmonics).clamp(min=0).mean(dim=1)                # (1, 96)
    bell = torch.exp(-((torch.arange(cqt.shape[-1]) - cqt.shape[-1] / 2) / deviation) ** 2 / 2)
    return (spectrum * bell).unflatten(-1, (-1, 12)).mean(dim=1).roll(9, dims=-1)


def measured_profiles(tracks, start):
    """One step of EM, no labels: the mean chroma of each mode, (2, 12) with sums 1, every track turned to C.

    A track counts for each of the 24 keys as much as the template with the profiles `start` has it likely.
    """
    x = torch.cat([chroma(cqt_of(t)) for t in tracks])
    likely = (CPSD.SHARPNESS * centred(x) @ centred(rotated(start)).T).softmax(dim=-1)          # (tracks, 24)
    x = x / x.sum(dim=1, keepdim=True)                                                          # (tracks, 12)
    sums = torch.stack([likely[:, key] @ x.roll(-(key % 12), dims=1) for key in range(24)])     # (24, 12)
    return F.normalize(sums.unflatten(0, (2, 12)).sum(dim=1), p=1, dim=-1)


def text(outputs, truth):
    """'81.2 (78.2)': key signature and, of 24 outputs, key, in %."""
    scores = [100 * probe.Keys.metrics[name](outputs, truth) for name in ("signature", "accuracy")]
    return "{:.1f} ({:.1f})".format(*scores) if outputs.shape[1] == 24 else f"{scores[0]:.1f}"


@torch.inference_mode()
def turning(model, tracks):
    """'turns 84 %, one output 12 %, |z| 0.84' of all windows, at crops 3, 6 and 8."""
    name, crops, found = model.key_token(), (3, 6, 8), []
    for _, batch in probe.batches_of(probe.windows_of(tracks)[2]):
        tokens = [model(*probe.views_of(batch, "cpu", crop))[0][name] for crop in crops]
        found.append(sum_relatives(model.tasks[name].log_keys(torch.stack(tokens))))        # (3, n, 12)
    profiles = torch.cat(found, dim=1)
    best = profiles.argmax(dim=-1) + torch.tensor(crops)[:, None]          # crop c: c semitones lower
    turns = np.mean([((best[a] - best[b]) % 12 == 0).float().mean().item() for a, b in ((0, 1), (1, 2), (0, 2))])
    most = torch.bincount(profiles[1].argmax(dim=-1)).max() / profiles.shape[1]
    length = torch.hypot(*circle_point(profiles[1], 7)).mean()
    return f"turns {100 * turns:.0f} %, one output {100 * most:.0f} %, |z| {length:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="FOLDER CSV")
    parser.add_argument("--profiles", action="store_true")
    parser.add_argument("--checkpoint", nargs="+", default=[])
    args = parser.parse_args()
    if args.profiles:
        store, = data.open_data(["synth"])
        tracks = [store.track(i) for i in range(len(store.lengths))]
        profiles = measured_profiles(tracks, np.sqrt(ALBRECHT))
        return print(*(" ".join(f"{p:.3f}" for p in row) for row in profiles), sep="\n")
    if not args.sets or len(args.sets) % 2:
        raise data.InputError("give pairs of a folder and a CSV")
    sets = {}                                                              # {csv: (tracks, keys)}
    for folder, path in zip(args.sets[::2], args.sets[1::2]):
        store = data.prepare_folders([folder])
        keys = {name: data.parse_key(key) for name, key in data.read_labels(path, "key", store.paths).items()}
        numbers = [i for i, name in enumerate(store.paths) if keys.get(name) is not None]
        sets[Path(path).stem] = [store.track(i) for i in numbers], np.array([keys[store.paths[i]] for i in numbers])
    rows = {}
    if not args.checkpoint:
        cqts = {name: [cqt_of(t) for t in tracks] for name, (tracks, _) in sets.items()}
        for title, options in VARIANTS.items():
            rows[title] = [text(torch.cat([template(x, **options) for x in cqts[name]]).numpy(), truth)
                           for name, (_, truth) in sets.items()]
    for path in args.checkpoint:
        model = load_checkpoint(path)
        if model.key_token() is None:
            raise data.InputError(f"{path}: has no key token; give one that was trained with --tokens skey or cpsd")
        turn = probe.calibrate(model, "cpu")
        for tracks, truth in sets.values():
            for crops in ([probe.PITCH_CROP], range(0, 13, 3), range(13)):
                outputs = probe.key_outputs(model, tracks, "cpu", crops)
                keys = probe.transpose(outputs, -turn)
                keys = torch.cat([keys[:, :12], keys[:, 12:].roll(9, dims=1)], dim=1)
                rows.setdefault(f"{path}, {len(crops)} crops", []).append(text(keys.numpy(), truth))
            best = outputs.unflatten(-1, (-1, 12)).sum(dim=1).argmax(dim=1).numpy()
            offsets = np.bincount((best - probe.SIGNATURES[truth]) % 12, minlength=12)
            rows.setdefault(f"{path}, offsets", []).append(" ".join(map(str, offsets)))
            rows.setdefault(path, []).append(turning(model, tracks))
    print(" " * 40, *(f"{name:>15}" for name in sets))
    for title, cells in rows.items():
        print(f"{title:40}", *(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    data.run_cli(main)
