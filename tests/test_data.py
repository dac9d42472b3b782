"""Front ends and decoding: the CQT and the mel spectrogram against slow references, resampling, files, chunks."""
import math

import numpy as np
import pytest
import soundfile as sf
import torch

import data
from conftest import wave_of
from data import CQT, HOP, N_BINS, SAMPLE_RATE, FrontEnd, InputError, Mel, audio_to_frames, log_compress, read_audio, resample

INTERIOR = slice(26, -26)  # frames out of reach of the clip's ends: half the longest filter and all halvings


def tone(frequency, seconds=2.0, rate=SAMPLE_RATE, amplitude=1.0):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate), dtype=torch.float64) / rate).float()


def noise(samples, seed=0):
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def music(index, seconds=4):
    return torch.from_numpy(wave_of(index)[:seconds * SAMPLE_RATE])


def frequency_of(k):
    return 27.5 * 2 ** (k / 12)


@pytest.fixture(scope="module")
def cqt():
    return CQT()


@pytest.fixture(scope="module")
def front_end():
    return FrontEnd()


# ---------------------------------------------------------------- CQT


def slow_cqt(wave):
    """The definition: every filter at the full rate, centred on every frame, in float64."""
    quality, half = (2 ** (1 / 6) + 1) / (2 ** (1 / 6) - 1), 6000
    padded = np.pad(wave.double().numpy(), (half, half + 1))
    framed = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)[::HOP]
    t, rows = np.arange(-half, half + 1), []
    for k in range(N_BINS):
        length = quality * SAMPLE_RATE / frequency_of(k)
        inside = np.abs(t) < length / 2
        window = 0.5 + 0.5 * np.cos(2 * np.pi * t[inside] / length)
        kernel = 2 * window / window.sum() * np.exp(-2j * np.pi * frequency_of(k) / SAMPLE_RATE * t[inside])
        taps = framed[:, inside]
        rows.append(np.hypot(taps @ kernel.real, taps @ kernel.imag))
    return np.stack(rows)


@pytest.mark.parametrize("wave", [noise(4 * SAMPLE_RATE), music(1)], ids=["noise", "music"])
def test_cqt_equals_the_direct_form(cqt, wave):
    """Octave by octave, because the loud low octaves of music would hide an error in the high ones."""
    fast, slow = cqt(wave[None])[0].numpy()[:, INTERIOR], slow_cqt(wave)[:, INTERIOR]
    assert fast.shape == slow.shape
    for octave in range(8):
        rows = slice(12 * octave, 12 * octave + 12)
        assert np.linalg.norm(fast[rows] - slow[rows]) < 0.005 * np.linalg.norm(slow[rows]), f"octave {octave}"


@pytest.mark.parametrize("k", [0, 5, 12, 23, 31, 47, 48, 60, 74, 83, 84, 90, 94])
def test_sine_at_a_bin_centre_is_one_and_a_semitone_up_one_row_higher(cqt, k):
    for row in (k, k + 1):
        profile = cqt(tone(frequency_of(row))[None])[0][:, INTERIOR]
        assert (profile.argmax(dim=0) == row).all()
        assert (profile[row] - 1).abs().max() < 0.01


def test_cqt_scales_with_the_amplitude(cqt):
    wave = noise(SAMPLE_RATE)[None]
    torch.testing.assert_close(cqt(2 * wave), 2 * cqt(wave))


def test_a_clip_alone_equals_the_clip_in_a_batch(front_end):
    batch = torch.stack([noise(20000, seed) for seed in range(4)])
    torch.testing.assert_close(front_end(batch)[2:3], front_end(batch[2:3]), rtol=1e-4, atol=1e-4)


def test_a_delay_of_one_hop_moves_the_interior_one_frame(front_end):
    wave = music(2)
    delayed = torch.cat([torch.zeros(HOP), wave])
    plain, moved = front_end(wave[None])[0], front_end(delayed[None])[0]
    torch.testing.assert_close(moved[1:][INTERIOR], plain[INTERIOR], rtol=1e-3, atol=1e-3)
    assert (moved[:-1][INTERIOR] - plain[INTERIOR]).abs().max() > 0.05


def test_frames_are_centred_at_multiples_of_the_hop(front_end):
    """A click at sample 40 * HOP is loudest in frame 40, in both branches."""
    wave = torch.zeros(1, 80 * HOP)
    wave[0, 40 * HOP] = 1
    cqt, mel = front_end.cqt(wave)[0], front_end.mel(wave)[0]
    assert (cqt[:60].argmax(dim=1) == 40).all() and (mel.argmax(dim=1) == 40).all()


def test_silence_is_finite_with_finite_gradients(front_end):
    wave = torch.zeros(1, 8000, requires_grad=True)
    frames = front_end(wave)
    frames.sum().backward()
    assert (frames == 0).all() and wave.grad.isfinite().all()


