"""The frame store (order, resuming, broken files) and the synthetic songs that fill it."""
import json
import os
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch

import data
from conftest import wave_of
from data import HOP, SAMPLE_RATE, SCALES, SONG_SECONDS, TIMBRES, FrameStore, InputError, compose, prepare_folders, render

FILES = ("frames.bin", "index.jsonl", "store.json")
LOUDNESS = {0: [0.06008, 0.05795, 0.05518, 0.05262, 0.06772, 0.06754],
            1: [0.05981, 0.05024, 0.04445, 0.05462, 0.04451, 0.05372],
            2: [0.15658, 0.15545, 0.15075, 0.12778, 0.11735, 0.12351]}  # by number of the song


@pytest.fixture
def copy_of(frames_of_songs, tmp_path):
    """A complete store of the song folder, to damage."""
    return shutil.copytree(frames_of_songs, tmp_path / "copy")


def bytes_of(store):
    return {name: (store / name).read_bytes() for name in FILES}


def unfinish(store):
    """Make a complete store one that was killed at the very end."""
    info = json.loads((store / "store.json").read_text())
    del info["tracks"]
    (store / "store.json").write_text(json.dumps(info))


def write_tone(path, frequency=440.0, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE), SAMPLE_RATE)


class Counter:
    """Counts the tracks that are really transformed."""

    def __init__(self, monkeypatch):
        self.calls, real = 0, data.audio_to_frames

        def counted(*args):
            self.calls += 1
            return real(*args)

        monkeypatch.setattr(data, "audio_to_frames", counted)


# ---------------------------------------------------------------- store


