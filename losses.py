"""Pretext tasks: what a class token has to learn, without labels. One class each, found by its name in PRETEXT.

    key        cpsd, cpsd1 (STONE)    skey (S-KEY)    tone (Semi-TONE: with some labels)
    style      ntxent (SimCLR)    byol    cluster (DINO)    barlow (Barlow Twins)    vicreg

First the losses as plain functions of what the views gave, all in float32. Then the tasks: which views one needs, its head,
its loss, what it logs. `train.py --tokens a,b,c` trains any set of them in one trunk.
"""
import math
from functools import partial, wraps
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn


def in_float32(loss):
    """Leave autocast for a loss: under bf16 a cosine of 0.99 / 0.1 has a spacing of 0.06, as large as what there is to learn."""
    @wraps(loss)
    def wrapped(first, *rest, **options):
        with torch.autocast(first.device.type, enabled=False):
            return loss(first, *rest, **options)
    return wrapped


# ---------------------------------------------------------------- key: equivariance


def circle_point(profiles, omega):
    """(..., 12), each not negative and 1 in sum -> real and imaginary part (...) of z = sum_q y[q] exp(2 pi i omega q / 12).

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

    profiles (views, batch, 12), each 1 in sum; shifts (views, batch), semitones by which each view was transposed up;
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
        cross_im = im[a] * re[b] - re[a] * im[b]                           # (batch,)
        total = total + ((turn.cos() - cross_re) ** 2 + (turn.sin() - cross_im) ** 2).mean()
    return total / len(pairs)


# ---------------------------------------------------------------- timbre and style: invariance


@in_float32
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
    z = F.normalize(z.float().flatten(0, 1), dim=-1)                       # (views * batch, dim)
    similarity = z @ z.T / temperature                                     # (views * batch, views * batch)
    similarity.fill_diagonal_(-math.inf)
    log_probability = similarity.log_softmax(dim=-1)                       # (views * batch, views * batch)
    item = torch.arange(batch, device=z.device).repeat(views)              # (views * batch,)
    positive = (item[:, None] == item).fill_diagonal_(False)               # (views * batch, views * batch)
    return -log_probability.where(positive, 0).sum() / (views * batch * (views - 1))


@in_float32
def byol(prediction, target):
    """BYOL, eq. 2: predict what a slowly moving teacher says of the *other* excerpt.

    prediction (2, batch, dim) of the student for both views, target (2, batch, dim) of the teacher (no gradient reaches
    it). The sum of 2 - 2 cosine over the two crossed pairs, mean over the batch: 0 for equal directions, 4 for
    orthogonal ones, 8 for opposite ones. There are no negatives; what keeps a constant answer away is that the student
    has a predictor and the teacher only follows the student's average.
    """
    cosine = F.cosine_similarity(prediction.float(), target.detach().float().flip(0), dim=-1)  # (2, batch)
    return (2 - 2 * cosine).mean(dim=1).sum()


@in_float32
def cluster(student, teacher, centre, teacher_temperature, student_temperature=0.1):
    """DINO, eq. 1-2: sort the other excerpt into the same of many clusters as the teacher does.

    student, teacher (2, batch, prototypes) raw outputs, centre (prototypes,). Cross entropy between the teacher's
    softmax((t - centre) / teacher_temperature) for one view and the student's for the other, mean over both orders and
    the batch. The centre keeps one cluster from taking all, the low teacher temperature keeps all from being equally
    likely: either alone collapses. log(prototypes) when both say nothing.
    """
    with torch.no_grad():
        wanted = ((teacher.float() - centre) / teacher_temperature).softmax(dim=-1).flip(0)     # (2, batch, prototypes)
    return -(wanted * (student.float() / student_temperature).log_softmax(dim=-1)).sum(dim=-1).mean()


@in_float32
def barlow(a, b, off_diagonal=0.005):
    """Barlow Twins, eq. 1: each dimension agrees with itself over the two views and with no other dimension.

    a, b (batch, dim). C = correlation matrix of a's and b's dimensions over the batch, standardised with the biased
    deviation. Sum of (1 - C_ii)^2 plus 0.005 times the sum of C_ij^2, i != j. 0 for equal, decorrelated views.
    """
    a, b = ((x.float() - x.float().mean(dim=0)) / (x.float().var(dim=0, unbiased=False) + 1e-5).sqrt() for x in (a, b))
    correlation = a.T @ b / len(a)                                         # (dim, dim)
    diagonal = correlation.diagonal()                                      # (dim,)
    return (1 - diagonal).square().sum() + off_diagonal * (correlation.square().sum() - diagonal.square().sum())


@in_float32
def vicreg(a, b, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg, eq. 1-6 with the weights and the halved variance term of its released code.

    a, b (batch, dim). Views agree (mean square), each dimension keeps a deviation of at least 1 (hinge), no two
    dimensions say the same (off-diagonal covariance squared, over dim). A constant output costs 25 * 0.99.
    """
    a, b = a.float(), b.float()
    spread = sum(F.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean() for x in (a, b)) / 2
    shared = 0.0
    for x in (a, b):
        x = x - x.mean(dim=0)
        c = x.T @ x / (len(x) - 1)                                         # (dim, dim)
        shared = shared + (c.square().sum() - c.diagonal().square().sum()) / x.shape[1]
    return invariance * F.mse_loss(a, b) + variance * spread + covariance * shared


