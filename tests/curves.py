"""Train in stages and watch from outside: losses on music that is held out, and probes, over the steps.

    python tests/curves.py --held held-music --at 500,1000,2000 --tokens skey,ntxent --steps 2000 --out out/curves

All other flags are train.py's; the run is the one that train.py makes, stopped and resumed. After each stage: the loss
of every token on batches from --held, always the same, and the table of held-out synthetic songs. OUT/curves.json keeps
it all, with the lines of log.jsonl; OUT/curves.png draws it when matplotlib is installed.
"""
import argparse
import json
import sys
from itertools import product
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
            for name, loss in train.training_losses(model, model, batch)[0].items():
                sums[name] += loss.item() / BATCHES
    return sums


def draw(plt, log, stages, out):
    """Four panels over the steps: losses (line: training, dots: held out), rank, mean |z|, probes."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    steps, stops = [line["step"] for line in log], [s["step"] for s in stages]
    for i, name in enumerate(stages[0]["held_out"]):
        axes[0, 0].plot(steps, [line[name] for line in log], color=f"C{i}", lw=0.8, label=f"{name}, training")
        axes[0, 0].plot(stops, [s["held_out"][name] for s in stages], "o-", color=f"C{i}", label=f"{name}, held out")
        axes[0, 1].plot(steps, [line[f"{name}_rank"] for line in log], color=f"C{i}", label=name)
    axes[1, 0].plot(steps, [line.get("mean_abs_z", float("nan")) for line in log])
    for name in stages[0]["probes"]:
        axes[1, 1].plot(stops, [100 * s["probes"][name] for s in stages], "o-", label=name)
    for axis, title in zip(axes.flat, ("loss (log scale)", "effective rank of the class tokens",
                                       "mean |z| of the key profiles", "held-out synthetic songs, %")):
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
    segments = data.Segments(data.open_data([own.held]), size)             # too little music ends here, before training
    for step in map(int, own.at.split(",")):
        train.main([*rest, "--no-probe", "--stop-at", str(step), *(["--resume"] if stages else [])])
        settings, device = read_checkpoint(out / "checkpoint.pt")["settings"], train.pick_device(args.device)
        model = load_checkpoint(out / "checkpoint.pt", device)
        results, key = probe.synth_table(model, device), str(model.key_token())
        shown = [*product(set(model.tokens) - {key}, ("instrument accuracy", "retrieval")), (key, "key accuracy"),
                 (f"{key} zero-shot", "key signature"), ("sequence", "chords overlap (pooled)")]
        probes = {f"{row}: {c}": results[row][c]["mean"] for row, c in sorted(shown) if c in results.get(row, ())}
        stages.append(dict(step=step, held_out=held_out_losses(model, segments, settings, device), probes=probes))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        data.write_atomic(out / "curves.json", json.dumps(dict(stages=stages, log=log)).encode())
        print(json.dumps(stages[-1]))
    if plt := probe.pyplot():
        draw(plt, log, stages, out)


if __name__ == "__main__":
    data.run_cli(main)
