"""MT2: a ViT-1D with two class tokens (arXiv 2507.12996). Frames in, one vector per pretext task out.

A vision transformer cuts an image into square patches. Here the image is a spectrogram and a patch is one frame, all
frequencies at one moment: time is the sequence, as words are in a sentence. Class tokens are extra positions without
audio of their own. They gather by attention what their loss asks of them: one learns key (CPSD), one timbre and style
(NT-Xent), both in one trunk. Read top to bottom: block, model, checkpoint.
"""
import torch
import torch.nn.functional as F
from torch import nn

from data import CROP_BINS, N_MELS, SEGMENT, InputError

# Which spectrogram a class token starts from: its own branch (MT2). Others would start from the sum of both.
BRANCH = {"cpsd": "cqt", "ntxent": "mel"}
PROFILE_TEMPERATURE = 0.3  # of the profile's softmax; below 1 the first outputs are sharp enough to leave z = 0 (our choice)
EMBEDDING = 128            # dimensions in which NT-Xent compares (SimCLR)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). (batch, tokens, dim) -> the same."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # each (batch, heads, tokens, dim / heads)
        attended = F.scaled_dot_product_attention(q, k, v)                 # (batch, heads, tokens, dim / heads)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp(self.norm2(x))


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


class MT2(nn.Module):
    """ViT-1D with one class token per pretext task.

    tokens: names out of "cpsd", "ntxent", in any number and order; dim, depth, heads: the trunk, 192, 12, 3 in the
    paper (5.4 M parameters); frames: the longest input, in frames of 32 ms. Raises ValueError for unknown or repeated
    tokens, or a dim that the heads do not divide.
    """

    def __init__(self, tokens=("cpsd", "ntxent"), dim=192, depth=12, heads=3, frames=SEGMENT):
        super().__init__()
        tokens = tuple(tokens)
        if not tokens or len(set(tokens)) < len(tokens) or set(tokens) - set(BRANCH):
            raise ValueError(f"tokens {','.join(tokens)!r}: give one or more of {', '.join(BRANCH)}, each once")
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.config = dict(tokens=list(tokens), dim=dim, depth=depth, heads=heads, frames=frames)
        self.tokens, self.frames = tokens, frames
        tokeniser = lambda bins: nn.Sequential(nn.LayerNorm(bins), nn.Linear(bins, dim), nn.GELU())
        self.tokenisers = nn.ModuleDict({"cqt": tokeniser(CROP_BINS), "mel": tokeniser(N_MELS)})
        self.class_tokens = nn.Parameter(torch.empty(len(tokens), dim))
        # Learned positions for frames only: a class token has just one place, its position is part of its vector.
        self.positions = nn.Parameter(torch.empty(frames, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        # CPSD: 12 pitch classes, straight. STONE and MT2 map to 84 bins and average over octaves; the mean of linear
        # maps is a linear map, so both heads can say exactly the same. NT-Xent: SimCLR's projector, thrown away later.
        heads = {"cpsd": lambda: nn.Linear(dim, 12),
                 "ntxent": lambda: nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, EMBEDDING))}
        self.heads = nn.ModuleDict({name: heads[name]() for name in tokens})
        nn.init.normal_(self.class_tokens, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # each block starts as the identity
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.mlp[-1].weight)
        circulant_(self.tokenisers["cqt"][1].weight)
        if "cpsd" in tokens:
            circulant_(self.heads["cpsd"].weight.data.T).mul_(0.3)  # unsure at first: a saturated softmax learns nothing

    def forward(self, cqt, mel, positions=None, layers=()):
        """Frames to class tokens.

        cqt (batch, frames, 84) and mel (batch, frames, 128), log-compressed to [0, 1]. positions (batch, frames) int64
        says which frames of the segment these are; without it, the first ones in order. A masked frame is one that is
        not given: it costs nothing, and class tokens are never masked.
        Returns ({name: (batch, dim)}, {layer: (batch, tokens + frames, dim)}): the class tokens after the last layer,
        and for each layer in `layers` (0 = tokeniser + positions .. depth = after the final norm) all tokens, class
        tokens first.
        Raises ValueError when the shapes do not fit or there are more frames than positions.
        """
        batch, frames, _ = cqt.shape
        if cqt.shape[-1] != CROP_BINS or mel.shape != (batch, frames, N_MELS):
            raise ValueError(f"expected cqt (batch, frames, {CROP_BINS}) and mel (batch, frames, {N_MELS}), "
                             f"got {tuple(cqt.shape)} and {tuple(mel.shape)}")
        if positions is not None and positions.shape != (batch, frames):
            raise ValueError(f"expected positions ({batch}, {frames}), got {tuple(positions.shape)}")
        if frames > self.frames:
            raise ValueError(f"{frames} frames are more than the model's {self.frames}; cut the audio into windows")
        branch = {"cqt": self.tokenisers["cqt"](cqt), "mel": self.tokenisers["mel"](mel)}    # (batch, frames, dim) each
        own = [branch[BRANCH[name]].mean(dim=1) for name in self.tokens]                     # (batch, dim) each
        class_tokens = torch.stack(own, dim=1) + self.class_tokens                           # (batch, tokens, dim)
        if positions is None:
            positions = torch.arange(frames, device=cqt.device)
        place = F.embedding(positions, self.positions)                                       # (..., frames, dim)
        x = torch.cat([class_tokens, branch["cqt"] + branch["mel"] + place], dim=1)          # (batch, tokens + frames, dim)
        inside = {}
        for layer, block in enumerate(self.blocks):
            if layer in layers:
                inside[layer] = x
            x = block(x)
        x = self.norm(x)
        if len(self.blocks) in layers:
            inside[len(self.blocks)] = x
        return {name: x[:, i] for i, name in enumerate(self.tokens)}, inside

    def profile(self, token):
        """CPSD class token (batch, dim) -> pitch profile (batch, 12), non-negative, summing to 1."""
        return (self.heads["cpsd"](token).float() / PROFILE_TEMPERATURE).softmax(dim=-1)

    def embed(self, token):
        """NT-Xent class token (batch, dim) -> the embedding (batch, 128) whose cosines the loss compares."""
        return self.heads["ntxent"](token)


