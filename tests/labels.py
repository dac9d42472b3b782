"""Label efficiency as a figure: a probe's score over the share of the training labels it was given.

    python probe.py folders --data soundtracks --labels 0.1,0.25,0.5
    python tests/labels.py out/probe-folders-soundtracks-class.json --rows ntxent "untrained ntxent" raw

Line: mean over splits or seeds; band: 95 % bootstrap interval over test tracks.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import probe  # noqa: E402
from data import InputError, run_cli  # noqa: E402


def curve(row):
    """A row of a table -> [(share of the labels in %, cell)] of its first metric, all labels last."""
    metric = next(iter(row))
    shares = {float(name.split("@")[1].rstrip(" %")): cell for name, cell in row.items()
              if re.fullmatch(re.escape(metric) + r" @[\d.e+-]+ %", name)}
    return sorted(shares.items()) + [(100.0, row[metric])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", help="JSON file that probe.py --labels wrote")
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--out", default="labels.png")
    args = parser.parse_args()
    rows = json.loads(Path(args.table).read_text())["rows"]
    if missing := set(args.rows) - set(rows):
        raise InputError(f"{args.table}: has no row {', '.join(missing)}; it has {', '.join(rows)}")
    if (plt := probe.pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, name in enumerate(args.rows):
        shares, cells = zip(*curve(rows[name]))
        low, high = zip(*(cell["interval"] for cell in cells))
        axis.plot(shares, [100 * cell["mean"] for cell in cells], "o-", color=f"C{i}", label=name)
        axis.fill_between(shares, [100 * v for v in low], [100 * v for v in high], color=f"C{i}", alpha=0.12)
    axis.set(xscale="log", xlabel="share of the training labels, %", ylabel=f"{next(iter(rows[args.rows[0]]))}, %")
    axis.legend()
    probe.save_figure(plt, figure, args.out)


if __name__ == "__main__":
    run_cli(main)
