"""Train MT2 or one of its single-token baselines.

    python train.py --tokens cpsd,ntxent                      the main job: synthetic songs, seven minutes on two cores
    python train.py --tokens cpsd --out out/cpsd              one token alone: the paper's baselines
    python train.py --data ~/Music --out out/mine             your own recordings
    python train.py --data synth ~/Music --mix 3,1            both, three pieces in four of them synthetic
    python train.py --tokens cpsd,byol                        any set of the pretext tasks of losses.PRETEXT
    python train.py --tokens skey,ntxent --weights 1,0.3      how much each of their losses counts
    python train.py --preset myna-base                        another paper's model
    python train.py --out out/mine --resume                   go on, bit for bit, from the last checkpoint
    torchrun --nproc_per_node=8 train.py --preset mt2         eight GPUs of one machine; or of two, the same line on each:
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --preset mt2

A run folder holds checkpoint.pt (weights, optimiser, step, every setting) and log.jsonl (one line per log interval).
Batches, crops and masks are functions of (seed, step), so the step number is all the state there is beside the weights.

Several processes (ranks) train what one would: --batch-size is that of all together. Each passes its share through the
trunk; class tokens are then gathered, so every loss sees the whole batch; gradients are averaged, so all ranks take the
same step. A checkpoint goes on with any number of them. Machines need one common disk (data, labels, --out).
"""
import argparse
import io
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import probe
from data import SEGMENT, InputError, Segments, kept_positions, locked, open_data, run_cli, training_views, write_atomic
from losses import PRETEXT, effective_rank
from model import MT2, pick_amp, read_checkpoint

# Named models and recipes. A flag given by hand wins over its preset. Frames, AdamW and the schedule are the same for all.
VIT1D = dict(dim=192, depth=12, heads=3, batch_size=128, steps=511_488, lr=1e-3, patch="1", pool="token")
MYNA = dict(tokens="ntxent", dim=384, depth=12, heads=6, batch_size=4096, steps=100_341, lr=3e-4, mask=0.9, pool="mean")
PRESETS = {
    # For a CPU: a third of the layers, two thirds of the width; steps for six minutes on two cores (our choice).
    "small": dict(VIT1D, tokens="cpsd,ntxent", dim=128, depth=4, heads=2, steps=1000, mask=0.75),
    # MT2 (paper: 192 x 12 x 3, MLP 768); batch 128 and 999 epochs of 512 steps from CoJEPA; mask from CoJEPA (50-75 %).
    "mt2": dict(VIT1D, tokens="cpsd,ntxent", mask=0.5),
    # "Emergent": the same trunk with NT-Xent alone; no masking described.
    "vit1d": dict(VIT1D, tokens="ntxent", mask=0.0),
    # STONE's loss, batch, rate and length (50 epochs of 512 steps) on our trunk; its own is a convolutional network.
    "stone": dict(VIT1D, tokens="cpsd", steps=25_600, mask=0.0),
    # S-KEY's: 50 epochs of 60,000 songs in batches of 128.
    "skey": dict(VIT1D, tokens="skey", steps=23_438, mask=0.0),
    # Myna (paper: 384 x 12 x 6, no class token, 90 % masked, batch 4096, 500 epochs of 822,000 clips, rate 3e-4). Our segments
    # of 4 s make 56 and 63 patches where its 3 s make 48; its Adam with decay 1e-5 is our AdamW.
    "myna-base": dict(MYNA, patch="16x16"),
    "myna-vertical": dict(MYNA, patch="128x2"),
    "myna-hybrid": dict(MYNA, patch="16x16,128x2"),
}
BETAS = (0.9, 0.98)            # STONE, CoJEPA
WEIGHT_DECAY = (0.04, 0.01)    # first and last value of a cosine, CoJEPA
FINAL_LR = 1.5e-6              # CoJEPA
TEACHER_MOMENTUM = 0.996       # rises to 1 by a cosine (BYOL)
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
    decays = lambda name, p: p.ndim >= 2 and name not in ("class_tokens", "positions")
    decay = [p for name, p in model.named_parameters() if decays(name, p)]
    rest = [p for name, p in model.named_parameters() if not decays(name, p)]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW([dict(params=decay, decays=True), dict(params=rest, decays=False)], betas=BETAS, fused=fused)


