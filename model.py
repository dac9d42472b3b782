"""MT2: a ViT-1D with two class tokens (arXiv 2507.12996). Frames in, one vector per pretext task out.

A vision transformer cuts an image into square patches. Here the image is a spectrogram and a patch is one frame, all
frequencies at one moment: one token per frame. Class tokens are extra tokens that attend to all frames, each trained by
its own loss: one by CPSD for key, one by NT-Xent for timbre and style. A class token starts as a learned vector plus
the mean of the embedded frames of one spectrogram, CQT for key and mel for the others (MT2).
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from losses import CPSD, PRETEXT, circulant_

CROP_BINS, N_MELS, SEGMENT = 84, 128, 126  # CQT bins of a crop, mel bands, frames of a 4 s segment (data.py)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    (batch, tokens, dim) -> (batch, count, dim), the first `count` tokens (default all); they attend to all.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, count=None):
        weights, v = self.attention(x)
        x = x[:, :count] + self.out((weights[:, :, :count] @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def attention(self, x):
        """Attention weights (batch, heads, tokens, tokens), rows sum to 1; values (batch, heads, tokens, dim / heads).

        Not F.scaled_dot_product_attention: forward and backward, it takes seven times as long in bf16 on a CPU.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1), v


def sinusoid(positions, dim):
    """positions (n,) -> (n, dim): sines and cosines of wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017)."""
    frequency = 1e-4 ** (torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angle = positions[:, None].float() * frequency                         # (n, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def parse_patch(text):
    """'1' -> [None]: whole frames of both spectrograms; '16x16,128x2' -> [(16, 16), (128, 2)]: bands x frames of mel.

    Raises ValueError when the text is neither, or the bands do not divide the 128 of the mel.
    """
    if text == "1":
        return [None]
    sizes = []
    if re.fullmatch(r"\d{1,4}x\d{1,4}(,\d{1,4}x\d{1,4})*", text):
        sizes = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if not sizes or len(set(sizes)) < len(sizes) or any(0 in size or N_MELS % size[0] for size in sizes):
        raise ValueError(f"patch {text!r}: give 1, or bands x frames with bands that divide {N_MELS}, as 16x16,128x2")
    return sizes


def cut_patches(mel, size):
    """mel (..., frames, 128), bytes or floats -> patches (..., n, width * bands) of size (bands, width) (Myna).

    Counted up the bands, then along time. A last incomplete patch is dropped, an input shorter than one zero-padded.
    """
    bands, width = size
    mel = F.pad(mel, (0, 0, 0, max(0, width - mel.shape[-2])))
    columns = mel.shape[-2] // width
    x = mel[..., :columns * width, :].unflatten(-2, (columns, width))      # (..., columns, width, 128)
    x = x.unflatten(-1, (-1, bands)).transpose(-3, -2)                     # (..., columns, rows, width, bands)
    return x.flatten(-2).flatten(-3, -2)                                   # (..., columns * rows, width * bands)


class MT2(nn.Module):
    """ViT with one class token per pretext task.

    tokens: names out of losses.PRETEXT; dim, depth, heads: the trunk, 192, 12, 3 in MT2 (5.4 M parameters);
    frames: longest input, 32 ms each; patch: "1", a frame a token (ViT-1D), or "16x16,128x2", patches of the mel
    (Myna); pool: "token", or "mean" of the sequence (Myna); inputs: the spectrograms of a frame, "cqt,mel" (MT2), "mel"
    (ViT-1D) or "cqt" (STONE). Raises ValueError for misfits.
    """

    def __init__(self, tokens=("cpsd", "ntxent"), dim=192, depth=12, heads=3, frames=SEGMENT, patch="1", pool="token",
                 inputs="cqt,mel"):
        super().__init__()
        tokens = tuple(tokens)
        if not tokens or len(set(tokens)) < len(tokens) or set(tokens) - set(PRETEXT):
            raise ValueError(f"tokens {','.join(tokens)!r}: give one or more of {', '.join(PRETEXT)}, each once")
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if pool not in ("token", "mean"):
            raise ValueError(f"pool={pool!r}: give token or mean")
        if inputs not in ("cqt,mel", "mel", "cqt") or (inputs == "cqt" and patch != "1"):
            raise ValueError(f"inputs {inputs!r}: give cqt,mel, mel or, with patch 1, cqt")
        self.config = dict(tokens=list(tokens), dim=dim, depth=depth, heads=heads, frames=frames, patch=patch,
                           pool=pool, inputs=inputs)
        self.tokens, self.frames, self.pool, self.patches = tokens, frames, pool, parse_patch(patch)
        self.inputs = inputs.split(",") if patch == "1" else ["mel"]
        self.class_token_count = len(tokens) if pool == "token" else 0
        if pool == "token":
            self.class_tokens = nn.Parameter(torch.empty(len(tokens), dim))
        if self.patches == [None]:
            sizes, last = {name: CROP_BINS if name == "cqt" else N_MELS for name in self.inputs}, nn.GELU
            # Learned positions for frames only: the position of a class token would be part of its vector.
            self.positions = nn.Parameter(torch.empty(frames, dim))
        else:  # Myna's code: LayerNorm on both sides of the linear layer, fixed positions
            sizes = {f"{bands}x{width}": bands * width for bands, width in self.patches}
            last = lambda: nn.LayerNorm(dim)
        tokeniser = lambda size: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, dim), last())
        self.tokenisers = nn.ModuleDict({name: tokeniser(size) for name, size in sizes.items()})
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        pixels = {"mae": dict(pixels=[math.prod(size or (N_MELS, 1)) for size in self.patches])}
        self.tasks = nn.ModuleDict({name: PRETEXT[name](dim, **pixels.get(name, {})) for name in tokens})
        if "cqt" not in self.inputs and any(task.branch == "cqt" for task in self.tasks.values()):
            raise ValueError(f"tokens {','.join(tokens)}: key tasks need transposed frames of the CQT; use patch 1 and "
                             "inputs with cqt")
        self.initialise()

    def initialise(self):
        for own in self.parameters(recurse=False):  # class tokens, positions
            nn.init.normal_(own, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # each block starts as the identity
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.mlp[-1].weight)
        if "cqt" in self.tokenisers:
            circulant_(self.tokenisers["cqt"][1].weight)
        for task in self.tasks.values():
            task.reset()

    def embed_frames(self, cqt, mel, positions):
        """Frame tokens (batch, n, dim), and the initial values of the class tokens (batch, tokens, dim)."""
        if positions is None:
            positions = torch.arange(mel.shape[1], device=mel.device)
        spectrograms = {"cqt": cqt, "mel": mel}
        branch = {name: self.tokenisers[name](spectrograms[name]) for name in self.inputs}     # (batch, n, dim) each
        other = branch[self.inputs[0]]  # for a task whose own spectrogram is not an input
        means = [branch.get(task.branch, other).mean(dim=1) for task in self.tasks.values()]   # (batch, dim) each
        return sum(branch.values()) + F.embedding(positions, self.positions), torch.stack(means, dim=1)

    def places(self, size):
        """Position vectors: learned, of each frame (frames, dim), or fixed, of each patch of `size` (patches, dim)."""
        if size is None:
            return self.positions
        bands, width = size
        rows, half = N_MELS // bands, self.config["dim"] // 2
        index = torch.arange(rows * max(1, self.frames // width), device=self.norm.weight.device)
        return torch.cat([sinusoid(index // rows, half), sinusoid(index % rows, half)], dim=-1)    # time, frequency

    def embed_patches(self, patches, positions, size):
        """Patch tokens (batch, n, dim), and the initial values of the class tokens (batch, tokens, dim)."""
        bands, width = size
        place = self.places(size)
        place = place[:patches.shape[1]] if positions is None else F.embedding(positions, place)
        x = self.tokenisers[f"{bands}x{width}"](patches) + place                               # (batch, n, dim)
        return x, x.mean(dim=1, keepdim=True).expand(-1, len(self.tokens), -1)

    def forward(self, cqt, mel, positions=None, layers=(), patch_index=0):
        """Frames to class tokens.

        cqt (batch, frames, 84) and mel (batch, frames, 128), log-compressed to [0, 1]; cqt may be None where it
        is no input.
        Masked tokens are dropped, not replaced (as in MAE): with positions (batch, kept) int64 only the frames at these
        positions of the segment are given, (batch, kept, 84 and 128), or as mel only those of its patches, (batch,
        kept, width * bands), see cut_patches. patch_index: which of several sizes.
        Returns ({name: (batch, dim)}, {layer: (batch, tokens + n, dim)}): the class tokens after the last layer (or the
        mean, see pool), and for each layer in `layers` (0 = tokeniser + positions .. depth = after the final norm) all
        tokens, class tokens first (none if pool is mean). Raises ValueError when shapes or the number of frames misfit.
        """
        size, (batch, n, columns) = self.patches[patch_index], mel.shape
        whole = size is None or positions is None  # frames, not patches
        fits = columns == (N_MELS if whole else math.prod(size))
        fits &= positions is None or positions.shape == (batch, n)
        fits &= "cqt" not in self.inputs or cqt.shape == (batch, n, CROP_BINS)
        if not fits:
            raise ValueError(f"mel {tuple(mel.shape)} does not fit, or cqt and positions do not: see MT2.forward")
        if whole and n > self.frames:
            raise ValueError(f"{n} frames are more than the model's {self.frames}; cut the audio into windows")
        if size is None:
            x, initial = self.embed_frames(cqt, mel, positions)       # (batch, n, dim), (batch, tokens, dim)
        else:
            x, initial = self.embed_patches(cut_patches(mel, size) if whole else mel, positions, size)
        if self.pool == "token":
            x = torch.cat([initial + self.class_tokens, x], dim=1)    # (batch, tokens + n, dim)
        inside, depth = {}, len(self.blocks)
        # Of the last layer only what is used: the class tokens, unless all are asked for or averaged.
        count = None if depth in layers else self.class_token_count or None
        for layer, block in enumerate(self.blocks):
            if layer in layers:
                inside[layer] = x
            x = block(x, count if layer == depth - 1 else None)
        x = self.norm(x)
        if depth in layers:
            inside[depth] = x
        vectors = x.unbind(dim=1) if self.pool == "token" else [x.mean(dim=1)] * len(self.tokens)
        return dict(zip(self.tokens, vectors)), inside

    def key_token(self):
        """Name of the first token whose task is a CPSD, or None: zero-shot key looks at no other."""
        return next((name for name, task in self.tasks.items() if isinstance(task, CPSD)), None)


def pick_amp(device):
    """(whether to run matrix products in bf16 on a torch.device, why). bf16 has fp32's range: no loss scaling."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    native |= device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return native, "bf16 autocast, which this device computes fast" if native else "fp32, no fast bf16 here"


def load_checkpoint(path, device="cpu"):
    """Open a checkpoint written by train.py: MT2 in eval mode. Raises ValueError when it is missing or does not fit."""
    checkpoint = read_checkpoint(path)
    try:
        model = MT2(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])  # weights in half precision load as well
    except Exception:  # a file from elsewhere fails in many ways
        raise ValueError(f"{path}: weights and configuration do not fit; written by another version?") from None
    return model.to(device).eval()


def read_checkpoint(path):
    """The dictionary that train.py saved; nothing in the file is executed. Raises ValueError when there is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"], checkpoint["model"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train one with: python train.py") from None
    except Exception:  # torch.load has no exception of its own
        raise ValueError(f"{path}: is not a checkpoint of train.py") from None
    return checkpoint
