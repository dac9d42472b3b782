"""Speed, as ratios within one run: python tests/bench.py (about five minutes on two cores; not part of the test suite).

python tests/bench.py learn: does each token learn (half an hour)? Or the name of any other part: costs, preparation ...
"""
import contextlib
import io
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile as sf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
import probe  # noqa: E402
import train as training  # noqa: E402
from model import MT2, cut_patches, pick_amp  # noqa: E402
from train import PRESETS  # noqa: E402


def seconds(function, repeats=3):
    """Best of `repeats` after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def dense_cqt(wave):
    """The same CQT with one kernel at the longest window: every frame times (96, 8193-point spectrum)."""
    frequency = data.FMIN * 2 ** (torch.arange(data.N_BINS, dtype=torch.float64) / 12)
    kernel = data.cqt_kernel(frequency)
    window = torch.ones(2 * (kernel.shape[1] - 1))

    def transform():
        spectrum = torch.stft(wave, len(window), data.HOP, window=window, pad_mode="constant", return_complex=True)
        return (kernel @ spectrum).abs()
    return transform


def operations():
    """Million operations a second of audio: 5/2 n log2 n for a real FFT, 8 or 2 for a complex or real multiply-add."""
    fft, rate, small = lambda n: 2.5 * n * math.log2(n), data.SAMPLE_RATE / data.HOP, 128  # the CQT's n_fft
    octaves = sum(fft(60 * data.SAMPLE_RATE / 2 ** octave) / 60 for octave in range(8))  # one forward, seven inverse
    return {"CQT (octaves)": (octaves + rate * 8 * (fft(small) + 12 * (small // 2 + 1) * 8)) / 1e6,
            "CQT (one dense kernel)": rate * (fft(16384) + data.N_BINS * 8193 * 8) / 1e6,
            "mel": rate * (fft(data.N_FFT) + (data.N_FFT // 2 + 1) * (3 + 2 * data.N_MELS)) / 1e6}


def other_libraries():
    """{name: wave -> function}: the same two transforms by librosa and nnAudio, where they happen to be installed."""
    sizes, found = dict(sr=data.SAMPLE_RATE, hop_length=data.HOP), {}
    bins = dict(fmin=data.FMIN, n_bins=data.N_BINS, bins_per_octave=data.BINS_PER_OCTAVE)
    with contextlib.suppress(ImportError):
        import librosa
        found["CQT of librosa"] = lambda w: lambda: librosa.cqt(w.numpy(), **sizes, **bins)
        mel = partial(librosa.feature.melspectrogram, n_fft=data.N_FFT, n_mels=data.N_MELS, **sizes)
        found["mel of librosa"] = lambda w: lambda: mel(y=w.numpy())
    with contextlib.suppress(ImportError):
        from nnAudio import features
        cqt = features.CQT2010v2(**sizes, **bins, verbose=False)
        mel_bands = features.MelSpectrogram(n_fft=data.N_FFT, n_mels=data.N_MELS, **sizes, verbose=False)
        found |= {"CQT of nnAudio": lambda w: lambda: cqt(w), "mel of nnAudio": lambda w: lambda: mel_bands(w)}
    return found


def front_ends():
    """Both spectrograms beside a dense CQT and other libraries, in seconds of audio a second."""
    print(f"{'seconds of audio per second':34}{'16 clips of 4 s':>18}{'one of 10 min':>18}")
    waves = [torch.randn(16, 64000) * 0.1, torch.randn(1, 600 * data.SAMPLE_RATE) * 0.1]
    cqt, mel, rates, cost = data.CQT(), data.Mel(), {}, operations()
    with torch.inference_mode():
        for name, make in {"CQT (octaves)": lambda w: lambda: cqt(w), "CQT (one dense kernel)": dense_cqt,
                           "mel": lambda w: lambda: mel(w), **other_libraries()}.items():
            rates[name] = [w.numel() / data.SAMPLE_RATE / seconds(make(w)) for w in waves]
            formula = f"   {cost[name]:.1f} million operations a second" if name in cost else ""
            print(f"{name:34}{rates[name][0]:18.0f}{rates[name][1]:18.0f}{formula}")
        ratio = [a / b for a, b in zip(rates["CQT (octaves)"], rates["CQT (one dense kernel)"])]
        print(f"{'octaves : dense':34}{ratio[0]:17.1f}x{ratio[1]:17.1f}x\n")


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def preparation():
    """From a compressed file to frames, step by step, and sixteen files at once."""
    print("preparing one stereo 44.1 kHz ogg of 3 minutes, one core")
    with tempfile.TemporaryDirectory() as folder:
        song = np.tile(data.render(data.compose(0)), 8)[:180 * data.SAMPLE_RATE]
        wave = data.resample([torch.from_numpy(song)], data.SAMPLE_RATE, 44100).numpy()
        path = Path(folder) / "song.ogg"
        with sf.SoundFile(path, "w", 44100, 2) as file:  # in blocks: libvorbis dislikes minutes at once
            for block in np.array_split(np.stack([wave, 0.8 * wave], axis=1).clip(-1, 1), 60):
                file.write(block)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        front_end, mono = data.FrontEnd(), torch.from_numpy(wave)
        decode = seconds(lambda: sf.read(path, dtype="float32"))
        resample = seconds(lambda: data.resample([mono], 44100, data.SAMPLE_RATE))
        transform = seconds(lambda: data.audio_to_frames(torch.from_numpy(song), front_end))
        whole = seconds(lambda: data.audio_to_frames(data.read_audio(path), front_end))
        torch.set_num_threads(threads)
        together = []
        for files in (4, 16, 64):
            music = Path(folder) / str(files)
            music.mkdir()
            for copy in range(files):
                shutil.copy(path, music / f"song-{copy}.ogg")
            start = time.perf_counter()
            quietly(data.prepare_folders, [music], music / "store")
            taken, size = time.perf_counter() - start, (music / "store" / "frames.bin").stat().st_size
            together.append(f"{files * 180 / 3600:.1f} h in {taken:.1f} s, {size / 1e6:.1f} MB")
    for name, value in (("decode", decode), ("resample", resample), ("transform", transform), ("all", whole)):
        print(f"  {name:12}{180 / value:8.0f} x real time")
    print(f"  python data.py, 4, 16, 64 of them on all cores: {'; '.join(together)}")


def describe(folder, paths, frames):
    lines = [json.dumps(dict(path=str(path), frames=frames)) + "\n" for path in paths]
    (folder / "index.jsonl").write_text("".join(lines))
    (folder / "store.json").write_text(json.dumps(dict(data.front_end_settings(), tracks=len(paths))))


def scale():
    """A large collection: opening and drawing from 1 GB and 50 GB, preparing many files, preparing a long one."""
    print("\nscale: frame stores of empty frames (a sparse file), 223 frames a track, batches of 128 x 3 segments")
    for tracks in (20_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            folder, size = Path(folder), tracks * 223 * data.COLUMNS
            with open(folder / "frames.bin", "wb") as file:
                file.truncate(size)
            if (folder / "frames.bin").stat().st_blocks * 512 > size // 2:
                print("  this file system has no sparse files: skipped")
                return
            describe(folder, [f"music/an artist/an album/{i:07d} a title.flac" for i in range(tracks)], 223)
            start = time.perf_counter()
            store = data.FrameStore(folder)
            opened = time.perf_counter()
            segments = data.Segments([store], 128)
            cut = time.perf_counter()
            for step in range(20):
                segments.gather(segments.draw(0, step, 3, 0.75)["rows"])
            print(f"  {size / 1e9:5.0f} GB, {tracks:7} tracks: open {opened - start:.2f} s, segments "
                  f"{cut - opened:.2f} s, a batch {(time.perf_counter() - cut) / 20 * 1e3:.1f} ms")
    empty = lambda blocks, front_end: np.zeros((9, data.COLUMNS), np.uint8)
    with tempfile.TemporaryDirectory() as folder, mock.patch("data.audio_to_frames", empty):
        for files in (10_000, 100_000):
            sources = [(f"music/{i:06d}.flac", list) for i in range(files)]
            start = time.perf_counter()
            quietly(data.prepare, sources, f"{folder}/{files}", [name for name, _ in sources], "")
            print(f"  preparing {files:6} empty files: {(time.perf_counter() - start) / files * 1e6:.0f} us a file")
    with tempfile.TemporaryDirectory() as folder:
        block = np.tile(data.render(data.compose(0)), 5)[:120 * data.SAMPLE_RATE]
        # VmHWM is the process's own; ru_maxrss would begin with that of this one.
        code = ("import data, sys; data.prepare_folders(sys.argv[1:2], sys.argv[2]); "
                "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
        for minutes in (2, 20, 180) if Path("/proc/self/status").exists() else ():
            music = Path(folder) / f"{minutes}"
            music.mkdir()
            with sf.SoundFile(music / "long.wav", "w", data.SAMPLE_RATE, 1) as file:
                for _ in range(minutes // 2):
                    file.write(block)
            child = subprocess.run([sys.executable, "-c", code, music, music / "store"], cwd=Path(data.__file__).parent,
                                   check=True, capture_output=True, text=True)
            print(f"  preparing one file of {minutes:3} minutes: {int(child.stdout.split()[-1]) / 1024:.0f} MB at most")


def features():
    """Prepared frames through the network."""
    print(f"\nprobe features of prepared frames, {torch.get_num_threads()} threads")
    frames = [np.random.default_rng(0).integers(0, 255, (1875, data.COLUMNS), dtype=np.uint8)] * 10  # a minute each
    for preset in ("small", "mt2"):
        network = MT2(**{k: PRESETS[preset][k] for k in ("dim", "depth", "heads")}).eval()
        taken = seconds(lambda: probe.extract(network, frames, "cpu"))
        print(f"  {preset:12}{60 * len(frames) / taken:8.0f} x real time")


def random_store(folder, hours):
    """A frame store of noise: tracks of four minutes."""
    tracks = int(hours * 15)
    np.random.default_rng(0).integers(0, 256, (tracks * 7500, data.COLUMNS), np.uint8).tofile(folder / "frames.bin")
    describe(folder, range(tracks), 7500)
    return data.FrameStore(folder)


class Plain(torch.nn.Module):
    """A yardstick for the training step: fp32, PyTorch's encoder, masked frames replaced by a vector, not dropped."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.tokeniser = torch.nn.Linear(data.CROP_BINS + data.N_MELS, dim)
        random = lambda *shape: torch.nn.Parameter(torch.randn(shape))
        self.positions, self.classes, self.masked = random(data.SEGMENT, dim), random(2, dim), random(dim)
        layer = torch.nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, depth, torch.nn.LayerNorm(dim), enable_nested_tensor=False)
        self.key, self.style = losses.CPSD(dim), losses.NTXent(dim)

    def forward(self, segments, step, mask):
        batch = segments.draw(0, step)                                      # whole segments
        frames, crops = segments.gather(batch["rows"]), batch["crops"]
        views = [torch.cat([frame[:, crop:crop + data.CROP_BINS], frame[:, data.N_BINS:]], dim=1)
                 for frame, crop in zip(frames.flatten(0, 1), crops.flatten())]
        x = self.tokeniser(torch.stack(views).float() / 255)               # (views * batch, frames, dim)
        x = torch.where(torch.rand(x.shape[:2])[..., None] < mask, self.masked, x) + self.positions
        x = self.encoder(torch.cat([self.classes.expand(len(x), -1, -1), x], dim=1))[:, :2].unflatten(0, (3, -1))
        batch["shifts"] = -crops
        return self.key(x[:, :, 0], batch)[0] + self.style(x[:2, :, 1], batch)[0]


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, data sheets


