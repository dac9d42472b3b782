"""Train MT2 or one of its single-token baselines.

    python train.py --tokens cpsd,ntxent                      the main job: synthetic songs, seven minutes on two cores
    python train.py --tokens cpsd --out out/cpsd              one token alone: the paper's baselines
    python train.py --data ~/Music --out out/mine             your own recordings
    python train.py --data synth ~/Music --steps 3000         both, mixed by the piece
    python train.py --out out/mine --resume                   go on, bit for bit, from the last checkpoint

A run folder holds checkpoint.pt (weights, optimiser, step, every setting) and log.jsonl (one line per log interval).
Batches, crops and masks are functions of (seed, step), so the step number is all the state there is beside the weights.
"""
import argparse
import io
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import probe
from data import SEGMENT, InputError, Segments, open_data, run_cli, training_views, write_atomic
from losses import circle_point, cpsd, nt_xent
from model import MT2, pick_amp, read_checkpoint

# Named sizes and recipes. A flag given by hand wins over its preset.
PRESETS = {
    # For a CPU: a third of the layers, two thirds of the width; steps for six minutes on two cores (our choice).
    "small": dict(dim=128, depth=4, heads=2, batch_size=128, steps=1000, mask=0.75),
    # MT2 (paper: 192 x 12 x 3, MLP 768); batch 128 and 999 epochs of 512 steps from CoJEPA; mask from CoJEPA (50-75 %).
    "mt2": dict(dim=192, depth=12, heads=3, batch_size=128, steps=511_488, mask=0.5),
}
BETAS = (0.9, 0.98)            # STONE, CoJEPA
WEIGHT_DECAY = (0.04, 0.01)    # first and last value of a cosine, CoJEPA
FINAL_LR = 1.5e-6              # CoJEPA
TRANSPOSED_PAIRS = [(0, 2), (1, 2)]  # the views whose crops differ (data.Segments); without 0-1 there is no trap (losses.cpsd)
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, data sheets


def schedule(step, steps, warmup, peak_lr):
    """Learning rate and weight decay at `step`, pure functions of it.

    Linear warm-up over the share `warmup` of the run, then half a cosine down to FINAL_LR; the decay follows half a
    cosine over the whole run. Both end with the run, whatever its length.
    """
    rising = max(1, round(warmup * steps))
    cosine = lambda start, end, progress: end + (start - end) * (1 + math.cos(math.pi * min(1, progress))) / 2
    lr = peak_lr * (step + 1) / rising if step < rising else cosine(peak_lr, FINAL_LR, (step - rising) / max(1, steps - 1 - rising))
    return lr, cosine(*WEIGHT_DECAY, step / max(1, steps - 1))


def make_optimizer(model):
    """AdamW. Matrices decay; biases, norms, class tokens and positions, which have no input to scale, do not."""
    tables = {id(model.class_tokens), id(model.positions)}
    decay = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.ndim < 2 or id(p) in tables]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW([dict(params=decay, decays=True), dict(params=rest, decays=False)], betas=BETAS, fused=fused)


def training_losses(model, cqt, mel, positions, crops, omegas):
    """One forward pass of all views and the loss of each token.

    cqt (views, batch, kept, 84), mel (views, batch, kept, 128), positions (views, batch, kept), crops (views, batch).
    Returns ({token: loss}, mean |z| at the first omega or None).
    """
    views, batch = crops.shape
    tokens, _ = model(cqt.flatten(0, 1), mel.flatten(0, 1), positions.flatten(0, 1))
    losses, resultant = {}, None
    if "cpsd" in tokens:
        profiles = model.profile(tokens["cpsd"]).view(views, batch, 12)
        # A crop c bins up is a transposition c semitones down.
        losses["cpsd"] = sum(cpsd(profiles, -crops, omega, TRANSPOSED_PAIRS) for omega in omegas) / len(omegas)
        re, im = circle_point(profiles.detach(), omegas[0])
        resultant = (re ** 2 + im ** 2).sqrt().mean()
    if "ntxent" in tokens:  # views 0 and 1: two segments at the same pitch
        losses["ntxent"] = nt_xent(model.embed(tokens["ntxent"][:2 * batch]).view(2, batch, -1))
    return losses, resultant


