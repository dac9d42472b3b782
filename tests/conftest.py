"""Shared by all tests: the project root on sys.path, and a small folder of music."""
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # these tests are small: on a busy machine threads cost more than they gain
import data  # noqa: E402
import train  # noqa: E402
from probe import Items  # noqa: E402

SONGS = ["one.wav", "two.flac", "three.ogg", "Café Ñandú.wav",
         "more/five.flac", "more/six.WAV", "more/seven.ogg", "more/eight.wav"]
STEREO_44K = {"two.flac", "more/six.WAV", "more/seven.ogg"}


@functools.cache
def wave_of(index):
    """The sound of a synthetic song, (24 s * 16000,) float32, rendered once for all tests. Read only."""
    return data.render(data.compose(index))


def frame_items(lengths, rows):
    """Items of every frame of tracks of `lengths` frames, with these rows."""
    frames = np.concatenate([np.arange(length) for length in lengths])
    return Items(rows, np.repeat(np.arange(len(lengths)), lengths), frames * data.FRAME_SECONDS)


def drawn_batch(segments, *args, **options):
    """Segments.draw with the frames (views, share, kept, 224) uint8 in the place of their rows."""
    drawn = segments.draw(*args, **options)
    return dict(frames=segments.gather(drawn.pop("rows")), **drawn)


@pytest.fixture(scope="session")
def song_folder(tmp_path_factory):
    """Eight synthetic songs of 10 s in two folders: wav, flac and ogg, three of them 44.1 kHz stereo. Read only."""
    folder = tmp_path_factory.mktemp("songs") / "music"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(SONGS):
        wave, rate = wave_of(i)[:10 * data.SAMPLE_RATE], data.SAMPLE_RATE
        if name in STEREO_44K:
            wave, rate = data.resample([torch.from_numpy(wave)], rate, 44100).numpy(), 44100
            wave = np.stack([wave, 0.5 * wave], axis=1).clip(-1, 1)
        sf.write(folder / name, wave, rate)
    return folder


@pytest.fixture(scope="session")
def frames_of_songs(song_folder, tmp_path_factory):
    """The frame store of the song folder. Read only."""
    return data.prepare_folders([song_folder], tmp_path_factory.mktemp("frames") / "store").folder


@pytest.fixture
def store(frames_of_songs, tmp_path, monkeypatch):
    """What a short training run needs: a fresh working directory, a tiny network, and frames, which are read only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS, "small", dict(train.PRESETS["small"], dim=24, depth=1))
    return frames_of_songs