def step_flops(model, batch, mask, views):
    """Floating-point operations of one training step by formula: 6 per weight and token, and attention's products.

    The last block has qkv, 3 of its 12 dim^2 weights, for all tokens, and the rest for the class tokens alone.
    """
    dim, depth, flops = model.config["dim"], model.config["depth"], 0
    for size in model.patches:
        count = data.SEGMENT if size is None else cut_patches(torch.zeros(data.SEGMENT, data.N_MELS), size).shape[0]
        tokens = max(1, round(count * (1 - mask))) + model.class_token_count
        left_out = tokens - (model.class_token_count or tokens)
        flops += views * batch * depth * tokens * (6 * 12 * dim ** 2 + 12 * dim * tokens)
        flops -= views * batch * left_out * (6 * 9 * dim ** 2 + 6 * dim * tokens)
    return flops


def our_step(network, segments, mask, device, compiled=False):
    """(a function of the step number that trains one step, one that only makes its batch) as train.py does."""
    optimizer, (amp, _) = training.make_optimizer(network), pick_amp(device)
    losses_of = torch.compile(training.training_losses) if compiled else training.training_losses
    batch = lambda step: training.make_batch(segments, network, 0, step, mask, 1000, device)

    def train_one(step):
        inputs = batch(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            total = sum(losses_of(network, None, inputs)[0].values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
    return train_one, batch


def training_step():
    """A training step of the preset small on the processor beside a plain one; of mt2 on a GPU, where there is one."""
    size, cpu = lambda preset: {k: PRESETS[preset][k] for k in ("dim", "depth", "heads")}, torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        segments = data.Segments([random_store(Path(folder), 2)], 128)
        network, plain = MT2(**size("small")), Plain(**size("small"))
        mask, optimizer = PRESETS["small"]["mask"], torch.optim.AdamW(plain.parameters())
        train_one, batch = our_step(network, segments, mask, cpu)

        def train_plain(step):
            optimizer.zero_grad()
            plain(segments, step, mask).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 3.0)
            optimizer.step()

        timed = lambda function: seconds(lambda steps=count(): function(next(steps)))
        ours, theirs, views = map(timed, (train_one, train_plain, batch))
        by_mask = {share: timed(our_step(network, segments, share, cpu)[0]) for share in (0.0, 0.5, 0.75, 0.9)}
    print(f"\ntraining step, preset small, 3 views of 128, mask {mask}, {pick_amp(cpu)[1]}")
    print(f"  ours {1000 * ours:.0f} ms, plain {1000 * theirs:.0f} ms: {theirs / ours:.1f} x; "
          f"batch and views {100 * views / ours:.1f} % of ours")
    print("  by mask: " + ", ".join(f"{share} {3 * 128 / taken:.0f} clips/s" for share, taken in by_mask.items()))

    print("training step on a GPU, preset mt2, bf16, torch.compile")
    if not torch.cuda.is_available():
        return print("  no GPU: skipped")
    device = torch.device("cuda", torch.cuda.current_device())
    peak = next((p for name, p in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), float("nan"))
    front_end, wave = data.FrontEnd().to(device), 0.1 * torch.randn(3 * 128, 64000, device=device)
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder), 40)
        for size_of_batch, mask in ((128, PRESETS["mt2"]["mask"]), (4096, 0.9)):
            torch._dynamo.reset()
            torch.cuda.reset_peak_memory_stats()
            network, steps = MT2(**size("mt2")).to(device), count()
            train_one, batch = our_step(network, data.Segments([store], size_of_batch), mask, device, compiled=True)

            def some(function, n=20):
                for _ in range(n):
                    function(next(steps))
                torch.cuda.synchronize()
            step, views = seconds(lambda: some(train_one)) / 20, seconds(lambda: some(batch)) / 20
            front = seconds(torch.inference_mode()(lambda: some(lambda _: front_end(wave)))) / 20 * size_of_batch / 128
            used = step_flops(network, size_of_batch, mask, 3) / step / peak
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
            print(f"  batch {size_of_batch}, mask {mask}: {1 / step:.1f} steps/s, MFU {100 * used:.1f} %, "
                  f"{memory:.1f} GiB; batch and views take {100 * views / step:.0f} % of that time, "
                  f"the front end of as much audio would take {100 * front / step:.0f} %")


