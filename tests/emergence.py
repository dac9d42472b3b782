"""By layer: does attention follow onsets and chord changes, and do features turn with a transposition?

    python tests/emergence.py [--data FOLDER] [--checkpoint out/mt2/checkpoint.pt]

Music: the recordings below --data, else 160 test songs of the embedded set; the first 30 s of each in windows of 4 s.

A. Attention on each frame, mean over heads: of each class token, and as "sequence" what a frame receives from all
frames (mean over queries). 100 r (Pearson) in a window, mean over a song's windows; then mean and deviation over songs.
    onsets             with the onset envelope (probe.onset_windows)
    changes            with 1 within 1.5 frames of a chord change, else 0, not smoothed; only windows that have one
    changes | onsets   the partial correlation given the onset envelope, as notes begin where chords change
Chance is 0, off by about the deviation / sqrt(songs); random weights follow the music too, hence the untrained rows.
Row "onset envelope": the envelope in place of attention. Chords: the embedded songs', or .lab files beside the songs.

B. Equivariance, without labels: a linear layer and softmax, dim -> 12, fitted by CPSD at omega 7 to pairs of crops of
the first three windows. From its outputs on held-out tracks, z on the circle of fifths and u = z / |z|:
    d = root mean square over pairs of crops of | exp(2 pi i 7 (s_a - s_b) / 12) - u_a conj(u_b) |    (s: semitones up)
0: the output turns with the music; 1.41: unrelated points; 1.47: a constant. 100 d, over three initialisations.
Departures from the published measurement: there waveforms are transposed, here the CQT is cropped and the mel is zero,
as the crop could be read off beside an uncropped mel (data.training_views); so `ntxent` is constant in layer 0. Tracks
in sorted order, which keeps an album together: the first 60 % to fit, 20 % to select the step, 20 % for d.
"""
import argparse
import math
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import probe  # noqa: E402
from losses import circle_point, cpsd  # noqa: E402

SONGS, CROPS = 160, data.MAX_CROP + 1
WINDOWS, HEADS, STEPS, EVERY, BATCH, RATE = 3, 3, 1500, 50, 128, 5e-3  # of a song, and of the fit, in B (our choice)


