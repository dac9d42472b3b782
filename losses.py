"""Pretext tasks: what a class token is trained for, without labels. One class each, found by its name in PRETEXT.

    key        cpsd, cpsd1 (STONE)    skey (S-KEY)    tone (Semi-TONE: with some labels)
    style      ntxent (SimCLR)    byol    cluster (DINO)    barlow (Barlow Twins)    vicreg
    content    mae (masked autoencoder)

First the losses as plain functions, all in float32, then the tasks. `train.py --tokens a,b,c` trains any set of them.
"""
import math
from functools import partial, wraps
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn


def in_float32(loss):
    """Leave autocast for a loss: in bf16 a cosine of 0.99 / 0.1 is rounded to steps of 0.06, as large as the signal."""
    @wraps(loss)
    def wrapped(first, *rest, **options):
        with torch.autocast(first.device.type, enabled=False):
            return loss(first, *rest, **options)
    return wrapped


# ---------------------------------------------------------------- key: equivariance


def circle_point(profiles, omega):
    """(..., 12), non-negative with sum 1 -> real and imaginary part (...) of z = sum_q y[q] exp(2 pi i omega q / 12).

    The centre of gravity of y, a probability of each of 12 key signatures, on a circle (STONE, section 3). omega = 1:
    semitones, 7: fifths. There a transposition by 7 semitones turns z by 49 / 12 of a turn, 30 degrees, so keys a fifth
    apart, which share six of seven notes, are neighbours. |z| = 1 only for a one-hot y, 0 for a uniform one.
    """
    angle = 2 * math.pi * omega * torch.arange(12, device=profiles.device, dtype=torch.float32) / 12
    profiles = profiles.float()
    return (profiles * angle.cos()).sum(-1), (profiles * angle.sin()).sum(-1)  # a matmul would be bf16 in autocast


def cpsd(profiles, shifts, omega=7, pairs=None):
    """Cross-power spectral density loss (STONE, eq. 5-6): transposing the music must turn the profile as much.

    profiles (views, batch, 12), each with sum 1; shifts (views, batch), semitones by which each view was transposed up;
    pairs: which views to compare (default: every pair). Returns the mean over pairs and batch of

        | exp(2 pi i omega (s_a - s_b) / 12) - z_a conj(z_b) |^2

    If view a is s semitones above view b, its point must lie omega * s / 12 of a turn ahead; an output that turns along
    with the music is the key, up to a rotation that CPSD leaves open in each song (see class CPSD). 0 for one-hot
    profiles at the right shift, 1 for uniform profiles (z = 0), 4 for opposite points.

    The trap. With a pair at equal pitch, as in STONE's three terms, a constant output has a lower loss than a uniform
    one (sum of the terms 2.76 at |z|^2 = 0.28, against 3.00), and a ViT with ordinary random weights stays there. So
    the tasks below compare only views whose crops differ, and start equivariant (circulant_). For two different crops
    out of 0..12 the mean of exp(i turn) is -1/13: a constant costs 1 + 2/13 |z|^2 + |z|^4 a pair, always more than the
    uniform output's 1. z = 0 stays a saddle: the gradient is 0 there, and small around it.
    """
    total, (re, im) = 0.0, circle_point(profiles, omega)                   # (views, batch) each
    pairs = pairs or list(combinations(range(len(profiles)), 2))
    for a, b in pairs:
        turn = 2 * math.pi * omega * (shifts[a] - shifts[b]).float() / 12  # (batch,)
        cross_re = re[a] * re[b] + im[a] * im[b]                           # (batch,), z_a conj(z_b) in real arithmetic
        cross_im = im[a] * re[b] - re[a] * im[b]                           # (batch,)
        total = total + ((turn.cos() - cross_re) ** 2 + (turn.sin() - cross_im) ** 2).mean()
    return total / len(pairs)