class Gather(torch.autograd.Function):
    """(views, share, ...) of each rank -> (views, batch, ...) of all in order, the same on every rank."""

    @staticmethod
    def forward(ctx, x):
        shares = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, x.contiguous())
        return torch.cat(shares, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        # x enters the loss of every rank. The losses are equal, so are these gradients: their sum needs no message.
        return dist.get_world_size() * gradient.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


gather = torch.compiler.disable(Gather.apply)


def whole_batch(x):
    """(views, share, ...) of this rank -> (views, batch, ...) of all ranks, differentiable. A single process has it all."""
    return gather(x) if dist.is_initialized() else x


def average_gradients(model):
    """Mean over the ranks of every gradient. One message, after backward: for a trunk of 5 M parameters there is little to
    overlap. A trunk's gradient comes from its share alone, but `ranks` times (Gather): the mean is that of the whole batch."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, mean in zip(parameters, flat.div_(dist.get_world_size()).split([p.numel() for p in parameters])):
        p.grad = mean.view_as(p)


def any_rank(flag, device):
    """Whether `flag` is true on one of the ranks."""
    flag = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def training_losses(model, teacher, batch):
    """One forward pass of all views and the loss of each token; with several patch sizes, the mean over them.

    batch: for the trunk cqt (views, share, frames, 84), mel (views, share, frames, 128), positions [(views, share, kept)] per
    patch size; for the heads shifts (views, batch), keys (batch,), progress (). share: the items of this rank, all of the
    batch in a single process. teacher: the moving average of the model, or None.
    Returns ({token: loss}, {name: scalar to log}, {token: (batch, dim) of view 0}), of the whole batch.
    """
    views = len(batch["shifts"])
    heard = batch | {name: whole_batch(batch[name][:2]) for name in ("cqt", "mel")} if any(task.hears for task in model.heads.values()) else batch
    losses, logs = dict.fromkeys(model.tokens, 0.0), {}
    for patch, positions in enumerate(batch["positions"]):
        inputs = lambda n: (batch["cqt"][:n].flatten(0, 1), batch["mel"][:n].flatten(0, 1), positions[:n].flatten(0, 1))
        tokens = model(*inputs(views), patch=patch)[0]
        tokens = {name: whole_batch(token.unflatten(0, (views, -1))) for name, token in tokens.items()}  # (views, batch, dim) each
        if teacher is not None:
            with torch.no_grad():
                seen = {name: whole_batch(token.unflatten(0, (2, -1))) for name, token in teacher(*inputs(2), patch=patch)[0].items()}
        for name, task in model.heads.items():
            average = (teacher.heads[name], seen[name]) if task.teacher else None
            loss, extra = task(tokens[name][:task.views], heard, average)
            losses[name] = losses[name] + loss / len(batch["positions"])
            logs |= {f"{name}_{k}" if k in logs else k: v for k, v in extra.items()}
    return losses, logs, {name: token[0].detach() for name, token in tokens.items()}


def make_batch(segments, model, seed, step, views, mask, steps, device, share=slice(None)):
    """The inputs of training_losses at a step, on the device: a pure function of (seed, step). share: the items of this rank."""
    whole_frames = model.patches == [None]
    frames, crops, positions, keys = segments.batch(seed, step, views, mask if whole_frames else 0.0, share)
    if whole_frames:
        kept = [positions]
    else:  # patches are masked one by one, so the frames come whole
        kept = [torch.from_numpy(kept_positions(np.random.default_rng([seed, step, 1 + patch]), (views, segments.batch_size),
                                                model.patch_count(SEGMENT, patch), mask)[:, share]) for patch in range(len(model.patches))]
    cqt, mel = training_views(frames.to(device), crops[:, share].to(device))
    # A crop c bins up is a transposition c semitones down.
    return dict(cqt=cqt, mel=mel, positions=[p.to(device) for p in kept], shifts=-crops.to(device), keys=keys.to(device),
                progress=torch.tensor(step / max(1, steps - 1), device=device))


@torch.no_grad()
def follow(teacher, model, progress):
    """Move the teacher towards the student: momentum 0.996 at first, 1 at the end of the run."""
    momentum = 1 - (1 - TEACHER_MOMENTUM) * (1 + math.cos(math.pi * progress)) / 2
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - momentum)


def collapse_report(tokens):
    """{name_rank, name_deviation} of tokens {name: (batch, dim)}, and the names of those that have collapsed.

    Effective rank: how many directions the batch uses. Deviation: the spread of each dimension over the batch, mean over
    dimensions, where 1 is what the final norm makes of a healthy token. Collapsed: one direction, or no spread.
    """
    report, collapsed = {}, []
    for name, token in tokens.items():
        rank, deviation = effective_rank(token), token.float().std(dim=0).mean().item()
        report |= {f"{name}_rank": rank, f"{name}_deviation": deviation}
        if rank < 1.5 or deviation < 0.05:
            collapsed.append(name)
    return report, collapsed


def keys_of(path, stores):
    """Labels of a CSV with columns file,key: {path in a store: 0..23}. A file is named as in the store, or below its folder."""
    paths, wanted = [p for store in stores for p in store.paths], probe.read_keys(path)
    keys = {p: wanted.get(p, wanted.get(probe.below(p))) for p in paths}
    keys = {p: key for p, key in keys.items() if key is not None}
    print(f"{path}: {len(keys)} of {len(paths)} tracks have a key")
    if not keys:
        raise InputError(f"{path}: none of its files is in the data; name them as in index.jsonl of the store")
    return keys


def pick_device(name):
    """The device asked for, or the best there is; torchrun gives each process a GPU. Raises InputError when it is not there."""
    local = os.environ.get("LOCAL_RANK")
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not local else "cpu"
    if name == "cuda" and local:
        name = f"cuda:{local}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: is not available here; leave it out, or use --device cpu") from None


def join_ranks(device):
    """(rank, ranks) of this process: (0, 1), or what torchrun says; then it can reach the others."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # one voice
    return rank, ranks


def step_flops(model, batch, mask, views):
    """Floating-point operations of one training step by formula: 6 per weight and token, and attention's products."""
    dim, depth, flops = model.config["dim"], model.config["depth"], 0
    for patch in range(len(model.patches)):
        tokens = max(1, round(model.patch_count(SEGMENT, patch) * (1 - mask))) + model.class_token_count
        flops += views * batch * tokens * (6 * 12 * depth * dim ** 2 + 12 * depth * dim * tokens)
    return flops


def save_checkpoint(path, model, teacher, optimizer, step, settings):
    """Everything that `--resume` and `model.load_checkpoint` need: tensors and plain types only, written atomically."""
    buffer = io.BytesIO()
    state = dict(config=model.config, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, settings=settings)
    torch.save(state | ({"teacher": teacher.state_dict()} if teacher is not None else {}), buffer)
    try:
        write_atomic(path, buffer.getbuffer())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror} at step {step}; the checkpoint before it is kept, make room and go on with --resume") from None


