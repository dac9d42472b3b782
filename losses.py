"""Two pretext losses: CPSD teaches key by equivariance, NT-Xent teaches timbre and style by contrast.

Both take the outputs of all views at once, (views, batch, ...), and work in float32 whatever the autocast: under bf16
a cosine of 0.99 / 0.1 has a spacing of 0.06, which is as large as what there is to learn.
"""
import math
from itertools import combinations

import torch
import torch.nn.functional as F


def circle_point(profiles, omega):
    """(..., 12) on the simplex -> real and imaginary part (...) of z = sum_q y[q] exp(2 pi i omega q / 12).

    A pitch profile y says how likely each of 12 classes is. z is its centre of gravity when class q sits at angle
    2 pi omega q / 12: omega = 1 is the circle of semitones; omega = 7 the circle of fifths, where a step of 7 semitones
    turns by 30 degrees (7 * 7 = 49 = 1 mod 12), so that keys which share six of their seven notes are neighbours.
    |z| = 1 only for a one-hot profile, z = 0 for a uniform one. (STONE, section 3; a discrete Fourier coefficient.)
    """
    angle = 2 * math.pi * omega * torch.arange(12, device=profiles.device, dtype=torch.float32) / 12
    profiles = profiles.float()
    return (profiles * angle.cos()).sum(-1), (profiles * angle.sin()).sum(-1)  # autocast would make a matmul bf16


def cpsd(profiles, shifts, omega=7, pairs=None):
    """Cross-power spectral density loss (STONE, eq. 5-6): transposing the music must turn the profile as much.

    profiles (views, batch, 12) on the simplex; shifts (views, batch), semitones by which each view was transposed up;
    pairs: which views to compare (default: every pair). Returns the mean over pairs and batch of

        | exp(2 pi i omega (s_a - s_b) / 12) - z_a conj(z_b) |^2

    Nobody tells the network the key. It only learns that if view a sounds s semitones above view b, its point must lie
    omega * s / 12 of a turn ahead; an answer that turns along with the music is, up to one rotation of the whole
    circle, the key. 0 for one-hot profiles at the stated shift, 1 for uniform profiles (z = 0), 4 for opposite points.

    The trap. STONE's three terms hold one pair at the *same* pitch: |1 - z_1 conj(z_2)|^2. An output that ignores its
    input satisfies that pair and pays a little more for the other two: a constant with |z|^2 = 1/3 scores 2.67 in
    total, under the 3.00 of a uniform output, and networks that are not equivariant by construction, such as a ViT,
    stay there. Without the same-pitch pair it pays to be blind no more: for two different crops drawn from 0..12 the
    mean of exp(i turn) is -1/13, so a constant scores 1 + 2/13 |z|^2 + |z|^4 per pair, always above the uniform
    output's 1. Growing |z| pays only if the point really turns. Which pairs to use is the caller's: train.py passes
    those whose crops differ. z = 0 stays a saddle, as the gradient is of second order in z; README tells how a run leaves it.
    """
    re, im = circle_point(profiles, omega)                                 # (views, batch) each
    total = 0.0
    pairs = pairs or list(combinations(range(len(profiles)), 2))
    for a, b in pairs:
        turn = 2 * math.pi * omega * (shifts[a] - shifts[b]).float() / 12  # (batch,)
        cross_re = re[a] * re[b] + im[a] * im[b]                           # z_a conj(z_b), in real arithmetic
        cross_im = im[a] * re[b] - re[a] * im[b]
        total = total + ((turn.cos() - cross_re) ** 2 + (turn.sin() - cross_im) ** 2).mean()
    return total / len(pairs)


def nt_xent(z, temperature=0.1):
    """Normalised temperature-scaled cross entropy (SimCLR, eq. 1): find the other excerpt of the same music.

    z (views, batch, dim), any scale. Each of the views * batch embeddings asks: which of the others comes from my
    track? The answer is a softmax over cosine similarities divided by `temperature`, itself left out. Every other view
    of the same item counts as correct (the mean over them is taken), every other item as wrong. What two excerpts of a
    track share (instruments, room, mix, style) is kept; what differs (this bar's notes) is forgotten.

    If all embeddings coincide, the 2N - 1 candidates of two views are equally likely and the loss is log(2N - 1): that
    is the value at chance, and it depends on the batch size. With N = 1 and two views the only candidate is right: 0.
    """
    views, batch, _ = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float().flatten(0, 1), dim=-1)                   # (views * batch, dim)
        similarity = z @ z.T / temperature                                 # (views * batch, views * batch)
        similarity.fill_diagonal_(-math.inf)
        log_probability = similarity.log_softmax(dim=-1)
        item = torch.arange(batch, device=z.device).repeat(views)          # (views * batch,)
        positive = (item[:, None] == item).fill_diagonal_(False)
        return -log_probability.where(positive, 0).sum() / (views * batch * (views - 1))