def effective_rank(x):
    """exp of the entropy of the singular values of centred x (items, dim): how many directions are in use, 1 .. dim.

    0 for a constant x. (Roy and Vetterli 2007.) A token that collapses in directions shows here long before its loss does.
    """
    x = x.float()
    values = torch.linalg.svdvals(x - x.mean(dim=0))                       # (min(items, dim),)
    if values.sum() <= 1e-4 * x.norm():  # rounding, not music
        return 0.0
    share = values / values.sum()
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item()


# ---------------------------------------------------------------- tasks

PROFILE_TEMPERATURE = 0.3  # of the profile's softmax; below 1 the first outputs are sharp enough to leave z = 0 (our choice)
TRANSPOSED_PAIRS = [(0, 2), (1, 2)]  # the views whose crops differ (data.Segments); without 0-1 there is no trap (cpsd)


@torch.no_grad()
def circulant_(weight):
    """Initialise (outputs, bins) so that transposing the input by a semitone only rotates each group of 12 outputs.

    Row 12 k + q looks at pitch class p as row 12 k looks at p - q, in every octave alike but for a random weight of the
    octave. A network that starts like this, all else being the identity, is equivariant at birth; it is free to leave.
    Rows beyond the last whole group of 12 keep their values. Returns weight.
    """
    outputs, bins = weight.shape
    groups, octaves = outputs // 12, bins // 12
    pattern = torch.randn(groups, 12)                                      # what group k listens for, from its tonic up
    octave = torch.rand(groups, octaves) + 0.5
    q = torch.arange(12)
    rows = pattern[:, (q[None, :] - q[:, None]) % 12]                      # (groups, 12 outputs, 12 pitch classes)
    rows = torch.einsum("kqp,ko->kqop", rows, octave).reshape(12 * groups, 12 * octaves)
    weight[:12 * groups, :12 * octaves] = rows * (2 / (outputs + bins)) ** 0.5
    return weight


class ViewNorm(nn.Module):
    """Batch norm of each view by itself: (views, batch, n) standardised over the batch, times a weight, plus a bias.

    BYOL, Barlow Twins and VICReg have batch norm in their heads; without it BYOL collapses (README). No running statistics:
    heads serve training only, and the features that are kept never see it.
    """

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        variance, mean = torch.var_mean(x.float(), dim=-2, keepdim=True, unbiased=False)       # (views, 1, n) each
        return (x.float() - mean) * (variance + 1e-5).rsqrt() * self.weight + self.bias