# Mean chroma, as in template_keys, in C major and C minor: one step of EM on synthetic songs (tests/README.md).
MAJOR = torch.tensor([.140, .035, .113, .035, .119, .091, .045, .142, .036, .116, .044, .084])
MINOR = torch.tensor([.144, .036, .096, .120, .039, .104, .036, .146, .077, .052, .107, .043])
KEY_PROFILES = torch.stack([profile.roll(tonic) for profile in (MAJOR, MINOR) for tonic in range(12)])  # (24, 12)


def centred(x):
    """Minus the mean, then of length 1, over the last dimension: the product of two such vectors is a correlation."""
    return F.normalize(x - x.mean(dim=-1, keepdim=True), dim=-1)


@in_float32
def template_keys(cqt):
    """A key template: cqt (batch, frames, 84 or 96) in [0, 1] -> correlations (batch, 24).

    The lowest bin is taken for an A; of a crop from bin c, the keys are those of the view, c semitones lower.

    Keep spectral peaks, whiten them (minus the mean over 13 bins, not below 0), subtract a fifth harmonic of 0.2 (28
    bins up: a major third, which makes minor look major), average over frames and octaves, the middle octaves weighted
    most, and correlate this chroma with the 24 rotated profiles: major keys by their tonic, C = 0, then minor keys. No
    training, no labels; our choice, by trial on real recordings (tests/README.md).
    """
    cqt = cqt.float()
    # Frames are the channels of these pools: they pool over bins.
    peaks = cqt.where(cqt >= F.max_pool1d(cqt, 3, stride=1, padding=1), 0)                     # (batch, frames, bins)
    white = (peaks - F.avg_pool1d(peaks, 13, 1, 6, count_include_pad=False)).clamp(min=0)
    white = (white - 0.2 * F.pad(white[..., :-28], (28, 0))).clamp(min=0)
    octaves = (torch.arange(cqt.shape[-1], device=cqt.device) - cqt.shape[-1] / 2) / 12        # from the middle
    spectrum = white.mean(dim=1) * torch.exp(-(octaves / 2) ** 2 / 2)                          # (batch, bins)
    chroma = spectrum.unflatten(-1, (-1, 12)).mean(dim=1).roll(9, dims=-1)                     # (batch, 12), C = 0
    profiles = KEY_PROFILES.to(cqt.device, non_blocking=True)                                  # (24, 12)
    return centred(chroma) @ centred(profiles).T


# ---------------------------------------------------------------- timbre and style: invariance


@in_float32
def nt_xent(z, tracks=None, temperature=0.1):
    """Normalised temperature-scaled cross entropy (SimCLR, eq. 1): find the other excerpt of the same music.

    z (views, batch, dim), any scale. Each of the views * batch embeddings is classified among all others by a softmax
    over cosine similarities divided by `temperature`. Every other view of the same item is a positive (the mean over
    them is taken), every other item a negative. What two excerpts of a track share (instruments, room, mix, style) is
    kept; what differs (the notes of one bar) is discarded. tracks (batch,) int64: different items of one track are
    neither positives nor negatives of each other (our choice). At chance, with two views: log(2 batch - 1).
    """
    views, batch, _ = z.shape
    z = F.normalize(z.float().flatten(0, 1), dim=-1)                       # (views * batch, dim)
    item = torch.arange(batch, device=z.device).repeat(views)              # (views * batch,)
    track = item if tracks is None else tracks.repeat(views)               # (views * batch,)
    positive = (item[:, None] == item).fill_diagonal_(False)               # (views * batch, views * batch)
    excluded = (track[:, None] == track) & ~positive                       # the same track or the embedding itself
    similarity = (z @ z.T / temperature).masked_fill(excluded, -math.inf)  # (views * batch, views * batch)
    log_probability = similarity.log_softmax(dim=-1)                       # (views * batch, views * batch)
    return -log_probability.where(positive, 0).sum() / (views * batch * (views - 1))


