"""Audio file -> spectrogram frames -> views.

    python data.py FOLDER... --out data/NAME      prepare a frame store from folders of music
    python data.py synth                          prepare the embedded synthetic songs (data/synth)

A ViT-1D takes one spectrogram frame as one token. This file makes the frames, and the views that training compares.

Music theory: a note sounds at its frequency and, more softly, at its multiples, its harmonics. A note an octave higher
has twice the frequency and the same name, its pitch class. An octave is divided into 12 equal steps, semitones, each a
factor of 2^(1/12) in frequency. A scale picks 7 of the 12 pitch classes, one of them is home, the tonic; the mode,
major or minor, says which neighbours in it are one semitone apart and which two. Tonic and mode are the key: 24 keys. A
minor has the notes of C major (its relative), so both share one key signature: 12 signatures. Signatures a fifth (7
semitones) apart differ in one note; going up by fifths visits all 12 and returns, the circle of fifths. A chord is
several notes at once. To transpose music is to move all notes by one number of semitones; its key changes, its timbre
(what distinguishes a flute from a violin on the same note) does not. Hence two spectrograms. The CQT (constant-Q
transform) has one bin a semitone, so transposed music is the same image some rows higher. The mel spectrogram has the
ear's frequency scale and shows timbre.

Every recording is decoded once, transformed into both on one time grid (31.25 frames a second), the CQT tuned as the
recording is (its A4 may not be at 440 Hz), and kept in a memory map, the frame store:

    data/NAME/frames.bin    uint8 (frames, 224): columns 0..95 the CQT (one a semitone), 96..223 the mel bands
    data/NAME/index.jsonl   one line a track, in sorted order: path and number of frames, or why it was skipped
    data/NAME/store.json    settings and a checksum of the list of files; `tracks` is added last and means "complete"

That is 224 x 31.25 bytes a second, 25.2 MB an hour. Training cuts 4 s segments out of the map and transposes them by
choosing where an 84-bin crop of the 96 CQT bins starts. In this order: audio, front ends, store, labels, views, songs.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from glob import glob
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

SAMPLE_RATE = 16000        # Hz (MT2, CoJEPA, Myna): holds frequencies up to its half, the Nyquist frequency
HOP = 512                  # samples between frames: 32 ms (MT2: deduced from 126 frames per 4 s); halved 7 times in CQT
FMIN = 27.5                # Hz, the piano's lowest A (STONE); losses.template_keys takes bin 0 for an A
BINS_PER_OCTAVE = 12       # one bin a semitone (STONE); fixed: crops, shifts and losses count bins as semitones
N_BINS = 96                # eight octaves; STONE's 99th bin would cross Nyquist at 16 kHz (our choice)
CROP_BINS = 84             # seven octaves (STONE): 96 - 84 = 12 spare bins give the 13 crops 0..12
MAX_CROP = N_BINS - CROP_BINS
N_MELS, N_FFT = 128, 1024  # mel branch (multi-view comparison, CoJEPA)
COLUMNS = N_BINS + N_MELS
SEGMENT = 126              # frames in a 4 s segment: 1 + 64000 // 512 (MT2, CoJEPA)
PIECE = 938                # frames in 30 s: both segments of a pair come from one piece of a track (our choice)
FRAME_SECONDS = HOP / SAMPLE_RATE
DYNAMIC_RANGE = 80.0       # dB (our choice: half of what STONE keeps)
MEL_REFERENCE = 2000.0     # mel power counted as 0 dB: about a full-scale sine in the low bands (our choice)


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, and what to do."""


def run_cli(main):
    """Call `main` as a command: an InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    sys.stdout.reconfigure(errors="replace")  # file names need not be valid text
    sys.stderr.reconfigure(errors="replace")
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def write_atomic(path, data):
    """Write bytes beside `path`, then rename: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # only there after a failure


# ---------------------------------------------------------------- audio

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".au", ".aif", ".aiff"}


def change_rate(spectrum, n_in, n_out):
    """Low-pass filter and change the sample rate: rfft (..., n_in/2 + 1) of n_in samples -> (..., n_out) samples.

    The inverse FFT of the lower part of a spectrum is the same signal at a lower rate. The gain is 1 up to 92 % of the
    lower Nyquist frequency and falls to 0 there, so nothing aliases.
    """
    lower = min(n_in, n_out) // 2                               # FFT bin of the lower Nyquist frequency
    fade = ((torch.arange(lower + 1, device=spectrum.device) / lower - 0.92) / 0.08).clamp(0, 1)
    gain = torch.cos(fade * math.pi / 2) ** 2 * (n_out / n_in)  # (lower + 1,)
    return torch.fft.irfft(spectrum[..., :lower + 1] * gain, n=n_out)


def resample(blocks, rate_in, rate_out):
    """Band-limited resampling: (samples,) float32 in blocks at `rate_in` Hz -> (ceil(samples * rate_out / rate_in),).

    `down` samples in last as long as `up` samples out. The FFT is circular, so it takes overlapping windows, whose
    edges are discarded (overlap-save). Blocks, as a whole recording at 44.1 kHz stereo would fill the memory.
    """
    if rate_in == rate_out:
        return torch.cat([torch.zeros(0), *blocks])
    units_per_second = math.gcd(rate_in, rate_out)
    up, down = rate_out // units_per_second, rate_in // units_per_second
    margin, core = math.ceil(0.1 * units_per_second), math.ceil(1.5 * units_per_second)        # in units
    size = core + 2 * margin
    end = torch.zeros((core + margin) * down)                   # pushes the last samples out
    buffer, output, samples = torch.zeros(margin * down), [], -len(end)
    for block in chain(blocks, [end]):
        samples += len(block)
        buffer = torch.cat([buffer, block])
        if len(buffer) >= size * down:
            windows = buffer.unfold(0, size * down, core * down)                               # (n, size * down)
            resampled = change_rate(torch.fft.rfft(windows), size * down, size * up)           # (n, size * up)
            output.append(resampled[:, margin * up:-margin * up].flatten())
            buffer = buffer[len(windows) * core * down:]
    return torch.cat(output)[:math.ceil(samples * up / down)]


