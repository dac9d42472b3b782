"""Real recordings: zero-shot keys and retrieval for several checkpoints at once, mean and deviation over them.

    python tests/real.py excerpts --keys held_majority.csv held_agreed.csv --checkpoint out/real-*/checkpoint.pt
    python tests/real.py excerpts --keys held_majority.csv --checkpoint tests/weights/mt2.pt --tuning 432 436 444 448

Key signature and key in % on each CSV (columns file,key), beside the template and one untrained network a checkpoint
(seeds 0, 1, ...; a checkpoint may be named three times). Retrieval: two excerpts of a track, NAME_a and NAME_b; top-1
accuracy of finding the other one among all excerpts of the other kind, by the cosine of mean features, both ways.
--tuning: keys of the recordings resampled so that A4 is at these Hz.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import probe  # noqa: E402
from model import load_checkpoint  # noqa: E402


def key_columns(outputs, truths, numbers):
    """{column: score in %} of outputs (tracks, 12 or 24). truths {name: keys}, numbers {name: rows of outputs}."""
    metrics = ("signature", "accuracy") if outputs.shape[1] == 24 else ("signature",)
    return {f"{name} {metric}": 100 * probe.Keys.metrics[metric](outputs[numbers[name]], truth)
            for name, truth in truths.items() for metric in metrics}


def rows_of(model, tracks, prefix, device):
    """{row: (tracks, dim)}: mean features of one network, or of the raw spectrograms (model None)."""
    items, order = probe.extract(model, tracks, device), np.arange(len(tracks))
    return {prefix + name: probe.track_mean(x.float(), items.owner, order) for name, x in items.rows.items()}


def retuned(path, a4, front_end):
    """Frames of a recording as if its A4 were not at 440 Hz."""
    wave = data.resample([data.read_audio(path)], 10 * round(data.SAMPLE_RATE * a4 / 4400), data.SAMPLE_RATE)
    return data.audio_to_frames(wave, front_end)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--keys", nargs="+", required=True)
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--tuning", nargs="+", type=float, default=[])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    store, truths, numbers = data.prepare_folders([args.folder]), {}, {}
    labels = {Path(path).stem: data.read_labels(path, "key", store.paths) for path in args.keys}
    paths = sorted(set().union(*labels.values()))                          # excerpts with a key in one of the CSVs
    tracks = [store.track(store.paths.index(name)) for name in paths]
    for name, keys in labels.items():
        numbers[name] = np.array([i for i, path in enumerate(paths) if data.parse_key(keys.get(path, "")) is not None])
        truths[name] = np.array([data.parse_key(keys[paths[i]]) for i in numbers[name]])
    stems = {Path(path).stem: i for i, path in enumerate(paths)}
    pairs = [(i, stems[stem[:-1] + "b"]) for stem, i in stems.items() if stem.endswith("_a") and stem[:-1] + "b" in stems]
    first, second = map(list, zip(*pairs))

    table = {"key template": [key_columns(probe.template_rows(tracks), truths, numbers)]}
    retunings, front_end = {}, data.FrontEnd()
    for a4 in args.tuning:
        retunings[a4] = [retuned(Path(args.folder).resolve().parent / path, a4, front_end) for path in paths]
        row = key_columns(probe.template_rows(retunings[a4]), truths, numbers)
        table[f"key template, A = {a4:g} Hz"] = [row]
    for seed, path in enumerate(args.checkpoint):
        model = load_checkpoint(path, args.device)
        for prefix, network in (("", model), ("untrained ", probe.untrained(model, args.device, seed=seed))):
            if model.key_token():
                row = key_columns(probe.key_probabilities(network, tracks, args.device).numpy(), truths, numbers)
                table.setdefault(f"{prefix}{model.key_token()} zero-shot", []).append(row)
            for name, x in rows_of(network, tracks, prefix, args.device).items():
                table.setdefault(name, []).append({"retrieval": 100 * probe.retrieval(x[first], x[second])[0]})
        for a4, frames in retunings.items() if model.key_token() else ():
            row = key_columns(probe.key_probabilities(model, frames, args.device).numpy(), truths, numbers)
            table.setdefault(f"{model.key_token()}, A = {a4:g} Hz", []).append(row)
    for name, x in rows_of(None, tracks, "", args.device).items():
        table[name] = [{"retrieval": 100 * probe.retrieval(x[first], x[second])[0]}]
    print(f"{len(args.checkpoint)} networks; retrieval among {len(pairs)} tracks")
    for name, rows in table.items():
        cells = [f"{column} {np.mean(values):.1f} ±{np.std(values):4.1f}" for column in rows[0]
                 if (values := [row[column] for row in rows])]
        print(f"{name:30} {'   '.join(cells)}")


if __name__ == "__main__":
    data.run_cli(main)
