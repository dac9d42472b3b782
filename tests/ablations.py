"""Two design choices, taken back: train.py with one line changed, everything else alike.

    python tests/ablations.py mel-kept --out out/mel-kept        the transposed view hears its mel
    python tests/ablations.py plain-init --out out/plain-init    ordinary random weights instead of equivariant at birth

All flags of train.py are understood. The table at the end tells what each choice is worth.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402


def plain_init():
    birth = model.MT2.__init__

    def init(self, *args, **kwargs):
        birth(self, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
    model.MT2.__init__ = init


if __name__ == "__main__":
    choice = sys.argv.pop(1)
    if choice == "mel-kept":
        train.training_views = data.crop_views
    elif choice == "plain-init":
        plain_init()
    else:
        sys.exit(f"{choice}: give mel-kept or plain-init")
    data.run_cli(train.main)
