"""Design choices taken back, and regularisers to try: train.py with one thing changed, everything else alike.

    python tests/ablations.py mel-kept --out out/mel-kept    the transposed view keeps its mel
    python tests/ablations.py plain-init                     ordinary random weights instead of equivariant at initialisation
    python tests/ablations.py jitter                         each view through an equaliser and at a level of its own
    python tests/ablations.py mixing                         half of the pieces have another one in the background
    python tests/ablations.py batch-norm --tokens skey       batch norm before the softmax of the 24 keys (STONE-24, S-KEY)
    python tests/ablations.py no-mode --tokens skey          S-KEY without its mode and balance terms
    python tests/ablations.py three-term                     CPSD with the pair at equal pitch too, STONE's three terms
    python tests/ablations.py omega7                         CPSD on the circle of fifths alone; omega1: of semitones
    python tests/ablations.py plain-init+omega7+three-term   several changes
    python tests/ablations.py piece=90                       both segments from a piece of 90 s instead of 30
    python tests/ablations.py labels=0.1 --tokens tone --labels-csv keys.csv --data pop909       a tenth of the labels
    python tests/ablations.py one-hot=0.1 --tokens tone --labels-csv keys.csv --data pop909      in Semi-TONE's form
    python tests/ablations.py hours=4 --data synth music     4 hours of the music, whole tracks in random order
    python tests/ablations.py dim=192+depth=8                a wider and deeper `small`, heads of 64 as before

All flags of train.py are understood. tests/README.md has their results.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402


def mel_kept():
    data.training_views = data.crop_views


def plain_init():
    original_init = model.MT2.__init__

    def init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
    model.MT2.__init__ = init


def change_frames(change):
    """Frames (views, batch, kept, 224) in [0, 1] pass through change(frames, rng) before they are cropped."""
    plain = data.training_views

    def views(frames, crops):
        rng = np.random.default_rng(frames[0, 0, 0].cpu().numpy())         # of the batch: equal in a resumed run
        return plain(change(frames.float() / 255, rng).clamp(0, 1) * 255, crops)
    data.training_views = views


def jitter(frames, rng):
    """For each view a smooth curve over frequency (cosines of 4, 3, 2, 2 dB) and a level within 6 dB; silence stays."""
    mel = data.Mel().filters.argmax(dim=1).numpy() * data.SAMPLE_RATE / data.N_FFT   # (128,) Hz, the peak of each band
    place = np.append(np.arange(data.N_BINS) / 12, np.log2(np.maximum(mel, data.FMIN) / data.FMIN)) / 8  # 8 octaves
    shape, waves = frames.shape[:2], np.arange(1, 5)[:, None]
    size, phase = rng.normal(0, [4, 3, 2, 2], (*shape, 4)), rng.uniform(0, 2 * np.pi, (*shape, 4))
    decibels = (size[..., None] * np.cos(np.pi * waves * place + phase[..., None])).sum(axis=2)
    curve = torch.from_numpy((decibels + rng.uniform(-6, 6, (*shape, 1))) / data.DYNAMIC_RANGE).float()
    return torch.where(frames > 0, frames + curve[:, :, None], frames)


def mixing(frames, rng):
    """The louder of two pieces in each band; the other one 6 to 18 dB down."""
    down = np.where(rng.random(frames.shape[1]) < 0.5, rng.uniform(6, 18, frames.shape[1]), data.DYNAMIC_RANGE)
    down = torch.from_numpy(down / data.DYNAMIC_RANGE).float()             # (batch,)
    return torch.maximum(frames, frames.roll(1, dims=1) - down[:, None, None])


def batch_norm():
    """Before the softmax, over all views, without a learned scale."""
    original_init = losses.SKey.__init__

    def init(self, dim):
        original_init(self, dim)
        self.norm = torch.nn.BatchNorm1d(24, affine=False)

    def log_keys(self, token):
        logits = self.head(token).float() / losses.PROFILE_TEMPERATURE
        return self.norm(logits.flatten(0, -2)).view_as(logits).log_softmax(dim=-1)
    losses.SKey.__init__, losses.SKey.log_keys = init, log_keys


def no_mode():
    losses.SKey.MODE = losses.SKey.BALANCE = 0.0


def three_term():
    losses.TRANSPOSED_PAIRS.insert(0, (0, 1))


def one_circle(omega):
    for name in ("cpsd", "skey", "tone"):
        losses.PRETEXT[name] = partial(losses.PRETEXT[name], omegas=(omega,))


def piece(seconds):
    data.PIECE = round(float(seconds) / data.FRAME_SECONDS)


def labels(share):
    """Keys of a share of the tracks of --labels-csv, drawn at random; each share holds the smaller ones."""
    plain = data.read_labels

    def read_labels(*args):
        found = plain(*args)
        order = np.random.default_rng(0).permutation(sorted(found))
        return {name: found[name] for name in order[:round(float(share) * len(found))]}
    data.read_labels = read_labels


def one_hot(share):
    """Semi-TONE: CPSD between each view and the label, a one-hot profile at the pitch as played, and BCE of the mode."""
    labels(share)

    plain = losses.Tone.forward

    def forward(self, token, batch, teacher=None):
        (loss, logs), log_keys = plain(self, token, batch), self.log_keys(token)               # (3, batch, 24)
        label, profile = batch["keys"].clamp(min=0), losses.sum_relatives(log_keys)            # (batch,), (3, batch, 12)
        signature = torch.where(label < 12, label, label + 3) % 12
        target = torch.nn.functional.one_hot(signature, 12).float()                            # (batch, 12)
        mode = log_keys.unflatten(-1, (2, 12)).logsumexp(dim=-1)                               # (3, batch, 2)
        term = -torch.where(label < 12, mode[..., 0], mode[..., 1])                            # (3, batch)
        for omega in self.omegas:
            angle = 2 * np.pi * omega * batch["shifts"].float() / 12                           # (3, batch)
            (re, im), (x, y) = losses.circle_point(profile, omega), losses.circle_point(target, omega)
            distance = (angle.cos() - re * x - im * y) ** 2 + (angle.sin() - im * x + re * y) ** 2
            term = term + distance / len(self.omegas)
        labelled = (batch["keys"] >= 0).float()                                                # (batch,)
        supervised = (term.mean(dim=0) * labelled).sum() / labelled.sum().clamp(min=1)
        return loss - logs["supervised_term"] + supervised, logs | dict(supervised_term=supervised)
    losses.Tone.forward = forward


def hours(limit):
    """Of every store but the synthetic songs, the first tracks in random order that have `limit` hours together."""
    plain = data.open_data

    def open_data(sources):
        stores = plain(sources)
        for store in stores:
            if store.paths[0] == "synth/00000":
                continue
            order = np.random.default_rng(0).permutation(len(store.paths))
            total = np.cumsum(store.lengths[order]) * data.FRAME_SECONDS / 3600
            kept = np.sort(order[:np.searchsorted(total, float(limit)) + 1])
            store.paths = [store.paths[i] for i in kept]
            store.starts, store.lengths = store.starts[kept], store.lengths[kept]
        return stores
    data.open_data = open_data


def size(name, value):
    """dim or depth of the preset `small`; a head keeps its 64 dimensions."""
    small = train.PRESETS["small"]
    small[name] = int(value)
    small["heads"] = small["dim"] // 64


CHANGES = {"mel-kept": mel_kept, "plain-init": plain_init, "jitter": lambda: change_frames(jitter),
           "mixing": lambda: change_frames(mixing), "batch-norm": batch_norm, "no-mode": no_mode,
           "three-term": three_term, "omega7": partial(one_circle, 7), "omega1": partial(one_circle, 1),
           "piece": piece, "hours": hours, "labels": labels, "one-hot": one_hot,
           "dim": partial(size, "dim"), "depth": partial(size, "depth")}

if __name__ == "__main__":
    changes = [change.split("=") for change in (sys.argv.pop(1) if len(sys.argv) > 1 else "").split("+")]
    for choice, *value in changes:
        if choice not in CHANGES:
            sys.exit(f"{choice!r}: give one of {', '.join(CHANGES)}")
        CHANGES[choice](*value)
    data.run_cli(train.main)