def parameter_count(tokens, dim, depth, frames=SEGMENT):
    """Number of parameters by formula: what each part of MT2 costs."""
    block = 12 * dim ** 2 + 13 * dim                                       # qkv, out, two-layer MLP, two norms
    tokenisers = sum(2 * bins + bins * dim + dim for bins in (CROP_BINS, N_MELS))
    heads = {"cpsd": 12 * dim + 12, "ntxent": (dim + 1) * 4 * dim + (4 * dim + 1) * EMBEDDING}
    return depth * block + tokenisers + (len(tokens) + frames) * dim + 2 * dim + sum(heads[t] for t in tokens)


def pick_amp(device):
    """Whether to run matrix products in bf16 on a torch.device, and why. bf16 has fp32's range: no loss scaling."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
        return fast, "bf16 autocast, the GPU's tensor cores" if fast else "fp32, the GPU has no bf16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return True, "bf16 autocast, the processor multiplies bf16 at twice the speed"
    return False, "fp32, no fast bf16 here"


def load_checkpoint(path, device="cpu"):
    """Open a checkpoint written by train.py: MT2 in eval mode. Nothing in the file is executed.

    Raises InputError when the file is missing, is not a checkpoint, or does not hold the weights of its own config.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = MT2(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ZeroDivisionError):
        raise InputError(f"{path}: its weights do not fit its configuration; it was written by another version, train anew") from None
    return model.to(device).eval()


def read_checkpoint(path):
    """The dictionary that train.py saved. Raises InputError when there is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one with: python train.py") from None
    except Exception:  # torch.load has no exception of its own: unpickling, zip and value errors all mean the same
        raise InputError(f"{path}: is not a checkpoint of train.py") from None
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "model" not in checkpoint:
        raise InputError(f"{path}: is not a checkpoint of train.py")
    return checkpoint