def pick_device(name):
    """The device asked for, or the best there is. Raises InputError when it is not there."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: is not available here; leave it out, or use --device cpu") from None


def step_flops(model, batch, kept, views):
    """Floating-point operations of one training step by formula: 6 per weight and token, and attention's products."""
    tokens = kept + len(model.tokens)
    dim, depth = model.config["dim"], model.config["depth"]
    per_token = 6 * 12 * depth * dim ** 2 + 12 * depth * dim * tokens
    return views * batch * tokens * per_token


def save_checkpoint(path, model, optimizer, step, settings):
    """Everything that `--resume` and `model.load_checkpoint` need: tensors and plain types only, written atomically."""
    buffer = io.BytesIO()
    torch.save(dict(config=model.config, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, settings=settings), buffer)
    write_atomic(path, buffer.getbuffer())


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("what to learn, from what")
    group.add_argument("--tokens", default="cpsd,ntxent", help="pretext tasks, one class token each: any of cpsd, ntxent")
    group.add_argument("--data", nargs="+", default=["synth"], help="folders of music or frame stores; synth: the embedded songs")
    group.add_argument("--out", default="out/mt2", help="run folder")
    group = parser.add_argument_group("size and length (defaults from the preset)")
    group.add_argument("--preset", choices=PRESETS, help="mt2 on a GPU, small elsewhere")
    group.add_argument("--steps", type=int, help="length of the schedule")
    group.add_argument("--batch-size", type=int, help="pieces of music per step; NT-Xent's negatives come from it")
    group.add_argument("--mask", type=float, help="share of frames dropped before the trunk, 0..1")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (STONE)")
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises (our choice)")
    group.add_argument("--clip", type=float, default=3.0, help="largest norm of the whole gradient (STONE: 3.0 per tensor)")
    group.add_argument("--omega", default="7,1", help="circles on which CPSD is measured and averaged: 7 fifths, 1 semitones")
    group.add_argument("--seed", type=int, default=0, help="decides initial weights, batches, crops and masks")
    group = parser.add_argument_group("running")
    group.add_argument("--device", help="cuda, mps or cpu; found when not given")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile; default: on a GPU only")
    group.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt with its settings")
    group.add_argument("--stop-at", type=int, help="leave at this step with a checkpoint; the schedule is still that of --steps")
    group.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl")
    group.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    group.add_argument("--probe", action=argparse.BooleanOptionalAction, default=True, help="print the probe table at the end")
    return parser.parse_args(argv)


# What a checkpoint fixes: --resume takes these from it.
SETTINGS = ("tokens", "data", "preset", "steps", "batch_size", "mask", "lr", "warmup", "clip", "omega", "seed")


def settle(args, device):
    """Fill in preset and checkpoint values; returns the checkpoint to resume from, or None. Raises InputError."""
    path = Path(args.out) / "checkpoint.pt"
    checkpoint = None
    if args.resume:
        checkpoint = read_checkpoint(path)
        saved = checkpoint["settings"]
        asked = parse_args([]).__dict__
        for name in SETTINGS:
            given = getattr(args, name)
            if given not in (asked[name], saved[name]):
                raise InputError(f"{path}: was trained with --{name.replace('_', '-')} {saved[name]}, not {given}; "
                                 "drop the flag, or start anew in another --out")
            setattr(args, name, saved[name])
    elif path.exists():
        raise InputError(f"{path}: exists; go on with --resume, or choose another --out")
    args.preset = args.preset or ("mt2" if device.type == "cuda" else "small")
    for name in ("steps", "batch_size", "mask"):
        if getattr(args, name) is None:
            setattr(args, name, PRESETS[args.preset][name])
    if args.steps < 1 or args.batch_size < 1 or not 0 <= args.mask < 1:
        raise InputError(f"--steps {args.steps}, --batch-size {args.batch_size}, --mask {args.mask}: "
                         "steps and batch size must be 1 or more, mask from 0 to below 1")
    if not all(o in ("1", "5", "7", "11") for o in args.omega.split(",")):
        raise InputError(f"--omega {args.omega!r}: give 7 (circle of fifths), 1 (semitones) or 7,1; others confuse pitch classes")
    return checkpoint