def costs():
    """A step on the processor over batch and size beside the operations by formula; the paper's run, predicted."""
    print("\ntraining step, cpsd,ntxent, mask 0.75, over batch and dim x depth; operations by formula")
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder), 6)
        for dim, depth, heads, batch in ((128, 4, 2, 32), (128, 4, 2, 64), (128, 4, 2, 128), (128, 4, 2, 256),
                                         (128, 4, 2, 512), (128, 12, 2, 128), (192, 4, 3, 128), (192, 12, 3, 128)):
            network, steps = MT2(dim=dim, depth=depth, heads=heads), count()
            train_one, _ = our_step(network, data.Segments([store], batch), 0.75, torch.device("cpu"))
            taken, flops = seconds(lambda: train_one(next(steps)), 2), step_flops(network, batch, 0.75, 3)
            print(f"  {dim} x {depth}, batch {batch}: {1000 * taken:.0f} ms, {flops / 1e9:.0f} GFLOP, "
                  f"{flops / taken / 1e9:.0f} GFLOP/s", flush=True)
    mt2 = PRESETS["mt2"]
    network = MT2(dim=mt2["dim"], depth=mt2["depth"], heads=mt2["heads"])
    flops = step_flops(network, mt2["batch_size"], mt2["mask"], 3)
    print(f"  mt2: {flops / 1e9:.0f} GFLOP a step; {mt2['steps']} steps, PREDICTED as operations / (peak x utilisation):")
    for name, peak in PEAK_FLOPS.items():
        hours = [flops * mt2["steps"] / peak / share / 3600 for share in (0.05, 0.2)]
        print(f"    {name}: {hours[0]:.1f} h at 5 %, {hours[1]:.1f} h at 20 % of its peak")


