"""Weights to pass on: a checkpoint of train.py without its optimiser, in half precision, with a note on what it heard.

    python tests/publish.py out/mt2/checkpoint.pt --licence "CC BY-SA 4.0" --about "what it was trained on" --out tests/weights/mt2.pt

probe.py listens with tests/weights/mt2.pt when there is no run in out/ and no --checkpoint is given.
"""
import argparse
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, run_cli, write_atomic  # noqa: E402
from model import load_checkpoint, read_checkpoint  # noqa: E402

LARGEST = 12e6  # bytes: more does not belong into a repository


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--about", required=True, help="what the network was trained on, for those who open the file")
    parser.add_argument("--licence", required=True, help="on what terms, and those of the music")
    parser.add_argument("--out", default="tests/weights/mt2.pt")
    args = parser.parse_args()
    model, saved = load_checkpoint(args.checkpoint), read_checkpoint(args.checkpoint)
    buffer = io.BytesIO()
    torch.save(dict(config=model.config, model={name: weight.half() for name, weight in model.state_dict().items()}, step=saved.get("step"),
                    settings=saved.get("settings"), about=args.about, licence=args.licence), buffer)
    if buffer.tell() > LARGEST:
        raise InputError(f"{args.checkpoint}: makes {buffer.tell() / 1e6:.1f} MB in half precision, more than {LARGEST / 1e6:.0f}; pass it on elsewhere")
    write_atomic(Path(args.out), buffer.getbuffer())
    print(f"{args.out}: {buffer.tell() / 1e6:.2f} MB")


if __name__ == "__main__":
    run_cli(main)
