"""What a masked autoencoder predicts: three panels over time, the mel of 4 s, what is kept of it, the prediction.

    python tests/reconstruction.py song.ogg --checkpoint out/mae/checkpoint.pt --out reconstruction.png

Each frame or patch is predicted up to its mean and deviation (the target is normalised, as in MAE): these are the true
ones. What was kept is not predicted, and stands as it is.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import probe  # noqa: E402
from model import cut_patches, load_checkpoint  # noqa: E402


def join_patches(patches, size):
    """The inverse of model.cut_patches: (n, width * bands) -> mel (frames, 128)."""
    bands, width = size
    x = patches.unflatten(-1, (width, bands)).unflatten(0, (-1, data.N_MELS // bands))     # (columns, rows, width, bands)
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


@torch.inference_mode()
def reconstruct(model, frames, mask, seed=0):
    """frames (126, 224) uint8 -> (input, kept, prediction), each mel (frames, 128) in 0..1; NaN where dropped."""
    size = model.patches[0]
    cqt, mel = probe.views_of(frames[None], "cpu")
    target = cut_patches(mel, size or (data.N_MELS, 1))[0]                 # (n, pixels)
    kept = torch.from_numpy(data.kept_positions(np.random.default_rng(seed), (1,), len(target), mask))    # (1, kept)
    given = target[kept] if size else mel[:, kept[0]]                      # (1, kept, pixels or 128)
    sequence = model(cqt[:, kept[0]], given, kept, layers=[model.config["depth"]])[1][model.config["depth"]]
    batch = dict(sequence=sequence[None, :, model.class_token_count:], positions=kept[None], patch=0)
    predicted = model.tasks["mae"].predict(batch | dict(places=model.places(size)))[0, 0]  # (n, pixels)
    predicted = predicted * target.std(dim=-1, keepdim=True) + target.mean(dim=-1, keepdim=True)
    seen = torch.full_like(target, float("nan"))
    seen[kept[0]], predicted[kept[0]] = target[kept[0]], target[kept[0]]
    return [join_patches(x, size or (data.N_MELS, 1)) for x in (target, seen, predicted)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("song")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--mask", type=float, default=0.75)
    parser.add_argument("--out", default="reconstruction.png")
    args = parser.parse_args()
    model = load_checkpoint(args.checkpoint)
    if "mae" not in model.tokens:
        raise data.InputError(f"{args.checkpoint}: has no token mae; train one with --tokens mae")
    frames = torch.from_numpy(data.audio_to_frames(data.read_audio(args.song), data.FrontEnd()))
    middle = max(0, len(frames) // 2 - data.SEGMENT // 2)
    panels = reconstruct(model, frames[middle:middle + data.SEGMENT], args.mask)
    if (plt := probe.pyplot()) is None:
        return
    figure, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True)
    for axis, image, title in zip(axes, panels, ("mel", f"kept: {100 * (1 - args.mask):.0f} %", "prediction")):
        axis.imshow(image.T, origin="lower", aspect="auto", vmin=0, vmax=panels[0].max().item())
        axis.set(title=title, ylabel="mel band")
    axes[-1].set(xlabel="frame, 32 ms")
    probe.save_figure(plt, figure, args.out)


if __name__ == "__main__":
    data.run_cli(main)