def projector(dim, out, width=None, norm=nn.Identity):
    """A head of two layers: the loss compares here, not in the features, which may keep what the loss throws away (SimCLR)."""
    width = width or 4 * dim
    return nn.Sequential(nn.Linear(dim, width), norm(width), nn.GELU(), nn.Linear(width, out))


class Pretext(nn.Module):
    """A pretext task. A subclass sets what it needs, makes its head, and returns its loss.

    branch: the spectrogram whose mean the class token starts from, "cqt" or "mel"; views: 2 segments at one pitch, or 3,
    with segment A transposed (data.Segments); teacher: whether it needs the moving average of the network; hears: whether
    it reads the spectrograms. A subclass is made with the width `dim` of the trunk, has `head`, and implements

        forward(token, batch, teacher) -> (loss, {name: scalar to log})

    token (views, batch, dim); batch: "shifts" (views, batch) semitones up, "cqt" (2, batch, frames, 84) and "mel"
    (2, batch, frames, 128) where it hears, "keys" (batch,) 0..23 or -1, "progress" of the run, 0 to 1; teacher: None, or
    (the teacher's copy of this task, its token (2, batch, dim)).
    All of this is of the whole batch, however many processes share the trunk's work (train.whole_batch).
    """
    branch, views, teacher, hears = "mel", 2, False, False

    def reset(self):
        """Called once after the general initialisation, for heads that start otherwise."""


class CPSD(Pretext):
    """STONE: the pitch profile turns as the music is transposed. omegas: circles, averaged; 7 fifths, 1 semitones."""
    branch, views, outputs = "cqt", 3, 12

    def __init__(self, dim, omegas=(7, 1)):
        super().__init__()
        # 12 pitch classes, straight. STONE and MT2 map to 84 bins and average over octaves; the mean of linear maps is a
        # linear map, so both heads can say exactly the same.
        self.head, self.omegas = nn.Linear(dim, self.outputs), omegas

    def reset(self):
        circulant_(self.head.weight.data.T).mul_(0.3)  # unsure at first: a saturated softmax learns nothing

    def keys(self, token):
        """token (..., dim) -> probabilities (..., outputs), summing to 1."""
        return (self.head(token).float() / PROFILE_TEMPERATURE).softmax(dim=-1)

    def profile(self, token):
        """token (..., dim) -> pitch profile (..., 12) over key signatures, non-negative, summing to 1."""
        return self.keys(token).unflatten(-1, (-1, 12)).sum(dim=-2)

    def equivariance(self, profile, batch):
        loss = sum(cpsd(profile, batch["shifts"], omega, TRANSPOSED_PAIRS) for omega in self.omegas) / len(self.omegas)
        re, im = circle_point(profile.detach(), self.omegas[0])
        return loss, {"mean_abs_z": (re ** 2 + im ** 2).sqrt().mean()}

    def forward(self, token, batch, teacher=None):
        return self.equivariance(self.profile(token), batch)


