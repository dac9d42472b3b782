"""What did it learn? Frozen features, judged by one linear layer, beside the rows that learned nothing.

    python probe.py synth --checkpoint out/mt2/checkpoint.pt        the embedded songs (default: the newest run)
    python probe.py folders --data DIR                              your recordings, one sub-folder per class
    python probe.py folders --data DIR --group "^[a-z]+"            ... soundfont, artist or album kept on one side
    python probe.py key SONG_OR_FOLDER...                           key signature, no labels needed
    python probe.py key FOLDER --labels keys.csv                    ... scored against a CSV with columns file,key

The protocol. A track is cut into 4 s windows that do not overlap; a feature is taken from each window at the network's
last layer and averaged over the track, so that no window of a track can be in another split than the rest of it. One
linear layer is trained on the features with Adam. Standardisation is fitted on the training tracks; the stopping point
is the best validation accuracy (with few labels the loss rises while the accuracy still grows); the test tracks are
predicted once. Five seeds (initial weights, and the draw of the labelled tracks or of the split), mean and standard
deviation. Every readout is a row; none is picked.

    cpsd, ntxent ...   each class token           average, concat    of the class tokens
    sequence mean      of the frames' tokens      all tokens mean    of class tokens and frames' tokens
    untrained ...      the same readouts of the same network with random weights
    raw                mean and deviation over time of the very spectrograms the network sees

A row is evidence only if it beats raw and untrained: pooled spectrograms already tell a linear layer a lot.
"""
import argparse
import csv
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (DYNAMIC_RANGE, FMIN, HOP, MAX_CROP, N_BINS, PITCH_CROP, SAMPLE_RATE, SEGMENT, SYNTH_SONGS, SYNTH_SPLITS, TIMBRES,
                  FrontEnd, InputError, audio_to_frames, compose, crop_views, find_audio, prepare_folders, prepare_synth,
                  read_audio, render_note, run_cli)
from model import MT2, load_checkpoint, pick_amp

