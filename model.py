"""MT2: a ViT-1D with two class tokens (arXiv 2507.12996). Frames in, one vector per pretext task out.

A vision transformer cuts an image into square patches. Here the image is a spectrogram and a patch is one frame, all
frequencies at one moment: time is the sequence, as words are in a sentence. Class tokens are extra positions without
audio of their own. They gather by attention what their loss asks of them: one learns key (CPSD), one timbre and style
(NT-Xent), both in one trunk. Read top to bottom: block, model, checkpoint.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from data import CROP_BINS, N_MELS, SEGMENT, InputError
from losses import PRETEXT, circulant_


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). (batch, tokens, dim) -> the same."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        q, k, v = self.project(x)
        attended = F.scaled_dot_product_attention(q, k, v)                 # (batch, heads, tokens, dim / heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def project(self, x):
        """Queries, keys and values of the block's input, each (batch, heads, tokens, dim / heads)."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def attention(self, x):
        """Which tokens each token looks at, (batch, heads, tokens, tokens), rows sum to 1: the weights that forward never shows."""
        q, k, _ = self.project(x)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


def sinusoid(places, dim):
    """places (n,) -> (n, dim): sines and cosines of wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017)."""
    frequency = 1e-4 ** (torch.arange(dim // 2, device=places.device) / (dim // 2))
    angle = places[:, None].float() * frequency                            # (n, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def parse_patch(text):
    """'1' -> [None]: whole frames of both spectrograms; '16x16,128x2' -> [(16, 16), (128, 2)]: bands x frames of the mel.

    Raises ValueError when the text is neither, or the bands do not divide the 128 of the mel.
    """
    if text == "1":
        return [None]
    sizes = [tuple(map(int, part.split("x"))) for part in text.split(",")] if re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text) else []
    if not sizes or any(0 in size or N_MELS % size[0] for size in sizes) or len(set(sizes)) < len(sizes):
        raise ValueError(f"patch {text!r}: give 1, or bands x frames with bands that divide {N_MELS}, as 16x16 or 16x16,128x2")
    return sizes


class MT2(nn.Module):
    """ViT with one class token per pretext task.

    tokens: names out of losses.PRETEXT, in any number and order; dim, depth, heads: the trunk, 192, 12, 3 in the paper
    (5.4 M parameters); frames: the longest input, in frames of 32 ms; patch: "1", one frame of both spectrograms a token
    (ViT-1D), or patches of the mel as in Myna, "16x16", "128x2" or both; pool: "token", or "mean" of the sequence in place
    of class tokens (Myna). Raises ValueError for values that do not fit.
    """

    def __init__(self, tokens=("cpsd", "ntxent"), dim=192, depth=12, heads=3, frames=SEGMENT, patch="1", pool="token"):
        super().__init__()
        tokens = tuple(tokens)
        if not tokens or len(set(tokens)) < len(tokens) or set(tokens) - set(PRETEXT):
            raise ValueError(f"tokens {','.join(tokens)!r}: give one or more of {', '.join(PRETEXT)}, each once")
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if pool not in ("token", "mean"):
            raise ValueError(f"pool={pool!r}: give token or mean")
        self.config = dict(tokens=list(tokens), dim=dim, depth=depth, heads=heads, frames=frames, patch=patch, pool=pool)
        self.tokens, self.frames, self.pool, self.patches = tokens, frames, pool, parse_patch(patch)
        if pool == "token":
            self.class_tokens = nn.Parameter(torch.empty(len(tokens), dim))
        if self.patches == [None]:
            tokeniser = lambda bins: nn.Sequential(nn.LayerNorm(bins), nn.Linear(bins, dim), nn.GELU())
            self.tokenisers = nn.ModuleDict({"cqt": tokeniser(CROP_BINS), "mel": tokeniser(N_MELS)})
            # Learned positions for frames only: a class token has just one place, its position is part of its vector.
            self.positions = nn.Parameter(torch.empty(frames, dim))
        else:  # Myna: linear patches, fixed two-dimensional positions
            self.tokenisers = nn.ModuleDict({f"{bands}x{width}": nn.Linear(bands * width, dim) for bands, width in self.patches})
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict({name: PRETEXT[name](dim) for name in tokens})
        keys = [name for name in tokens if self.heads[name].branch == "cqt"]
        if keys and self.patches != [None]:
            raise ValueError(f"tokens {','.join(keys)}: learn from transposed frames of the CQT, which patches of the mel lack; use patch 1")
        for name, parameter in self.named_parameters():
            if name in ("class_tokens", "positions"):
                parameter.data.copy_(0.02 * torch.randn(parameter.shape))  # nn.init.normal_ in numbers; on "meta" that one loads for seconds
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # each block starts as the identity
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.mlp[-1].weight)
        if self.patches == [None]:
            circulant_(self.tokenisers["cqt"][1].weight)
        for head in self.heads.values():
            head.reset()

    @property
    def class_token_count(self):
        return len(self.tokens) if self.pool == "token" else 0

    def patch_count(self, frames, patch=0):
        """How many tokens `frames` frames make (at least one: what is shorter than a patch is filled up with silence)."""
        size = self.patches[patch]
        return frames if size is None else N_MELS // size[0] * max(1, frames // size[1])

    def tokenise(self, cqt, mel, positions, patch):
        """Sequence tokens with their places, (batch, n, dim), and where each task's class token starts from, (batch, tokens, dim)."""
        size, dim = self.patches[patch], self.config["dim"]
        if size is None:
            branch = {"cqt": self.tokenisers["cqt"](cqt), "mel": self.tokenisers["mel"](mel)}         # (batch, frames, dim) each
            own = [branch[head.branch].mean(dim=1) for head in self.heads.values()]                   # (batch, dim) each
            positions = torch.arange(cqt.shape[1], device=cqt.device) if positions is None else positions
            return branch["cqt"] + branch["mel"] + F.embedding(positions, self.positions), torch.stack(own, dim=1)
        bands, width = size
        rows, columns = N_MELS // bands, max(1, mel.shape[1] // width)
        mel = F.pad(mel, (0, 0, 0, max(0, width - mel.shape[1])))[:, :columns * width]
        x = mel.unflatten(1, (columns, width)).unflatten(3, (rows, bands))                            # (batch, columns, width, rows, bands)
        x = x.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)                                         # (batch, columns * rows, width * bands)
        n = torch.arange(columns * rows, device=mel.device)
        place = torch.cat([sinusoid(n // rows, dim // 2), sinusoid(n % rows, dim // 2)], dim=-1)      # (n, dim): when, and how high
        if positions is not None:  # masked patches are dropped before the first matrix product
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
            place = place[positions]
        x = self.tokenisers[f"{bands}x{width}"](x) + place
        return x, x.mean(dim=1, keepdim=True).expand(-1, len(self.tokens), -1)

    def forward(self, cqt, mel, positions=None, layers=(), patch=0):
        """Frames to class tokens.

        cqt (batch, frames, 84) and mel (batch, frames, 128), log-compressed to [0, 1]. A masked token is one that is not
        there: it costs nothing, and class tokens are never masked. With patch "1" positions (batch, frames) int64 says
        which frames of the segment the given ones are; with patches of the mel, which patches to keep, (batch, kept),
        counted up the bands, then along time. Without it, all in order. patch: which of several patch sizes.
        Returns ({name: (batch, dim)}, {layer: (batch, tokens + n, dim)}): the class tokens after the last layer (or the mean,
        see pool), and for each layer in `layers` (0 = tokeniser + positions .. depth = after the final norm) all tokens,
        class tokens first. Raises ValueError when the shapes do not fit or there are more frames than positions.
        """
        batch, frames, _ = cqt.shape
        if cqt.shape[-1] != CROP_BINS or mel.shape != (batch, frames, N_MELS):
            raise ValueError(f"expected cqt (batch, frames, {CROP_BINS}) and mel (batch, frames, {N_MELS}), "
                             f"got {tuple(cqt.shape)} and {tuple(mel.shape)}")
        if positions is not None and (len(positions) != batch or (self.patches == [None] and positions.shape != (batch, frames))):
            raise ValueError(f"expected positions ({batch}, {frames if self.patches == [None] else 'kept'}), got {tuple(positions.shape)}")
        if frames > self.frames:
            raise ValueError(f"{frames} frames are more than the model's {self.frames}; cut the audio into windows")
        x, own = self.tokenise(cqt, mel, positions, patch)                                            # (batch, n, dim), (batch, tokens, dim)
        if self.pool == "token":
            x = torch.cat([own + self.class_tokens, x], dim=1)                                        # (batch, tokens + n, dim)
        inside = {}
        for layer, block in enumerate(self.blocks):
            if layer in layers:
                inside[layer] = x
            x = block(x)
        x = self.norm(x)
        if len(self.blocks) in layers:
            inside[len(self.blocks)] = x
        answers = [x[:, i] for i in range(len(self.tokens))] if self.pool == "token" else [x.mean(dim=1)] * len(self.tokens)
        return dict(zip(self.tokens, answers)), inside

    def key_token(self):
        """Name of the first token that knows key signatures, or None: its head has profile(token)."""
        return next((name for name, head in self.heads.items() if hasattr(head, "profile")), None)


def pick_amp(device):
    """Whether to run matrix products in bf16 on a torch.device, and why. bf16 has fp32's range: no loss scaling."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
        return fast, "bf16 autocast, the GPU's tensor cores" if fast else "fp32, the GPU has no bf16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return True, "bf16 autocast, the processor multiplies bf16 at twice the speed"
    return False, "fp32, no fast bf16 here"


def load_checkpoint(path, device="cpu"):
    """Open a checkpoint written by train.py: MT2 in eval mode. Nothing in the file is executed, nor believed unseen.

    Raises InputError when the file is missing, is not a checkpoint, or does not hold the weights of its own config.
    """
    checkpoint = read_checkpoint(path)
    try:
        config, state = checkpoint["config"], checkpoint["model"]
        # A config may ask for any amount of memory, the tensors in the file are what they are. So first build without memory
        # ("meta") and compare. The depth is bounded before, as its loop takes time; an expanded tensor is larger than its file.
        if not all(type(config[name]) is int and config[name] > 0 for name in ("dim", "depth", "heads", "frames")) or config["depth"] > len(state):
            raise ValueError
        with torch.device("meta"):
            wanted = {name: (t.shape, t.dtype, torch.device("cpu"), True) for name, t in MT2(**config).state_dict().items()}
        single = lambda dtype: torch.float32 if dtype == torch.float16 else dtype  # weights that are passed on may be rounded to half
        if wanted != {name: (t.shape, single(t.dtype), t.device, t.is_contiguous()) for name, t in state.items()}:
            raise ValueError
        if not all(t.isfinite().all() for t in state.values()):
            raise InputError(f"{path}: holds weights that are not finite; train anew with a lower --lr")
        model = MT2(**config)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError):
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