def grid():
    """The grid search of one row."""
    print("\n216-point grid, 443 + 197 tracks, 960 dimensions, 10 classes")
    y, generator = torch.arange(640) % 10, torch.Generator().manual_seed(0)
    x = torch.randn(10, 960, generator=generator)[y] + 4 * torch.randn(640, 960, generator=generator)
    target = probe.Classes(y.tolist(), probe.Items({}, np.arange(640), np.zeros(640)))
    start = time.perf_counter()
    chosen = probe.choose(x, target, np.arange(443), np.arange(443, 640))
    print(f"  {time.perf_counter() - start:.1f} s; chosen: {chosen}")


def learn():
    """Does every token alone learn the embedded songs in 400 steps? Its score beside raw and the best untrained row."""
    script = Path(__file__).resolve().parent.parent / "train.py"
    for token in losses.PRETEXT:
        row = "sequence mean" if losses.PRETEXT[token](8).needs_sequence else token
        column = "retrieval" if losses.PRETEXT[token](8).branch == "mel" else "key accuracy"
        with tempfile.TemporaryDirectory() as out:
            flags = ["--tokens", token, "--steps", "400", "--out", out]
            subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
            table = json.loads((Path(out) / "probe-synth.json").read_text())["rows"]
        rows = {name: 100 * row[column]["mean"] for name, row in table.items() if column in row}
        untrained = max(value for name, value in rows.items() if name.startswith("untrained"))
        verdict = "learnt" if rows[row] > max(rows["raw"], untrained) else "NOT LEARNT"
        print(f"{token:8} {column:20} {rows[row]:5.1f}   raw {rows['raw']:.1f}   untrained {untrained:.1f}   "
              f"{verdict}", flush=True)


def main():
    parts = (front_ends, preparation, scale, features, training_step, costs, grid)
    chosen = [part for part in (*parts, learn) if part.__name__ in sys.argv[1:]]
    if len(chosen) < len(sys.argv) - 1:
        sys.exit(f"give none or some of {', '.join(part.__name__ for part in (*parts, learn))}")
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = next(iter(found), platform.processor())
    print(f"torch {torch.__version__}, numpy {np.__version__}, {processor}, {torch.get_num_threads()} threads\n")
    for part in chosen or parts:
        part()


if __name__ == "__main__":
    main()