class SKey(CPSD):
    """S-KEY: 24 outputs, major keys first; CPSD on the sum of relatives, and a guess from chroma tells them apart. (Chroma: how
    loud each pitch class is, all octaves together. Relatives, tonic, triad: see the songs in data.py.)

    Output q (major) and 12 + q (its relative minor) share a key signature. Of the two, the one whose tonic triad sounds
    more is taken as the answer: a pseudo-label, right often enough to learn from, and it turns along with the music.
    (S-KEY compares the tonics alone. Given the signature, tonics name the mode of 71 % of POP909's clips, triads of 75 %.)
    It must know which pitch class output q stands for, which CPSD leaves open; `alignment` counts at which rotation the
    profiles agree with the scale whose seven notes sound most. The balance term keeps all from being major.
    """
    outputs, hears = 24, True
    # S-KEY (code; its paper says 15). There CPSD is a sum over three pairs, here a mean, so these are thirds of theirs.
    MODE, BALANCE = 1.5 / 3, 20.0 / 3

    def __init__(self, dim, omegas=(7, 1)):
        super().__init__(dim, omegas)
        self.register_buffer("alignment", torch.zeros(12))
        major = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1.])
        self.register_buffer("scales", torch.stack([major.roll(q) for q in range(12)]), persistent=False)

    def reset(self):
        circulant_(self.head.weight.data[:12].T).mul_(0.3)
        self.head.weight.data[12:] = self.head.weight.data[:12]  # major and minor start level

    @torch.no_grad()
    def guess(self, profile, batch):
        """1.0 where major, (batch,): the louder of the two tonic triads of the key signature. profile (views, batch, 12)."""
        cqt = batch["cqt"][:2].flatten(0, 1).float()                                           # (2 batch, frames, 84)
        # Bins louder than their neighbours are partials; the rest is the filters' slopes, drums and noise.
        peaks = torch.where(cqt >= F.max_pool1d(cqt, 3, stride=1, padding=1), cqt, 0)
        chroma = peaks.unflatten(0, (2, -1)).unflatten(-1, (-1, 12)).mean(dim=(0, 2, 3))       # (batch, 12) from the crop's first bin
        centred = F.normalize(chroma - chroma.mean(dim=-1, keepdim=True), dim=-1)
        believed = (10 * centred @ self.scales.T).softmax(dim=-1)                              # (batch, 12)
        answer = profile[:2].mean(dim=0)                                                       # (batch, 12)
        agreement = torch.stack([(answer.roll(-r, dims=-1) * believed).sum(dim=-1).mean() for r in range(12)])
        self.alignment.lerp_(agreement, 0.05)
        tonic = (answer.argmax(dim=-1) - self.alignment.argmax()) % 12                         # (batch,) pitch class of the major tonic
        loudness = lambda pitch: chroma.gather(1, (pitch % 12)[:, None])[:, 0]
        major, minor = (loudness(root) + loudness(root + third) + loudness(root + 7) for root, third in ((tonic, 4), (tonic - 3, 3)))
        return (major > minor).float()

    def forward(self, token, batch, teacher=None):
        keys = self.keys(token)                                                                # (3, batch, 24)
        profile = keys.unflatten(-1, (2, 12)).sum(dim=-2)                                      # (3, batch, 12)
        loss, logs = self.equivariance(profile, batch)
        major = keys[..., :12].sum(dim=-1).clamp(1e-6, 1 - 1e-6)                               # (3, batch)
        guess = self.guess(profile, batch)                                                     # (batch,)
        mode = -(guess * major.log() + (1 - guess) * (1 - major).log()).mean(dim=1).sum()      # sum over the three views
        balance = (major[:2].mean() - 0.5) ** 2
        logs |= {"cpsd_term": loss.detach(), "mode_term": mode.detach(), "balance_term": balance.detach(), "major_share": major.detach().mean()}
        return loss + self.MODE * mode + self.BALANCE * balance, logs