def main():
    args = parse_args()
    device = pick_device(args.device)
    checkpoint = settle(args, device)
    tokens = args.tokens.split(",")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    preset = PRESETS[args.preset]
    try:
        model = MT2(tokens, preset["dim"], preset["depth"], preset["heads"]).to(device)
    except ValueError as error:
        raise InputError(f"--tokens: {error}") from None
    amp, reason = pick_amp(device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    print(f"device {device}, preset {args.preset}; {reason}; torch.compile {'on' if compiled else 'off'}")
    print(f"tokens {args.tokens}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    stores = open_data(args.data)
    segments = Segments(stores, args.batch_size)
    print(f"data {' '.join(args.data)}: {segments.summary}; {args.steps} steps of {args.batch_size}, mask {args.mask}")
    optimizer, start = make_optimizer(model), 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    omegas = [int(o) for o in args.omega.split(",")]
    views = 3 if "cpsd" in tokens else 2
    losses_of = torch.compile(training_losses) if compiled else training_losses
    flops = step_flops(model, args.batch_size, max(1, round(SEGMENT * (1 - args.mask))), views)
    peak = next((p for name, p in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path, stop = out / "checkpoint.pt", min(args.steps, args.stop_at or args.steps)
    settings = {name: getattr(args, name) for name in SETTINGS}
    trim_log(out / "log.jsonl", start)
    model.train()
    clock, logged, interrupted = time.perf_counter(), start, []
    # Ctrl-C lets the running step end: half a step would be neither before nor after it.
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    bar = tqdm(initial=start, total=args.steps, desc="training", unit="step", smoothing=0.05)
    try:
        with open(out / "log.jsonl", "a") as log:
            for step in range(start, stop):
                lr, decay = schedule(step, args.steps, args.warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"], group["weight_decay"] = lr, decay * group["decays"]
                frames, crops, positions = (x.to(device) for x in segments.batch(args.seed, step, views, args.mask))
                cqt, mel = training_views(frames, crops)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    losses, resultant = losses_of(model, cqt, mel, positions, crops, omegas)
                optimizer.zero_grad(set_to_none=True)
                total = sum(losses.values())                               # weights 1 : 1 (our choice; MT2 unknown)
                total.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                leaving = bool(interrupted)
                last = leaving or step + 1 == stop
                log_now, save_now = last or (step + 1) % args.log_every == 0, last or (step + 1) % args.save_every == 0
                # Only here does the host wait for the device; what is bad never reaches a checkpoint.
                if (log_now or save_now) and not math.isfinite(total.item() + norm.item()):
                    raise InputError(f"loss or gradient is not finite at step {step}; the last good checkpoint is {path}; "
                                     "start anew with a lower --lr in another --out")
                optimizer.step()
                bar.update()
                if log_now:
                    rate = (step + 1 - logged) / (time.perf_counter() - clock)
                    clock, logged = time.perf_counter(), step + 1
                    line = dict(step=step + 1, **{name: loss.item() for name, loss in losses.items()}, grad_norm=norm.item(), lr=lr,
                                clips_per_s=views * args.batch_size * rate)
                    if resultant is not None:
                        line["mean_abs_z"] = resultant.item()
                    if peak:
                        line["mfu"] = flops * rate / peak
                    log.write(json.dumps({k: float(f"{v:.6g}") for k, v in line.items()}) + "\n")
                    log.flush()
                    bar.set_postfix_str("  ".join(f"{k} {v:.3g}" for k, v in line.items() if k not in ("step", "lr")), refresh=False)
                if save_now:
                    save_checkpoint(path, model, optimizer, step + 1, settings)
                if leaving:
                    bar.close()
                    print(f"stopped; {path} holds step {step + 1}, go on with --resume", file=sys.stderr)
                    sys.exit(130)
    finally:
        bar.close()
        signal.signal(signal.SIGINT, handler)
    print(f"{path}: step {stop} of {args.steps}")
    if args.probe and stop == args.steps:
        probe.print_synth(path, device)


def trim_log(path, step):
    """Drop lines past `step`: they belong to steps that a resumed run does again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomic(path, "".join(kept).encode())


if __name__ == "__main__":
    run_cli(main)
