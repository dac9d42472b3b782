"""Train MT2 or one of its single-token baselines.

    python train.py --tokens cpsd,ntxent                      the main job: synthetic songs, minutes on two cores
    python train.py --data synth ~/Music --mix 3,1            with your recordings, three pieces in four synthetic
    python train.py --tokens skey,ntxent --weights 1,1        any tasks of losses.PRETEXT, and how much each counts
    python train.py --preset mt2                              the paper's recipe; myna-base: another paper's
    python train.py --out out/mine --resume                   continue, bit for bit, from the last checkpoint
    torchrun --nproc_per_node=8 train.py --preset mt2         eight GPUs of one machine; or of two, the same on each:
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --preset mt2

A run folder holds checkpoint.pt (weights, EMA teacher, optimiser, step, settings) and log.jsonl (one line per log
interval). Batches, crops and masks are functions of (seed, step): there is no other state.

Several processes (ranks) train what one would. Each passes its share of the batch through the trunk; class tokens are
then gathered, so every loss is that of the whole batch (mae: the mean of the shares' losses); gradients are averaged,
so all ranks take the same step. A checkpoint can be resumed with any number of them. Machines need one common disk.
"""
import argparse
import io
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_single_autograd
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import data
from data import InputError
from losses import PRETEXT, effective_rank
from model import MT2, cut_patches, pick_amp, read_checkpoint

# Named models and recipes. A flag given by hand wins over its preset.
VIT1D = dict(tokens="cpsd,ntxent", dim=192, depth=12, heads=3, batch_size=128, steps=511_488, lr=1e-3, mask=0.0,
             patch="1", pool="token", inputs="cqt,mel")
MYNA = dict(tokens="ntxent", dim=384, depth=12, heads=6, batch_size=4096, steps=100_341, lr=3e-4, mask=0.9, pool="mean",
            inputs="mel")
PRESETS = {
    # For a CPU: a third of the layers, two thirds of the width; rate, mask, length: our choice, log in tests/README.md.
    "small": dict(VIT1D, dim=128, depth=4, heads=2, steps=500, lr=2e-3, mask=0.88),
    # MT2 (published interface: 192 x 12 x 3); batch 128 and 999 epochs of 512 steps from CoJEPA; mask our choice.
    "mt2": dict(VIT1D, mask=0.5),
    # The same for a first try on one GPU: a length of some minutes there (our choice, not measured).
    "demo": dict(VIT1D, steps=6000, mask=0.5),
    # ViT-1D ("Emergent"): the same trunk with NT-Xent alone on the mel; no masking described.
    "vit1d": dict(VIT1D, tokens="ntxent", inputs="mel"),
    # STONE's CQT, batch, rate, 50 epochs of 512 steps; our CPSD (two circles, two pairs) and trunk (its: a CNN).
    "stone": dict(VIT1D, tokens="cpsd", steps=25_600, inputs="cqt"),
    # S-KEY's: 50 epochs of 60,000 songs in batches of 128.
    "skey": dict(VIT1D, tokens="skey", steps=23_438, inputs="cqt"),
    # Myna (paper: 384 x 12 x 6, no class token, 90 % masked, batch 4096, 500 epochs of 822,000 clips, rate 3e-4). Our
    # segments of 4 s make 56 and 63 patches where its 3 s make 48; its Adam with decay 1e-5 is our AdamW.
    "myna-base": dict(MYNA, patch="16x16"),
    "myna-vertical": dict(MYNA, patch="128x2"),
    "myna-hybrid": dict(MYNA, patch="16x16,128x2"),
}
WARMUP = 0.05                    # share of the steps in which the rate rises (our choice)
CLIP = 3.0                       # largest norm of the whole gradient (STONE: 3.0 per tensor)
BETAS = (0.9, 0.98)              # STONE, CoJEPA
WEIGHT_DECAY = (0.04, 0.01)      # first and last value of a cosine, CoJEPA
FINAL_LR = 1.5e-6                # CoJEPA
TEACHER_MOMENTUM = 0.996         # rises to 1 by a cosine (BYOL)
SAVE_SECONDS = 30.0              # between checkpoints, at least, unless --save-every is given (our choice)
# What a checkpoint fixes: --resume takes these from it.
SETTINGS = ("tokens", "data", "mix", "pseudo_label", "labels_csv", "preset", "steps", "batch_size", "mask", "patch",
            "pool", "inputs", "lr", "weights", "seed")