class Tone(SKey):
    """Semi-TONE: 24 outputs and CPSD; the views of a piece agree on the mode, or where it has a label, learn its key.

    Without any label this is STONE's 24-class model, with labels on all pieces its supervised one. A label names the
    key as played; a view at crop c hears it c semitones lower. (Where a label is known nothing else speaks of the mode:
    agreement alone likes one mode for all, and beside it even labels on every piece taught none. Our choice.)
    """
    hears = False
    # Which view's major share teaches which (target, prediction, weight), times 1.5: STONE's 24-class code.
    AGREE = ((0, 2, 1.0), (1, 2, 0.5), (2, 1, 0.5), (0, 1, 1.0))

    def forward(self, token, batch, teacher=None):
        keys = self.keys(token)                                                                # (3, batch, 24)
        loss, logs = self.equivariance(keys.unflatten(-1, (2, 12)).sum(dim=-2), batch)
        major = keys[..., :12].sum(dim=-1).clamp(1e-6, 1 - 1e-6)                               # (3, batch)
        agree = sum(weight * -(major[t] * major[p].log() + (1 - major[t]) * (1 - major[p]).log()) for t, p, weight in self.AGREE)  # (batch,)
        label = batch["keys"]                                                                  # (batch,)
        signature = torch.where(label < 12, label, label + 3) % 12                             # (batch,)
        heard = (signature + batch["shifts"]) % 12 + 12 * (label >= 12)                        # (3, batch)
        surprise = -keys.clamp(min=1e-6).log().gather(-1, heard[..., None])[..., 0]            # (3, batch)
        known = (label >= 0).float()                                                           # (batch,)
        mode = (agree * (1 - known)).sum() / (1 - known).sum().clamp(min=1)
        named = (surprise * known).sum() / (3 * known.sum()).clamp(min=1)
        logs |= {"cpsd_term": loss.detach(), "mode_term": mode.detach(), "label_term": named.detach(), "labelled_share": known.mean()}
        return loss + self.MODE * mode + named, logs


class NTXent(Pretext):
    """SimCLR, CLMR, ViT-1D: find the other excerpt among all of the batch, by the cosine of 128-d embeddings (SimCLR)."""

    def __init__(self, dim):
        super().__init__()
        self.head = projector(dim, 128)

    def forward(self, token, batch, teacher=None):
        return nt_xent(self.head(token)), {}


class BYOL(Pretext):
    """BYOL: projector 4 dim - 256 and predictor of the same shape on the student (BYOL's 4096 - 256, scaled to the trunk)."""
    teacher = True

    def __init__(self, dim):
        super().__init__()
        self.head, self.predictor = projector(dim, 256, norm=ViewNorm), projector(256, 256, 4 * dim, norm=ViewNorm)

    def forward(self, token, batch, teacher):
        other, seen = teacher
        return byol(self.predictor(self.head(token)), other.head(seen)), {}


class Cluster(Pretext):
    """DINO's loss on 1024 prototypes. Teacher temperature 0.02 -> 0.04 by cosine in the first tenth, centre 0.9 (multi-view)."""
    teacher = True

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
        other, seen = teacher
        with torch.no_grad():
            target = other.outputs(seen)                                                       # (2, batch, 1024)
        rise = (batch["progress"] / 0.1).clamp(max=1)
        temperature = 0.03 - 0.01 * torch.cos(math.pi * rise)
        loss = cluster(self.outputs(token), target, self.centre, temperature)
        with torch.no_grad():
            share = ((target - self.centre) / temperature).softmax(dim=-1).mean(dim=(0, 1))    # (1024,)
            entropy = -(share * share.clamp(min=1e-12).log()).sum()
            self.centre.lerp_(target.mean(dim=(0, 1)), 0.1)
        return loss, {"cluster_entropy": entropy}  # log(1024) = 6.9: all clusters in use; 0: one took all


class Barlow(Pretext):
    """Barlow Twins on 1024 dimensions. The sum over dimensions is divided by their number, so that it weighs like the others."""

    def __init__(self, dim):
        super().__init__()
        self.head = projector(dim, 1024, norm=ViewNorm)

    def forward(self, token, batch, teacher=None):
        a, b = self.head(token)
        return barlow(a, b) / 1024, {}


class VICReg(Barlow):
    """VICReg on the same head, divided by its weight 25, so that it weighs like the others."""

    def forward(self, token, batch, teacher=None):
        a, b = self.head(token)
        return vicreg(a, b) / 25, {}


PRETEXT = {"cpsd": CPSD, "cpsd1": partial(CPSD, omegas=(1,)), "skey": SKey, "tone": Tone,
           "ntxent": NTXent, "byol": BYOL, "cluster": Cluster, "barlow": Barlow, "vicreg": VICReg}
