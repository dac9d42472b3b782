"""Speed, as ratios within one run: python tests/bench.py (about a minute on two cores; not part of the test suite)."""
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402


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
        torch.set_num_threads(1)
        front_end, mono = data.FrontEnd(), torch.from_numpy(wave)
        decode = seconds(lambda: sf.read(path, dtype="float32"))
        resample = seconds(lambda: data.resample(mono, 44100, data.SAMPLE_RATE))
        transform = seconds(lambda: data.audio_to_frames([torch.from_numpy(song)], front_end))
        whole = seconds(lambda: data.audio_to_frames(data.read_audio(path), front_end))
    for name, value in (("decode", decode), ("resample", resample), ("transform", transform), ("all", whole)):
        print(f"  {name:12}{180 / value:8.0f} x real time")


if __name__ == "__main__":
    main()