# ---------------------------------------------------------------- one step


def make_batch(segments, model, seed, step, mask, steps, device, share=slice(None)):
    """What training_losses takes, on the device: a pure function of (seed, step). share: the items of this rank.

    For the trunk "inputs", per patch size (cqt, mel, positions), each (views, share, kept, ...), cqt None for patches.
    For the heads "shifts" (views, batch), "keys" and "tracks" (batch,), "progress" (), and where one needs them "cqt"
    and "mel" (2, share, kept, ...), and "whole_mel" (2, share, 126, 128), nothing dropped. Copies to a GPU are queued
    behind the running step; none waits for it.
    """
    pin = torch.device(device).type == "cuda"
    move = lambda x: (x.pin_memory() if pin and not x.is_cuda else x).to(device, non_blocking=True)
    to_frames = lambda x: move(x) if segments.frames is not None else x  # numbers of frames go where the frames are
    views = max(task.views for task in model.tasks.values())
    whole_frames = model.patches == [None]
    needs_spectrogram = any(task.needs_spectrogram for task in model.tasks.values())
    drawn = segments.draw(seed, step, views, mask if whole_frames else 0.0, share)
    frames = segments.gather(to_frames(drawn["rows"]))                     # (views, share, kept, 224) uint8
    crops = move(drawn["crops"])                                           # (views, batch)
    batch = dict(shifts=-crops, keys=move(drawn["keys"]), tracks=move(drawn["tracks"]))  # crop c: c semitones down
    batch["progress"] = torch.full((), step / max(1, steps - 1), device=device)
    if whole_frames or needs_spectrogram:
        cqt, mel = data.training_views(move(frames), crops[:, share])      # (views, share, kept, 84 and 128)
    if needs_spectrogram:
        batch |= dict(cqt=cqt[:2], mel=mel[:2])
    if any(task.needs_sequence for task in model.tasks.values()):
        first = (drawn["rows"] - drawn["positions"])[:2, :, :1]            # (2, share, 1)
        rows = to_frames(first + torch.arange(data.SEGMENT))               # (2, share, 126)
        batch["whole_mel"] = move(segments.gather(rows)[..., data.N_BINS:]).float() / 255
    if whole_frames:
        return batch | dict(inputs=[(cqt, mel, move(drawn["positions"]))])
    batch["inputs"] = []
    for patch, size in enumerate(model.patches):  # only the kept patches travel, as bytes
        patches = cut_patches(frames[..., data.N_BINS:], size)             # (views, share, n, pixels) uint8
        rng = np.random.default_rng([seed, step, 1 + patch])
        kept = data.kept_positions(rng, (views, segments.batch_size), patches.shape[2], mask)[:, share]
        kept = to_frames(torch.from_numpy(kept))                           # (views, share, kept)
        patches = patches.gather(2, kept[..., None].expand(-1, -1, -1, patches.shape[3]))
        batch["inputs"].append((None, move(patches).float() / 255, move(kept)))
    return batch


def prefetch(make, steps):
    """(step, make(step)) for each of `steps`, a range. A thread makes the next batch while the caller uses this one."""
    with ThreadPoolExecutor(1) as helper:
        ahead = None
        for step in steps:
            batch = (ahead or helper.submit(make, step)).result()
            ahead = helper.submit(make, step + 1) if step + 1 in steps else None
            yield step, batch


def forward_views(network, inputs, views, patch_index, layers=()):
    """The first views of `inputs` (see make_batch) through the network.

    Returns {name: (views, batch, dim)}, class tokens of all ranks, and {layer: (views * share, tokens + kept, dim)}.
    """
    cqt, mel, positions = (None if x is None else x[:views].flatten(0, 1) for x in inputs)
    tokens, inside = network(cqt, mel, positions, layers, patch_index)                         # (views * share, dim)
    return {name: whole_batch(token.unflatten(0, (views, -1))) for name, token in tokens.items()}, inside


