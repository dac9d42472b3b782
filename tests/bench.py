"""Speed, as ratios within one run: python tests/bench.py (about three minutes on two cores; not part of the test suite)."""
import json
import platform
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
import probe  # noqa: E402
import train as training  # noqa: E402
from model import MT2, pick_amp  # noqa: E402
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
    """The same CQT with one kernel at the longest window: every frame times (96, 8192-point spectrum)."""
    Q = (2 ** (1 / 6) + 1) / (2 ** (1 / 6) - 1)
    frequency = data.FMIN * 2 ** (torch.arange(data.N_BINS, dtype=torch.float64) / 12)
    length = Q * data.SAMPLE_RATE / frequency
    n_fft = 16384
    t = torch.arange(n_fft, dtype=torch.float64) - n_fft // 2
    window = (0.5 + 0.5 * torch.cos(2 * torch.pi * t / length[:, None])) * (t.abs() < length[:, None] / 2)
    window = 2 * window / window.sum(1, keepdim=True)
    kernel = torch.fft.fft(window * torch.exp(2j * torch.pi * frequency[:, None] / data.SAMPLE_RATE * t))[:, :n_fft // 2 + 1].conj() / n_fft
    kernel = kernel.to(torch.complex64)

    def transform():
        spectrum = torch.stft(wave, n_fft, data.HOP, window=torch.ones(n_fft), center=True, pad_mode="constant", return_complex=True)
        return (kernel @ spectrum).abs()
    return transform


def random_store(folder, hours):
    """A frame store of noise: tracks of four minutes."""
    tracks = int(hours * 15)
    frames = np.random.default_rng(0).integers(0, 256, (tracks * 7500, data.COLUMNS), dtype=np.uint8)
    frames.tofile(folder / "frames.bin")
    (folder / "index.jsonl").write_text("".join(json.dumps(dict(path=str(i), frames=7500)) + "\n" for i in range(tracks)))
    (folder / "store.json").write_text(json.dumps(data.front_end_settings()))
    return data.FrameStore(folder)


class Plain(torch.nn.Module):
    """A yardstick for the training step: fp32, PyTorch's encoder, masked frames replaced by a vector instead of left out."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.tokeniser = torch.nn.Linear(data.CROP_BINS + data.N_MELS, dim)
        self.positions, self.classes = torch.nn.Parameter(torch.randn(data.SEGMENT, dim)), torch.nn.Parameter(torch.randn(2, dim))
        self.masked = torch.nn.Parameter(torch.randn(dim))
        layer = torch.nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, depth, torch.nn.LayerNorm(dim), enable_nested_tensor=False)
        self.key, self.style = losses.CPSD(dim), losses.NTXent(dim)

    def forward(self, segments, step, mask):
        frames, crops, _, _ = segments.batch(0, step)                      # whole segments
        views = []
        for frame, crop in zip(frames.flatten(0, 1), crops.flatten()):     # item by item
            cqt = frame[:, crop:crop + data.CROP_BINS].float() / 255
            views.append(torch.cat([cqt, frame[:, data.N_BINS:].float() / 255], dim=1))
        x = self.tokeniser(torch.stack(views))                             # (views * batch, frames, dim)
        x = torch.where(torch.rand(x.shape[:2])[..., None] < mask, self.masked, x) + self.positions
        x = self.encoder(torch.cat([self.classes.expand(len(x), -1, -1), x], dim=1))[:, :2].unflatten(0, (3, -1))
        batch = dict(shifts=-crops)
        return self.key(x[:, :, 0], batch)[0] + self.style(x[:2, :, 1], batch)[0]


def our_step(network, segments, mask, device, compiled=False):
    """(a function of the step number that trains one step, one that only makes its batch) as train.py does."""
    optimizer, (amp, _) = training.make_optimizer(network), pick_amp(device)
    losses_of = torch.compile(training.training_losses) if compiled else training.training_losses
    batch = lambda step: training.make_batch(segments, network, 0, step, 3, mask, 1000, device)

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
    size = lambda preset: {k: PRESETS[preset][k] for k in ("dim", "depth", "heads")}
    with tempfile.TemporaryDirectory() as folder:
        segments = data.Segments([random_store(Path(folder), 2)], 128)
        network, plain = MT2(**size("small")), Plain(**size("small"))
        mask, optimizer = PRESETS["small"]["mask"], torch.optim.AdamW(plain.parameters())
        train_one, batch = our_step(network, segments, mask, torch.device("cpu"))

        def train_plain(step):
            optimizer.zero_grad()
            plain(segments, step, mask).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 3.0)
            optimizer.step()

        ours, theirs, views = (seconds(lambda: function(next(steps))) for function, steps in
                               ((train_one, count()), (train_plain, count()), (batch, count())))
    print(f"\ntraining step, preset small, 3 views of 128, mask {mask}, {pick_amp(torch.device('cpu'))[1]}")
    print(f"  ours {1000 * ours:.0f} ms, plain {1000 * theirs:.0f} ms: {theirs / ours:.1f} x; batch and views {100 * views / ours:.1f} % of ours")

    print("training step on a GPU, preset mt2, bf16, torch.compile")
    if not torch.cuda.is_available():
        print("  no GPU: skipped")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    peak = next((p for name, p in training.PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), float("nan"))
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
            flops = training.step_flops(network, size_of_batch, mask, 3)
            print(f"  batch {size_of_batch}, mask {mask}: {1 / step:.1f} steps/s, MFU {100 * flops / step / peak:.1f} %, "
                  f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, batch and views take {100 * views / step:.0f} % of that time")


def main():
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?") if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"torch {torch.__version__}, numpy {np.__version__}, {processor}, {torch.get_num_threads()} threads\n")
    print(f"{'seconds of audio per second':34}{'16 clips of 4 s':>18}{'one of 10 min':>18}")
    waves = [torch.randn(16, 64000) * 0.1, torch.randn(1, 600 * data.SAMPLE_RATE) * 0.1]
    cqt, mel = data.CQT(), data.Mel()
    rates = {}
    with torch.inference_mode():
        for name, make in (("CQT (octaves)", lambda w: lambda: cqt(w)), ("CQT (one dense kernel)", dense_cqt), ("mel", lambda w: lambda: mel(w))):
            rates[name] = [w.numel() / data.SAMPLE_RATE / seconds(make(w)) for w in waves]
            print(f"{name:34}{rates[name][0]:18.0f}{rates[name][1]:18.0f}")
        ratio = [a / b for a, b in zip(rates["CQT (octaves)"], rates["CQT (one dense kernel)"])]
        print(f"{'octaves : dense':34}{ratio[0]:17.1f}x{ratio[1]:17.1f}x\n")

    print("preparing one stereo 44.1 kHz ogg of 3 minutes, one core")
    with tempfile.TemporaryDirectory() as folder:
        song = np.tile(data.render(data.compose(0)), 8)[:180 * data.SAMPLE_RATE]
        wave = data.resample(torch.from_numpy(song), data.SAMPLE_RATE, 44100).numpy()
        path = Path(folder) / "song.ogg"
        with sf.SoundFile(path, "w", 44100, 2) as file:  # in blocks: libvorbis dislikes minutes at once
            for block in np.array_split(np.stack([wave, 0.8 * wave], axis=1).clip(-1, 1), 60):
                file.write(block)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        front_end, mono = data.FrontEnd(), torch.from_numpy(wave)
        decode = seconds(lambda: sf.read(path, dtype="float32"))
        resample = seconds(lambda: data.resample(mono, 44100, data.SAMPLE_RATE))
        transform = seconds(lambda: data.audio_to_frames([torch.from_numpy(song)], front_end))
        whole = seconds(lambda: data.audio_to_frames(data.read_audio(path), front_end))
    for name, value in (("decode", decode), ("resample", resample), ("transform", transform), ("all", whole)):
        print(f"  {name:12}{180 / value:8.0f} x real time")
    torch.set_num_threads(threads)

    print(f"\nprobe features of prepared frames, {threads} threads")
    frames = [np.random.default_rng(0).integers(0, 255, (60 * 31, data.COLUMNS), dtype=np.uint8) for _ in range(10)]
    for preset in ("small", "mt2"):
        network = MT2(**{k: PRESETS[preset][k] for k in ("dim", "depth", "heads")}).eval()
        print(f"  {preset:12}{sum(map(len, frames)) * probe.FRAME_SECONDS / seconds(lambda: probe.extract(network, frames, 'cpu')):8.0f} x real time")

    training_step()

    print("\n216-point grid, 443 + 197 tracks, 960 dimensions, 10 classes")
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(640) % 10
    x = torch.randn(10, 960, generator=generator)[y] + 4 * torch.randn(640, 960, generator=generator)
    train, valid, owner = np.arange(443), np.arange(443, 640), np.arange(640)
    score = lambda outputs, tracks: probe.accuracy(outputs.numpy(), y[tracks].numpy())
    start = time.perf_counter()
    probe.choose(x, owner, y, "class", train, valid, score)
    print(f"  whole grid  {time.perf_counter() - start:8.1f} s")
    for name, some in (("linear", [c for c in probe.GRID if not c["hidden"] and c["batch"] == 64][::3]),
                       ("512 units", [c for c in probe.GRID if c["hidden"] and c["batch"] == 64][::3])):
        runs = [dict(c, seed=0, train=train, valid=valid) for c in some]
        fit = lambda chosen: probe.fit(x, owner, y, "class", chosen, score, steps=64, every=8, patience=99)
        together, alone = seconds(lambda: fit(runs), 1), seconds(lambda: [fit([run]) for run in runs], 1)
        print(f"  {name:12}{len(runs)} configurations, 64 steps: together {together:.2f} s, one by one {alone:.2f} s: {alone / together:.1f} x")


if __name__ == "__main__":
    main()