def trim_log(path, step):
    """Drop lines past `step`: they belong to steps that a resumed run does again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomic(path, "".join(kept).encode())


@contextmanager
def run_folder(out, step):
    """Keep other runs away from the folder `out` and give its log, open at `step`. Raises InputError when another has it."""
    with locked(out, "another run is writing there; wait for its end, or choose another --out"):
        trim_log(out / "log.jsonl", step)
        with open(out / "log.jsonl", "a") as log:
            yield log


@contextmanager
def postponed_interrupts():
    """Ctrl-C lets the running step end: half a step would be neither before nor after it. Gives a list, empty until then."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)


def numbers(text):
    """'3,1' -> [3.0, 1.0]."""
    return [float(number) for number in text.split(",")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("what to learn, from what")
    group.add_argument("--tokens", help=f"pretext tasks, one class token each: any of {', '.join(PRETEXT)}")
    group.add_argument("--data", nargs="+", default=["synth"], help="folders of music or frame stores; synth: the embedded songs")
    group.add_argument("--mix", type=numbers, help="how often each source of --data is drawn from, as shares: 3,1 (default: by the piece)")
    group.add_argument("--labels-csv", help="CSV with columns file,key: labels that the token tone learns from")
    group.add_argument("--out", default="out/mt2", help="run folder")
    group = parser.add_argument_group("size and length (defaults from the preset)")
    group.add_argument("--preset", choices=PRESETS, help="mt2 on a GPU, small elsewhere")
    group.add_argument("--steps", type=int, help="length of the schedule")
    group.add_argument("--batch-size", type=int, help="pieces of music per step; NT-Xent's negatives come from it")
    group.add_argument("--mask", type=float, help="share of frames or patches dropped before the trunk, 0..1")
    group.add_argument("--patch", help="1: a token is a frame; 16x16, 128x2 or both: a patch of the mel, bands x frames (Myna)")
    group.add_argument("--pool", choices=("token", "mean"), help="class tokens, or the mean of the sequence (Myna)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises (our choice)")
    group.add_argument("--clip", type=float, default=3.0, help="largest norm of the whole gradient (STONE: 3.0 per tensor)")
    group.add_argument("--omega", default="7,1", help="circles on which CPSD is measured and averaged: 7 fifths, 1 semitones")
    group.add_argument("--weights", type=numbers, help="weight of each token's loss in the sum: 1,0.3 (default: 1 each, our choice; MT2 unknown)")
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
SETTINGS = dict(tokens=str, data=list, preset=str, steps=int, batch_size=int, mask=float, patch=str, pool=str, lr=float, warmup=float,
                clip=float, omega=str, seed=int, mix=(list, type(None)), weights=(list, type(None)), labels_csv=(str, type(None)))


def settle(args, device, ranks):
    """Fill in what the flags leave to the checkpoint, the preset and the device. Returns the checkpoint to resume from, or None."""
    path = Path(args.out) / "checkpoint.pt"
    checkpoint = None
    if args.resume:
        checkpoint = read_checkpoint(path)
        saved, step = checkpoint.get("settings"), checkpoint.get("step")
        if not (isinstance(saved, dict) and all(isinstance(saved.get(name), kind) for name, kind in SETTINGS.items())
                and saved["preset"] in PRESETS and isinstance(step, int) and 0 <= step <= saved["steps"]):
            raise InputError(f"{path}: lacks what a run of this version needs to go on; start anew in another --out")
        asked = parse_args([]).__dict__
        for name in SETTINGS:
            given = getattr(args, name)
            if given not in (asked[name], saved.get(name)):
                raise InputError(f"{path}: was trained with --{name.replace('_', '-')} {saved.get(name)}, not {given}; "
                                 "drop the flag, or start anew in another --out")
            setattr(args, name, saved.get(name))
    elif path.exists():
        raise InputError(f"{path}: exists; go on with --resume, or choose another --out")
    args.preset = args.preset or ("mt2" if device.type == "cuda" else "small")
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    for name in ("tokens", "steps", "batch_size", "mask", "patch", "pool", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, PRESETS[args.preset][name])
    if args.steps < 1 or args.batch_size < 1 or not 0 <= args.mask < 1:
        raise InputError(f"--steps {args.steps}, --batch-size {args.batch_size}, --mask {args.mask}: "
                         "steps and batch size must be 1 or more, mask from 0 to below 1")
    if args.log_every < 1 or args.save_every < 1:
        raise InputError(f"--log-every {args.log_every}, --save-every {args.save_every}: must be 1 or more")
    if args.batch_size % ranks:
        raise InputError(f"--batch-size {args.batch_size}: {ranks} processes share it, and it is no multiple of {ranks}")
    if not all(o in ("1", "5", "7", "11") for o in args.omega.split(",")):
        raise InputError(f"--omega {args.omega!r}: give 7 (circle of fifths), 1 (semitones) or 7,1; others confuse pitch classes")
    return checkpoint


def main():
    try:
        train(parse_args())
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputError("another process of this run ended or cannot be reached; see what it said, then go on with --resume") from None
        raise


def set_up(args, device, ranks):
    """All that a run needs before its first step: (model, teacher or None, optimiser, segments, number of that step)."""
    checkpoint = settle(args, device, ranks)
    tokens, preset = args.tokens.split(","), PRESETS[args.preset]
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    try:
        model = MT2(tokens, preset["dim"], preset["depth"], preset["heads"], patch=args.patch, pool=args.pool).to(device)
    except ValueError as error:
        raise InputError(f"--tokens, --patch or --pool: {error}") from None
    for name in {"cpsd", "skey", "tone"} & set(tokens):
        model.heads[name].omegas = tuple(int(o) for o in args.omega.split(","))
    if args.weights and (len(args.weights) != len(tokens) or not all(0 < weight < math.inf for weight in args.weights)):
        raise InputError(f"--weights: give one number above 0 for each of the {len(tokens)} tokens of --tokens {args.tokens}")
    if args.labels_csv and "tone" not in tokens:
        raise InputError(f"--labels-csv: only the token tone learns from labels; --tokens is {args.tokens}")
    print(f"device {device}, preset {args.preset}; {pick_amp(device)[1]}; torch.compile {'on' if args.compile else 'off'}")
    print(f"{', '.join(f'{k} {v}' for k, v in model.config.items() if k != 'tokens')}, lr {args.lr:g}")
    print(f"tokens {args.tokens}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    stores = open_data(args.data)
    segments = Segments(stores, args.batch_size, keys_of(args.labels_csv, stores) if args.labels_csv else None, args.mix)
    print(f"data {' '.join(args.data)}: {segments.summary}; {args.steps} steps of {args.batch_size}, mask {args.mask}")

    optimizer = make_optimizer(model)
    # Teachers share one moving average of the network, heads included.
    teacher = deepcopy(model).requires_grad_(False) if any(task.teacher for task in model.heads.values()) else None
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            if teacher is not None:
                teacher.load_state_dict(checkpoint["teacher"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            raise InputError(f"{args.out}/checkpoint.pt: its weights do not fit its settings; start anew in another --out") from None
    return model.train(), teacher, optimizer, segments, checkpoint["step"] if checkpoint else 0


def train(args):
    device = pick_device(args.device)
    rank, ranks = join_ranks(device)
    # Rank 0 sets up first, as long as it takes: data are prepared once, and what is wrong is said once.
    first = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if ranks > 1 else None
    if rank > 0:
        dist.barrier(first)
    model, teacher, optimizer, segments, start = set_up(args, device, ranks)
    if ranks > 1 and rank == 0:
        dist.barrier(first)

    out, stop = Path(args.out), max(start, min(args.steps, args.stop_at or args.steps))
    weights = args.weights or [1.0] * len(model.tokens)
    path, settings = out / "checkpoint.pt", {name: getattr(args, name) for name in SETTINGS}
    views = max(task.views for task in model.heads.values())
    share = slice(rank * args.batch_size // ranks, (rank + 1) * args.batch_size // ranks)
    amp, _ = pick_amp(device)
    losses_of = torch.compile(training_losses) if args.compile else training_losses
    peak = next((p for name, p in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    clock, logged, leaving, warned = time.perf_counter(), start, False, set()
    due = lambda every: leaving or step + 1 == stop or (step + 1) % every == 0
    with (run_folder(out, start) if rank == 0 else nullcontext() as log, postponed_interrupts() as interrupted,
          tqdm(initial=start, total=args.steps, desc="training", unit="step", smoothing=0.05, disable=rank > 0) as bar):
        for step in range(start, stop):
            batch = make_batch(segments, model, args.seed, step, views, args.mask, args.steps, device, share)

            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                losses, logs, seen = losses_of(model, teacher, batch)
            total = sum(weight * loss for weight, loss in zip(weights, losses.values()))

            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if ranks > 1:
                average_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            # Ranks leave at the same step. They ask each other at log lines, where the host waits for the device anyway.
            leaving = bool(interrupted) if ranks == 1 else due(args.log_every) and any_rank(interrupted, device)
            # Only here does the host wait for the device; what is bad never reaches a checkpoint.
            if (due(args.log_every) or due(args.save_every)) and not math.isfinite(total.item() + norm.item()):
                if rank > 0:
                    sys.exit(2)  # rank 0 has the same to say
                raise InputError(f"loss or gradient is not finite at step {step}; the last good checkpoint is {path}; "
                                 "start anew with a lower --lr in another --out")
            lr, decay = schedule(step, args.steps, args.warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay * group["decays"]
            optimizer.step()
            if teacher is not None:
                follow(teacher, model, step / max(1, args.steps - 1))
            bar.update()

            if due(args.log_every) and rank == 0:
                rate = (step + 1 - logged) / (time.perf_counter() - clock)
                clock, logged = time.perf_counter(), step + 1
                report, collapsed = collapse_report(seen)
                line = {"step": step + 1} | {name: loss.item() for name, loss in losses.items()}
                line |= dict(grad_norm=norm.item(), lr=lr, clips_per_s=views * args.batch_size * rate)
                line |= {name: value.item() for name, value in logs.items()} | report
                if peak:
                    line["mfu"] = step_flops(model, args.batch_size, args.mask, views) * rate / peak / ranks
                log.write(json.dumps({name: float(f"{value:.6g}") for name, value in line.items()}) + "\n")
                log.flush()
                shown = [name for name in line if name in (*losses, "grad_norm", "mean_abs_z", "clips_per_s", "mfu")]
                bar.set_postfix_str("  ".join(f"{name} {line[name]:.3g}" for name in shown), refresh=False)
                for name in set(collapsed) - warned:
                    bar.write(f"warning: the {name} token says the same of every track at step {step + 1}; it has collapsed")
                    warned.add(name)

            if due(args.save_every) and rank == 0:
                save_checkpoint(path, model, teacher, optimizer, step + 1, settings)
            if leaving:
                break
    if ranks > 1:
        dist.destroy_process_group()
    if leaving:
        if rank == 0:
            print(f"stopped; {path} holds step {step + 1}, go on with --resume", file=sys.stderr)
        sys.exit(130)
    print(f"{path}: step {stop} of {args.steps}")
    if rank == 0 and args.probe and stop == args.steps:
        probe.print_synth(path, device)


if __name__ == "__main__":
    run_cli(main)