def training_losses(model, teacher, batch):
    """One forward pass of all views and the loss of each token; with several patch sizes, the mean over them.

    batch: from make_batch; teacher: the moving average of the model, or None. Returns ({token: loss}, {name: scalar to
    log}, {token: (batch, dim) of view 0}), of the whole batch, however many ranks there are.
    """
    views, depth = len(batch["shifts"]), len(model.blocks)
    losses, logs = dict.fromkeys(model.tokens, 0.0), {}
    given = batch | {name: whole_batch(batch[name]) for name in ("cqt", "mel") if name in batch}
    layers = [depth] if "whole_mel" in batch else []
    for patch, inputs in enumerate(batch["inputs"]):
        tokens, inside = forward_views(model, inputs, views, patch, layers)                    # (views, batch, dim)
        if layers:  # of this rank's share
            size = model.patches[patch]
            sequence = inside[depth][:, model.class_token_count:].unflatten(0, (views, -1))[:2]
            target = cut_patches(batch["whole_mel"], size or (data.N_MELS, 1))                 # (2, share, n, pixels)
            given |= dict(sequence=sequence, target=target, positions=inputs[2][:2], places=model.places(size),
                          patch=patch)                                     # sequence (2, share, kept, dim)
        with torch.no_grad():
            targets = forward_views(teacher, inputs, 2, patch)[0] if teacher is not None else {}
        for name, task in model.tasks.items():
            average = (teacher.tasks[name], targets[name]) if task.needs_teacher else None
            loss, extra = task(tokens[name][:task.views], given, average)
            if task.needs_sequence:
                loss = whole_batch(loss[None, None]).mean()                # that of the share -> that of the batch
            losses[name] = losses[name] + loss / len(batch["inputs"])
            logs |= {f"{name}_{key}" if key in logs else key: value.detach() for key, value in extra.items()}
    return losses, logs, {name: token[0].detach() for name, token in tokens.items()}


@torch.no_grad()
def update_teacher(teacher, model, progress):
    """Exponential moving average of the student: momentum 0.996 at first, 1 at the end of the run."""
    momentum = 1 - (1 - TEACHER_MOMENTUM) * (1 + math.cos(math.pi * progress)) / 2
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - momentum)


def make_optimizer(model):
    """AdamW. Matrices decay; biases, norms, class tokens and positions, which have no input to scale, do not."""
    groups = [dict(params=[], decays=True), dict(params=[], decays=False)]
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and name not in ("class_tokens", "positions")
        groups[not decays]["params"].append(parameter)
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def schedule(step, steps, peak_lr):
    """Learning rate and weight decay at `step`, pure functions of it.

    Linear warm-up over the share WARMUP of the run, then half a cosine down to FINAL_LR; the decay follows half a
    cosine over the whole run.
    """
    cosine = lambda start, end, progress: end + (start - end) * (1 + math.cos(math.pi * min(1, progress))) / 2
    rising = max(1, round(WARMUP * steps))
    lr = cosine(peak_lr, FINAL_LR, (step - rising) / max(1, steps - 1 - rising))
    if step < rising:
        lr = peak_lr * (step + 1) / rising
    return lr, cosine(*WEIGHT_DECAY, step / max(1, steps - 1))


def set_rates(optimizer, lr, decay):
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, decay * group["decays"]


# ---------------------------------------------------------------- several processes


def pick_device(name):
    """The device asked for, or the best there is; torchrun gives each process a GPU. Raises InputError without it."""
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: is not available here; leave it out, or use --device cpu") from None


def join_ranks(device):
    """(rank, ranks) of this process: (0, 1), or those of torchrun, connected to the others. Only rank 0 prints."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Others wait while rank 0 prepares the data, which may take hours.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


@contextmanager
def lost_ranks():
    """One line instead of a traceback when another process of the run ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise InputError("another process of this run ended or cannot be reached; see its message, then continue "
                         "with --resume") from None


def whole_batch(x):
    """(views, share, ...) of this rank -> (views, batch, ...) of all ranks, differentiable.

    Every rank computes the same loss; backward adds the gradients of these `ranks` equal losses for each share, and
    average_gradients divides by `ranks`. In the heads gradients are equal on all ranks, and stay.
    """
    if not dist.is_initialized():
        return x
    return all_gather_single_autograd(x.contiguous(), 1, dist.group.WORLD)