def test_store_holds_every_song_under_its_name_in_sorted_order(song_folder, frames_of_songs):
    store = FrameStore(frames_of_songs)
    names = [str(path.relative_to(song_folder.parent)) for path in song_folder.rglob("*") if path.is_file()]
    assert store.paths == sorted(names) and len(names) == 8 and store.skipped == []
    assert "music/Café Ñandú.wav" in store.paths
    assert (store.lengths == 1 + 10 * SAMPLE_RATE // HOP).all()
    assert store.frames.shape == (store.lengths.sum(), 224) and store.frames.dtype == np.uint8


def test_each_track_holds_the_frames_of_its_own_file(song_folder, frames_of_songs):
    store, front_end = FrameStore(frames_of_songs), data.FrontEnd()
    for i, name in enumerate(store.paths):
        wave = data.read_audio(song_folder.parent / name)
        expected = (front_end(wave[None], data.estimate_tuning(wave))[0] * 255).round()
        assert (torch.from_numpy(store.track(i).copy()).float() - expected).abs().max() <= 1


def test_a_second_preparation_gives_the_same_bytes_and_leaves_the_threads(song_folder, frames_of_songs, tmp_path):
    threads = torch.get_num_threads()
    prepare_folders([song_folder], tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(frames_of_songs)
    assert torch.get_num_threads() == threads


def test_a_complete_store_is_opened_without_work(song_folder, copy_of, monkeypatch):
    counter, before = Counter(monkeypatch), bytes_of(copy_of)
    store = prepare_folders([song_folder], copy_of)
    assert counter.calls == 0 and len(store.paths) == 8 and bytes_of(copy_of) == before


@pytest.mark.parametrize("whole_lines, torn", [(0, ""), (3, '{"path": "music/mo'), (3, ""),
                                               (7, '{"path": "x", "frames": 313}'), (8, "")])
def test_preparing_resumes_after_a_kill(song_folder, copy_of, monkeypatch, whole_lines, torn):
    """As a kill leaves it: some lines, half a line, and frames that no line names."""
    before, counter = bytes_of(copy_of), Counter(monkeypatch)
    unfinish(copy_of)
    lines = before["index.jsonl"].decode().splitlines(keepends=True)
    (copy_of / "index.jsonl").write_text("".join(lines[:whole_lines]) + torn)
    kept = sum(json.loads(line)["frames"] for line in lines[:whole_lines]) * 224
    (copy_of / "frames.bin").write_bytes(before["frames.bin"][:kept] + b"\x07" * 5000)
    prepare_folders([song_folder], copy_of)
    assert bytes_of(copy_of) == before
    assert counter.calls == 8 - whole_lines


def test_an_error_in_the_middle_keeps_what_was_finished(song_folder, frames_of_songs, tmp_path, monkeypatch):
    """A full disk, say: the exception comes through, the store is not complete, the next run completes it."""
    real, calls = data.audio_to_frames, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(data, "audio_to_frames", failing)
    with pytest.raises(OSError):
        prepare_folders([song_folder], tmp_path)
    with pytest.raises(InputError):
        FrameStore(tmp_path)
    prepare_folders([song_folder], tmp_path)
    assert bytes_of(tmp_path) == bytes_of(frames_of_songs)


@pytest.mark.parametrize("size, redone", [(3 * 313 * 224 + 9, 5), (3 * 313 * 224, 5), (0, 8), (None, 8)])
def test_lines_whose_frames_were_lost_are_done_again(song_folder, copy_of, monkeypatch, size, redone):
    """As a power cut leaves it: the index reached the disk, the frames did not. Filling up with zeros would be silent music."""
    before, counter = bytes_of(copy_of), Counter(monkeypatch)
    unfinish(copy_of)
    (copy_of / "frames.bin").unlink() if size is None else (copy_of / "frames.bin").write_bytes(before["frames.bin"][:size])
    prepare_folders([song_folder], copy_of)
    assert bytes_of(copy_of) == before and counter.calls == redone


def test_an_index_of_rubbish_starts_anew(song_folder, copy_of):
    before = bytes_of(copy_of)
    unfinish(copy_of)
    (copy_of / "index.jsonl").write_bytes(b"\0" * 100 + b"\n" + before["index.jsonl"])
    prepare_folders([song_folder], copy_of)
    assert bytes_of(copy_of) == before


def test_two_preparations_of_one_folder_exclude_each_other(tmp_path):
    """The second gets one line and changes nothing; when the first is gone, whatever way, it may."""
    pytest.importorskip("fcntl")
    write_tone(tmp_path / "music" / "a.wav")
    (tmp_path / "out").mkdir()
    with data.locked(tmp_path / "out"):
        with pytest.raises(InputError, match="out.*another process"):
            prepare_folders([tmp_path / "music"], tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
    assert prepare_folders([tmp_path / "music"], tmp_path / "out").paths == ["music/a.wav"]
    with data.locked(tmp_path / "out"):                        # a complete store is opened, locked or not
        prepare_folders([tmp_path / "music"], tmp_path / "out")


def test_preparing_anew_leaves_an_open_store_whole(tmp_path):
    """A training run reads its map on: cutting the mapped file would end it with SIGBUS."""
    write_tone(tmp_path / "in" / "a.wav", seconds=30.0)
    store = prepare_folders([tmp_path / "in"], tmp_path / "out")
    before = store.frames.copy()
    write_tone(tmp_path / "in" / "a.wav", 880.0)
    prepare_folders([tmp_path / "in"], tmp_path / "out")
    assert (store.frames == before).all() and len(FrameStore(tmp_path / "out").frames) < len(before)


def test_files_that_go_or_grow_meanwhile(tmp_path, monkeypatch):
    """Gone between listing and reading: skipped, by name. Grown: this run keeps what it read, the next one starts anew."""
    for name in ("a.wav", "b.wav", "c.wav"):
        write_tone(tmp_path / "music" / name)
    listed = data.find_audio([tmp_path / "music"])
    (tmp_path / "music" / "b.wav").unlink()
    store = data.prepare_files(listed, tmp_path / "out")
    assert store.paths == ["music/a.wav", "music/c.wav"] and [path for path, _ in store.skipped] == ["music/b.wav"]
    write_tone(tmp_path / "music" / "c.wav", seconds=2.0)
    assert prepare_folders([tmp_path / "music"], tmp_path / "out").lengths[1] == 1 + 2 * SAMPLE_RATE // HOP


def test_a_file_made_again_is_prepared_again(tmp_path):
    """Of the same length and size, as a mix that is bounced once more."""
    write_tone(tmp_path / "music" / "a.wav")
    before = prepare_folders([tmp_path / "music"], tmp_path / "out").frames.copy()
    wave, rate = sf.read(tmp_path / "music" / "a.wav")
    sf.write(tmp_path / "music" / "a.wav", wave[::-1] * np.linspace(0.1, 1, len(wave)), rate)
    os.utime(tmp_path / "music" / "a.wav", (1e9, 1e9))
    after = prepare_folders([tmp_path / "music"], tmp_path / "out").frames
    assert before.shape == after.shape and (before != after).any()


@pytest.mark.parametrize("setting, value", [("MEL_REFERENCE", 500.0), ("DYNAMIC_RANGE", 60.0)])
def test_other_settings_prepare_anew(song_folder, copy_of, monkeypatch, setting, value):
    before = FrameStore(copy_of).frames[:].copy()
    monkeypatch.setattr(data, setting, value)
    after = prepare_folders([song_folder], copy_of).frames
    assert after.shape == before.shape and (after != before).mean() > 0.1
    monkeypatch.undo()
    with pytest.raises(InputError, match="another front end"):               # opened by name it is refused, not misread
        FrameStore(copy_of)


def test_other_music_prepares_anew(tmp_path):
    write_tone(tmp_path / "in" / "a.wav")
    prepare_folders([tmp_path / "in"], tmp_path / "out")
    write_tone(tmp_path / "in" / "b.wav")
    assert prepare_folders([tmp_path / "in"], tmp_path / "out").paths == ["in/a.wav", "in/b.wav"]


def test_broken_files_are_skipped_and_listed(tmp_path, capsys):
    music = tmp_path / "music"
    for name in ("a.wav", "e.wav", "deep/down/g.flac"):
        write_tone(music / name)
    (music / "b.wav").write_text("a text file")
    (music / "c.flac").write_bytes(b"")
    sf.write(music / "d.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    (music / "f.wav").mkdir()                                  # a folder that looks like a file
    (music / "notes.txt").write_text("not audio, not even tried")
    (music / "._a.wav").write_text("another system's leftover")
    store = prepare_folders([music], tmp_path / "out")
    printed = capsys.readouterr().out
    assert store.paths == ["music/a.wav", "music/deep/down/g.flac", "music/e.wav"]
    assert [path for path, _ in store.skipped] == ["music/b.wav", "music/c.flac", "music/d.wav"]
    for name in ("b.wav", "c.flac", "d.wav"):
        assert sum(name in line for line in printed.splitlines()) == 1
    assert (store.track(2) == store.track(0)).all()            # e is a again: what was skipped left no gap
    assert len(FrameStore(tmp_path / "out").skipped) == 3


def test_file_names_that_are_not_text_survive(tmp_path):
    write_tone(tmp_path / "music" / "a.wav")
    try:
        os.rename(tmp_path / "music" / "a.wav", os.fsencode(tmp_path / "music") + b"/caf\xe9.wav")
    except OSError:
        pytest.skip("this file system takes valid text only")
    assert len(prepare_folders([tmp_path / "music"], tmp_path / "out").paths) == 1
    assert len(FrameStore(tmp_path / "out").paths) == 1


def test_folders_of_the_same_name_never_mix_up_their_files(tmp_path):
    """Two disks, each with a folder `cd`: different files are all kept, two of one name are refused."""
    folders = [tmp_path / "one" / "cd", tmp_path / "two" / "cd"]
    write_tone(folders[0] / "01.wav", 220.0)
    write_tone(folders[1] / "02.wav", 440.0)
    store = prepare_folders(folders, tmp_path / "out")
    assert store.paths == ["cd/01.wav", "cd/02.wav"] and (store.track(0) != store.track(1)).any()
    write_tone(folders[1] / "01.wav", 660.0)
    with pytest.raises(InputError, match="01.wav.*01.wav.*rename"):
        prepare_folders(folders, tmp_path / "out")


def test_a_folder_given_twice_counts_once(tmp_path):
    write_tone(tmp_path / "music" / "a.wav")
    assert len(prepare_folders([tmp_path / "music", tmp_path / "music"], tmp_path / "out").paths) == 1


def test_folders_without_music_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        prepare_folders([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty.*no audio"):
        prepare_folders([tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "a.wav").write_text("a file, not a folder")
    with pytest.raises(InputError, match="a.wav"):
        prepare_folders([tmp_path / "a.wav"], tmp_path / "out")
    (tmp_path / "empty" / "broken.wav").write_text("text")
    for _ in range(2):                                         # and the second time as well
        with pytest.raises(InputError, match="none of 1"):
            prepare_folders([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(InputError, match="not a complete"):
        FrameStore(tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(f.read_bytes() + b"0" * 224),
                                    lambda f: f.write_bytes(b""), lambda f: f.unlink()], ids=["cut", "longer", "empty", "missing"])
def test_damaged_frames_are_refused(song_folder, copy_of, damage):
    damage(copy_of / "frames.bin")
    for opening in (lambda: FrameStore(copy_of), lambda: prepare_folders([song_folder], copy_of)):
        with pytest.raises(InputError, match="frames.bin"):
            opening()


def test_a_folder_that_is_no_store_is_refused(song_folder, copy_of):
    (copy_of / "store.json").write_text("not json")
    for folder in (song_folder, copy_of, song_folder / "nowhere"):
        with pytest.raises(InputError, match=folder.name):
            FrameStore(folder)


# ---------------------------------------------------------------- synthetic songs


@pytest.fixture(scope="module")
def scores():
    """The first 100 songs, not rendered."""
    return [compose(i) for i in range(100)]


def scale_of(song):
    return {(song["tonic"] + step) % 12 for step in SCALES[song["mode"]]}


def test_compose_is_a_pure_function_of_the_number():
    first = repr(compose(3))
    np.random.seed(1)
    compose(4)
    assert repr(compose(3)) == first
    assert repr(compose(4)) != first


def test_labels_agree_with_each_other_and_cover_their_range(scores):
    for song in scores:
        major = song["tonic"] if song["mode"] == "major" else (song["tonic"] + 3) % 12
        assert song["signature"] == major
        assert {(major + step) % 12 for step in SCALES["major"]} == scale_of(song)             # the same seven notes
        assert song["key"] == song["tonic"] + 12 * (song["mode"] == "minor")
        assert song["instrument"] == song["timbres"][0] and len(set(song["timbres"])) == 5
        assert 70 <= song["tempo"] <= 160 and np.allclose(np.diff(song["beats"]), 60 / song["tempo"])
    assert {song["key"] for song in scores} == set(range(24))
    assert {song["instrument"] for song in scores} == set(range(len(TIMBRES)))


def test_chord_labels_name_the_notes_that_sound(scores):
    """The accompaniment plays the labelled triad and nothing else; a bar of "no chord" is silent but for drums."""
    for song in scores[:60]:
        ends = [0.0] + [end for _, end, _ in song["chords"]]
        for (start, end, chord), previous in zip(song["chords"], ends):
            assert start == pytest.approx(previous) and end > start                            # no gap, no overlap
            inside = [note for note in song["notes"] if start - 1e-6 <= note[0] < end - 1e-6]
            played = {pitch % 12 for _, _, pitch, _, part in inside if part in (1, 3)}
            root = chord % 12
            assert played == (set() if chord == 24 else {root, (root + (3 if chord >= 12 else 4)) % 12, (root + 7) % 12})
            assert inside or chord == 24
        assert ends[-1] >= SONG_SECONDS


def test_notes_and_chords_stay_in_the_scale_of_their_half(scores):
    """The one exception is the leading tone of a minor key, in its dominant chord."""
    modal = 0
    for song in scores[:60]:
        spans, middle = len(song["chords"]), song["chords"][(len(song["chords"]) + 1) // 2][0]
        leading, halves = (song["tonic"] - 1) % 12, [{(song["tonic"] + s) % 12 for s in half["scale"]} for half in song["halves"]]
        for start, _, pitch, _, _ in song["notes"]:
            scale = halves[int(start > middle - 1e-6)]
            assert pitch % 12 in scale or (song["mode"] == "minor" and pitch % 12 == leading)
        for i, (_, _, chord) in enumerate(song["chords"]):
            assert chord == 24 or chord % 12 in halves[2 * i // spans]
        assert scale_of(song) in halves and len(halves[0] & halves[1]) in (6, 7)               # at most one note moves
        modal += halves[0] != halves[1]
    assert 25 <= modal <= 47                                                                   # 60 %
    chords = {chord for song in scores[:60] for _, _, chord in song["chords"]}
    assert chords == set(range(25))


def test_render_is_pure_finite_in_range_and_of_the_right_length():
    waves = [wave_of(i) for i in range(6)]
    for wave in waves:
        assert wave.shape == (SONG_SECONDS * SAMPLE_RATE,) and wave.dtype == np.float32
        assert np.isfinite(wave).all() and np.abs(wave).max() <= 1 and wave.std() > 0.005
    assert np.array_equal(render(compose(2)), waves[2])
    assert not np.array_equal(waves[0], waves[1])


def test_songs_of_this_version_sound_as_they_did():
    """Loudness of every fourth second of three songs. If you change the songs: count SONGS_VERSION up, and set these anew."""
    assert data.SONGS_VERSION == 3
    for number, expected in LOUDNESS.items():
        found = wave_of(number).reshape(SONG_SECONDS, -1).std(axis=1)[::4]
        assert found == pytest.approx(expected, rel=1e-3), number


def test_the_signature_is_in_the_spectrum(scores):
    """In the CQT, whose row 0 is an A, the notes of the scale are the loud ones, and for most songs name the signature."""
    cqt, louder, named = data.CQT(), 0, 0
    for i, song in enumerate(scores[:12]):
        wave = torch.from_numpy(wave_of(i))
        power = cqt(wave[None], data.estimate_tuning(wave))[0].square().sum(dim=1)
        chroma = power[12:72].view(5, 12).sum(dim=0).roll(9)                                   # (12,) from C
        mean = lambda classes: chroma[sorted(classes)].mean().item()
        louder += mean(scale_of(song)) > 1.2 * mean(set(range(12)) - scale_of(song))
        score = [mean({(tonic + step) % 12 for step in SCALES["major"]}) for tonic in range(12)]
        named += int(np.argmax(score)) == song["signature"]
    assert louder >= 10 and named >= 6                        # of 12; by chance one would be named


def test_prepare_synth_is_a_store_of_these_songs(tmp_path):
    store = data.prepare_synth(songs=2, out=tmp_path / "synth")
    assert store.paths == ["synth/00000", "synth/00001"]
    wave = torch.from_numpy(wave_of(1))
    expected = (data.FrontEnd()(wave[None], data.estimate_tuning(wave))[0] * 255).round()
    assert (torch.from_numpy(store.track(1).copy()).float() - expected).abs().max() <= 1
    assert data.prepare_synth(songs=1, out=tmp_path / "synth").paths == ["synth/00000"]


def test_synthetic_songs_by_the_path_of_their_store_are_training_songs_too(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SYNTH_SPLITS", {"train": range(2), "valid": range(2, 3), "test": range(3, 4)})
    data.prepare_synth(4, tmp_path / "songs")
    store, = data.open_data([tmp_path / "songs"])
    assert len(store.lengths) == 2 and data.Segments([store], 1).pieces[:, 2].max() == 1
