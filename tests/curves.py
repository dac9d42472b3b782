"""Train in stages and watch from outside: losses on music that is held out, and probes, over the steps.

    python tests/curves.py --held held-music --at 250,500,1000,2000,4000 --tokens skey,ntxent --data synth music --mix 3,1 --steps 4000 --out out/curves

All other flags are train.py's; the run is the one that train.py makes, stopped and resumed. After each stage: the loss of
every token on batches from --held (the same at every stage), and the table of held-out synthetic songs. OUT/curves.json
keeps it all, with the lines of log.jsonl; OUT/curves.png draws it when matplotlib is installed.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import probe  # noqa: E402
import train  # noqa: E402
from model import load_checkpoint, pick_amp, read_checkpoint  # noqa: E402

BATCHES = 16  # from the held-out music; their mean is the held-out loss


@torch.no_grad()
def held_out_losses(model, segments, settings, device):
    """{token: mean loss over BATCHES batches}, each a function of its number alone."""
    sums = dict.fromkeys(model.tokens, 0.0)
    for number in range(BATCHES):
        batch = train.make_batch(segments, model, settings["seed"] + 1, number, settings["mask"], BATCHES, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=pick_amp(device)[0]):
            for name, loss in train.training_losses(model, None, batch)[0].items():
                sums[name] += loss.item() / BATCHES
    return sums


def draw(plt, log, stages, out):
    """Four panels over the steps: losses (line: training, dots: held out), rank, mean |z|, probes. 0.58 is CPSD's trap."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    tokens, steps = list(stages[0]["held_out"]), [line["step"] for line in log]
    for i, name in enumerate(tokens):
        axes[0, 0].plot(steps, [line[name] for line in log], color=f"C{i}", lw=0.8, label=f"{name}, training")
        axes[0, 0].plot([s["step"] for s in stages], [s["held_out"][name] for s in stages], "o-", color=f"C{i}", label=f"{name}, held-out soundtracks")
        axes[0, 1].plot(steps, [line[f"{name}_rank"] for line in log], color=f"C{i}", label=name)
    axes[1, 0].plot(steps, [line.get("mean_abs_z", float("nan")) for line in log])
    axes[1, 0].axhline(0.58, color="grey", ls=":")
    for row, column in sorted({(row, column) for s in stages for row, cells in s["probes"].items() for column in cells}):
        values = [100 * s["probes"][row][column] for s in stages]
        axes[1, 1].plot([s["step"] for s in stages], values, "o-", label=f"{row}: {column}")
    titles = ("loss (log scale)", "effective rank of the class tokens", "mean |z| of the key profiles (dotted: the trap)", "held-out synthetic songs, %")
    for axis, title in zip(axes.flat, titles):
        axis.set(title=title, xlabel="step")
    axes[0, 0].set_yscale("log")
    for axis in (axes[0, 0], axes[0, 1], axes[1, 1]):
        axis.legend(fontsize=7)
    probe.save_figure(plt, figure, out / "curves.png")


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--held", required=True)
    parser.add_argument("--at", required=True, help="steps after which to look, the last one that of --steps")
    own, rest = parser.parse_known_args()
    args, stages = train.parse_args(rest), []
    out, size = Path(args.out), args.batch_size or train.PRESETS[args.preset or "small"]["batch_size"]
    segments = data.Segments(data.open_data([own.held]), size)             # before hours of training: it may be too little music
    for step in map(int, own.at.split(",")):
        train.main([*rest, "--no-probe", "--stop-at", str(step), *(["--resume"] if stages else [])])
        settings, device = read_checkpoint(out / "checkpoint.pt")["settings"], train.pick_device(args.device)
        model = load_checkpoint(out / "checkpoint.pt", device)
        results, _ = probe.synth_table(model, device)
        shown = {name: ("instrument @512", "retrieval") for name in model.tokens}
        shown |= {model.key_token(): ("key sig. 0-shot", "key @512"), "sequence mean": ("chord",)}
        probes = {row: {column: results[row][column]["mean"] for column in columns if column in results[row]}
                  for row, columns in shown.items() if row in results}
        stages.append(dict(step=step, held_out=held_out_losses(model, segments, settings, device), probes=probes))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        data.write_atomic(out / "curves.json", json.dumps(dict(stages=stages, log=log)).encode())
        print(json.dumps(stages[-1]))
    if plt := probe.pyplot():
        draw(plt, log, stages, out)


if __name__ == "__main__":
    data.run_cli(main)