def average_gradients(model):
    """Mean over the ranks of every gradient, in one message: with 5 M parameters there is little to overlap."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat / dist.get_world_size(), gradients)


def any_rank(pressed, device):
    """Whether the list `pressed` has an entry on one of the ranks."""
    if not dist.is_initialized():
        return len(pressed) > 0
    count = torch.tensor(len(pressed), device=device)
    dist.all_reduce(count)
    return count.item() > 0


# ---------------------------------------------------------------- log and checkpoint


def collapse_report(tokens):
    """{name_rank, name_deviation} of tokens {name: (batch, dim)}, and the names of those that have collapsed.

    Effective rank: how many directions the batch uses. Deviation: the spread of each dimension over the batch, mean
    over dimensions, where 1 is what the final norm makes of a healthy token. Collapsed: one direction, or no spread.
    """
    report, collapsed = {}, []
    for name, token in tokens.items():
        rank, deviation = effective_rank(token), token.float().std(dim=0).mean().item()
        report |= {f"{name}_rank": rank, f"{name}_deviation": deviation}
        if rank < 1.5 or deviation < 0.05:
            collapsed.append(name)
    return report, collapsed


class RunLog:
    """log.jsonl and the progress bar. A resumed run repeats the steps past `step`: their lines are removed."""

    def __init__(self, path, bar, step):
        self.path, self.bar, self.step, self.time, self.warned = path, bar, step, time.perf_counter(), set()
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        data.write_atomic(path, "".join(kept).encode())

    def write(self, step, clips, losses, logs, tokens, **numbers):
        """One line: losses and logs {name: tensor ()}, numbers, clips (of 4 s, a step) per second, collapse_report."""
        speed = clips * (step - self.step) / (time.perf_counter() - self.time)
        self.step, self.time = step, time.perf_counter()
        report, collapsed = collapse_report(tokens)
        line = dict(step=step) | {name: scalar.item() for name, scalar in (losses | logs).items()}
        line |= numbers | dict(clips_per_s=speed) | report
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.set_postfix({name: line[name] for name in (*losses, "grad_norm", "clips_per_s")}, refresh=False)
        for name in set(collapsed) - self.warned:
            self.bar.write(f"warning: the {name} token has collapsed at step {step}: rank {report[f'{name}_rank']:.1f}")
            self.warned.add(name)


@contextmanager
def run_log(out, rank, step, steps):
    """The RunLog of rank 0, None for others. Raises InputError when another run has the folder `out`."""
    if rank > 0:
        yield None
        return
    with data.locked(out, "another run is writing there; wait for its end, or choose another --out"):
        with tqdm(initial=step, total=steps, desc="training", unit="step") as bar:
            yield RunLog(out / "log.jsonl", bar, step)


def save_checkpoint(path, model, teacher, optimizer, step, args):
    """All that `--resume` and `model.load_checkpoint` need: tensors and plain types only, written atomically."""
    state = dict(config=model.config, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                 settings={name: getattr(args, name) for name in SETTINGS})
    if teacher is not None:
        state["teacher"] = teacher.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data.write_atomic(path, buffer.getbuffer())


@contextmanager
def postponed_interrupts():
    """Ctrl-C lets the running step end: half a step would be neither before nor after it. Gives a list, first empty."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------- settings


def numbers(text):
    """'3,1' -> [3.0, 1.0]."""
    return [float(number) for number in text.split(",")]


def flag(name):
    """'batch_size' -> '--batch-size'."""
    return "--" + name.replace("_", "-")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("tasks and data").add_argument
    add("--tokens", help=f"pretext tasks, one class token each: any of {', '.join(PRETEXT)}; default: the preset's")
    add("--data", nargs="+", default=["synth"], help="folders of music or frame stores; default: synth, built-in songs")
    add("--mix", type=numbers, help="how often each source of --data is drawn from, as 3,1; default: by its pieces")
    add("--pseudo-label", type=float, default=0.0,
        help="weight of a key template as soft label of the key token; default: 0; 1 for real recordings")
    add("--labels-csv", help="CSV with columns file,key: labels for the token tone; default: no labels")
    add("--out", type=Path, default="out/mt2", help="run folder; default: %(default)s")
    add = parser.add_argument_group("size and length, by default the preset's").add_argument
    add("--preset", choices=PRESETS, help="named recipe; default: demo on a GPU, small elsewhere")
    add("--steps", type=int, help="length of the schedule")
    add("--batch-size", type=int, help="pieces of music per step, of all processes together")
    add("--mask", type=float, help="share of frames or patches dropped before the trunk, 0..1")
    add("--patch", help="1: a token is a frame; 16x16, 128x2 or both: a patch of the mel, bands x frames (Myna)")
    add("--pool", choices=("token", "mean"), help="class tokens, or the mean of the sequence (Myna)")
    add("--inputs", choices=("cqt,mel", "mel", "cqt"), help="spectrograms of the trunk; patches are of the mel alone")
    add("--lr", type=float, help="peak learning rate")
    add = parser.add_argument_group("running").add_argument
    add("--weights", type=numbers, help="weight of each loss, as 1,1; default: 1, ntxent 0.3, as contrast costs key")
    add("--seed", type=int, default=0, help="of initial weights, batches, crops and masks; default: %(default)s")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU only")
    add("--resume", action="store_true", help="continue from OUT/checkpoint.pt with its settings")
    add("--stop-at", type=int, help="leave at this step with a checkpoint; default: the last one of --steps")
    add("--log-every", type=int, help="steps between lines of log.jsonl; default: 100 on a GPU, 10 elsewhere")
    add("--save-every", type=int, help="steps between checkpoints; default: 250, and not within 30 s of the last one")
    add("--probe", action=argparse.BooleanOptionalAction, default=True, help="print the final table; default: --probe")
    return parser.parse_args(argv)