SEEDS = 5
PROBE_STEPS, PROBE_LR, PROBE_BATCH = 500, 1e-3, 2048  # rate: CoJEPA; steps: our choice, past the best validation score
KEY_NAMES = "C Db D Eb E F Gb G Ab A Bb B".split()
# How well each pitch class fits C major and C minor, as listeners rated it (Krumhansl and Kessler 1982).
KRUMHANSL = {"major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
             "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)}

# ---------------------------------------------------------------- features


def cut_windows(frames):
    """(frames, 224) uint8 of a track -> (windows, 126, 224). A track under 4 s is one window, padded with silence."""
    if len(frames) < SEGMENT:
        frames = np.pad(frames, ((0, SEGMENT - len(frames)), (0, 0)))
    return torch.from_numpy(np.array(frames[:len(frames) // SEGMENT * SEGMENT])).view(-1, SEGMENT, frames.shape[1])


def window_batches(tracks, size=128):
    """Iterate over tracks [(frames, 224) uint8]; yields (windows <= size, 126, 224), windows of many tracks together."""
    waiting, count = [], 0
    for frames in tracks:
        waiting.append(cut_windows(frames))
        count += len(waiting[-1])
        while count >= size:
            pending = torch.cat(waiting)
            yield pending[:size]
            waiting, count = [pending[size:]], count - size
    if count:
        yield torch.cat(waiting)


def views_of(windows, device, crop=PITCH_CROP):
    """(windows, 126, 224) uint8 -> cqt (windows, 126, 84), mel (windows, 126, 128) on the device, at one crop."""
    windows = windows.to(device)
    return crop_views(windows, torch.full((len(windows),), crop, device=device))


def autocast(device):
    """The precision the network was trained in."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_amp(device)[0])


@torch.inference_mode()
def extract(model, tracks, device, per_frame=False, progress=None):
    """Features of every window. tracks: [(frames, 224) uint8].

    Returns ({row: (windows, dim)}, owner), owner (windows,) the index of each window's track. With `per_frame` only
    {"sequence": (windows, 126, dim)}. A `model` of None gives the raw rows.
    """
    owner = np.repeat(np.arange(len(tracks)), [max(1, len(t) // SEGMENT) for t in tracks])
    rows = {}
    for windows in window_batches(tqdm(tracks, desc=progress, unit="track", disable=progress is None)):
        cqt, mel = views_of(windows, device)
        if model is None:
            both = torch.cat([cqt, mel], dim=-1)                                     # (windows, 126, 212)
            features = {"raw": both if per_frame else torch.cat([both.mean(dim=1), both.std(dim=1)], dim=-1)}
        else:
            depth = model.config["depth"]
            with autocast(device):
                tokens, layers = model(cqt, mel, layers=(depth,))
            sequence = layers[depth].float()                                         # (windows, 126, dim)
            tokens = {name: token.float() for name, token in tokens.items()}         # (windows, dim) each
            every = torch.stack(list(tokens.values()))                               # (tokens, windows, dim)
            features = {"sequence": sequence} if per_frame else dict(tokens)
            if not per_frame:
                if len(tokens) > 1:
                    features |= {"average": every.mean(dim=0), "concat": torch.cat(list(tokens.values()), dim=-1)}
                features["sequence mean"] = sequence.mean(dim=1)
                features["all tokens mean"] = torch.cat([every.transpose(0, 1), sequence], dim=1).mean(dim=1)
        for name, value in features.items():
            rows.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in rows.items()}, owner


def track_means(rows, owner):
    """{row: (windows, dim)} -> {row: (tracks, dim)}, the mean over each track's windows."""
    owner = torch.from_numpy(owner)
    count = torch.bincount(owner)[:, None]
    return {name: torch.zeros(len(count), x.shape[1]).index_add_(0, owner, x) / count for name, x in rows.items()}


def untrained(model, device):
    """The same network with fresh random weights: what the architecture alone is worth."""
    torch.manual_seed(0)
    return MT2(**model.config).to(device).eval()


def all_rows(model, tracks, device, **options):
    """Rows of the trained network, of the untrained one, and raw: ({row: (windows, ...)}, owner)."""
    trained, owner = extract(model, tracks, device, **options, progress="features")
    random = extract(untrained(model, device), tracks, device, **options, progress="untrained")[0]
    raw = extract(None, tracks, device, **options)[0]
    return trained | {f"untrained {name}": value for name, value in random.items()} | raw, owner


# ---------------------------------------------------------------- the linear probe


def linear_probe(x, y, splits, classes):
    """One linear layer per seed, all seeds at once. Returns test accuracy (seeds,).

    x (items, dim) float, y (items,) int64; splits: per seed (train, valid, test) index arrays, of equal sizes over
    seeds for train. Scaler: mean and deviation of each seed's own training items. Weights of the best validation accuracy.
    """
    train = torch.stack([torch.as_tensor(t) for t, _, _ in splits])                  # (seeds, n)
    picked = x[train]                                                                # (seeds, n, dim)
    mean, deviation = picked.mean(dim=1, keepdim=True), picked.std(dim=1, keepdim=True) + 1e-6
    generator = torch.Generator().manual_seed(0)
    weight = (1e-3 * torch.randn(len(splits), x.shape[1], classes, generator=generator)).requires_grad_()
    bias = torch.zeros(len(splits), 1, classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=PROBE_LR)
    inputs, labels = (picked - mean) / deviation, y[train]
    del picked
    valid = [((x[v] - mean[s]) / deviation[s], y[v]) for s, (_, v, _) in enumerate(splits)]
    best_score = torch.full((len(splits),), -torch.inf)
    best_weight, best_bias = weight.detach().clone(), bias.detach().clone()
    for step in range(PROBE_STEPS + 1):
        if step % 10 == 0:
            with torch.no_grad():
                right = [(v @ weight[s] + bias[s]).argmax(dim=-1) == target for s, (v, target) in enumerate(valid)]
                score = torch.stack([r.float().mean() for r in right])               # (seeds,)
                better = (score > best_score)[:, None, None]
                best_score = torch.maximum(score, best_score)
                best_weight, best_bias = torch.where(better, weight, best_weight), torch.where(better, bias, best_bias)
        batch, target = inputs, labels
        if inputs.shape[1] > PROBE_BATCH:
            chosen = torch.randint(inputs.shape[1], (PROBE_BATCH,), generator=generator)
            batch, target = inputs[:, chosen], labels[:, chosen]
        logits = torch.baddbmm(bias, batch, weight)                                  # (seeds, n, classes)
        # A mean per seed, summed over seeds: every seed sees the gradient it would see alone.
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten()) * len(splits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = []
    for s, (_, _, test) in enumerate(splits):
        logits = ((x[test] - mean[s]) / deviation[s]) @ best_weight[s] + best_bias[s]
        scores.append((logits.argmax(dim=-1) == y[test]).float().mean().item())
    return scores


def labelled_draws(pool, count, valid, test):
    """Per seed: `count` of the items in `pool` for training, the same validation and test items for all."""
    return [(np.sort(np.random.default_rng(seed).choice(pool, count, replace=False)), valid, test) for seed in range(SEEDS)]


def group_splits(groups):
    """Per seed, 60/20/20 % of the *groups* for training, validation and test; seeds rotate, so test groups change.

    groups: one name per item. With fewer groups than seeds some test groups come twice. Training sets are cut to one
    size. Raises InputError with fewer than three groups.
    """
    names = np.random.default_rng(0).permutation(sorted(set(groups)))
    if len(names) < 3:
        raise InputError(f"{len(names)} group(s) cannot be split in train, valid and test; give at least three files or groups")
    part, splits = max(1, round(0.2 * len(names))), []
    for seed in range(SEEDS):
        order = np.roll(names, -seed * max(1, len(names) // SEEDS))
        where = {name: 0 if i < part else 1 if i < 2 * part else 2 for i, name in enumerate(order)}
        side = np.array([where[g] for g in groups])
        splits.append([np.flatnonzero(side == k) for k in (2, 1, 0)])
    smallest = min(len(train) for train, _, _ in splits)
    cut = lambda train, seed: np.sort(np.random.default_rng(seed).permutation(train)[:smallest])
    return [(cut(train, seed), valid, test) for seed, (train, valid, test) in enumerate(splits)]


def retrieval(first, second, size=128):
    """Top-1 accuracy of finding a track's second excerpt among `size` by the cosine to its first, both ways.

    first, second (tracks, dim). One score per seed, which draws the tracks.
    """
    scores = []
    for seed in range(SEEDS):
        chosen = np.random.default_rng(seed).choice(len(first), min(size, len(first)), replace=False)
        cosine = F.normalize(first[chosen], dim=-1) @ F.normalize(second[chosen], dim=-1).T
        right = torch.arange(len(chosen))
        scores.append(((cosine.argmax(dim=1) == right).float().mean() + (cosine.argmax(dim=0) == right).float().mean()).item() / 2)
    return scores


# ---------------------------------------------------------------- key without labels


def pitch_fork():
    """A clip known to be in C major, (frames, 224): the cadence C F G C on four timbres. (STONE's calibration.)"""
    wave = torch.zeros(0)
    for timbre in ("organ", "strings", "pluck", "epiano"):
        for chord in ((48, 60, 64, 67), (41, 60, 65, 69), (43, 59, 62, 67), (48, 60, 64, 67)):
            notes = [render_note(TIMBRES.index(timbre), pitch, 1.0, 1.0, np.random.default_rng(0)) for pitch in chord]
            wave = torch.cat([wave, torch.from_numpy(np.sum(notes, axis=0)) * 0.1])
    return audio_to_frames([wave], FrontEnd())


@torch.inference_mode()
def pitch_profiles(model, tracks, device, crop=PITCH_CROP, progress=None):
    """Mean CPSD profile of each track's windows, (tracks, 12), at one crop; not calibrated."""
    owner = np.repeat(np.arange(len(tracks)), [max(1, len(t) // SEGMENT) for t in tracks])
    profiles = []
    for windows in window_batches(tqdm(tracks, desc=progress, unit="track", disable=progress is None)):
        with autocast(device):
            profiles.append(model.profile(model(*views_of(windows, device, crop))[0]["cpsd"]).cpu())
    return track_means({"profile": torch.cat(profiles)}, owner)["profile"]


def calibrate(model, device):
    """The class that stands for C major. CPSD is blind to one rotation of the circle: a single clip settles it.

    The fork is heard at all 13 crops, each turned back to the one in use, so that one odd answer does not decide.
    """
    fork = pitch_fork()
    turned = [torch.roll(pitch_profiles(model, [fork], device, crop)[0], crop - PITCH_CROP) for crop in range(MAX_CROP + 1)]
    return torch.stack(turned).mean(dim=0).argmax().item()


def key_signatures(model, tracks, device, progress=None):
    """(tracks, 12) profiles whose index is the tonic of the major key with that signature (0 = C), by the CPSD head."""
    return torch.roll(pitch_profiles(model, tracks, device, progress=progress), -calibrate(model, device), dims=1)


def template_signatures(tracks):
    """The classical answer: the 24 Krumhansl profiles against each track's mean chroma. (tracks,) key signatures."""
    fold = (np.arange(N_BINS) + round(12 * np.log2(FMIN / 440)) + 69) % 12           # pitch class of each CQT bin
    answers = []
    for frames in tracks:
        level = frames[:, :N_BINS].astype(np.float32) / 255
        magnitude = np.where(level > 0, 10 ** ((level - 1) * DYNAMIC_RANGE / 20), 0).mean(axis=0)
        chroma = np.bincount(fold, weights=magnitude, minlength=12)
        fits = [np.corrcoef(chroma, np.roll(KRUMHANSL[mode], tonic))[0, 1] for mode in ("major", "minor") for tonic in range(12)]
        best = int(np.nanargmax(fits)) if np.isfinite(fits).any() else 0
        answers.append(best if best < 12 else (best + 3) % 12)
    return np.array(answers)


def parse_key(text):
    """'F# minor', 'Bb:maj', 'a' ... -> 0..11 major, 12..23 minor (C = 0), or None when it names no single key."""
    match = re.fullmatch(r"([A-Ga-g])([#b]*)[\s:]*(maj(?:or)?|min(?:or)?|M|m)?", text.strip(), re.IGNORECASE)
    if not match:
        return None
    letter, accidentals, mode = match.groups()
    tonic = "C D EF G A B".index(letter.upper()) + accidentals.count("#") - accidentals.lower().count("b")
    minor = mode is not None and (mode == "m" or mode.lower().startswith("min"))
    return tonic % 12 + 12 * minor


def signature_of(key):
    """Key 0..23 -> tonic of the major key with the same signature: A minor (21) -> C (0)."""
    return key if key < 12 else (key + 3) % 12


# ---------------------------------------------------------------- tables


def print_table(title, columns, rows, chance):
    """Aligned table of percentages. rows {name: {column: [scores of seeds]}}; missing cells stay empty."""
    width = max(len(name) for name in [*rows, "chance"]) + 2
    cells = lambda row: [f"{100 * np.mean(row[c]):.1f} ±{100 * np.std(row[c]):4.1f}" if c in row else "" for c in columns]
    print(f"\n{title}\n{'':{width}}" + "".join(f"{c:>16}" for c in columns))
    for name, row in rows.items():
        print(f"{name:{width}}" + "".join(f"{cell:>16}" for cell in cells(row)))
    print(f"{'chance':{width}}" + "".join(f"{100 * chance[c]:.1f}".rjust(11).ljust(16) if c in chance else " " * 16 for c in columns))


def write_json(path, results, chance):
    """The table's numbers: per row and column the mean, the deviation and each seed's score."""
    table = {name: {c: dict(mean=float(np.mean(v)), std=float(np.std(v)), scores=[float(s) for s in v]) for c, v in row.items()}
             for name, row in results.items()}
    Path(path).write_text(json.dumps(dict(rows=table, chance=chance), indent=1))
    print(f"written to {path}")


# ---------------------------------------------------------------- tasks


def synth_table(model, device):
    """All synthetic tasks: ({row: {column: scores}}, chance)."""
    store = prepare_synth()
    songs = [compose(i) for i in range(SYNTH_SONGS)]
    pool = np.arange(512)                                                            # labelled tracks come from these
    valid, test = (np.arange(len(r)) + offset for r, offset in ((SYNTH_SPLITS["valid"], 512), (SYNTH_SPLITS["test"], 640)))
    numbers = [*range(512), *SYNTH_SPLITS["valid"], *SYNTH_SPLITS["test"]]
    tracks, songs = [store.track(i) for i in numbers], [songs[i] for i in numbers]
    windows, owner = all_rows(model, tracks, device)
    means = track_means(windows, owner)
    first = np.searchsorted(owner, test)                                             # each test track's first and last window
    last = np.searchsorted(owner, test, side="right") - 1
    tempo_class = lambda song: min(5, int(6 * np.log(song["tempo"] / 70) / np.log(160 / 70)))
    labels = {"key": ([s["key"] for s in songs], 24), "instrument": ([s["instrument"] for s in songs], len(TIMBRES)),
              "tempo": ([tempo_class(s) for s in songs], 6)}
    results = {name: {} for name in means}
    for task, sizes in (("key", (64, 512)), ("instrument", (64, 512)), ("tempo", (512,))):
        y, classes = torch.tensor(labels[task][0]), labels[task][1]
        for count in sizes:
            for name, x in means.items():
                results[name][f"{task} @{count}"] = linear_probe(x, y, labelled_draws(pool, count, valid, test), classes)
    for name, x in windows.items():
        results[name]["retrieval"] = retrieval(x[first], x[last])

    # Chords: one label per frame, so one prediction per frame, from a part of the songs.
    part = [*range(96), *valid[:32], *test[:64]]
    sequences, frame_owner = all_rows(model, [tracks[i] for i in part], device, per_frame=True)
    times = np.arange(SEGMENT * len(frame_owner) // len(part)) * HOP / SAMPLE_RATE
    chord_labels = []
    for i in part:
        starts, classes = np.array([c[0] for c in songs[i]["chords"]]), np.array([c[2] for c in songs[i]["chords"]])
        chord_labels.append(classes[np.searchsorted(starts, times, side="right") - 1])
    y = torch.from_numpy(np.concatenate(chord_labels))
    frames_of = lambda lo, hi: np.arange(lo * len(times), hi * len(times))
    splits = [(frames_of(0, 96), frames_of(96, 128), frames_of(128, 192))]
    for name, x in sequences.items():
        row = {"sequence": "sequence mean", "untrained sequence": "untrained sequence mean"}.get(name, name)
        results[row]["chord"] = linear_probe(x.flatten(0, 1), y, splits, 25)

    # Key signature without labels.
    truth = np.array([songs[i]["signature"] for i in test])
    held_out = [tracks[i] for i in test]
    if "cpsd" in model.tokens:
        for name, network in (("cpsd", model), ("untrained cpsd", untrained(model, device))):
            estimate = key_signatures(network, held_out, device).argmax(dim=1).numpy()
            results[name]["key sig. 0-shot"] = [(estimate == truth).mean()]
    results["raw"]["key sig. 0-shot"] = [(template_signatures(held_out) == truth).mean()]
    most = lambda task: max(np.bincount(np.array(labels[task][0])[test])) / len(test)
    chance = {"key sig. 0-shot": 1 / 12, "key @64": most("key"), "key @512": most("key"), "instrument @64": most("instrument"),
              "instrument @512": most("instrument"), "tempo @512": most("tempo"), "retrieval": 1 / 128,
              "chord": float(torch.bincount(y[splits[0][2]]).max() / len(splits[0][2]))}
    return results, chance


SYNTH_COLUMNS = ["key sig. 0-shot", "key @64", "key @512", "instrument @64", "instrument @512", "tempo @512", "chord", "retrieval"]


def print_synth(checkpoint, device):
    """The table of the embedded songs for one checkpoint, printed and written beside it."""
    results, chance = synth_table(load_checkpoint(checkpoint, device), device)
    print_table(f"{checkpoint} on {len(SYNTH_SPLITS['test'])} held-out synthetic songs: accuracy in %, {SEEDS} probe seeds\n"
                "(@n: n labelled songs; 0-shot: no labels, raw = Krumhansl template; retrieval: the same song among 128)",
                SYNTH_COLUMNS, results, chance)
    write_json(Path(checkpoint).with_name("probe-synth.json"), results, chance)


def print_folders(checkpoint, device, data, group):
    """Class per sub-folder: accuracy of every row. Raises InputError when there are not two classes."""
    store = prepare_folders([data])
    labels = [Path(p).parts[1] if len(Path(p).parts) > 2 else None for p in store.paths]
    keep = [i for i, label in enumerate(labels) if label is not None]
    names = sorted({labels[i] for i in keep})
    if len(names) < 2:
        raise InputError(f"{data}: holds {len(names)} sub-folder(s) with audio; a class is a sub-folder, give at least two")
    groups = []
    for i in keep:
        match = re.search(group, Path(store.paths[i]).name) if group else None
        if group and not match:
            raise InputError(f"--group {group!r} does not match {Path(store.paths[i]).name}; the regex must match every file name")
        groups.append(match.group() if match else store.paths[i])
    y = torch.tensor([names.index(labels[i]) for i in keep])
    means = track_means(*all_rows(load_checkpoint(checkpoint, device), [store.track(i) for i in keep], device))
    splits = group_splits(groups)
    results = {name: {"accuracy": linear_probe(x, y, splits, len(names))} for name, x in means.items()}
    chance = {"accuracy": float(np.mean([np.bincount(y[test]).max() / len(test) for _, _, test in splits]))}
    train, valid, test = splits[0]
    print_table(f"{checkpoint} on {data}: {len(names)} classes, {len(keep)} tracks, {len(set(groups))} groups, split by group\n"
                f"(seed 0: {len(train)} train, {len(valid)} valid, {len(test)} test), {SEEDS} seeds, accuracy in %",
                ["accuracy"], results, chance)
    write_json(Path(checkpoint).with_name(f"probe-{Path(data).resolve().name}.json"), results, chance)


def print_key(checkpoint, device, songs, labels):
    """Key signature of each song; with a CSV of keys, the score of the network, the untrained one and the template."""
    model = load_checkpoint(checkpoint, device)
    if "cpsd" not in model.tokens:
        raise InputError(f"{checkpoint}: has no cpsd token, so it hears no key; train one with --tokens cpsd,ntxent")
    if not labels:
        front_end = FrontEnd()
        files = [f for song in songs for f in ([Path(song)] if Path(song).is_file() else [p for _, p in find_audio([song])])]
        rotation = calibrate(model, device)
        for file in files:
            try:
                profile = torch.roll(pitch_profiles(model, [audio_to_frames(read_audio(file), front_end)], device)[0], -rotation)
            except InputError as error:
                print(f"skipped {error}")
                continue
            best = profile.argmax().item()
            print(f"{file}: {KEY_NAMES[best]} major / {KEY_NAMES[(best + 9) % 12]} minor ({100 * profile[best]:.0f} %)")
        return
    store = prepare_folders(songs)
    try:
        with open(labels, newline="", encoding="utf-8-sig") as file:
            keys = {row["file"]: parse_key(row["key"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError):
        raise InputError(f"{labels}: is not a readable CSV with the columns file,key") from None
    inside = {str(Path(*Path(p).parts[1:])): i for i, p in enumerate(store.paths)}  # paths in the CSV are relative to the folder
    found = {inside[f]: key for f, key in keys.items() if key is not None and f in inside}
    print(f"{len(found)} of {len(keys)} rows used: {sum(k is None for k in keys.values())} name no single key, "
          f"{sum(f not in inside for f in keys)} have no readable file")
    if not found:
        raise InputError(f"{labels}: no row names a file below {' '.join(songs)}; give paths relative to that folder")
    tracks, truth = [store.track(i) for i in found], np.array([signature_of(k) for k in found.values()])
    results = {}
    for name, network in (("cpsd", model), ("untrained cpsd", untrained(model, device))):
        results[name] = key_signatures(network, tracks, device, name).argmax(dim=1).numpy()
    results["Krumhansl template"] = template_signatures(tracks)
    print(f"\nkey signature without labels, {len(truth)} tracks, accuracy in % [95 % bootstrap interval]; KSEA adds half for a fifth")
    draws = np.random.default_rng(0).integers(0, len(truth), (1000, len(truth)))
    summary = {}
    for name, estimate in results.items():
        right, fifth = estimate == truth, np.isin((estimate - truth) % 12, (5, 7))
        low, high = np.percentile(right[draws].mean(axis=1), [2.5, 97.5])
        summary[name] = dict(accuracy=right.mean(), interval=[low, high], ksea=(right + fifth / 2).mean())
        print(f"{name:20}{100 * right.mean():6.1f}  [{100 * low:.1f}, {100 * high:.1f}]   KSEA {100 * summary[name]['ksea']:.1f}")
    print(f"{'chance':20}{100 / 12:6.1f}")
    path = Path(checkpoint).with_name(f"probe-key-{Path(songs[0]).resolve().name}.json")
    path.write_text(json.dumps(summary, indent=1))
    print(f"written to {path}")


def newest_checkpoint():
    """The checkpoint written last below out/. Raises InputError when there is none."""
    found = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("no run in out/; train one with: python train.py, or name a file with --checkpoint")
    print(f"checkpoint {found[-1]}")
    return found[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--checkpoint", help="checkpoint.pt of a run (default: the newest below out/)")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the network runs")
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("synth", parents=[common], help="the embedded synthetic songs")
    folders = tasks.add_parser("folders", parents=[common], help="a folder with one sub-folder per class")
    folders.add_argument("--data", required=True, help="the folder")
    folders.add_argument("--group", help="regex; files whose match is equal stay on one side of the split")
    key = tasks.add_parser("key", parents=[common], help="key signature without labels")
    key.add_argument("songs", nargs="+", help="audio files or folders")
    key.add_argument("--labels", help="CSV with columns file (path below the folder) and key ('F# minor')")
    args = parser.parse_args()
    checkpoint = args.checkpoint or newest_checkpoint()
    if args.task == "synth":
        print_synth(checkpoint, args.device)
    elif args.task == "folders":
        print_folders(checkpoint, args.device, args.data, args.group)
    else:
        print_key(checkpoint, args.device, args.songs, args.labels)


if __name__ == "__main__":
    run_cli(main)