@in_float32
def byol(prediction, target):
    """BYOL, eq. 2: predict the EMA teacher's projection of the *other* excerpt.

    prediction, target (2, batch, dim) of student and teacher. The sum of 2 - 2 cosine over the crossed pairs, mean over
    the batch: 0 for equal directions, 4 orthogonal, 8 opposite. There are no negatives; the student's predictor and the
    slow teacher, which no gradient reaches, prevent a constant output.
    """
    cosine = F.cosine_similarity(prediction.float(), target.detach().float().flip(0), dim=-1)  # (2, batch)
    return (2 - 2 * cosine).mean(dim=1).sum()


@in_float32
def cluster(student, teacher, centre, teacher_temperature, student_temperature=0.1):
    """DINO, eq. 1-2: match the teacher's soft cluster assignment of the other excerpt.

    student, teacher (2, batch, prototypes) raw outputs, centre (prototypes,). Cross entropy between the teacher's
    softmax((t - centre) / teacher_temperature) for one view and the student's for the other, mean over both orders and
    the batch. Centre and low teacher temperature together prevent collapse. log(prototypes) when both are uniform.
    """
    with torch.no_grad():
        target = ((teacher.float() - centre) / teacher_temperature).softmax(dim=-1)            # (2, batch, prototypes)
    log_probability = (student.float() / student_temperature).log_softmax(dim=-1)              # (2, batch, prototypes)
    return -(target.flip(0) * log_probability).sum(dim=-1).mean()