def read_audio(path):
    """Decode a file (wav, flac, ogg, opus, mp3, au, aiff): (samples,) float32 at 16 kHz, mono by mean over channels.

    Raises InputError, naming the file, when it is not audio, cannot be read, is empty, silent or holds NaN.
    """
    def mono_blocks(file):
        size = min(20 * file.samplerate, 2 ** 22 // file.channels)
        while len(block := file.read(size, dtype="float32", always_2d=True)):                  # (samples, channels)
            yield torch.from_numpy(block.mean(axis=1))                                         # (samples,)

    try:
        with sf.SoundFile(os.fsencode(path)) as file:
            rate = file.samplerate
            if not 2000 <= rate <= 768000:
                raise InputError(f"{path}: a sample rate of {rate} Hz is not music; convert the file")
            wave = resample(mono_blocks(file), rate, SAMPLE_RATE)
    except (sf.SoundFileError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).rpartition(": ")[2].rstrip(".")
        raise InputError(f"{path}: cannot be decoded ({reason}); give wav, flac, ogg, opus, mp3 or aiff") from None
    peak = np.abs(wave.numpy()).max(initial=0)
    if not math.isfinite(peak):
        raise InputError(f"{path}: holds NaN or infinite samples; export it again")
    if peak < 1e-4:  # -80 dBFS; also a stereo file whose channels cancel each other
        raise InputError(f"{path}: is empty, or silent when mixed to mono; remove it or check its channels")
    return wave


# ---------------------------------------------------------------- front ends


def cqt_kernel(frequency):
    """Constant-Q filters at `frequency` (bins,) Hz, in the frequency domain: (bins, n_fft/2 + 1) complex64.

    The filter at f is a Hann window of Q * SAMPLE_RATE / f samples times a complex exponential, normalised to sum 1 and
    doubled: a full-scale sine at f gives 1.0. So every filter lasts the same number of periods: Q is constant. As in
    librosa, Q = (r^2 + 1) / (r^2 - 1) with r = 2^(1 / BINS_PER_OCTAVE): 17.33 for semitones.
    """
    r = 2 ** (1 / BINS_PER_OCTAVE)
    Q = (r ** 2 + 1) / (r ** 2 - 1)
    frequency = frequency[:, None]                                         # (bins, 1)
    length = Q * SAMPLE_RATE / frequency                                   # (bins, 1) samples, not integers
    n_fft = 2 ** math.ceil(math.log2(length.max().item() + 1))
    t = torch.arange(n_fft, dtype=torch.float64) - n_fft // 2              # (n_fft,)
    window = 0.5 + 0.5 * torch.cos(2 * math.pi * t / length)               # (bins, n_fft)
    window = window * (t.abs() < length / 2)
    window = 2 * window / window.sum(dim=1, keepdim=True)
    kernel = window * torch.exp(2j * math.pi * frequency / SAMPLE_RATE * t)                    # (bins, n_fft)
    spectrum = torch.fft.fft(kernel)[:, :n_fft // 2 + 1].conj() / n_fft    # Parseval: inner products need no inverse
    return spectrum.to(torch.complex64)


class CQT(nn.Module):
    """Constant-Q transform: (batch, samples) -> (batch, 96, frames) magnitudes, frames = 1 + samples // HOP.

    Bin k is tuned to f_k = 27.5 * 2^((k + tuning) / 12) Hz by a filter as in cqt_kernel. Frames are centred at
    multiples of HOP; the signal is zero-padded.

    The lowest filter lasts 0.6 s, and a kernel that long at every frame is slow. But the filter an octave lower is the
    same at half the sample rate. So: filter the top octave with a short kernel (12 x 128 taps), halve the sample rate,
    use the same kernel at half the hop, and so on (Schoerkhuber and Klapuri 2010).
    """

    def __init__(self):
        super().__init__()
        taps, self.centre = half_band_filter()
        self.register_buffer("taps", taps, persistent=False)               # (95, 32), not in the state dict

    def forward(self, wave, tuning=0.0):
        top = torch.arange(N_BINS - BINS_PER_OCTAVE, N_BINS, dtype=torch.float64)
        kernel = cqt_kernel(FMIN * 2 ** ((top + tuning) / BINS_PER_OCTAVE)).to(wave.device)    # (12, n_fft/2 + 1)
        n_fft = 2 * (kernel.shape[1] - 1)
        ones = torch.ones(n_fft, device=wave.device)                       # the window is in the kernel
        frames, octaves = 1 + wave.shape[-1] // HOP, []
        for octave in range(N_BINS // BINS_PER_OCTAVE):
            if octave:
                wave = halve_rate(wave, self.taps, self.centre)            # (batch, samples / 2^octave)
            spectrum = torch.stft(wave, n_fft, HOP >> octave, window=ones, pad_mode="constant", return_complex=True)
            spectrum = spectrum[..., :frames]                              # (batch, n_fft/2 + 1, frames)
            octaves.append((kernel @ spectrum).abs())                      # (batch, 12, frames)
        return torch.cat(octaves[::-1], dim=1)                             # (batch, 96, frames), low to high


HALF_BLOCK = 32  # samples that one row of the matrix product in halve_rate gives


def half_band_filter():
    """A half-band low-pass (Kaiser window): (inputs, HALF_BLOCK), one shifted copy per output, and its centre tap.

    Flat to 1e-3 up to 23 % of the sample rate, where the next octave's highest filter ends, and 70 dB down where that
    octave would alias. Every other tap of a half-band filter is 0; the 64 others are at -63, -61 ... 63.
    """
    window = torch.kaiser_window(127, periodic=False, beta=6.5, dtype=torch.float64)[::2]
    taps = torch.sinc(torch.arange(-63, 64, 2, dtype=torch.float64) / 2) * window              # (64,)
    total = 1 + taps.sum().item()
    padded = F.pad(taps / total, (0, HALF_BLOCK - 1))                                          # (95,)
    return torch.stack([padded.roll(i) for i in range(HALF_BLOCK)], dim=1).float(), 1 / total


def halve_rate(wave, taps, centre):
    """(batch, samples) -> (batch, ceil(samples / 2)): low-pass and keep every other sample.

    In blocks it is a matrix product; the CQT is 2.5 times as fast as with FFTs of the whole wave.
    """
    length = (wave.shape[-1] + 1) // 2
    pairs = F.pad(wave, (0, -wave.shape[-1] % (2 * HALF_BLOCK))).unflatten(-1, (-1, 2))        # (batch, n, 2)
    even, odd = pairs.unbind(dim=-1)                                                           # (batch, n) each
    blocks = F.pad(odd, (32, 31)).unfold(-1, len(taps), HALF_BLOCK)                            # (batch, n / 32, 95)
    return (centre * even + (blocks @ taps).flatten(1))[:, :length]


class Mel(nn.Module):
    """Mel spectrogram: (batch, samples) -> (batch, 128, frames) power, frames = 1 + samples // HOP.

    Triangles from 0 Hz to Nyquist on Slaney's mel scale, linear below 1 kHz and logarithmic above, each of area 1 in Hz
    (Slaney's norm). Periodic Hann window, centred, zero-padded: the same frame grid as the CQT.
    """

    def __init__(self):
        super().__init__()
        nyquist = SAMPLE_RATE / 2
        step = math.log(6.4) / 27                                          # one mel above 1000 Hz (15 mel)
        top = 15 + math.log(nyquist / 1000) / step
        mel = torch.linspace(0, top, N_MELS + 2, dtype=torch.float64)[:, None]                 # corners of triangles
        edge = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * step))       # (130, 1) Hz
        left, centre, right = edge[:-2], edge[1:-1], edge[2:]                                  # (128, 1) each
        bins = torch.linspace(0, nyquist, N_FFT // 2 + 1, dtype=torch.float64)                 # (513,) Hz
        rising = (bins - left) / (centre - left)                                               # (128, 513)
        falling = (right - bins) / (right - centre)
        filters = torch.minimum(rising, falling).clamp(min=0) * (2 / (right - left))
        self.register_buffer("filters", filters.float(), persistent=False)                     # (128, 513)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, wave):
        spectrum = torch.stft(wave, N_FFT, HOP, window=self.window, pad_mode="constant",
                              return_complex=True)                         # (batch, 513, frames)
        return self.filters @ (spectrum.real ** 2 + spectrum.imag ** 2)    # (batch, 128, frames)


def log_compress(x, reference=1.0, power=False):
    """Decibels below `reference`, a range of 80 dB mapped to [0, 1].

    x is a magnitude (20 log10: a factor of 10 is 20 dB = 0.25) or a power (10 log10). The reference is a constant, as a
    maximum would make a frame depend on where its clip was cut. Zeros give 0, with gradient 0.
    """
    factor = 10 if power else 20
    decibels = factor * torch.log10((x / reference).clamp(min=10 ** (-DYNAMIC_RANGE / factor)))
    return (1 + decibels / DYNAMIC_RANGE).clamp(0, 1)


class FrontEnd(nn.Module):
    """(batch, samples) waves in [-1, 1] -> (batch, frames, 224) in [0, 1]: log CQT (96) beside log mel (128)."""

    def __init__(self):
        super().__init__()
        self.cqt, self.mel = CQT(), Mel()

    def forward(self, wave, tuning=0.0):
        both = [log_compress(self.cqt(wave, tuning)), log_compress(self.mel(wave), MEL_REFERENCE, power=True)]
        return torch.cat(both, dim=1).transpose(1, 2)


def estimate_tuning(wave):
    """How far a recording is above A4 = 440 Hz: (samples,) -> semitones in -0.5..0.5, 0 where that is not clear.

    From the spectral peaks between 110 and 2000 Hz, as in librosa: each frequency by parabolic interpolation, then the
    circular mean, weighted by magnitude, of the distances to the nearest semitone. It is clear if that mean has at
    least a tenth of the length 1 that it would have if all peaks agreed (our choice, by trial).
    """
    n_fft = 8192                                                           # bins of 2 Hz
    hop = max(n_fft // 2, len(wave) // 256)                                # about 256 frames of a long recording
    spectrum = torch.stft(wave, n_fft, hop, window=torch.hann_window(n_fft), pad_mode="constant", return_complex=True)
    level = spectrum[56:1024].abs().clamp(min=1e-6).log()                  # (bins, frames)
    below, middle, above = level[:-2], level[1:-1], level[2:]
    offset = (below - above) / (below - 2 * middle + above) / 2            # vertex of the parabola through three bins
    frequency = (torch.arange(57, 1023)[:, None] + offset) * SAMPLE_RATE / n_fft
    is_peak = (middle > below) & (middle >= above)
    turn = torch.exp(2j * math.pi * 12 * torch.log2(frequency[is_peak] / 440))                 # a semitone is one turn
    weight = middle[is_peak].exp()
    mean = (weight * turn).sum() / weight.sum()
    return mean.angle().item() / (2 * math.pi) if mean.abs() > 0.1 else 0.0


CHUNK = 60 * SAMPLE_RATE // HOP * HOP  # samples transformed at once
HALO = 32 * HOP                        # context on either side: the longest filter and low-pass reach 0.8 s


@torch.inference_mode()
def audio_to_frames(wave, front_end):
    """(samples,) at 16 kHz -> (frames, 224) uint8, frames = 1 + samples // hop.

    The CQT follows the tuning of the recording. Chunks of 60 s are transformed with a halo of context, so that no seam
    remains. 255 steps for 80 dB are 0.3 dB each.
    """
    tuning, output = estimate_tuning(wave), []
    for start in range(0, len(wave), CHUNK):
        first = max(0, start - HALO)
        frames = front_end(wave[None, first:start + CHUNK + HALO], tuning)[0]              # (frames, 224) with context
        last = start + CHUNK >= len(wave)                                  # one frame more: that of the end
        frames = frames[(start - first) // HOP:][:CHUNK // HOP + last]
        output.append((frames * 255).round().to(torch.uint8))
    return torch.cat(output).numpy()


# ---------------------------------------------------------------- frame store


class FrameStore:
    """A prepared folder: `frames` (total, 224) uint8 memory map, `paths` and, per track, `starts` and `lengths`.

    Raises InputError when the folder is not a complete store of these settings. `prepare` never cuts a frames.bin that
    may be mapped elsewhere; it makes a new one, and the old one stays readable for those who have it open.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.info = read_json(self.folder / "store.json")
        if "tracks" not in self.info:
            raise InputError(f"{folder}: is not a complete store; make one with: python data.py FOLDER --out {folder}")
        if not self.info.items() >= front_end_settings().items():
            raise InputError(f"{folder}: was prepared with another front end; remove it and prepare it again")
        entries = read_index(self.folder)
        tracks = [e for e in entries if "frames" in e]
        self.skipped = [(e["path"], e["error"]) for e in entries if "error" in e]
        self.paths = [e["path"] for e in tracks]
        self.lengths = np.array([e["frames"] for e in tracks], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        try:
            frames = np.asarray(np.memmap(self.folder / "frames.bin", np.uint8, "r"))
            self.frames = frames.reshape(self.lengths.sum(), COLUMNS)
        except (FileNotFoundError, ValueError):
            raise InputError(f"{folder}: frames.bin is damaged; remove the folder and prepare it again") from None

    def track(self, i):
        """(frames, 224) uint8 of track `i`."""
        return self.frames[self.starts[i]:self.starts[i] + self.lengths[i]]


def read_json(path):
    """The dictionary in a file; an empty one when the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_index(folder):
    """Entries of index.jsonl, without a last line that a kill cut short; none when the file is missing or damaged."""
    try:
        lines = (folder / "index.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        return []


def front_end_settings():
    """What the frames of a store depend on beside the music. format: one more when the code of a front end changes."""
    return dict(format=4, sample_rate=SAMPLE_RATE, hop=HOP, fmin=FMIN, n_bins=N_BINS, bins_per_octave=BINS_PER_OCTAVE,
                n_fft=N_FFT, n_mels=N_MELS, dynamic_range=DYNAMIC_RANGE, mel_reference=MEL_REFERENCE)


def walk(folder):
    """All files below a folder, sorted, links followed; hidden ones are left out."""
    paths = [Path(folder, name) for name in glob("**", root_dir=folder, recursive=True)]
    return sorted(path for path in paths if path.is_file())


def find_audio(folders):
    """Audio files below `folders`, sorted: [(name, path)], name = the folder's own name / the path inside it.

    Raises InputError if a folder is missing, two files have one name or no file has an audio suffix.
    """
    found = {}
    for folder in [Path(f).resolve() for f in folders]:
        if not folder.is_dir():
            raise InputError(f"{folder}: {'is a file; give a folder' if folder.exists() else 'no such file or folder'}")
        for path in walk(folder):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                other = found.setdefault(str(path.relative_to(folder.parent)), path)
                if other != path:
                    raise InputError(f"{path} and {other} have one name below their folders; rename one of the folders")
    if not found:
        raise InputError(f"{', '.join(map(str, folders))}: no audio file ({' '.join(sorted(AUDIO_SUFFIXES))}) "
                         "in there; give another folder")
    return sorted(found.items())


@contextmanager
def locked(folder, taken="another process is preparing it; start again when it is done"):
    """Make `folder` and lock it for this process, however that ends. Raises InputError with `taken` if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: {taken}") from None
        except OSError:  # this file system has no locks
            pass
        yield


def transform(sources):
    """For each of `sources`, in their order: its entry in index.jsonl and its frames. Computed on all cores."""
    front_end, threads, workers = FrontEnd(), torch.get_num_threads(), os.cpu_count()

    def work(source):
        name, read = source
        try:
            frames = audio_to_frames(read(), front_end)
            return dict(path=name, frames=len(frames)), frames
        except InputError as error:
            return dict(path=name, error=str(error)), b""

    # Threads, not processes: decoding and the transforms release Python's lock, and each uses one core.
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
        # Some at a time: the frames of all would pile up behind a long file, and Ctrl-C waits for those begun.
        for first in range(0, len(sources), 32 * workers):
            yield from pool.map(work, sources[first:first + 32 * workers])
    torch.set_num_threads(threads)


def prepare(sources, out, identity, label):
    """Transform `sources` [(name, function that returns audio)] into the store `out` on all cores.

    The order of `sources` is the order in the store, whatever finishes first. A complete store with the same settings
    and `identity` (what they are made from, plain types) is opened as it is; an incomplete one is cut to whole tracks
    and completed; another one starts anew. Sources that raise InputError are skipped and listed. Raises
    InputError when nothing could be read, or another process is preparing the same store.
    """
    out = Path(out)
    listing = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    settings = front_end_settings() | dict(listing=listing)
    info = read_json(out / "store.json")
    same = info.items() >= settings.items()
    if same and "tracks" in info:
        return FrameStore(out)
    with locked(out):
        if not same:
            for name in ("store.json", "index.jsonl", "frames.bin"):
                (out / name).unlink(missing_ok=True)
            write_atomic(out / "store.json", json.dumps(settings).encode())
        with open(out / "frames.bin", "ab") as frames_file, open(out / "index.jsonl", "ab") as index_file:
            entries = read_index(out)
            ends = np.cumsum([0] + [e.get("frames", 0) for e in entries]) * COLUMNS            # bytes before each entry
            # A power cut can lose frames that the index names.
            done = entries[:np.searchsorted(ends[1:], frames_file.tell(), side="right")]
            frames_file.truncate(ends[len(done)])
            index_file.truncate(sum(len(json.dumps(e)) + 1 for e in done))
            todo = transform(sources[len(done):])
            for entry, frames in tqdm(todo, label, total=len(sources), initial=len(done), unit="track"):
                frames_file.write(frames)
                frames_file.flush()  # frames before the line that names them
                index_file.write(json.dumps(entry).encode() + b"\n")
                index_file.flush()
                done.append(entry)
            os.fsync(frames_file.fileno())
            os.fsync(index_file.fileno())
        for entry in done:
            if "error" in entry:
                print(f"skipped {entry['error']}")
        tracks = sum("frames" in entry for entry in done)
        if not tracks:
            raise InputError(f"none of {len(done)} files could be read as audio; see the lines above")
        write_atomic(out / "store.json", json.dumps(settings | dict(tracks=tracks)).encode())
    store = FrameStore(out)
    hours = len(store.frames) * FRAME_SECONDS / 3600
    print(f"{out}: {tracks} tracks, {hours:.2f} h, {len(store.skipped)} skipped")
    return store


def prepare_files(files, out):
    """Frame store `out` of files [(name, path)], each name once. See prepare.

    Names, sizes and dates are its identity: a file that changes, comes or goes makes the next run start anew.
    """
    changed = lambda path: (path.stat().st_size, path.stat().st_mtime) if path.exists() else None
    identity = [(name, changed(path)) for name, path in files]
    return prepare([(name, partial(read_audio, path)) for name, path in files], out, identity, "preparing")


def prepare_folders(folders, out=None):
    """Frame store of folders of music. `out` defaults to data/NAME-HASH, one per set of folders."""
    folders = [Path(folder).resolve() for folder in folders]
    where = "|".join(map(str, folders))
    default = f"{folders[0].name}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:8]}"
    return prepare_files(find_audio(folders), out or Path("data") / default)


def open_data(sources):
    """Stores for --data: "synth", a frame store, or a folder of music (prepared first when need be)."""
    stores = []
    for source in sources:
        if source == "synth":
            store = prepare_synth()
        elif (Path(source) / "store.json").exists():
            store = FrameStore(source)
        else:
            store = prepare_folders([source])
        if store.paths[0] == "synth/00000":  # no validation and test songs
            store.lengths = store.lengths[:len(SYNTH_SPLITS["train"])]
        stores.append(store)
    return stores


# ---------------------------------------------------------------- labels

KEY_NAMES = "C Db D Eb E F Gb G Ab A Bb B".split()  # by the tonic, in semitones above C


def parse_key(text):
    """'F# minor', 'Bb:maj', 'A', 'd# minor<TAB>2' ... -> tonic 0..11 major, 12 + tonic minor, None if no single key.

    Without a mode a capital letter is major, a small one minor.
    """
    match = re.fullmatch(r"([A-Ga-g])([#b]*)[\s:]*((?i:major|maj)|M|(?i:minor|min)|m)?", text.split("\t")[0].strip())
    if not match:
        return None
    letter, accidentals, mode = match.groups()
    tonic = "C D EF G A B".index(letter.upper()) + accidentals.count("#") - accidentals.count("b")
    minor = mode == "m" or mode[:3].lower() == "min" if mode else letter.islower()
    return tonic % 12 + 12 * minor


def read_table(path, delimiter=","):
    """Rows of a CSV file with a header, [{column: cell}], cells stripped. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            stripped = lambda row: {k.strip(): (v or "").strip() for k, v in row.items() if k}
            return [stripped(row) for row in csv.DictReader(file, delimiter=delimiter)]
    except (OSError, csv.Error):
        raise InputError(f"{path}: is not a readable CSV file") from None


def read_labels(path, column, names):
    """Labels of a CSV with the columns `file` and `column`: {name: text} for those of `names` (paths in a store).

    A file is named as in the store, "music/artist/song.ogg", or relative to the prepared folder, "artist/song.ogg".
    Raises InputError when a column is missing or no file is in the store.
    """
    rows = read_table(path)
    if not rows or not {"file", column} <= rows[0].keys():
        raise InputError(f"{path}: is not a CSV with the columns file,{column}")
    labels = {os.path.normpath(row["file"]): row[column] for row in rows}
    found = {}
    for name in names:
        for key in (name, os.path.relpath(name, Path(name).parts[0])):
            if key in labels:
                found[name] = labels[key]
    print(f"{path}: {len(found)} of {len(names)} tracks have a {column}, {len(labels)} rows")
    if not found:
        raise InputError(f"{path}: none of its files is in the data; name them as in index.jsonl of the store")
    return found


# ---------------------------------------------------------------- views

# Transposition by cropping: an 84-bin crop that starts at CQT bin c shows the music c semitones LOWER than the crop
# that starts at 0, so a view's shift (semitones by which it was transposed up) is -c.
PITCH_CROP = MAX_CROP // 2  # the crop used outside training: the middle of the range (our choice)


def crop_views(frames, crops):
    """(..., frames, 224) uint8 and crops (...) in 0..12 -> cqt (..., frames, 84), mel (..., frames, 128) in [0, 1].

    The mel bands cannot be transposed by a crop and stay as they are.
    """
    bins = crops[..., None, None] + torch.arange(CROP_BINS, device=frames.device)      # (..., 1, 84)
    cqt = torch.gather(frames, -1, bins.expand(*frames.shape[:-1], CROP_BINS))         # (..., frames, 84)
    return cqt.float() / 255, frames[..., N_BINS:].float() / 255


def training_views(frames, crops):
    """crop_views for the views of Segments, with the mel of the transposed view 2 zeroed.

    An uncropped mel beside a cropped CQT gives away where the crop starts: a network that compares the two can output
    the crop itself. That output shifts with the crop as CPSD asks, and has nothing to do with key: a shortcut solution.
    Zeroing the mel of one view of each pair removes it, as the two views can only agree on something in the music.
    """
    cqt, mel = crop_views(frames, crops)
    mel[2:] = 0
    return cqt, mel


def kept_positions(rng, shape, count, mask):
    """Which of `count` tokens stay when the share `mask` is dropped, random, sorted: (*shape, kept) int64."""
    kept = max(1, round(count * (1 - mask)))
    order = rng.random((*shape, count), dtype=np.float32)
    return np.sort(np.argpartition(order, kept - 1, axis=-1)[..., :kept], axis=-1)


class Segments:
    """Training batches from frame stores, each a pure function of (seed, step): resuming needs no hidden state.

    A track is cut into pieces of about 30 s (4 to 60); a piece is one item of a batch, with two segments of 4 s, close
    in time as in CoJEPA, and three views:

        view 0  segment A   crop c
        view 1  segment B   crop c     A, B do not overlap where the piece has room for two segments
        view 2  segment A   crop c'    mel zeroed (see training_views)

    NT-Xent compares views 0 and 1, which share a crop, or it would learn to ignore pitch. The whole batch shares it, or
    NT-Xent would find partners by the crop, read off mel against CQT. CPSD compares views 0 and 1 with view 2, which
    draws its own crop for each item. Each view keeps its own random frames.
    keys {path in a store: 0..23}: labels for the tasks that use some (`tone`). mix: shares in which the stores are
    drawn from (a store with too few pieces gives all it has); without it every piece is equally likely.
    Raises InputError when the stores hold fewer pieces than the batch, or when mix does not fit.
    """

    def __init__(self, stores, batch_size, keys=None, mix=None):
        self.stores, self.batch_size = stores, batch_size
        self.frames = None                                                            # on a device after to()
        self.offsets = np.cumsum([0] + [len(store.frames) for store in stores])       # of each store's frames in `rows`
        pieces, track, short, keys = [], 0, 0, keys or {}
        for number, store in enumerate(stores):
            for path, start, length in zip(store.paths, store.starts + self.offsets[number], store.lengths):
                count = max(1, length // PIECE) if length >= SEGMENT else 0
                for i in range(count):
                    size = length // count
                    pieces.append((start + i * size, size, track, keys.get(path, -1), number))
                short += count == 0
                track += 1
        if len(pieces) < batch_size:
            raise InputError(f"a batch of {batch_size} needs as many pieces of 30 s, the data has {len(pieces)} "
                             f"({short} tracks are shorter than 4 s); use a smaller --batch-size or add music")
        if mix and (len(mix) != len(stores) or not all(0 < share < np.inf for share in mix)):
            raise InputError(f"--mix: give one share above 0 for each of the {len(stores)} sources of --data")
        self.pieces = np.array(pieces)                                                # (pieces, 5)
        self.probability = None
        if mix:
            in_store = self.pieces[:, 4]
            weight = np.array(mix)[in_store] / np.bincount(in_store)[in_store]
            self.probability = weight / weight.sum()                                  # (pieces,)
        hours = self.pieces[:, 1].sum() * FRAME_SECONDS / 3600
        self.summary = f"{len(pieces)} pieces of about 30 s, {hours:.2f} h; {short} tracks shorter than 4 s left out"

    def to(self, device):
        """Keep the frames of all stores on a device: gather() then takes rows that are there."""
        self.frames = torch.from_numpy(np.concatenate([store.frames for store in self.stores])).to(device)

    def draw(self, seed, step, views=3, mask=0.0, share=slice(None)):
        """A batch without its frames, a dictionary of int64 tensors; gather() gives the frames of `rows`.

        rows (views, share, kept), frame numbers over all stores; positions (views, share, kept), which of the 126
        frames of a segment were kept; crops (views, batch); keys (batch,), -1 without a label; tracks (batch,), numbers
        unique over all stores. mask: share of frames dropped. share: the slice of the batch whose frames are wanted, as
        each of several processes draws the same batch and reads its part.
        """
        rng, size = np.random.default_rng([seed, step]), self.batch_size
        chosen = rng.choice(len(self.pieces), size, replace=False, p=self.probability)
        begin, length, track, key, _ = self.pieces[chosen].T                          # (batch,) each
        room = length - 2 * SEGMENT
        apart = np.sort(rng.integers(0, np.maximum(room, 0) + 1, (2, size)), axis=0)  # (2, batch)
        apart[1] += SEGMENT                                                           # sorted: no overlap
        anywhere = rng.integers(0, length - SEGMENT + 1, (2, size))
        start = np.where(room >= 0, apart, anywhere) + begin
        start = np.where(rng.random(size) < 0.5, start, start[::-1])                  # A is not always first
        start = start[[0, 1, 0]][:views]                                              # (views, batch)
        crop = np.full(size, rng.integers(0, MAX_CROP + 1))                           # one a step, see the class
        other = (crop + rng.integers(1, MAX_CROP + 1, size)) % (MAX_CROP + 1)         # uniform, never the same
        crops = np.stack([crop, crop, other])[:views]
        positions = kept_positions(rng, (views, size), SEGMENT, mask)[:, share]       # (views, share, kept)
        rows = start[:, share, None] + positions
        drawn = dict(rows=rows, crops=crops, positions=positions, keys=key, tracks=track)
        return {name: torch.from_numpy(values) for name, values in drawn.items()}

    def gather(self, rows):
        """Frames of global row numbers: rows (...) int64 -> (..., 224) uint8, from the stores or from the device."""
        if self.frames is not None:
            return self.frames[rows]
        rows = rows.numpy()
        frames = np.empty((*rows.shape, COLUMNS), np.uint8)
        for store, first, end in zip(self.stores, self.offsets, self.offsets[1:]):
            mine = (rows >= first) & (rows < end)
            frames[mine] = store.frames[rows[mine] - first]
        return torch.from_numpy(frames)


# ---------------------------------------------------------------- synthetic songs

# Pitch classes count from 0 = C to 11 = B. A chord stacks every other note of the scale; three of them are a triad.
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
# A loop of chords is a string, one digit a chord: the scale degree of its root, from 0. What may follow each chord; the
# diminished ones are left out.
FOLLOWS = {"major": {"0": "34512", "1": "443", "2": "53", "3": "401", "4": "0053", "5": "3142"},
           "minor": {"0": "35624", "2": "563", "3": "406", "4": "005", "5": "6234", "6": "025"}}
# Modes beyond major and minor, same tonic: (degree that moves, by semitones, chord left out as it is diminished).
MODES = {"major": ((6, -1, "2"), (3, 1, "3")),  # mixolydian, lydian
         "minor": ((5, 1, "5"), (1, -1, "4"))}  # dorian, phrygian
# Neighbours on the circle of fifths differ in one note. Every loop holds a chord with the note that rules out the fifth
# above and one with the note that rules out the fifth below: without both, the remaining notes fit two keys.
EDGES = {"major": ("13", "24"), "minor": ("35", "46")}
TIMBRES = ("strings", "clarinet", "organ", "flute", "brass", "pluck", "mallet", "epiano")
SONG_SECONDS = 24
SONGS_VERSION = 3  # one more when the songs change, so that data/synth is made anew
# Song numbers of each part of the default set. The labels of train are used by probes only.
SYNTH_SPLITS = {"train": range(0, 1024), "valid": range(1024, 1152), "test": range(1152, 1408)}


def chord_loop(rng, mode, length, left_out):
    """A loop of `length` chords, each one that may follow the one before, drawn until both edges of the scale occur."""
    follows, loop = FOLLOWS[mode], ""
    while left_out in loop or any(set(edge).isdisjoint(loop) for edge in EDGES[mode]):
        loop = "0" if rng.random() < 0.7 else rng.choice(list(follows))
        while len(loop) < length:
            loop += rng.choice(list(follows[loop[-1]]))
    return loop


def arrangement(rng):
    """What a song is made from, drawn by rng: key, tempo, instruments, and for each half its chords and style."""
    tonic, minor = int(rng.integers(12)), int(rng.integers(2))
    mode = ("major", "minor")[minor]
    tempo = 70 * (160 / 70) ** rng.random()
    span = 2 if tempo < 110 else 4                                        # beats a chord lasts: 1.1 to 2.2 s
    spans = math.ceil(SONG_SECONDS / (span * 60 / tempo))
    leading_tone = rng.random() < 0.5 and mode == "minor"                 # the chord on degree 4 becomes major
    # Verse and chorus: each half has its own loop of chords, so that only the key is common to both. In 60 % of songs
    # one half is in another mode on the same tonic, as in rock and folk; the label stays.
    halves = [dict(scale=list(SCALES[mode]), left_out="none") for _ in range(2)]
    if rng.random() < 0.6:
        half = halves[rng.integers(2)]
        degree, change, half["left_out"] = MODES[mode][rng.integers(2)]
        half["scale"][degree] += change
    for half, length in zip(halves, rng.choice([4, 4, 8], 2)):
        half["loop"] = chord_loop(rng, mode, length, half["left_out"])
    rest = rng.integers(1, spans) if rng.random() < 0.3 else -1           # one span of drums alone: "no chord"
    # The melody keeps its instrument; chords and bass change theirs, as does the style of playing.
    timbres = rng.permutation(len(TIMBRES))[:5].tolist()                  # melody, then chords and bass of each half
    for half in halves:
        half |= dict(chords=rng.choice(["block", "arpeggio", "offbeat"]), bass=rng.choice(["root", "walk", "pulse"]),
                     drums=rng.random() < 0.6, dense=rng.uniform(0.5, 0.9))
    # Each part's range starts anywhere: a lowest note common to all songs would give away where a crop was cut.
    lowest = [int(low + rng.integers(12)) for low in (46, 46, 29)]        # melody, chords, bass (MIDI pitch)
    return dict(tonic=tonic, mode=mode, key=tonic + 12 * minor, signature=(tonic + 3 * minor) % 12, tempo=tempo,
                span=span, spans=spans, leading_tone=leading_tone, halves=halves, rest=rest, timbres=timbres,
                instrument=timbres[0], lowest=lowest)


# The parts of an arrangement. Notes are (beat, beats long, MIDI pitch, velocity), from the start of a chord.


def patterns(chord, bass, triad, beats):
    """Notes of each style of playing the pitches `chord`, and of each style of a bass on `bass`, the root."""
    return {"block": [(b, 1.9, pitch, 0.5) for b in range(0, beats, 2) for pitch in chord],
            "arpeggio": [(b / 2, 1, chord[(0, 1, 2, 1)[b % 4]], 0.6) for b in range(2 * beats)],
            "offbeat": [(b + 0.5, 0.4, pitch, 0.5) for b in range(beats) for pitch in chord],
            "root": [(0, beats - 0.2, bass, 0.8)],
            "pulse": [(b, 0.9, bass, 0.8) for b in range(beats)],
            "walk": [(b, 0.9, bass + step, 0.8) for b, step in zip(range(beats), (*triad, 12))]}


def melody_line(rng, place, pitch_of, chord, dense, beats):
    """A random walk on the scale from degree `place`, on chord notes every two beats: (notes, last degree)."""
    notes, classes = [], {pitch % 12 for pitch in chord}
    for eighth in range(2 * beats):
        if rng.random() > dense:
            continue
        place = int(np.clip(place + rng.integers(-2, 3), 4, 18))
        if eighth % 4 == 0 and pitch_of(place) % 12 not in classes:
            place += 1 if pitch_of(place + 1) % 12 in classes else -1
        notes.append((eighth / 2, rng.choice([0.5, 0.5, 1.0]), pitch_of(place), rng.uniform(0.8, 1.1)))
    return notes, place


def above(low, pitch):
    """`pitch`, moved by whole octaves into the octave from `low`."""
    return low + (pitch - low) % 12


def play(rng, song):
    """The score of an arrangement: its notes, drums, chords and beats as in compose."""
    span, beat, lowest = song["span"], 60 / song["tempo"], song["lowest"]
    home, place = above(lowest[0], song["tonic"]), int(rng.integers(7, 14))
    length = span * beat                                                  # seconds a chord lasts
    notes, drums, chords = [], [], []
    for i in range(song["spans"]):
        start, number = length * i, 2 * i // song["spans"]
        half = song["halves"][number]
        if half["drums"] or i == song["rest"]:
            drums += [(start + b * beat, ("kick", "snare")[b % 2]) for b in range(span)]
            drums += [(start + b / 2 * beat, "hat") for b in range(2 * span) if rng.random() < half["dense"]]
        if i == song["rest"]:
            chords.append((start, start + length, 24))
            continue
        pitch_of = lambda degree: home + half["scale"][degree % 7] + 12 * (degree // 7)
        degree = int(half["loop"][i % len(half["loop"])])
        root = pitch_of(degree)
        triad = [pitch_of(degree + step) - root for step in (0, 2, 4)]    # semitones above the root
        triad[1] += song["leading_tone"] and degree == 4
        chords.append((start, start + length, root % 12 + 12 * (triad[1] == 3)))
        chord = sorted(above(lowest[1], root + step) for step in triad)
        styles = patterns(chord, above(lowest[2], root), triad, span)
        parts = {1 + 2 * number: styles[half["chords"]], 2 + 2 * number: styles[half["bass"]]}
        parts[0], place = melody_line(rng, place, pitch_of, chord, half["dense"], span)
        for part, line in parts.items():
            notes += [(start + b * beat, long * beat, pitch, velocity, part) for b, long, pitch, velocity in line]
    return dict(notes=notes, drums=drums, chords=chords, beats=[b * beat for b in range(span * song["spans"])])


def compose(index):
    """The score and the labels of one synthetic song, a pure function of its number.

    Keys: tonic 0..11, mode, key (0..23), signature (tonic of the major key with the same notes), instrument (index into
    TIMBRES of the melody), tempo (beats per minute), chords [(start, end, class)] in seconds, class = root + 12 * minor
    or 24 for none, beats [s], notes [(start, duration, MIDI pitch, velocity, part)], drums [(time, kind)]; and what
    render needs beside the score: levels, tuning of each part, equaliser, room, distortion, noise.
    """
    rng = np.random.default_rng([0, index])
    song = arrangement(rng)
    return song | play(rng, song) | dict(
        colour=rng.uniform(0.7, 1.4, 5), levels=[1.5, *rng.uniform(0.3, 0.6, 4)], drum_level=0.2 * 15 ** rng.random(),
        detune=rng.normal(0, 0.15, 5),                                    # semitones: no band is quite in tune
        noise_seed=rng.integers(2 ** 31), loudness=rng.uniform(-30, -14), tilt=rng.uniform(-1.5, 1.5),
        reverb=rng.uniform(0.1, 0.6) if rng.random() < 0.5 else 0.0,
        drive=rng.uniform(1, 4) if rng.random() < 0.2 else 0.0, noise=rng.uniform(-70, -30))


def harmonic_tone(name, h, phase, t, colour):
    """A sum of sines at multiples h = 1, 2 ... of the fundamental, by sin((h+1)x) = 2 cos(x) sin(hx) - sin((h-1)x)."""
    amplitude = {"strings": h ** -colour,
                 "clarinet": (h % 2) * h ** -colour + 0.04 / h,           # a closed pipe: odd harmonics
                 "brass": h ** (-0.6 * colour) * np.exp(-h / 9),
                 "organ": np.isin(h, (1, 2, 3, 4, 6, 8)) * h ** (-0.5 * colour),
                 "flute": np.array([1, 0.35, 0.12, 0.04])[:len(h)],
                 "pluck": h ** (-0.8 * colour) * np.abs(np.sin(0.55 * h))}[name]
    # Higher partials decay faster (pluck) or enter later (brass).
    decay = {"pluck": np.exp(-1.1 * t), "brass": (1 - np.exp(-9 * t)) ** 0.25}.get(name, 1)
    cosine, previous, current = 2 * np.cos(phase), 0, np.sin(phase)
    envelope, wave = 1, 0
    for a in amplitude:
        envelope = envelope * decay
        wave = wave + np.float32(a) * (current * envelope)
        previous, current = current, cosine * current - previous
    return wave


def render_note(timbre, pitch, seconds, colour, rng):
    """One note: (samples,) float32. Each timbre is built in its own way; `colour` > 1 is darker."""
    name, f = TIMBRES[timbre], 440 * 2 ** ((pitch - 69) / 12)
    t = np.arange(int(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    vibrato = {"strings": 0.03, "flute": 0.015}.get(name, 0) * np.sin(2 * np.pi * 5.5 * t) / (2 * np.pi * 5.5)
    phase = (2 * np.pi * f * (t + vibrato)).astype(np.float32)
    if name == "mallet":                                                  # a bar's modes are no multiples of each other
        modes = ((1, 1, 5), (3.93, 0.5, 14), (9.2, 0.25, 30))             # (ratio, amplitude, decay per second)
        wave = sum(a * np.sin(r * phase) * np.exp(-t * d * colour) for r, a, d in modes if r * f < 7500)
    elif name == "epiano":                                                # frequency modulation
        body = 1.8 / colour * np.exp(-3 * t) * np.sin(phase)
        tine = 0.4 * np.exp(-12 * t) * np.sin(min(7.0, 7000 / f) * phase)
        wave = np.sin(phase + body + tine) * np.exp(-1.2 * t)
    else:
        wave = harmonic_tone(name, np.arange(1, min(20, int(7500 / f)) + 1), phase, t, colour)
    if name == "flute":
        wave += 0.08 * rng.standard_normal(len(t), dtype=np.float32)
    attack = {"strings": 0.12, "flute": 0.06, "brass": 0.04, "clarinet": 0.03, "organ": 0.01}.get(name, 0.003)
    return (wave * np.minimum(1, t / attack)).astype(np.float32)


def add_notes(mix, song, rng):
    """Add the notes of a score to `mix` (samples,) in place. The longest note of a pitch serves the shorter ones."""
    release, cache = np.linspace(1, 0, int(0.04 * SAMPLE_RATE), dtype=np.float32), {}
    for start, duration, pitch, velocity, part in song["notes"]:
        place = mix[int(start * SAMPLE_RATE):][:int(duration * SAMPLE_RATE)]
        if len(place) <= 2 * len(release):                                # cut off by the end of the song
            continue
        note = cache.get((part, pitch), ())
        if len(note) < int(duration * SAMPLE_RATE):
            colour = song["colour"][part]
            note = render_note(song["timbres"][part], pitch + song["detune"][part], duration + 0.01, colour, rng)
            note /= np.sqrt(np.mean(note[:4000] ** 2)) + 1e-6
            cache[part, pitch] = note
        note = note[:len(place)] * np.float32(velocity * song["levels"][part])
        note[-len(release):] *= release
        place += note


def add_drums(mix, song, rng):
    """Add the drums of a score to `mix` (samples,) in place: a falling sine and two kinds of noise."""
    t = np.arange(int(0.25 * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    noise = rng.standard_normal(len(t), dtype=np.float32)
    kit = {"kick": 4 * np.sin(2 * np.pi * (50 * t + 3 * (1 - np.exp(-30 * t)))) * np.exp(-14 * t),
           "snare": 2 * noise * np.exp(-18 * t), "hat": np.diff(noise, append=0) * np.exp(-50 * t)}
    for time, kind in song["drums"]:
        place = mix[int(time * SAMPLE_RATE):][:len(t)]
        place += np.float32(song["drum_level"]) * kit[kind][:len(place)]


def render(song):
    """Score to sound: (SONG_SECONDS * 16000,) float32 with drums, room, equaliser, noise and a level of its own."""
    rng = np.random.default_rng(song["noise_seed"])
    mix = np.zeros(SONG_SECONDS * SAMPLE_RATE, np.float32)
    add_notes(mix, song, rng)
    add_drums(mix, song, rng)
    if song["drive"]:
        mix = np.tanh(song["drive"] * mix / (3 * mix.std()))
    # The equaliser and the room are filters: products of spectra, a second longer than the song against wrap-around.
    n, draw = len(mix) + SAMPLE_RATE, partial(rng.standard_normal, dtype=np.float32)
    spectrum = np.fft.rfft(mix, n)
    octaves = np.log2(np.arange(1, n // 2 + 2, dtype=np.float32) * SAMPLE_RATE / n / 800)      # from 800 Hz
    spectrum *= 10 ** (song["tilt"] * octaves / 20)
    if song["reverb"]:
        t = np.arange(SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE
        room = 0.03 * song["reverb"] * draw(len(t)) * np.exp(-7 * t)
        room[0] = 1
        spectrum *= np.fft.rfft(room, n)
    mix = np.fft.irfft(spectrum)[:len(mix)]
    mix *= 10 ** (song["loudness"] / 20) / mix.std()
    mix += 10 ** (song["noise"] / 20) * draw(len(mix))
    return (mix / max(1, np.abs(mix).max())).astype(np.float32)


def prepare_synth(songs=SYNTH_SPLITS["test"].stop, out="data/synth"):
    """Frame store of synthetic songs 0 .. songs - 1, through the same path as files. Made once, then cached."""
    sources = [(f"synth/{i:05d}", lambda i=i: torch.from_numpy(render(compose(i)))) for i in range(songs)]
    return prepare(sources, out, [SONGS_VERSION, songs], "making synthetic songs")


def main():
    parser = argparse.ArgumentParser(description="Prepare a frame store from folders of music.")
    parser.add_argument("folders", nargs="+", help="folders of audio files, or the word synth")
    parser.add_argument("--out", help="the store's folder (default data/NAME-HASH, where train.py looks for it)")
    args = parser.parse_args()
    if args.folders == ["synth"]:
        prepare_synth(out=args.out or "data/synth")
    else:
        prepare_folders(args.folders, args.out)


if __name__ == "__main__":
    run_cli(main)
