"""Weights to pass on: a checkpoint of train.py without its optimiser, in half precision, with a note on its data.

    python tests/publish.py out/mt2/checkpoint.pt --licence "CC BY-SA 4.0" --about "what it was trained on"

probe.py uses tests/weights/mt2.pt, the default of --out, when no run is in out/ and no --checkpoint is given.
"""
import argparse
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, run_cli, write_atomic  # noqa: E402
from model import load_checkpoint, read_checkpoint  # noqa: E402

LARGEST = 12  # MB: more does not belong into a repository


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--about", required=True, help="what the network was trained on, for those who open the file")
    parser.add_argument("--licence", required=True, help="on what terms, and those of the music")
    parser.add_argument("--out", default="tests/weights/mt2.pt")
    args = parser.parse_args()
    model, saved = load_checkpoint(args.checkpoint), read_checkpoint(args.checkpoint)
    buffer, weights = io.BytesIO(), {name: weight.half() for name, weight in model.state_dict().items()}
    torch.save(dict(config=model.config, model=weights, step=saved.get("step"), settings=saved.get("settings"),
                    about=args.about, licence=args.licence), buffer)
    if (size := buffer.tell() / 1e6) > LARGEST:
        raise InputError(f"{args.checkpoint}: {size:.1f} MB in half precision, over {LARGEST}; pass it on elsewhere")
    write_atomic(args.out, buffer.getbuffer())
    print(f"{args.out}: {size:.2f} MB")


if __name__ == "__main__":
    run_cli(main)