@in_float32
def barlow(a, b, off_diagonal=0.005):
    """Barlow Twins, eq. 1: each dimension correlates with itself over the two views and with no other dimension.

    a, b (batch, dim), C their correlation over the batch (biased deviation). Sum of (1 - C_ii)^2 plus 0.005 times the
    sum of C_ij^2, i != j. 0 for equal, decorrelated views.
    """
    standardise = lambda x: (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
    a, b = standardise(a.float()), standardise(b.float())
    correlation = a.T @ b / len(a)                                         # (dim, dim)
    diagonal = correlation.diagonal()                                      # (dim,)
    return (1 - diagonal).square().sum() + off_diagonal * (correlation.square().sum() - diagonal.square().sum())


@in_float32
def vicreg(a, b, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg, eq. 1-6 with the weights and the halved variance term of its released code. a, b (batch, dim).

    Views agree (mean square), dimensions keep a deviation of 1 (hinge) and do not covary (off-diagonal covariance
    squared, over dim). A constant output costs 25 * 0.99.
    """
    a, b, spread, shared = a.float(), b.float(), 0.0, 0.0
    for x in (a, b):
        spread = spread + F.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean() / 2
        x = x - x.mean(dim=0)
        c = x.T @ x / (len(x) - 1)                                         # (dim, dim)
        shared = shared + (c.square().sum() - c.diagonal().square().sum()) / x.shape[1]
    return invariance * F.mse_loss(a, b) + variance * spread + covariance * shared


@in_float32
def masked_error(prediction, target, positions):
    """MAE (section 3, "Reconstruction target"): mean square error of what was dropped; what was kept does not count.

    prediction, target (..., n, pixels); positions (..., kept) int64, which of the n were kept. Each target is
    normalised by its own mean and deviation (released code). About 1 for a prediction of 0.
    """
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    error = (prediction.float() - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=-1)   # (..., n)
    dropped = torch.ones_like(error).scatter(-1, positions, 0.0)                               # (..., n)
    return (error * dropped).sum() / dropped.sum()


def effective_rank(x):
    """exp of the entropy of the singular values of centred x (items, dim): how many directions are in use, 1 .. dim.

    0 for a constant x. (Roy and Vetterli 2007.) Dimensional collapse shows here long before it does in the loss.
    """
    x = x.float().cpu()  # a matrix this small is decomposed faster there than on a GPU
    values = torch.linalg.svdvals(x - x.mean(dim=0))                       # (min(items, dim),)
    if values.sum() <= 1e-4 * x.norm():  # constant up to rounding
        return 0.0
    share = values / values.sum()
    return torch.special.entr(share).sum().exp().item()


# ---------------------------------------------------------------- tasks

PROFILE_TEMPERATURE = 0.3  # of the profile's softmax; below 1 the first outputs are sharp enough to leave z = 0 (ours)
TRANSPOSED_PAIRS = [(0, 2), (1, 2)]  # the views whose crops differ (data.Segments); without 0-1 there is no trap (cpsd)


@torch.no_grad()
def circulant_(weight):
    """Initialise (outputs, bins) so that transposing the input by a semitone only rotates each group of 12 outputs.

    Row 12 k + q weighs pitch class p as row 12 k weighs p - q, in each octave times a random factor. Blocks start as
    the identity, so a class token that starts from the CQT is then equivariant, but for notes that cross the border of
    an octave or leave the crop; before training only. Rows after the last whole group of 12 keep their values.
    """
    outputs, bins = weight.shape
    groups, octaves = outputs // 12, bins // 12
    pattern = torch.randn(groups, 12)                                      # weights of group k, from its tonic up
    octave = torch.rand(groups, octaves) + 0.5
    q = torch.arange(12)
    rows = pattern[:, (q[None, :] - q[:, None]) % 12]                      # (groups, 12 outputs, 12 pitch classes)
    rows = torch.einsum("kqp,ko->kqop", rows, octave).reshape(12 * groups, 12 * octaves)
    weight[:12 * groups, :12 * octaves] = rows * (2 / (outputs + bins)) ** 0.5
    return weight


class ViewNorm(nn.Module):
    """Batch norm of each view by itself, (views, batch, n). BYOL, Barlow Twins and VICReg have it in their heads;
    without it BYOL collapsed here. No running statistics: heads serve training only."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        variance, mean = torch.var_mean(x.float(), dim=-2, keepdim=True, unbiased=False)       # (views, 1, n) each
        return (x.float() - mean) * (variance + 1e-5).rsqrt() * self.weight + self.bias


def projector(dim, out, width=None, norm=nn.Identity):
    """A head of two layers. The loss acts behind it, so the features may keep what the loss discards (SimCLR)."""
    width = width or 4 * dim
    return nn.Sequential(nn.Linear(dim, width), norm(width), nn.GELU(), nn.Linear(width, out))


class Pretext(nn.Module):
    """A pretext task. A subclass is made with the width `dim` of the trunk, sets what it needs, and implements

        forward(token, batch, teacher) -> (loss, {name: scalar to log})

    branch: the spectrogram whose mean (of the embedded frames) is the initial value of the class token, "cqt" or "mel";
    views: 2 segments at one pitch, or 3, with segment A transposed (data.Segments); needs_teacher: the moving
    average of the network; needs_sequence: the sequence tokens, of this rank's share of the batch only; the loss is
    averaged over ranks.

    token (views, batch, dim); batch: "shifts" (all views of the run, batch) semitones up, "keys" (batch,) 0..23 or -1,
    "tracks" (batch,), "progress" of the run, 0 to 1, and with needs_spectrogram, of the frames that masking kept, "cqt"
    (2, batch, kept, 84) and "mel" (2, batch, kept, 128); teacher: None, or (its copy of this task, its token (2, batch,
    dim)). With needs_sequence batch has "sequence" (2, share, kept, dim), "positions" (2, share, kept), of the n frames
    or patches "target" (2, share, n, pixels), "places" (n, dim), and "patch", the number of the patch size.
    """
    branch, views, needs_teacher, needs_spectrogram, needs_sequence = "mel", 2, False, False, False

    def reset(self):
        """Called after the general initialisation, for heads that start otherwise."""


def sum_relatives(log_keys):
    """Log probabilities of keys (..., 12 or 24) -> key signature profile (..., 12), with sum 1."""
    return log_keys.exp().unflatten(-1, (-1, 12)).sum(dim=-2)


class CPSD(Pretext):
    """STONE: the profile turns with the music. omegas: circles that are averaged, 7 of fifths, 1 of semitones.

    CPSD determines the key only up to a per-song offset: on real recordings a network locks to the riff, the scale or
    the tonic of each track. Ours: the posterior of a key template as a soft label, beside CPSD, removes the offset.
    pseudo_label: its weight (train.py --pseudo-label); 0 leaves it out.
    """
    branch, views, outputs, pseudo_label = "cqt", 3, 12, 0.0
    SHARPNESS = 15.0  # of the template's softmax (our choice)

    def __init__(self, dim, omegas=(7, 1)):
        super().__init__()
        # STONE and MT2 map to 84 bins and average over octaves; the mean of linear maps is a linear map, as here.
        self.head, self.omegas = nn.Linear(dim, self.outputs), omegas

    def reset(self):
        signatures = self.head.weight.data[:12]
        circulant_(signatures.T).mul_(0.3)  # .T: here the inputs come in groups of 12; 0.3: no saturated softmax
        self.head.weight.data[-12:] = signatures  # of 24 keys, major and minor start equally likely

    def log_keys(self, token):
        """token (..., dim) -> log probabilities (..., outputs).

        Output q and, of 24, output 12 + q share a key signature: a major key and its relative minor. (Labels and
        template_keys number a minor key 12 + its own tonic.)
        """
        return (self.head(token).float() / PROFILE_TEMPERATURE).log_softmax(dim=-1)

    @property
    def needs_spectrogram(self):
        return self.pseudo_label > 0

    @torch.no_grad()
    def template_posterior(self, batch):
        """Probability of each of 24 keys in each view, (3, batch, 24), from the input of views 0 and 1.

        Key q (major) and 12 + q (its relative minor) share a signature. The label turns with the crop of view 2.
        """
        keys = template_keys(batch["cqt"].transpose(0, 1).flatten(1, 2)).mul(self.SHARPNESS).softmax(dim=-1)
        keys = torch.cat([keys[:, :12], keys[:, 12:].roll(3, dims=1)], dim=1)                  # minor: its signature
        turn = batch["shifts"] - batch["shifts"][0]                                        # (3, batch): 0, 0, view 2's
        place = (torch.arange(12, device=keys.device) - turn[..., None]) % 12                  # (3, batch, 12)
        return keys.expand(3, -1, -1).gather(-1, torch.cat([place, place + 12], dim=-1))

    def key_loss(self, log_keys, batch, label=None):
        """CPSD of log_keys (3, batch, outputs), averaged over the circles, plus the pseudo-label's cross entropy.
        label: template_posterior (3, batch, 24), where it is known already."""
        profile = sum_relatives(log_keys)                                  # (3, batch, 12)
        loss = sum(cpsd(profile, batch["shifts"], omega, TRANSPOSED_PAIRS) for omega in self.omegas) / len(self.omegas)
        re, im = circle_point(profile, self.omegas[0])
        logs = dict(cpsd_term=loss, mean_abs_z=torch.hypot(re, im).mean())
        if self.pseudo_label > 0:
            label = self.template_posterior(batch) if label is None else label     # (3, batch, 24)
            label = label.unflatten(-1, (-1, self.outputs)).sum(dim=-2)    # (3, batch, outputs)
            logs["label_term"] = -(label * log_keys).sum(dim=-1).mean()
            loss = loss + self.pseudo_label * logs["label_term"]
        return loss, logs

    def forward(self, token, batch, teacher=None):
        return self.key_loss(self.log_keys(token), batch)


class SKey(CPSD):
    """S-KEY: 24 outputs; CPSD on the sum of relatives, a mode label from the template, a balance term for both modes.

    Relatives share a signature, so CPSD cannot tell them apart. Mode label, also without --pseudo-label: the relative
    that the template prefers at its own best signature. (S-KEY compares the levels of the two tonics at the network's
    signature, and so needs to know which pitch class output 0 stands for.) The balance term keeps all from being major.
    """
    outputs, needs_spectrogram = 24, True
    # S-KEY (code; its paper has 15). There CPSD is a sum over three pairs, here a mean, so these are thirds of theirs.
    MODE, BALANCE = 1.5 / 3, 20.0 / 3

    def mode_label(self, posterior):
        """(3, batch, 24) -> (batch,), 1.0 where the major key of the best signature is likelier than its relative."""
        keys = posterior[0].unflatten(-1, (2, 12))                                             # (batch, 2, 12)
        best = keys.sum(dim=1).argmax(dim=-1)                                                  # (batch,)
        major, minor = keys[torch.arange(len(best), device=best.device), :, best].unbind(-1)   # (batch,) each
        return (major > minor).float()

    def forward(self, token, batch, teacher=None):
        log_keys, posterior = self.log_keys(token), self.template_posterior(batch)             # (3, batch, 24) each
        loss, logs = self.key_loss(log_keys, batch, posterior)
        log_major, log_minor = log_keys.unflatten(-1, (2, 12)).logsumexp(dim=-1).unbind(-1)    # (3, batch) each
        label = self.mode_label(posterior)                                                     # (batch,)
        mode = -(label * log_major + (1 - label) * log_minor).mean(dim=1).sum()                # sum over three views
        balance = (log_major[:2].exp().mean() - 0.5) ** 2
        logs |= dict(mode_term=mode, balance_term=balance, major_share=log_major.exp().mean())
        return loss + self.MODE * mode + self.BALANCE * balance, logs


class Tone(CPSD):
    """Semi-TONE: 24 outputs and CPSD; the views of a piece agree on the mode, or where it has a label, learn its key.

    Without labels this is STONE's 24-class model. A label names the key as played, before the shift. Labelled pieces
    have no agreement term (our choice): it favours one mode for all; beside it even labels on every piece did not teach
    the mode.
    """
    outputs = 24
    # Cross entropy between the modes of two views (target, prediction, weight); the target has a gradient too. In
    # STONE's 24-class code times 1.5, here times SKey.MODE.
    AGREE = ((0, 2, 1.0), (1, 2, 0.5), (2, 1, 0.5), (0, 1, 1.0))

    def forward(self, token, batch, teacher=None):
        log_keys = self.log_keys(token)                                                        # (3, batch, 24)
        loss, logs = self.key_loss(log_keys, batch)
        log_modes = log_keys.unflatten(-1, (2, 12)).logsumexp(dim=-1)                          # (3, batch, 2)
        agreement = 0.0                                                                        # (batch,)
        for target, prediction, weight in self.AGREE:
            agreement = agreement - weight * (log_modes[target].exp() * log_modes[prediction]).sum(dim=-1)
        label = batch["keys"]                                                                  # (batch,), -1: none
        labelled = (label >= 0).float()                                                        # (batch,)
        signature = torch.where(label < 12, label, label + 3) % 12                             # (batch,)
        target = (signature + batch["shifts"]) % 12 + 12 * (label >= 12)                       # (3, batch)
        nll = -log_keys.gather(-1, target[..., None])[..., 0]                                  # (3, batch)
        mode = (agreement * (1 - labelled)).sum() / (1 - labelled).sum().clamp(min=1)
        supervised = (nll * labelled).sum() / (3 * labelled.sum()).clamp(min=1)
        logs |= dict(mode_term=mode, supervised_term=supervised, labelled_share=labelled.mean())
        return loss + SKey.MODE * mode + supervised, logs


class NTXent(Pretext):
    """SimCLR, CLMR, ViT-1D: find the other excerpt among all of the batch, by the cosine of 128-d embeddings."""

    def __init__(self, dim):
        super().__init__()
        self.head = projector(dim, 128)

    def forward(self, token, batch, teacher=None):
        return nt_xent(self.head(token), batch["tracks"]), {}


class BYOL(Pretext):
    """BYOL: projector 4 dim - 256, predictor of the same shape on the student (its 4096 - 256, scaled to the trunk)."""
    needs_teacher = True

    def __init__(self, dim):
        super().__init__()
        self.head = projector(dim, 256, norm=ViewNorm)
        self.predictor = projector(256, 256, 4 * dim, norm=ViewNorm)

    def forward(self, token, batch, teacher):
        average, teacher_token = teacher
        return byol(self.predictor(self.head(token)), average.head(teacher_token)), {}


class Cluster(Pretext):
    """DINO, 1024 prototypes. Teacher temperature 0.02 -> 0.04 in a tenth of the run (multi-view: 10 epochs); centre
    momentum 0.9.
    """
    needs_teacher = True

    def __init__(self, dim):
        super().__init__()
        self.head, self.prototypes = projector(dim, 256), nn.Linear(256, 1024, bias=False)
        self.register_buffer("centre", torch.zeros(1024))

    def outputs(self, token):
        """(..., dim) -> (..., 1024): cosine between the unit embedding and unit prototypes (DINO's last layer)."""
        embedding, prototypes = self.head(token).float(), self.prototypes.weight.float()
        with torch.autocast(embedding.device.type, enabled=False):
            return F.normalize(embedding, dim=-1) @ F.normalize(prototypes, dim=-1).T

    def forward(self, token, batch, teacher):
        average, teacher_token = teacher
        target = average.outputs(teacher_token)                                                # (2, batch, 1024)
        rise = (batch["progress"] / 0.1).clamp(max=1)
        temperature = 0.03 - 0.01 * torch.cos(math.pi * rise)
        loss = cluster(self.outputs(token), target, self.centre, temperature)
        share = ((target - self.centre) / temperature).softmax(dim=-1).mean(dim=(0, 1))        # (1024,)
        self.centre.lerp_(target.mean(dim=(0, 1)), 0.1)
        return loss, {"cluster_entropy": torch.special.entr(share).sum()}  # 6.9: all in use; 0: one took all


class Barlow(Pretext):
    """Barlow Twins on 1024 dimensions; the loss divided by their number has the scale of the others."""

    def __init__(self, dim):
        super().__init__()
        self.head = projector(dim, 1024, norm=ViewNorm)

    def forward(self, token, batch, teacher=None):
        return barlow(*self.head(token)) / 1024, {}


class VICReg(Barlow):
    """VICReg on the same head; the loss divided by its weight 25 has the scale of the others."""

    def forward(self, token, batch, teacher=None):
        return vicreg(*self.head(token)) / 25, {}


class MAE(Pretext):
    """Masked autoencoder, a baseline in Myna: predict the mel of the dropped frames, or the dropped patches.

    One block decodes, as wide as the trunk (MAE has eight, narrower than its trunk; our choice). The features are the
    mean of the sequence; the class token, as MAE's, has no loss of its own. pixels: of a patch, for each patch size.
    """
    needs_sequence = True

    def __init__(self, dim, pixels=(128,)):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(dim, dim), nn.Parameter(torch.zeros(dim))
        self.block = nn.TransformerEncoderLayer(dim, 2, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.heads = nn.LayerNorm(dim), nn.ModuleList(nn.Linear(dim, count) for count in pixels)

    def predict(self, batch):
        """Every frame or patch from the visible ones: (2, share, n, pixels)."""
        kept = batch["positions"][..., None].expand_as(batch["sequence"])                      # (2, share, kept, dim)
        x = self.mask_token.expand(*kept.shape[:2], len(batch["places"]), -1)                  # (2, share, n, dim)
        x = x.scatter(2, kept, self.embed(batch["sequence"]).float()) + batch["places"]
        x = self.block(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.heads[batch["patch"]](self.norm(x))

    def forward(self, token, batch, teacher=None):
        return masked_error(self.predict(batch), batch["target"], batch["positions"]), {}


PRETEXT = {"cpsd": CPSD, "cpsd1": partial(CPSD, omegas=(1,)), "skey": SKey, "tone": Tone,
           "ntxent": NTXent, "byol": BYOL, "cluster": Cluster, "barlow": Barlow, "vicreg": VICReg,
           "mae": MAE}  # by name: mae in model.py (pixels), train.py (--mask); tone in train.py (--labels-csv)