def read_music(folder):
    """[(frames, 224) uint8] in whole windows, and of each its chords [(start, end, class)], or nothing."""
    tracks = [t for t in probe.TASKS["chords"].read(probe.Files([folder])) if t.path] if folder else []
    if tracks:
        songs, tracks = probe.open_tracks("chords", tracks)
    elif folder:
        songs = probe.songs_of(data.prepare_folders([folder]))
    else:
        songs, tracks = probe.synth_tracks(test=SONGS)
    songs, chords = [song[:data.PIECE] for song in songs], [t.labels["chords"] for t in tracks]
    kept = [i for i, song in enumerate(songs) if len(song) >= data.SEGMENT]
    if len(kept) < 5:
        raise data.InputError(f"{folder}: {len(kept)} songs have 4 s or more, 5 are needed; add music")
    return [songs[i][:len(songs[i]) // data.SEGMENT * data.SEGMENT] for i in kept], chords and [chords[i] for i in kept]


def change_windows(chords, frames):
    """1 within 1.5 frames of a chord change, else 0: [(start, end, class)] -> (windows, 126)."""
    changes = [now[0] for before, now in zip(chords, chords[1:]) if now[2] != before[2]]
    distance = np.abs(np.arange(frames)[:, None] - np.array(changes) / data.FRAME_SECONDS)     # (frames, changes)
    return torch.from_numpy((distance <= 1.5).any(axis=1)).float().view(-1, data.SEGMENT)


@torch.inference_mode()
def attention_on_frames(model, songs, device):
    """Of each class token, then of all frames, mean over heads: (windows, layers, tokens + 1, 126)."""
    first, found = model.class_token_count, []
    for _, windows in probe.batches_of(probe.windows_of(songs)[2]):
        inside, rows = model(*probe.views_of(windows, device), layers=range(len(model.blocks)))[1], []
        for layer, block in enumerate(model.blocks):
            weights = block.attention(inside[layer])[0][..., first:].mean(dim=1)               # (n, tokens + 126, 126)
            rows.append(torch.cat([weights[:, :first], weights[:, first:].mean(dim=1, keepdim=True)], dim=1))
        found.append(torch.stack(rows, dim=1).cpu())
    return torch.cat(found)


def attention_row(weights, onsets, changes, owner):
    """Cells of a row of A: weights, onsets and changes (or None) (windows, 126), owner (windows,) the song of each."""
    over_songs = lambda r, owner: probe.mean_of([r[owner == song].mean().item() for song in np.unique(owner)])
    r = probe.correlations(weights, onsets)                                # (windows,)
    row = {"onsets": over_songs(r, owner)}
    if changes is not None:
        found, both = probe.correlations(weights, changes), probe.correlations(onsets, changes)
        partial = (found - r * both) / ((1 - r ** 2) * (1 - both ** 2)).clamp(min=1e-6).sqrt()
        kept = changes.any(dim=1).numpy()
        row["changes"] = over_songs(found[kept], owner[kept])
        row["changes | onsets"] = over_songs(partial[kept], owner[kept])
    return row


@torch.inference_mode()
def crop_features(model, songs, device):
    """{row: (windows, 13, dim)}: class tokens and sequence mean of every layer; of model None the mean of the CQT."""
    rows, batches = {}, [windows for _, windows in probe.batches_of(probe.windows_of(songs)[2])]
    for crop, windows in product(range(CROPS), batches):
        cqt, mel = probe.views_of(windows, device, crop)
        found = {"raw CQT mean": cqt.mean(dim=1)}
        if model:
            layers = range(model.config["depth"] + 1)
            every = probe.network_rows(model, cqt, torch.zeros_like(mel), layers, per_frame=False)
            wanted = [f"{name} L{layer}" for name, layer in product((*model.tokens, "sequence mean"), layers)]
            found = {name: every[name] for name in wanted}
        for name, x in found.items():
            rows.setdefault(name, []).append(x.cpu())
    return {name: torch.cat(x).unflatten(0, (CROPS, -1)).transpose(0, 1) for name, x in rows.items()}


@torch.no_grad()
def chordal_distance(profiles):
    """d over all pairs of crops: profiles (windows, 13, heads, 12) -> (heads,)."""
    turn = 2 * math.pi * 7 / 12 * torch.arange(CROPS)[:, None]             # crop c is c semitones down
    u = torch.sgn(torch.complex(*circle_point(profiles, 7))) * torch.polar(torch.ones_like(turn), turn)
    chords = (u[:, :, None] - u[:, None]).abs()                            # (windows, 13, 13, heads), turned back
    return (chords.square().sum(dim=(1, 2)).mean(dim=0) / (CROPS * (CROPS - 1))).sqrt()


def held_out_distance(x, train, valid, test):
    """d on the windows `test` of heads fitted to the windows `train`: x (windows, 13, dim) -> (heads,)."""
    torch.manual_seed(0)
    mean, std = x[train].mean(dim=(0, 1)), x[train].std(dim=(0, 1))
    x, best, kept = (x - mean) / (std + 1e-6), math.inf, None
    head = nn.Sequential(nn.Linear(x.shape[-1], 12 * HEADS), nn.Unflatten(-1, (HEADS, 12)), nn.Softmax(dim=-1))
    optimizer = torch.optim.Adam(head.parameters(), lr=RATE)
    for step in range(STEPS + 1):
        if step % EVERY == 0 and (distance := chordal_distance(head(x[valid])).mean()) < best:
            best, kept = distance, deepcopy(head.state_dict())
        crops = torch.stack([torch.randint(CROPS, (BATCH,)), torch.randint(1, CROPS, (BATCH,))]).cumsum(dim=0) % CROPS
        views = x[train[torch.randint(len(train), (BATCH,))], crops]       # (2, batch, dim), two crops of each window
        loss = cpsd(head(views), -crops[..., None], omega=7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.load_state_dict(kept)
    return chordal_distance(head(x[test]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of recordings")
    parser.add_argument("--checkpoint")
    parser.set_defaults(task="emergence", device="cpu")
    args = parser.parse_args()
    path, model = probe.open_model(args, frames=True)
    songs, chords = read_music(args.data)
    networks = {"": model, "untrained ": probe.untrained(model, args.device, blocks=None)}

    owner, onsets = probe.windows_of(songs)[0], probe.onset_windows(songs)              # (windows,), (windows, 126)
    changes = None
    if chords:
        changes = torch.cat([change_windows(c, len(song)) for c, song in zip(chords, songs)])      # (windows, 126)
    table = {"onset envelope": attention_row(onsets, onsets, changes, owner)} if chords else {}
    for prefix, network in networks.items():
        weights = attention_on_frames(network, songs, args.device).unbind(dim=1)
        for (i, name), (layer, x) in product(enumerate((*model.tokens, "sequence")), enumerate(weights, 1)):
            table[f"{prefix}{name} L{layer}"] = attention_row(x[:, i], onsets, changes, owner)
    probe.print_table(f"A. attention: {path} on {len(songs)} songs; 100 r, over songs", table)

    songs = [song[:WINDOWS * data.SEGMENT] for song in songs]
    part = np.digitize(probe.windows_of(songs)[0], np.array([0.6, 0.8]) * len(songs))   # (windows,)
    parts = [torch.from_numpy(np.flatnonzero(part == i)) for i in range(3)]
    rows = crop_features(None, songs, args.device)
    for prefix, network in networks.items():
        rows |= {prefix + name: x for name, x in crop_features(network, songs, args.device).items()}
    table = {name: {"d": probe.mean_of(held_out_distance(x, *parts).tolist())} for name, x in rows.items()}
    probe.print_table(f"B. equivariance: {path} on {len(parts[2])} windows held out; 100 d, over {HEADS} heads", table)


if __name__ == "__main__":
    data.run_cli(main)