@pytest.mark.parametrize("samples", [1, 511, 512, 513, 1023, 16001, 64000])
def test_both_branches_have_the_same_frames(front_end, samples):
    wave = noise(samples)[None]
    frames = 1 + samples // HOP
    assert front_end.cqt(wave).shape == (1, 96, frames) and front_end.mel(wave).shape == (1, 128, frames)
    assert front_end(wave).shape == (1, frames, 224)


def test_front_ends_leave_nothing_in_checkpoints(front_end):
    assert len(front_end.state_dict()) == 0 and len(list(front_end.parameters())) == 0
    assert len(list(front_end.buffers())) > 0                  # but they move with .to(device)


def test_front_end_puts_the_cqt_before_the_mel_bands(front_end):
    low, high = front_end(tone(110.0)[None])[0, INTERIOR].mean(0), front_end(tone(440.0)[None])[0, INTERIOR].mean(0)
    assert low[:96].argmax() == 24 and high[:96].argmax() == 48
    assert 96 <= 96 + low[96:].argmax() < 96 + high[96:].argmax()
    assert 0.9 < low[96:].max() <= 1                           # a full-scale tone nearly fills the mel range


# ---------------------------------------------------------------- mel


def slow_mel(wave, n_mels=128, n_fft=1024, f_max=8000.0):
    """The textbook definition in loops: Slaney's scale and norm, triangles sampled at the FFT bins."""
    to_hz = lambda mel: 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)
    top = 15 + 27 * math.log(f_max / 1000) / math.log(6.4)
    edge = [to_hz(top * i / (n_mels + 1)) for i in range(n_mels + 2)]
    filters = np.zeros((n_mels, n_fft // 2 + 1))
    for m in range(n_mels):
        left, centre, right = edge[m:m + 3]
        for k in range(n_fft // 2 + 1):
            f = k * SAMPLE_RATE / n_fft
            if left < f <= centre:
                filters[m, k] = (f - left) / (centre - left) * 2 / (right - left)
            elif centre < f < right:
                filters[m, k] = (right - f) / (right - centre) * 2 / (right - left)
    padded = np.pad(wave.double().numpy(), n_fft // 2)
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / n_fft) for n in range(n_fft)]
    frames = [np.fft.rfft(window * padded[m * HOP:m * HOP + n_fft]) for m in range(1 + len(wave) // HOP)]
    return filters @ np.abs(np.array(frames).T) ** 2


@pytest.mark.parametrize("wave", [noise(16000), music(3, seconds=2)], ids=["noise", "music"])
def test_mel_equals_the_textbook_definition(wave):
    fast, slow = Mel()(wave[None])[0].double().numpy(), slow_mel(wave)
    assert fast.shape == slow.shape
    assert np.linalg.norm(fast - slow, axis=1).max() < 1e-5 * np.linalg.norm(slow, axis=1).max()
    assert (np.linalg.norm(fast - slow, axis=1) < 1e-4 * np.linalg.norm(slow, axis=1)).all()  # in every band


# ---------------------------------------------------------------- log compression


def test_log_compress_closed_values():
    x = torch.tensor([1, 0.1, 1e-3, 1e-4, 1e-6, 0, 7])
    torch.testing.assert_close(log_compress(x), torch.tensor([1, 0.75, 0.25, 0, 0, 0, 1]))
    torch.testing.assert_close(log_compress(x, power=True), torch.tensor([1, 0.875, 0.625, 0.5, 0.25, 0, 1]))
    torch.testing.assert_close(log_compress(200 * x, reference=200.0, power=True), log_compress(x, power=True))


def test_log_compress_looks_at_each_value_alone():
    x = torch.rand(50)
    assert torch.equal(log_compress(torch.cat([x, 100 * x]))[:50], log_compress(x))


# ---------------------------------------------------------------- resampling


def fade(wave, rate):
    """Raised-cosine ramps of 0.1 s: a sudden start holds every frequency."""
    ramp = 0.5 - 0.5 * torch.cos(math.pi * torch.arange(rate // 10) / (rate // 10))
    out = wave.clone()
    out[:len(ramp)] *= ramp
    out[-len(ramp):] *= ramp.flip(0)
    return out


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("frequency", [60, 440, 3100])
def test_a_resampled_tone_is_the_same_tone(rate, frequency):
    """Frequency, amplitude and phase: it equals the tone written at 16 kHz, but for the ends."""
    out = resample([tone(frequency, 3, rate)], rate, SAMPLE_RATE)
    assert out.dtype == torch.float32 and len(out) == 3 * SAMPLE_RATE
    middle = slice(SAMPLE_RATE // 2, -SAMPLE_RATE // 2)
    assert (out - tone(frequency, 3))[middle].abs().max() < 1e-5


@pytest.mark.parametrize("rate", [44100, 48000])
def test_what_would_alias_is_gone(rate):
    middle = slice(SAMPLE_RATE // 2, -SAMPLE_RATE // 2)
    assert resample([tone(12000, 3, rate)], rate, SAMPLE_RATE)[middle].abs().max() < 1e-4
    assert resample([tone(8001, 3, rate)], rate, SAMPLE_RATE)[middle].abs().max() < 1e-4
    t = torch.arange(4 * rate, dtype=torch.float64) / rate
    top = rate / 2 - 100
    sweep = torch.sin(2 * math.pi * (8300 * t + (top - 8300) / 8 * t ** 2)).float()           # 8.3 kHz to the top in 4 s
    assert resample([fade(sweep, rate)], rate, SAMPLE_RATE).abs().max() < 1e-4


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_the_pass_band_is_flat_to_7_khz(rate):
    middle = slice(SAMPLE_RATE // 2, -SAMPLE_RATE // 2)
    for frequency in (20, 1000, 4000, 6000, 7000):
        out = resample([tone(frequency, 3, rate)], rate, SAMPLE_RATE)[middle]
        assert abs(20 * math.log10(out.std().item() * math.sqrt(2))) < 0.1


@pytest.mark.parametrize("rate_in, rate_out", [(44100, 16000), (48000, 16000), (8000, 16000), (11025, 16000),
                                               (16000, 16000), (16000, 44100)])
def test_resampled_length(rate_in, rate_out):
    for samples in (1, 7, 441, 44101, 100003):
        assert len(resample([torch.zeros(samples)], rate_in, rate_out)) == -(-samples * rate_out // rate_in)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_a_stream_of_odd_blocks_equals_all_at_once(rate):
    wave = noise(5 * rate + 123)
    whole, sizes, blocks, start = resample([wave], rate, SAMPLE_RATE), [1, 997, 44100, 12345, 60001], [], 0
    while start < len(wave):
        blocks.append(wave[start:start + sizes[len(blocks) % len(sizes)]])
        start += len(blocks[-1])
    streamed = resample(blocks, rate, SAMPLE_RATE)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_an_impulse_stays_at_its_time(rate):
    """Also near the seams of the blocks, which are 1.5 s long."""
    for seconds in (0.0, 0.02, 1.48, 1.5, 2.98, 3.0, 3.5):
        wave = torch.zeros(4 * rate)
        wave[round(seconds * rate)] = 1
        out = resample([wave], rate, SAMPLE_RATE)
        assert out.abs().argmax() == round(seconds * SAMPLE_RATE)
        assert out.sum().item() == pytest.approx(SAMPLE_RATE / rate, abs=0.02)                # and is counted once


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name, rate, options", [
    ("a.wav", 16000, dict(subtype="PCM_16")), ("a.wav", 44100, dict(subtype="PCM_16")), ("a.WAV", 44100, dict(subtype="PCM_24")),
    ("a.wav", 48000, dict(subtype="FLOAT")), ("a.flac", 44100, {}), ("a.ogg", 44100, dict(subtype="VORBIS")),
    ("a.opus", 48000, dict(format="OGG", subtype="OPUS")), ("a.mp3", 44100, {}), ("a.au", 22050, {}), ("a.aiff", 44100, {})])
def test_formats_decode_to_the_same_tone(tmp_path, name, rate, options):
    left, right = tone(440, 3, rate, 0.6).numpy(), tone(440, 3, rate, 0.2).numpy()
    sf.write(tmp_path / name, np.stack([left, right], axis=1), rate, **options)
    wave = read_audio(tmp_path / name)
    assert wave.ndim == 1 and wave.dtype == torch.float32 and abs(len(wave) - 3 * SAMPLE_RATE) < 1000
    middle = wave[SAMPLE_RATE:-SAMPLE_RATE]
    spectrum = torch.fft.rfft(middle).abs()
    assert spectrum.argmax() * SAMPLE_RATE / len(middle) == pytest.approx(440, abs=1)
    assert middle.std().item() * math.sqrt(2) == pytest.approx(0.4, rel=0.03)                 # the mean of both channels


def test_a_long_file_has_no_seam(tmp_path):
    """It is longer than one block of the decoder."""
    wave = music(4, seconds=20)
    wave = torch.cat([wave, wave.flip(0)])
    sf.write(tmp_path / "long.wav", wave.numpy(), SAMPLE_RATE, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "long.wav"), wave)


def bad_files():
    def stereo(f, left, right):
        sf.write(f, np.stack([left, right], axis=1), SAMPLE_RATE, subtype="FLOAT")

    def cut(f, size):
        sf.write(f, tone(440).numpy(), SAMPLE_RATE)
        f.write_bytes(f.read_bytes()[:size])

    sine, hole = tone(440).numpy(), tone(440).numpy()
    hole[1234] = np.nan
    return {
        "missing.wav": lambda f: None,
        "empty.wav": lambda f: f.write_bytes(b""),
        "empty.mp3": lambda f: f.write_bytes(b""),
        "header.wav": lambda f: cut(f, 20),
        "header.flac": lambda f: cut(f, 30),
        "header.ogg": lambda f: cut(f, 40),
        "no samples.wav": lambda f: sf.write(f, np.zeros((0, 2)), SAMPLE_RATE),
        "no samples 44k.wav": lambda f: sf.write(f, np.zeros(0), 44100),
        "text.wav": lambda f: f.write_text("not a song: " * 200),
        "text.mp3": lambda f: f.write_text("not a song: " * 200),
        "text.flac": lambda f: f.write_text("not: a song\n" * 200),
        "silent.wav": lambda f: sf.write(f, np.zeros(SAMPLE_RATE), SAMPLE_RATE),
        "cancels.wav": lambda f: stereo(f, sine, -sine),
        "nan.wav": lambda f: sf.write(f, hole, SAMPLE_RATE, subtype="FLOAT"),
        "nan left.wav": lambda f: stereo(f, hole, sine),
        "inf.wav": lambda f: sf.write(f, np.full(99, np.inf), SAMPLE_RATE, subtype="FLOAT"),
        "slow.wav": lambda f: sf.write(f, sine, 1000),
        "folder.wav": lambda f: f.mkdir(),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_input_is_one_line_that_names_the_file(tmp_path, name):
    bad_files()[name](tmp_path / name)
    with pytest.raises(InputError) as caught:
        read_audio(tmp_path / name)
    message = str(caught.value)
    assert name in message and "\n" not in message and len(message) > len(str(tmp_path / name)) + 20


# ---------------------------------------------------------------- tuning


def chord(cents):
    """Four seconds of C major, `cents` above A4 = 440 Hz."""
    t = torch.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    partials = [(220 * 2 ** ((step + cents / 100) / 12) * h, h) for step in (3, 7, 10) for h in (1, 2, 3, 4, 6)]
    return 0.1 * sum(torch.sin(2 * np.pi * frequency * t) / h for frequency, h in partials) + 0.01 * noise(len(t))


@pytest.mark.parametrize("cents", [-45, -20, 0, 10, 40])
def test_the_tuning_of_a_chord_is_found_within_two_cents(cents):
    assert abs(100 * data.estimate_tuning(chord(cents)) - cents) < 2


def test_silence_and_nothing_are_in_tune():
    assert data.estimate_tuning(torch.zeros(9000)) == data.estimate_tuning(torch.zeros(0)) == 0


@pytest.mark.parametrize("cents", [-30, 40])
def test_the_cqt_of_a_recording_does_not_depend_on_its_tuning(front_end, cents):
    tuned = [audio_to_frames(chord(c), front_end)[20:-20, :N_BINS].mean(0) for c in (0, cents)]
    fixed = [255 * front_end(chord(c)[None])[0, 20:-20, :N_BINS].numpy().mean(0) for c in (0, cents)]
    assert np.abs(tuned[0] - tuned[1]).max() < 6 and np.abs(fixed[0] - fixed[1]).max() > 12


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("seconds", [0.5, 2.0, 2.048, 9.3, 14.336])
def test_cutting_into_chunks_leaves_no_trace(front_end, monkeypatch, seconds):
    wave = music(5, seconds=24)[:round(seconds * SAMPLE_RATE)]
    whole = (front_end(wave[None], data.estimate_tuning(wave))[0] * 255).round()
    monkeypatch.setattr(data, "CHUNK", 64 * HOP)               # 2.048 s
    frames = audio_to_frames(wave, front_end)
    assert frames.dtype == np.uint8 and frames.shape == (1 + len(wave) // HOP, 224)
    assert (torch.from_numpy(frames).float() - whole).abs().max() <= 1


# ---------------------------------------------------------------- small tools


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    data.write_atomic(tmp_path / "new" / "file", b"old")
    with pytest.raises(TypeError):
        data.write_atomic(tmp_path / "new" / "file", 3)
    assert (tmp_path / "new" / "file").read_bytes() == b"old" and len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("error, code, line", [(InputError("no music"), 2, "error: no music"), (KeyboardInterrupt(), 130, "stopped"),
                                               (PermissionError(13, "Permission denied", "a.bin"), 2, "a.bin")])
def test_run_cli_ends_with_one_line_and_an_exit_code(capfd, error, code, line):
    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        data.run_cli(fail)
    printed = capfd.readouterr().err.strip()
    assert caught.value.code == code and line in printed and "\n" not in printed