def resolve_settings(args, device, ranks):
    """Fill in the flags that were not given. Returns the checkpoint to resume from, or None. Raises InputError."""
    path, gpu = args.out / "checkpoint.pt", device.type == "cuda"
    checkpoint = restore_settings(args, path) if args.resume else None
    if not args.resume and path.exists():
        raise InputError(f"{path}: exists; continue it with --resume, or choose another --out")
    args.preset = args.preset or ("demo" if gpu else "small")
    args.save_seconds = SAVE_SECONDS if args.save_every is None else 0.0
    defaults = PRESETS[args.preset] | dict(compile=gpu, log_every=100 if gpu else 10, save_every=250)
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    print(f"device {device}, {pick_amp(device)[1]}, torch.compile {args.compile}; preset {args.preset}")
    tokens = args.tokens.split(",")
    args.weights = args.weights or [0.3 if name == "ntxent" else 1.0 for name in tokens]  # 0.3: our choice
    args.stop_at = min(args.steps, args.stop_at or args.steps)
    for name in ("steps", "batch_size", "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise InputError(f"{flag(name)} {getattr(args, name)}: must be 1 or more")
    if not 0 <= args.mask < 1:
        raise InputError(f"--mask {args.mask}: must be from 0 to below 1")
    if "mae" in tokens and args.mask == 0:
        raise InputError("mae: needs --mask above 0, for something to predict")
    if not 0 <= args.pseudo_label < math.inf:
        raise InputError(f"--pseudo-label {args.pseudo_label}: must be 0 or more")
    if args.batch_size % ranks:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {ranks}, the number of processes")
    if len(args.weights) != len(tokens) or not all(0 < weight < math.inf for weight in args.weights):
        raise InputError(f"--weights: give one number above 0 for each of the {len(tokens)} tokens {args.tokens}")
    if args.labels_csv and "tone" not in tokens:
        raise InputError(f"--labels-csv: only the token tone learns from labels; --tokens is {args.tokens}")
    return checkpoint


def restore_settings(args, path):
    """Set args to the settings of a checkpoint, and return it. InputError where a flag, not at its default, differs."""
    try:
        checkpoint = read_checkpoint(path)
        saved = {name: checkpoint["settings"][name] for name in SETTINGS}
    except ValueError as error:
        raise InputError(str(error)) from None
    except (KeyError, TypeError):
        raise InputError(f"{path}: lacks settings of this version; start anew in another --out") from None
    for name, value in saved.items():
        given = getattr(args, name)
        if given not in (value, vars(parse_args([]))[name]):
            raise InputError(f"{path}: was trained with {flag(name)} {value}, not {given}; drop it or change --out")
        setattr(args, name, value)
    return checkpoint


def make_model(args, device, checkpoint):
    """(model, teacher, optimizer, number of the first step), new or out of the checkpoint. Raises InputError.

    teacher: the moving average of the whole network, one for all tasks that need it, or None.
    """
    torch.manual_seed(args.seed)
    try:
        model = MT2(args.tokens.split(","), args.dim, args.depth, args.heads, patch=args.patch, pool=args.pool,
                    inputs=args.inputs)
    except ValueError as error:
        raise InputError(f"--tokens, --patch, --pool or --inputs: {error}") from None
    for task in model.tasks.values():
        task.pseudo_label = args.pseudo_label  # the key tasks use it
    model.to(device).train()
    print(f"tokens {args.tokens}, {sum(map(torch.numel, model.parameters())) / 1e6:.2f} M parameters, lr {args.lr:g}")
    needs_teacher = any(task.needs_teacher for task in model.tasks.values())
    teacher = deepcopy(model).requires_grad_(False) if needs_teacher else None
    optimizer = make_optimizer(model)
    if checkpoint is None:
        return model, teacher, optimizer, 0
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if needs_teacher:
            teacher.load_state_dict(checkpoint["teacher"])
        return model, teacher, optimizer, int(checkpoint["step"])
    except Exception:  # a file from elsewhere fails in many ways
        raise InputError(f"{args.out}/checkpoint.pt: does not fit its settings; start anew in another --out") from None


def make_segments(args, device):
    """Segments of --data, prepared first if need be. Frames that fit easily into the memory of a GPU move there."""
    stores, keys = data.open_data(args.data), {}
    if args.labels_csv:
        paths = [path for store in stores for path in store.paths]
        texts = data.read_labels(args.labels_csv, "key", paths)
        keys = {path: key for path, text in texts.items() if (key := data.parse_key(text)) is not None}
    segments = data.Segments(stores, args.batch_size, keys, args.mix)
    print(f"data {' '.join(args.data)}: {segments.summary}; {args.steps} steps of {args.batch_size}, mask {args.mask}")
    size = sum(store.frames.nbytes for store in stores)
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
        segments.to(device)
    return segments


# ---------------------------------------------------------------- the loop


@lost_ranks()
def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    rank, ranks = join_ranks(device)
    if rank > 0:
        dist.barrier()  # rank 0 goes first: data are prepared once, bad input is reported once
    model, teacher, optimizer, start = make_model(args, device, resolve_settings(args, device, ranks))
    segments = make_segments(args, device)
    if rank == 0 and ranks > 1:
        dist.barrier()

    share = slice(rank * args.batch_size // ranks, (rank + 1) * args.batch_size // ranks)
    make = lambda step: make_batch(segments, model, args.seed, step, args.mask, args.steps, device, share)
    forward = torch.compile(training_losses) if args.compile else training_losses
    # Products in float32 keep full precision: only the losses have any, the trunk's are in bf16 where that pays.
    amp = torch.autocast(device.type, torch.bfloat16, enabled=pick_amp(device)[0])
    path, done, saved, leaving = args.out / "checkpoint.pt", start, time.monotonic(), False
    with run_log(args.out, rank, start, args.steps) as log, postponed_interrupts() as interrupted:
        for step, batch in prefetch(make, range(start, args.stop_at)):
            with amp:
                losses, logs, tokens = forward(model, teacher, batch)
            total = sum(weight * loss for weight, loss in zip(args.weights, losses.values()))

            optimizer.zero_grad()
            total.backward()
            if ranks > 1:
                average_gradients(model)
            norm = clip_grad_norm_(model.parameters(), CLIP)

            done = step + 1
            # Only at these steps does the host wait for the device; what is not finite reaches no checkpoint.
            waits = done == args.stop_at or done % args.log_every == 0 or done % args.save_every == 0
            if waits or ranks == 1:
                leaving = any_rank(interrupted, device)  # several ranks stop at the same step
            if (waits or leaving) and not math.isfinite(total.item() + norm.item()):
                raise InputError(f"loss or gradient is not finite at step {step}; the last good checkpoint is {path}; "
                                 "start anew with a lower --lr in another --out")
            set_rates(optimizer, *schedule(step, args.steps, args.lr))
            optimizer.step()
            if teacher is not None:
                update_teacher(teacher, model, step / max(1, args.steps - 1))

            last = leaving or done == args.stop_at
            if rank == 0:
                log.bar.update()
                if last or done % args.log_every == 0:
                    log.write(done, batch["shifts"].numel(), losses, logs, tokens, grad_norm=norm.item(),
                              lr=optimizer.param_groups[0]["lr"])
                if last or done % args.save_every == 0 and time.monotonic() - saved >= args.save_seconds:
                    save_checkpoint(path, model, teacher, optimizer, done, args)
                    saved = time.monotonic()
            if leaving:
                break
    if ranks > 1:
        dist.destroy_process_group()
    if leaving:
        print(f"stopped; {path} holds step {done}, continue with --resume")
        sys.exit(130)
    print(f"{path}: step {done} of {args.steps}")
    if rank == 0 and args.probe and done == args.steps:
        import probe
        probe.print_synth(path, device)


if __name__ == "__main__":
    data.run_cli(main)
