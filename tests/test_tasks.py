"""Every task of the probe, from files as they lie on disk to a table: true layouts with their traps, then commands."""
import functools
import io
import itertools
import json
import re
import shutil
import sys
import textwrap
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import data
import model
import probe
from conftest import wave_of

ROWS = ["cpsd", "ntxent", "average", "concat", "sequence mean", "sequence mean+std", "all tokens mean"]
PROBED = [*ROWS, *(f"untrained {name}" for name in ROWS), "raw mean", "raw"]
CHOSEN = ["chosen on validation", "untrained, chosen", "chance"]
ZERO_SHOT = ["key template", "cpsd zero-shot", "untrained cpsd zero-shot"]
QUICK = dict(lr=0.1, steps=2)  # of a fit; a test that looks at scores sets more steps
BROKEN = "RIFF and then nothing"  # a file that no library decodes


def lay(root, *empty):
    """Create empty files below a root: readers look at names and never decode."""
    for name in empty:
        write(root / name, "")


def write(path, text, encoding="utf-8"):
    """Write text as it is, without changing its line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def write_table(path, *rows, delimiter=",", quote=False):
    cell = '"{}"'.format if quote else str
    write(path, "".join(delimiter.join(map(cell, row)) + "\n" for row in rows))


def read(task, *roots):
    """{name: Track} of a task's reader; a name must not come twice."""
    tracks = list(probe.TASKS[task].read(probe.Files(roots)))
    found = {t.name: t for t in tracks}
    assert len(found) == len(tracks), "a track came twice"
    return found


def at(track):
    """The last two parts of a track's path, or None."""
    return track.path and "/".join(track.path.parts[-2:])


def hashes_to(modulus, wanted):
    """Names whose hash fits: "band aa", "band ab", ..."""
    names = (f"band {a}{b}" for a, b in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2))
    return [name for name in names if wanted(probe.hashed(name, modulus))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a checkpoint, where all commands of this file run."""
    folder = tmp_path_factory.mktemp("lab")
    torch.manual_seed(1)  # not the seed of the untrained row
    network = model.MT2(dim=24, depth=1, heads=2)
    torch.save(dict(config=network.config, model=network.state_dict()), folder / "checkpoint.pt")
    return folder


@pytest.fixture
def run(lab, monkeypatch, capsys):
    """run("gtzan", "--data", folder) -> what the command printed. Two seeds, short fits, few bootstrap draws."""
    monkeypatch.chdir(lab)
    fit = probe.fit
    monkeypatch.setattr(probe, "SEEDS", 2)
    monkeypatch.setattr(probe, "fit", lambda *args, **options: fit(*args, **options | QUICK))
    monkeypatch.setattr(probe, "interval", functools.partial(probe.interval, draws=8))

    def command(*words):
        checkpoint = () if "--features" in words else ("--checkpoint", "checkpoint.pt")
        monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, words), "--device", "cpu", *checkpoint])
        capsys.readouterr()
        probe.main()
        return capsys.readouterr().out

    return command


def written(name, folder=""):
    """The rows of a table, by default of the one beside the checkpoint."""
    return json.loads(Path(folder, f"probe-{name}.json").read_text())["rows"]


@pytest.fixture
def columns_from_features(run):
    """f(task, folder) -> (what its command printed, {column: score of chance}), from features without audio."""
    def command(task, root):
        names = np.repeat(list(read(task, root)), 2)  # two windows a track
        np.savez(root / "x.npz", features=np.random.default_rng(0).normal(size=(len(names), 5)), track=names)
        out = run(task, "--data", root, "--features", root / "x.npz")
        rows = written(task, root)
        assert list(rows) == ["features", "chance"] and list(rows["features"]) == list(rows["chance"])
        return out, {column: pytest.approx(cell["mean"], abs=1e-6) for column, cell in rows["chance"].items()}

    return command


# ---------------------------------------------------------------- readers: names, paths, labels, splits, groups

GENRES = "blues classical country disco hiphop jazz metal pop reggae rock".split()
GTZAN = [f"{genre}.{i:05d}" for genre in GENRES for i in range(100)]


def test_gtzan_split_has_the_published_counts():
    """443 / 197 / 290, and those of every genre; the damaged reggae.00086 is out, jazz.00054 is in."""
    published = {"train": (46, 48, 45, 42, 47, 43, 44, 41, 43, 44), "valid": (23, 20, 23, 22, 18, 17, 20, 13, 17, 24),
                 "test": (31, 31, 30, 29, 27, 27, 27, 30, 26, 32)}
    tracks = read("gtzan")
    for part, counts in published.items():
        assert Counter(n.split(".")[0] for n, t in tracks.items() if t.split == part) == dict(zip(GENRES, counts))
    assert len(tracks) == 930 and set(tracks) <= set(GTZAN) and "reggae.00086" not in tracks
    assert [tracks[n].split for n in ("blues.00028", "blues.00029", "jazz.00054")] == ["test", "train", "train"]


@pytest.mark.parametrize("layout", ["genres/{}/{}.wav", "genres/{}/{}.au", "Data/genres_original/{}/{}.wav",
                                    "{}/{}.wav", "gtzan_genre/genres/{}/{}.WAV"])
def test_gtzan_in_every_layout(layout, tmp_path):
    """All 1000 files, with macOS leftovers beside: 930 tracks, each with its own file."""
    lay(tmp_path, *(layout.format(name.split(".")[0], name) for name in GTZAN),
        *(f"genres/blues/._{name}.wav" for name in GTZAN[:100]), "Data/images_original/blues/blues00000.png")
    tracks = read("gtzan", tmp_path)
    assert len(tracks) == 930
    assert all(t.path.stem == name and t.path.parent.name == t.labels["genre"] for name, t in tracks.items())


def test_gtzan_spelled_hip_hop_leftovers_and_au_beside_wav(tmp_path):
    lay(tmp_path, "genres/hip-hop/hip-hop.00002.wav", "genres/hip-hop/hiphop.00003.wav", "a/rock.00001.au",
        "b/rock.00001.wav", "a/rock.00002.wav", "b/rock.00002.au", "__MACOSX/genres/._rock.00003.wav")
    tracks = read("gtzan", tmp_path)
    assert tracks["hiphop.00002"].labels == {"genre": "hiphop"}
    assert {name: at(t) for name, t in tracks.items() if t.path} == {
        "hiphop.00002": "hip-hop/hip-hop.00002.wav", "hiphop.00003": "hip-hop/hiphop.00003.wav",
        "rock.00001": "b/rock.00001.wav", "rock.00002": "a/rock.00002.wav"}


def test_gtzan_keys_count_from_a(columns_from_features, tmp_path):
    """-1 is no key; pop.00015 and reggae.00086 are not in the split."""
    values = {"blues.00029": "3", "blues.00030": "12\n", "disco.00001": "9", "hiphop.00002": "0", "jazz.00001": "23",
              "rock.00000": "14", "rock.00038": "17", "classical.00030": "-1", "pop.00015": "5", "reggae.00086": "5"}
    for name, value in values.items():
        write(tmp_path / f"gtzan_key/gtzan_key/genres/{name.split('.')[0]}/{name}.lerch.txt", value)
    lay(tmp_path, "gtzan_key/genres/disco/disco.00055.pk", "gtzan_key/genres/blues/._blues.00029.lerch.txt",
        "gtzan_key/KeyEnumeration.txt", "genres/blues/blues.00029.au", "genres/hip-hop/hip-hop.00002.wav")
    tracks = read("gtzan-key", tmp_path)
    assert {name: (probe.ALL_KEYS[t.labels["key"]], t.split) for name, t in tracks.items()} == {
        "blues.00029": ("C", "train"), "blues.00030": ("a", "train"), "disco.00001": ("Gb", "test"),
        "hiphop.00002": ("A", "train"), "jazz.00001": ("g#", "train"), "rock.00000": ("b", "train"),
        "rock.00038": ("d", "valid")}
    assert at(tracks["blues.00029"]) == "blues/blues.00029.au"
    assert at(tracks["hiphop.00002"]) == "hip-hop/hip-hop.00002.wav"
    out, chance = columns_from_features("gtzan-key", tmp_path)
    assert list(chance) == ["weighted", "weighted (both)", "accuracy", "signature", "KSEA", "mode"]
    assert "7 of 769 files" in out and "5 train, 1 valid, 1 test" in out


@pytest.mark.parametrize("folder", ["", "from-MTG/giantsteps"])
def test_giantsteps_filter_artists_and_test_set(folder, columns_from_features, tmp_path):
    """Confidence 2, one key; artists split before the filter, collaborators follow; the test keys are not MTG's.

    A folder above the root may have mtg in its name: only the name of the repository tells training from test.
    """
    v, t = hashes_to(116, lambda h: h >= 100), hashes_to(116, lambda h: h < 100)
    # 103 is not used (confidence 1), but it makes t[2] a validation artist, 102 then t[1], and so 104 is one.
    artists = {100: v[0].upper(), 101: t[0], 102: f"{t[1]}, {t[2]}", 103: f"{t[2]},{v[1]}", 104: t[1],
               105: f" {t[3]} , {t[4]}", 106: t[5], 107: t[6], 108: t[7], 109: t[8], 110: t[9], 111: t[0]}
    keys = {100: ("D# minor", 2), 101: ("B major ", 2), 102: ("C minor", 2), 103: ("C minor", 1),
            104: ("F# minor", 2), 105: ("Bb minor", 2), 106: ("-", 2), 107: ("", 2), 108: ("D minor / F major", 2),
            109: ("A minor", 0), 110: ("A minor", ""), 111: ("G# minor", 2)}
    root = tmp_path / folder
    mtg, test = root / "giantsteps-mtg-key-dataset", root / "giantsteps-key-dataset"
    rows = [("ID", "MANUAL KEY", "C"), *((i, *row) for i, row in keys.items())]
    write_table(mtg / "annotations/annotations.txt", *rows, delimiter="\t")
    rows = [("ID", "ARTIST", "SONG TITLE", "MIX"), *((i, name, 'A 12" song', "") for i, name in artists.items())]
    write_table(mtg / "annotations/beatport_metadata.txt", *rows, delimiter="\t")
    for i, (key, confidence) in keys.items():
        write(mtg / f"annotations/key/{i}.LOFI.key", f"{key.lower()}\t{confidence}\t")
    lay(mtg, *(f"audio/{i}.LOFI.mp3" for i in keys if i != 105), *(f"md5/{i}.LOFI.md5" for i in keys))
    for name, key in {"10089": "D major", "61415": "F minor", "74982": "Db minor"}.items():
        write(test / f"annotations/key/{name}.LOFI.key", key)
        write(test / f"annotations/giantsteps/{name}.LOFI.giantsteps.key", f"key\tweight\nkey 0 {key}\n")
    lay(test, "audio/10089.LOFI.mp3", "audio/61415.LOFI.mp3", "audio/61415.LOFI.wav", "md5/74982.LOFI.md5")
    tracks = read("giantsteps", root)
    assert {name: (probe.ALL_KEYS[t.labels["key"]], t.split) for name, t in tracks.items()} == {
        "100.LOFI": ("eb", "valid"), "101.LOFI": ("B", "train"), "102.LOFI": ("c", "valid"),
        "104.LOFI": ("f#", "valid"), "105.LOFI": ("bb", "train"), "111.LOFI": ("g#", "train"),
        "10089.LOFI": ("D", "test"), "61415.LOFI": ("f", "test"), "74982.LOFI": ("c#", "test")}
    assert tracks["105.LOFI"].path is None and tracks["74982.LOFI"].path is None
    assert at(tracks["61415.LOFI"]) == "audio/61415.LOFI.wav" and at(tracks["100.LOFI"]) == "audio/100.LOFI.mp3"
    out, chance = columns_from_features("giantsteps", root)
    assert "weighted" in chance and "9 of 1763 files; INCOMPLETE" in out and "3 train, 3 valid, 3 test" in out


@pytest.mark.parametrize("audio", ["{}/{}.mp3", "fma_large/{}/{}.mp3", "all/{1}.mp3"])
def test_fmak_keys_paths_and_artists(audio, tmp_path):
    """Six-digit names from ids, artists from FMA's own table, every tenth artist for validation."""
    keys = {10: "F# Major", 141: "E minor", 135054: "Bb Minor", 148: "C major", 3: "A minor"}
    rows = [("track_id", "spotify_uri", "key_and_mode"), *((i, "spotify:track:x", key) for i, key in keys.items())]
    write_table(tmp_path / "fmakv2.csv", *rows)
    valid = next(str(i) for i in range(99) if probe.hashed(str(i), 10) == 0)
    train = next(str(i) for i in range(99) if probe.hashed(str(i), 10) != 0)
    artists = {10: train, 141: valid, 135054: valid, 2: "7", 148: train}
    rows = [(i, 5, '"two\nlines, one cell"', artist, "t") for i, artist in artists.items()]
    write_table(tmp_path / "fma_metadata/raw_tracks.csv", ("track_id", "album_id", "album_title", "artist_id", "track_title"), *rows)
    lay(tmp_path, *(audio.format(f"{i:06d}"[:3], f"{i:06d}") for i in keys if i != 148))
    write(tmp_path / "giantsteps-key-dataset/annotations/key/10089.LOFI.key", "D major")
    tracks, lone = read("fmak", tmp_path), "valid" if probe.hashed("track 3", 10) == 0 else "train"
    assert {n: (t.labels["key"], t.split) for n, t in tracks.items()} == {
        "000010": (6, "train"), "000141": (16, "valid"), "135054": (22, "valid"), "000148": (0, "train"),
        "000003": (21, lone), "10089.LOFI": (2, "test")}
    assert tracks["000010"].group == tracks["000148"].group != tracks["000141"].group == tracks["135054"].group
    assert tracks["000148"].path is None
    assert all(tracks[n].path.name == f"{n}.mp3" for n in ("000010", "000141", "135054", "000003"))


@pytest.mark.parametrize("folder", ["mp3/", "", "MagnaTagATune/"])
def test_mtt_tags_folders_and_dropped_rows(folder, columns_from_features, tmp_path):
    """Split by folder; corrupt and pathless clips are out, untagged ones in mtt-all only; columns in any order."""
    columns = ["electro", *sorted(probe.MTT_TAGS, key=lambda tag: tag[::-1]), "drum"]  # the real file has 188
    aria = "f/american_bach_soloists-j_s__bach_solo_cantatas-01-bwv54__i_aria-30-59.mp3"
    clips = {"2": (aria, "classical strings opera violin"), "6": ("0/a-0-29.mp3", "drum guitar"),
             "7": ("b/b.v_-0-29.mp3", "flute"), "8": ("c/c-0-29.mp3", "choral"), "9": ("d/d-0-29.mp3", "metal"),
             "10": ("e/e-0-29.mp3", "rock"), "11": ("9/untagged-0-29.mp3", ""), "12": ("d/o-0-29.mp3", "electro drum"),
             "13": ("", "guitar"), "35644": ("6/x-0-29.mp3", "guitar"), "055753": ("8/y-0-29.mp3", "guitar"),
             "57881": ("9/z-0-29.mp3", "guitar")}
    rows = [("clip_id", *columns, "mp3_path")]
    for i, (path, tags) in clips.items():
        rows.append((i, *(int(tag in tags.split()) for tag in columns), path))
    write_table(tmp_path / "annotations_final.csv", *rows, delimiter="\t", quote=True)
    lay(tmp_path, *(folder + path for path, _ in clips.values() if path and path[0] != "e"))
    found = {}
    for task in ("mtt", "mtt-all"):
        number = {path.removesuffix(".mp3"): i for i, (path, _) in clips.items()}
        tracks = {number[name]: t for name, t in read(task, tmp_path).items()}
        found[task] = {i: (" ".join(sorted(t.labels["tags"])), t.split) for i, t in tracks.items()}
    assert found["mtt"] == {"2": ("classical opera strings violin", "test"), "6": ("guitar", "train"),
                            "7": ("flute", "train"), "8": ("choral", "valid"), "9": ("metal", "test"),
                            "10": ("rock", "test")}
    assert found["mtt-all"] == found["mtt"] | {"11": ("", "train"), "12": ("", "test")}
    assert at(tracks["2"]) == aria and at(tracks["7"]) == "b/b.v_-0-29.mp3" and tracks["10"].path is None
    assert len(set(probe.MTT_TAGS)) == len(probe.MTT_TAGS) == 50
    out, chance = columns_from_features("mtt", tmp_path)  # of the tags that some test clips have
    assert chance == {"ROC-AUC": 0.5, "AP": 1 / 3} and "tags: 9 outputs" in out
    assert "6 of 21108 files" in out and "2 train, 1 valid, 3 test" in out
    out, chance = columns_from_features("mtt-all", tmp_path)
    assert chance == {"ROC-AUC": 0.5, "AP": 1 / 4} and "tags: 9 outputs" in out
    assert "8 of 25860 files" in out and "3 train, 1 valid, 4 test" in out


@pytest.mark.parametrize("task, tags", [("top50", "top50tags"), ("genre", "genre"), ("instrument", "instrument"), ("mood", "moodtheme")])
@pytest.mark.parametrize("audio", ["{}.mp3", "raw_30s_audio/{}.mp3", "audio-low/{}.low.mp3"])
def test_jamendo_tags_span_fields(task, tags, audio, columns_from_features, tmp_path):
    """Every field after the fifth is a tag; only split 0, and only the lists of the task."""
    songs = {"train": ("48/948", "genre---pop\tmood/theme---dark"), "validation": ("00/7400", "genre---pop"),
             "test": ("32/1001032", "genre---rock\tinstrument---piano\tmood/theme---film")}
    for i, (part, (name, labels)) in enumerate(songs.items()):
        head, row = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n", f"track_{i}\tartist_{i}\talbum_1\t{name}.mp3\t85.9\t"
        write(tmp_path / f"data/splits/split-0/autotagging_{tags}-{part}.tsv", f"{head}{row}{labels}\n")
        write(tmp_path / f"data/splits/split-1/autotagging_{tags}-{part}.tsv", f"{head}{row}genre---wrong\n")
        write(tmp_path / f"data/splits/split-0/autotagging-{part}.tsv", f"{head}{row}genre---wrong\n")
        lay(tmp_path, audio.format(name))
    tracks = read(f"jamendo-{task}", tmp_path)
    assert {n: (t.labels["tags"], t.split, t.group) for n, t in tracks.items()} == {
        "48/948": (["genre---pop", "mood/theme---dark"], "train", "artist_0"), "00/7400": (["genre---pop"], "valid", "artist_1"),
        "32/1001032": (["genre---rock", "instrument---piano", "mood/theme---film"], "test", "artist_2")}
    assert all(t.path.as_posix().endswith(audio.format(n)) for n, t in tracks.items())
    if task == "mood":
        out, chance = columns_from_features("jamendo-mood", tmp_path)
        assert list(chance) == ["ROC-AUC", "AP"] and "tags: 5 outputs" in out and "3 of 17982 files" in out


def test_emomusic_blanks_columns_and_artists(columns_from_features, tmp_path):
    """Blanks and tabs as in the real cells, valence before arousal, a song without values."""
    valid, train = hashes_to(10, lambda h: h >= 8)[0], hashes_to(10, lambda h: h < 8)[0]
    songs = {2: (f"{valid.upper()}!", "development", 3.1, 3), 7: (train, "development", None, None),
             10: (f"1 {train.replace(' ', '   ')} 2", "development", 5.5, 8.1), 12: (train, "development", 2.5, 6),
             13: (valid, "development", 4, 5), 1000: (train, "evaluation", 2, 4.5), 31: (valid, "evaluation", 8, 2.5)}
    rows = [(i, f"{i}.mp3\t", f"\t{artist}\t", f"\t{part} ") for i, (artist, part, *_) in songs.items()]
    header = ("song_id", "file_name", "Artist", "Mediaeval 2013 set")
    write_table(tmp_path / "annotations/songs_info.csv", header, *rows)
    rows = [(f" {i}", f" {valence}", 0.6, f"{arousal} ") for i, (*_, arousal, valence) in songs.items() if arousal]
    header = ("song_id", "mean_valence", "std_valence", "mean_arousal")
    write_table(tmp_path / "annotations/static_annotations.csv", header, *rows)
    lay(tmp_path, *(f"clips_45seconds/{name}.mp3" for name in ("2", "0010", "1000", "7")))
    tracks = read("emomusic", tmp_path)
    assert {n: (t.labels["emotion"], t.split, t.group) for n, t in tracks.items()} == {
        "2": ((3.1, 3.0), "valid", valid), "10": ((5.5, 8.1), "train", train), "12": ((2.5, 6.0), "train", train),
        "13": ((4.0, 5.0), "valid", valid), "1000": ((2.0, 4.5), "test", train), "31": ((8.0, 2.5), "test", valid)}
    assert at(tracks["10"]) == "clips_45seconds/0010.mp3" and at(tracks["2"]) == "clips_45seconds/2.mp3"
    assert tracks["31"].path is None
    out, chance = columns_from_features("emomusic", tmp_path)
    arousal, valence = 1 - (2 ** 2 + 4 ** 2) / (3 ** 2 + 3 ** 2), 1 - (2.55 ** 2 + 4.55 ** 2) / 2
    assert chance == {"R2 joint": (arousal + valence) / 2, "R2 arousal": arousal, "R2 valence": valence}
    assert "6 of 744 files" in out and "2 train, 2 valid, 2 test" in out


@pytest.mark.parametrize("folder", ["audio/", "", "Medley-solos-DB/"])
def test_medleysolos_follows_the_column_not_the_order(folder, columns_from_features, tmp_path):
    rows = [("test", "piano", 4, 31), ("training", "female singer", 2, 7), ("validation", "flute", 3, 210),
            ("test", "violin", 7, 32), ("training", "piano", 4, 7), ("train", "piano", 4, 8), ("test", "piano", 4, 33)]
    names = [f"Medley-solos-DB_{subset}-{number}_uuid-{i}" for i, (subset, _, number, _) in enumerate(rows)]
    mixed = [(*rows[i], f"uuid-{i}") for i in np.random.default_rng(3).permutation(len(rows))]
    header = ("subset", "instrument", "instrument_id", "song_id", "uuid4")
    write_table(tmp_path / "annotation/Medley-solos-DB_metadata.csv", header, *mixed)
    lay(tmp_path, *(f"{folder}{name}.wav" for name in names))
    tracks = read("medleysolos", tmp_path)
    assert [(tracks[n].split, tracks[n].labels["instrument"], tracks[n].group) for n in names] == [
        ("test", "piano", "31"), ("train", "female singer", "7"), ("valid", "flute", "210"), ("test", "violin", "32"),
        ("train", "piano", "7"), ("train", "piano", "8"), ("test", "piano", "33")]
    assert all(t.path.stem == n for n, t in tracks.items())
    out, chance = columns_from_features("medleysolos", tmp_path)
    assert chance == {"accuracy": 2 / 3, "class mean": 1 / 2} and "instrument: 4 outputs" in out
    assert "7 of 21571 files" in out and "3 train, 1 valid, 3 test" in out


def test_nsynth_pitch_is_midi_and_instruments_are_groups(columns_from_features, tmp_path):
    notes = {"nsynth-train": ("organ_electronic_001", 60), "nsynth-test": ("bass_acoustic_017", 108),
             "nsynth-valid.jsonwav/nsynth-valid": ("synth_lead_synthetic_004", 21)}
    for folder, (instrument, pitch) in notes.items():
        name, family = f"{instrument}-{pitch:03d}-127", instrument.rsplit("_", 2)[0]
        note = dict(note=9, instrument=5, instrument_str=instrument, pitch=pitch, instrument_family_str=family)
        write(tmp_path / folder / "examples.json", json.dumps({name: note}))
        lay(tmp_path / folder, f"audio/{name}.wav")
    tracks = read("nsynth", tmp_path)
    assert [(n, t.labels["instrument"], t.labels["pitch"], t.split, t.group) for n, t in tracks.items()] == [
        ("organ_electronic_001-060-127", "organ", 60, "train", "organ_electronic_001"),
        ("synth_lead_synthetic_004-021-127", "synth_lead", 21, "valid", "synth_lead_synthetic_004"),
        ("bass_acoustic_017-108-127", "bass", 108, "test", "bass_acoustic_017")]
    assert all(at(t) == f"audio/{n}.wav" for n, t in tracks.items())
    assert list(columns_from_features("nsynth", tmp_path)[1]) == ["instrument accuracy", "pitch accuracy"]


def test_tinysol_has_folds_and_two_targets(columns_from_features, tmp_path):
    notes = [("Winds/Flute/ordinario", "Fl-ord-C4-mf-N-T14d", 0, "Flute", 60),
             ("Strings/Contrabass/ordinario", "Cb-ord-A#2-mf-2c-N", 4, "Contrabass", 46),
             ("Brass/Bass_Tuba/ordinario", "BTb-ord-F#1-mf-N-N", 3, "Bass Tuba", 30)]
    rows = [(f"{folder}/{stem}.wav", fold, "Ab", *labels) for folder, stem, fold, *labels in notes]
    header = ("Path", "Fold", "Instrument (abbr.)", "Instrument (in full)", "Pitch ID")
    write_table(tmp_path / "TinySOL_metadata.csv", header, *rows)
    lay(tmp_path, *(f"TinySOL/{folder}/{stem}.wav" for folder, stem, *_ in notes))
    tracks = read("tinysol", tmp_path)
    assert [(n, t.split, t.labels) for n, t in tracks.items()] == [
        (stem, fold, {"instrument": instrument, "pitch": pitch}) for _, stem, fold, instrument, pitch in notes]
    assert at(tracks["Cb-ord-A#2-mf-2c-N"]) == "ordinario/Cb-ord-A#2-mf-2c-N.wav"
    out, chance = columns_from_features("tinysol", tmp_path)
    assert list(chance) == ["instrument accuracy", "pitch accuracy"] and "pitch: 3 outputs" in out
    assert "3 of 2913 files; INCOMPLETE" in out and "3 folds" in out and "1 train, 1 valid, 1 test" in out


def test_giantsteps_tempo_version_two_without_its_zeros(columns_from_features, tmp_path, monkeypatch):
    """101 is in no fold. Inside the repository `--data .` finds the same."""
    tempi = {28952: "139.0", 3041381: "0.0", 1327052: "0.0", 4398117: "90", 100: "128.0\n", 101: "197.0"}
    repository = tmp_path / "giantsteps-tempo-dataset"
    for i, bpm in tempi.items():
        write(repository / f"annotations/tempo/{i}.LOFI.bpm", "77.7")
        write(repository / f"annotations_v2/tempo/{i}.LOFI.bpm", f"{bpm}")
    for f, ids in enumerate([[28952, 1327052], [], [100], [], [], [], [], [], [3041381], [4398117]], 1):
        write_table(repository / f"splits/fold{f:02d}.txt", *((f"{i}.LOFI.mp3",) for i in ids))
    write_table(repository / "splits/files.txt", *((f"{i}.LOFI.mp3",) for i in tempi))
    lay(repository, *(f"audio/{i}.LOFI.mp3" for i in tempi), "md5/28952.LOFI.md5")
    tracks = read("giantsteps-tempo", tmp_path)
    assert {n: (t.labels["tempo"], t.split) for n, t in tracks.items()} == {
        "28952.LOFI": (139.0, 0), "4398117.LOFI": (90.0, 9), "100.LOFI": (128.0, 2)}
    assert at(tracks["28952.LOFI"]) == "audio/28952.LOFI.mp3"
    out, chance = columns_from_features("giantsteps-tempo", tmp_path)
    assert list(chance) == ["ACC1", "ACC2"] and "3 folds" in out and "tempo: 3 outputs" in out
    monkeypatch.chdir(repository)
    assert set(read("giantsteps-tempo", ".")) == set(tracks)


CHORDS = "0.000000 2.612267 N\n2.612267 4.586464 E\n4.586464 6.989730 E:min/b7\n"


def lay_beatles(root, songs):
    """songs ["album/song"]: chordlab beside the archive's other folders, whose files have the same names."""
    for song in songs:
        write(root / f"annotations/chordlab/The Beatles/{song}.lab", CHORDS)
        write(root / f"annotations/keylab/The Beatles/{song}.lab", "0.000\t119.333\tKey\tE\n")
        write(root / f"annotations/seglab/The Beatles/{song}.lab", "0.0 1.0 silence\n1.0 9.5 verse\n")
        lay(root, f"audio/{song}.wav", f"annotations/chordlab/The Beatles/{song.replace('/', '/._')}.lab")


def test_isophonics_albums_and_their_other_annotations(tmp_path):
    """Only chordlab holds chords; songs of equal names find their own album; five albums or more are groups."""
    lay_beatles(tmp_path, [f"0{i}_-_Album/{name}" for i in (1, 2, 3) for name in ("01_-_Intro", f"0{i + 1}_-_Song")])
    tracks = read("chords", tmp_path)
    assert len(tracks) == 6 and all(at(t) == f"{n}.wav" and t.split is None for n, t in tracks.items())
    assert all(t.labels["chords"] == [(0, 2.612267, 24), (2.612267, 4.586464, 4), (4.586464, 6.98973, 16)]
               for t in tracks.values())
    assert len({t.group for t in tracks.values()}) == 4  # by song: the three intros may be one song
    lay_beatles(tmp_path, [f"0{i}_-_Album/07_-_More" for i in (4, 5, 6)])
    tracks = read("chords", tmp_path)
    pairs = {(t.group, n.split("/")[0]) for n, t in tracks.items()}
    assert len(tracks) == 9 and len(pairs) == len({t.group for t in tracks.values()}) == 6


def test_rwc_discs_and_tracks_become_paths(tmp_path):
    """N001-M01-T01 lies in rwc-p-m01/1.wav, N017-M02-T01 in rwc-p-m02/01.wav; the re-release pairs by name."""
    for name in ("N001-M01-T01", "N012-M01-T12", "N017-M02-T01"):
        write(tmp_path / f"AIST.RWC-MDB-P-2001.CHORD/{name}.lab", "0.000\t0.104\tN\n0.104\t1.858\tAb:min\n")
    lay(tmp_path, "audio/rwc-p-m01/1.wav", "audio/rwc-p-m01/12.wav", "audio/rwc-p-m02/01.wav",
        "audio/rwc-p-m02/12.wav", "audio/RWC_P003.wav")
    write(tmp_path / "01_annotations_preprocessed/chords/RWC-P/RWC_P003.csv", "t_start;t_end;chord\n0.5;2.25;Bb:maj7\n")
    write(tmp_path / "metadata-master/rwc-p.csv", "Piece No.,Cat. Suffix,Tr. No.,Title\nNo. 1,M01,Tr. 01,Replica\n")
    tracks = read("chords", tmp_path)
    assert {n.split("/")[1]: at(t) for n, t in tracks.items()} == {
        "N001-M01-T01": "rwc-p-m01/1.wav", "N012-M01-T12": "rwc-p-m01/12.wav", "N017-M02-T01": "rwc-p-m02/01.wav",
        "RWC_P003": "audio/RWC_P003.wav"}
    assert len({t.group for t in tracks.values()}) == 4


@pytest.mark.parametrize("home", ["winterreise", "datasets/chords"])
def test_winterreise_keeps_a_songs_performances_together(home, tmp_path, monkeypatch):
    """Only ann_audio_chord/ has chords, also where a folder above it is named chords. 02_AL98 has no audio."""
    monkeypatch.chdir(tmp_path)
    chords = '"start";"end";"shorthand";"extended";"majmin";"majmin_inv"\n0.0;1.2;"C:min7/G";"C:min";"C:min";"C:min"\n'
    notes = Path(home) / "02_Annotations"
    for stem in ("Schubert_D911-01_HU33", "Schubert_D911-01_SC06", "Schubert_D911-02_HU33", "Schubert_D911-02_AL98"):
        write(notes / f"ann_audio_chord/{stem}.csv", chords, "utf-8-sig")
        write(notes / f"ann_audio_localkey-ann1/{stem}.csv", '"start";"end";"key"\n0.0;2.5;"D:min"\n')
    write(notes / "ann_audio_globalkey.csv", '"WorkID";"PerformanceID";"key"\n"Schubert_D911-01";"HU33";"D:min"\n')
    lay(Path(home), *(f"01_RawData/audio_wav/Schubert_D911-{song}.wav" for song in ("01_HU33", "01_SC06", "02_HU33")))
    tracks = {n.removeprefix("ann_audio_chord/Schubert_D911-"): t for n, t in read("chords", home).items()}
    assert {n: (at(t), t.group) for n, t in tracks.items()} == {
        "01_HU33": ("audio_wav/Schubert_D911-01_HU33.wav", "D911-01"), "02_AL98": (None, "D911-02"),
        "01_SC06": ("audio_wav/Schubert_D911-01_SC06.wav", "D911-01"),
        "02_HU33": ("audio_wav/Schubert_D911-02_HU33.wav", "D911-02")}
    assert tracks["02_AL98"].labels["chords"] == [(0.0, 1.2, 12)]


def test_beats_of_ballroom_train_and_of_gtzan_test(tmp_path):
    """Replicas and files without positions are dropped; the audio is found by name in any style folder."""
    held, kept, lost = hashes_to(10, lambda h: h == 0)[0], *hashes_to(10, lambda h: h > 0)[:2]
    for name in (held, kept, lost, "Albums-Fire-09", "Media-104705"):
        write(tmp_path / f"BallroomAnnotations-master/{name}.beats", "0.2000000000 1\n0.7000000000 2\n")
    for name in ("blues_00000", "hiphop_00007", "blues_00000_noposition"):
        write(tmp_path / f"gtzan_tempo_beat/beats/gtzan_{name}.beats", "0.7\t2\n0.2\t1\n\n")
    write(tmp_path / "gtzan_tempo_beat/tempo/gtzan_blues_00000.bpm", "1.258700000000000045e+02")
    lay(tmp_path, f"BallroomData/Rumba-international/{held}.wav", f"BallroomData/Waltz/{kept}.wav",
        "BallroomData/Samba/Albums-Fire-09.wav", "genres/blues/blues.00000.au", "genres/hip-hop/hip-hop.00007.wav")
    tracks = read("beats", tmp_path)
    assert {n: (t.split, at(t)) for n, t in tracks.items()} == {
        held: ("valid", f"Rumba-international/{held}.wav"), kept: ("train", f"Waltz/{kept}.wav"), lost: ("train", None),
        "blues.00000": ("test", "blues/blues.00000.au"), "hiphop.00007": ("test", "hip-hop/hip-hop.00007.wav")}
    assert all(t.labels["beats"] == [0.2, 0.7] for t in tracks.values())
    assert len(probe.BALLROOM_TWICE) == 13
    shutil.rmtree(tmp_path / "gtzan_tempo_beat")
    assert {t.split for t in read("beats", tmp_path).values()} == {None}  # no benchmark: split by song


@pytest.mark.parametrize("task", list(probe.TASKS))
def test_a_missing_data_set_is_two_lines(task, tmp_path, monkeypatch):
    """What it is, and which files are needed where."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.InputError) as error:
        probe.tracks_of(Namespace(task=task, data=None, features=None))
    what, needs = str(error.value).split("\n")
    assert what.startswith(f"{task}: {probe.TASKS[task].what}; no")
    assert needs.startswith("  needs below datasets/") and needs.endswith(probe.TASKS[task].needs)
    assert all(f"datasets/{home}" in needs for home in probe.TASKS[task].homes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.InputError, match=r"\n  needs below \S*empty, or"):
        probe.tracks_of(Namespace(task=task, data=tmp_path / "empty", features=None))


@pytest.mark.parametrize("task, name, text, problem", [
    ("mtt", "annotations_final.csv", "clip_id,guitar,mp3_path\n2,1,f/a.mp3\n", "a label file is not as published"),
    ("fmak", "fma_metadata/raw_tracks.csv", "track_id,artist\n1,2\n", "a label file is not as published"),
    ("giantsteps", "annotations.txt", "ID\tMANUAL KEY\tC\n", "no beatport_metadata.txt below"),
    ("gtzan-key", "gtzan_key/blues.00029.lerch.txt", "3", "none of its audio files found")])
def test_labels_without_audio_or_in_another_form_are_reported(task, name, text, problem, tmp_path):
    """Nothing is guessed: the same two lines, with what was found."""
    write(tmp_path / name, text)
    with pytest.raises(data.InputError, match=f"{problem}.*\n  needs below "):
        probe.tracks_of(Namespace(task=task, data=tmp_path, features=None))


# ---------------------------------------------------------------- the whole command, on seconds of audio


def clip(path, i):
    """Clip i: an excerpt of 4 to 9 s of a synthetic song, no two alike. Returns its length in frames."""
    start = i // 4 * 2 % 15 * data.SAMPLE_RATE
    wave = wave_of(i % 4)[start:start + int((4.1 + 1.7 * (i % 4)) * data.SAMPLE_RATE)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wave, data.SAMPLE_RATE)
    return 1 + len(wave) // data.HOP


PARTS = {"train": ("blues.00029", "blues.00030", "blues.00031", "jazz.00000", "jazz.00001", "jazz.00013", "rock.00000",
                   "rock.00001"), "valid": ("blues.00000", "jazz.00002", "rock.00038"),
         "test": ("blues.00012", "blues.00013", "jazz.00075", "jazz.00076", "rock.00010")}


@pytest.fixture(scope="module")
def gtzan(tmp_path_factory):
    """16 clips of three genres; jazz.00054 and rock.00011 cannot be decoded. (folder, {name: frames})"""
    folder, frames = tmp_path_factory.mktemp("gtzan"), {}
    for i, name in enumerate(itertools.chain(*PARTS.values())):
        frames[name] = clip(folder / f"genres/{name.split('.')[0]}/{name}.wav", i)
    write(folder / "genres/jazz/jazz.00054.wav", BROKEN)
    write(folder / "genres/rock/rock.00011.wav", BROKEN)
    return folder, frames


def test_gtzan_from_files_to_table(gtzan, run, monkeypatch):
    """Rows with deviation, interval and a score a seed; broken files are named; a second run decodes nothing again."""
    monkeypatch.setattr(probe, "SEEDS", 3)
    out, rows = run("gtzan", "--data", gtzan[0]), written("gtzan")
    assert list(rows) == [*PROBED, *CHOSEN] and list(rows["raw"]) == ["accuracy"]
    assert rows["chance"]["accuracy"]["mean"] == pytest.approx(2 / 5)  # most training windows are of jazz
    for cell in [rows[name]["accuracy"] for name in (*PROBED, *CHOSEN[:2])]:
        assert len(cell["scores"]) == 3 and set(cell["scores"]) <= {0, 0.2, 0.4, 0.6, 0.8, 1}
        assert cell["mean"] == pytest.approx(np.mean(cell["scores"]))
        assert cell["std"] == pytest.approx(np.std(cell["scores"]))
        assert 0 <= cell["interval"][0] <= cell["interval"][1] <= 1
    assert len({tuple(row["accuracy"]["scores"]) for row in rows.values()}) > 6  # the rows are not copies of each other
    assert "16 of 930 files; 913 missing or unreadable: blues.00001," in out
    assert "INCOMPLETE: not comparable with the benchmark" in out and "complete: the" not in out
    assert re.search(r"skipped .*rock.00011.wav: cannot be decoded", out) and "genre: 3 outputs" in out
    assert "8 train, 3 valid, 5 test" in out and "3 seeds" in out and "chosen on validation: " in out
    for name in ("read_audio", "audio_to_frames"):
        monkeypatch.setattr(data, name, lambda *_, **__: pytest.fail("decoded again"))
    run("gtzan", "--data", gtzan[0])
    assert written("gtzan") == rows


def test_windows_stay_with_their_track_also_in_a_file_of_features(gtzan, run, monkeypatch):
    """A fit gets every window of its tracks, no track in two parts, none of the test.

    `--features` probes what any model gives, window by window, the tracks in any order: with the same features the
    scores are the same.
    """
    seen, fit = [], probe.fit
    monkeypatch.setattr(probe, "fit", lambda *args, **options: seen.append(args[:4]) or fit(*args, **options))
    run("gtzan", "--data", gtzan[0])
    kept = np.array(sorted(gtzan[1], key=list(probe.GTZAN_PART).index))
    windows = [max(1, gtzan[1][name] // data.SEGMENT) for name in kept]
    assert len(seen) == 2 * len(PROBED) and sum(windows) > len(kept)
    for x, target, train, valid in seen:
        owner = target.items.owner
        assert len(x) == len(owner) and np.bincount(owner).tolist() == windows
        assert set(kept[owner[train]]) == set(PARTS["train"]) and set(kept[owner[valid]]) == set(PARTS["valid"])
    before, order = written("gtzan"), np.argsort(-owner, kind="stable")
    np.savez("mine.npz", features=target.items.rows["concat"].numpy()[order], track=kept[owner[order]])
    assert "16 of 930 files" in run("gtzan", "--data", gtzan[0], "--features", "mine.npz")
    assert list(written("gtzan")) == ["features", "chance"] and written("gtzan")["features"] == before["concat"]


def test_layers_and_labels(gtzan, run):
    """A row per layer and readout; a column per share of the labels."""
    run("gtzan", "--data", gtzan[0], "--layers", "all", "--labels", "0.5,1")
    rows, names = written("gtzan"), [f"{name} L{layer}" for layer in (0, 1) for name in ROWS]
    assert list(rows) == [*names, *PROBED[len(ROWS):], *CHOSEN]
    for name in (*names, "raw"):
        assert list(rows[name]) == ["accuracy", "accuracy @50 %", "accuracy @100 %"]
        assert rows[name]["accuracy @100 %"]["scores"] == rows[name]["accuracy"]["scores"]
    assert list(rows["chosen on validation"]) == ["accuracy"]


def test_one_inner_layer_has_its_number_in_the_rows():
    net = probe.MT2(("cpsd", "ntxent"), dim=24, depth=2, heads=2)
    frames = [np.full((126, data.COLUMNS), 9, np.uint8)]
    assert all(name.endswith(" L1") for name in probe.extract(net, frames, "cpu", [1]).rows)
    assert not any(" L" in name for name in probe.extract(net, frames, "cpu", [2]).rows)


def test_chords_of_a_missing_song_get_no_other_song_of_its_name(tmp_path):
    for album in ("A", "B"):
        (tmp_path / album).mkdir()
        (tmp_path / album / "01.lab").write_text("0 4 C\n")
    (tmp_path / "B" / "01.wav").touch()
    found = {t.name: t.path for t in probe.read_chords(probe.Files([tmp_path]))}
    assert found == {"A/01": None, "B/01": tmp_path / "B" / "01.wav"}


@pytest.mark.parametrize("words, message", [
    ("--layers 2", "--layers 2: this network has layers 0 to 1"), ("--layers last", "--layers last"),
    ("--labels 2", None), ("--labels half", None)])
def test_options_that_do_not_fit_are_refused_before_any_fit(words, message, gtzan, run, monkeypatch):
    """One clear line, or argparse's; never a traceback."""
    monkeypatch.setattr(probe, "fit", lambda *_, **__: pytest.fail("trained a probe"))
    with pytest.raises(data.InputError if message else SystemExit, match=message) as error:
        run("gtzan", "--data", gtzan[0], *words.split())
    assert "\n" not in str(error.value)


def test_features_of_another_model_need_no_audio(run, tmp_path, monkeypatch):
    """GTZAN's labels are in probe.py: embeddings are enough, without a folder of the data set."""
    monkeypatch.setitem(QUICK, "steps", 64)
    names = [name for name in probe.GTZAN_PART if int(name[-2:]) % 3 == 0]

    features = np.random.default_rng(0).normal(size=(len(names) + 1, 13))
    for x, name in zip(features, names):
        x[GENRES.index(name.split(".")[0])] += 9
    np.savez(tmp_path / "theirs.npz", features=features, track=[*names, "unknown.wav"])
    out = run("gtzan", "--features", tmp_path / "theirs.npz")
    assert written("gtzan", tmp_path)["features"]["accuracy"]["mean"] > 0.95
    assert f"{len(names)} of 930 files" in out and "INCOMPLETE" in out


def npz(**arrays):
    """The bytes of an npz."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("task, content, message", [
    ("gtzan", npz(features=np.zeros((2, 3)), track=["a", "b"]), "none of its tracks"),
    ("gtzan", npz(features=np.zeros((3, 3)), track=["a", "b"]), "one row for each of 2 tracks"),
    ("gtzan", npz(features=np.full((1, 3), np.nan), track=["blues.00000"]), "finite"),
    ("gtzan", npz(features=np.zeros((0, 3)), track=[]), "one row for each of 0 tracks"),
    ("gtzan", npz(x=np.zeros(3)), r"is not an npz with the arrays features \(items, dim\), track \(items,\)$"),
    ("gtzan", npz(features=np.zeros((2, 3)), track=["a", "b"])[:-9], "is not an npz"), ("gtzan", b"", "is not an npz"),
    ("chords", npz(features=np.zeros((2, 3)), track=["a", "a"]), r"is not an npz .*, time \(items,\)$"),
    ("chords", npz(features=np.zeros((2, 3)), track=["a", "a"], time=[0.0]), "one row for each of 2 tracks")],
    ids=range(9))
def test_features_that_do_not_fit_are_refused(task, content, message, run, tmp_path):
    """Wrong names, shapes and arrays, torn files, and no times where labels belong to frames."""
    (tmp_path / "wrong.npz").write_bytes(content)
    write(tmp_path / "a.lab", CHORDS)
    with pytest.raises(data.InputError, match=f"wrong.npz: .*{message}"):
        run(task, "--data", tmp_path, "--features", tmp_path / "wrong.npz")


def test_complete_means_all_but_the_one_that_never_decodes():
    """jazz.00054 may be missing; with another one missing it is no longer the benchmark's set."""
    tracks = list(read("gtzan").values())
    line = lambda *lost: probe.counts_line(930, tracks, [t for t in tracks if t.name not in lost])
    assert line() == "930 of 930 files; complete: the benchmark's set"
    assert line("jazz.00054") == line().replace("930 of", "929 of", 1)
    assert re.search("929 of 930 files; 1 missing or unreadable: blues.00029; INCOMPLETE", line("blues.00029"))


LOCAL = ["sequence", "untrained sequence", "raw", "chance"]


def lay_songs(root, names, text):
    """Clips with a chord file each: text(i)."""
    for i, name in enumerate(names):
        clip(root / f"audio/{name}.wav", i)
        write(root / f"labels/{name}.lab", text(i))


def test_chords_table(run, tmp_path):
    """Two recordings of a song stay on one side; every row is of the frames; an unreadable file is listed."""
    names = [f"D911-0{song}_{singer}" for song, singer in ("1A", "1B", "2A", "3A", "3B", "4A", "5A")]
    lay_songs(tmp_path, names, lambda i: f"0 {1 + i / 4} C\n{1 + i / 4} 3.5 A:min7\n3.5 5.0 X\n5.0 9.0 N\n")
    write(tmp_path / "audio/D911-06_A.wav", BROKEN)
    write(tmp_path / "labels/D911-06_A.lab", CHORDS)
    out, rows = run("chords", "--data", tmp_path), written("chords")
    assert list(rows) == LOCAL and list(rows["raw"]) == ["overlap", "overlap (pooled)"]
    assert "7 of 8 files; 1 missing or unreadable: labels/D911-06_A" in out and "5 groups" in out
    assert 0 < rows["chance"]["overlap"]["mean"] < 1 and "interval" in rows["sequence"]["overlap"]


def test_local_tasks_take_layers_labels_and_grid(run, tmp_path, monkeypatch):
    """As tasks of whole tracks do; three songs leave one for training."""
    lay_songs(tmp_path, ["one", "two", "three"], lambda i: "0 1.5 C\n1.5 3.5 G\n")
    run("chords", "--data", tmp_path, "--layers", "0,1", "--labels", "0.5,1")
    rows, names = written("chords"), ["sequence L0", "sequence L1", "untrained sequence", "raw"]
    assert list(rows) == [*names, "chosen on validation", "chance"]
    for name in names:
        assert list(rows[name]) == ["overlap", "overlap (pooled)", "overlap @50 %", "overlap @100 %"]
        assert rows[name]["overlap @100 %"]["scores"] == rows[name]["overlap"]["scores"]
    monkeypatch.setattr(probe, "GRID", probe.GRID[:2])
    monkeypatch.setattr(probe, "GRID_STEPS", (8,))
    out = run("chords", "--data", tmp_path, "--grid")
    assert list(written("chords-grid")) == LOCAL and "protocol grid" in out
    assert "\nsequence: {'standardize': False, 'hidden': 0, 'batch': 64" in out


@pytest.mark.parametrize("task, metric", [("chords", "overlap"), ("beats", "F")])
def test_local_tasks_take_features_with_their_times(task, metric, run, tmp_path, monkeypatch):
    """Frames of 0.1 s of another model, in any order, beats past the end; no audio."""
    monkeypatch.setitem(QUICK, "steps", 64)
    features, track, time = [], [], []
    for i in range(5):
        name, moments, beats = f"song {i}", np.arange(60 + i) / 10, 0.55 + 0.1 * i + 0.8 * np.arange(10)
        write(tmp_path / f"labels/{name}.lab", f"0 {2 + i / 5} C\n{2 + i / 5} 4.5 G\n4.5 9 N\n")
        write(tmp_path / f"labels/{name}.beats", "".join(f"{beat:.3f}\n" for beat in beats))
        near = np.abs(moments[:, None] - beats).min(axis=1) < 0.06
        features += np.column_stack([np.eye(3)[np.digitize(moments, [2 + i / 5, 4.5])], near]).tolist()
        track += [f"labels/{name}" if task == "chords" else name] * len(moments)
        time += moments.tolist()
    order = np.random.default_rng(0).permutation(len(time))
    features, track, time = (np.array(values)[order] for values in (features, track, time))
    np.savez(tmp_path / "theirs.npz", features=features, track=track, time=time)
    out = run(task, "--data", tmp_path, "--features", tmp_path / "theirs.npz")
    rows = written(task, tmp_path)
    assert list(rows) == ["features", "chance"] and "5 of 5 files" in out and "3 train, 1 valid, 1 test" in out
    assert rows["features"][metric]["mean"] > 0.95 and rows["chance"][metric]["mean"] < 0.6


@pytest.mark.parametrize("parts, right, mean, low, high", [
    (["train", "valid"] * 2 + ["test"] * 8, {0, 1, 4, 5, 8, 9}, 0.5, 0.25, 0.75),
    ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], {0, 1, 2}, 0.25, 0.25, 0.25)])
def test_an_interval_is_of_one_seed_where_test_tracks_are_shared(parts, right, mean, low, high, monkeypatch):
    """Five seeds on eight test tracks are not forty tracks; folds whose labels read alike are other tracks."""
    monkeypatch.setattr(probe, "fit", lambda x, *_, **__: lambda x: x)
    x = torch.eye(3)[[i % 3 if i in right else (i + 1) % 3 for i in range(12)]]
    tracks = [probe.Track(f"{i}", None, {"c": "abc"[i % 3]}, part, f"{i}") for i, part in enumerate(parts)]
    items = probe.Items({"raw": x}, np.arange(12), np.zeros(12))
    cell = probe.probe_targets(items, tracks, {"c": "class"})[0]["raw"]["accuracy"]
    assert cell["mean"] == mean and cell["interval"][0] <= low and high <= cell["interval"][1] < 1


# ---------------------------------------------------------------- your own files


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """15 recordings of five players, labels of four kinds, a split, a file that is lost and one that is broken."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    for i in range(15):
        clip(folder / f"audio/p{i % 5}/take {i}.wav", i)
        key = ("F# minor", "Bb minor", "B major", "X", "")[i % 5 if i > 9 else i % 3]
        part = ("training", "Train", "val", "test", "evaluation")[i % 5]
        rows.append(dict(file=f"p{i % 5}/take {i}.wav", key=key, loud=f"{0.5 * (i % 4) - 1}", style=f"{'ab'[i % 2]}é",
                         mood=("calm", "wild|dark", "calm | dark")[i % 3], player=f"player {i % 5}", part=part))
    lost = dict(file="p0/lost.wav", key="G major", loud="3", style="aé", mood="calm", player="player 0", part="train")
    write(folder / "audio/p1/broken.wav", BROKEN)
    rows = [*rows[:4], lost, *rows[4:], dict(lost, file="p1/broken.wav")]
    write_table(folder / "labels.csv", ("\ufefffile", *list(lost)[1:]), *(row.values() for row in rows))
    return folder


@pytest.mark.parametrize("how", ["--split part", "--group player"])
@pytest.mark.parametrize("label, kind, first", [("key", "key", "weighted"), ("loud", "regression", "R2"),
                                                ("mood", "tags", "ROC-AUC"), ("style", "class", "accuracy")])
def test_csv_of_every_kind(how, label, kind, first, own, run, monkeypatch):
    """The kind follows from the column; the given split is used, or groups stay apart; what is lost is listed."""
    seen, split = [], probe.splits_of
    monkeypatch.setattr(probe, "splits_of", lambda tracks: seen.append((tracks, split(tracks))) or seen[-1][1])
    out = run("csv", "--data", own / "labels.csv", "--audio", own / "audio", "--label", label, *how.split())
    rows, labelled = written(f"csv-labels-{label}"), 15 if label == "key" else 17  # the key column has an X and a blank
    assert f"{label}: {kind}; {labelled} of 17 rows have a label" in out
    assert f"{labelled - 2} of {labelled} files; 2 missing or unreadable: p0/lost.wav, p1/broken.wav\n" in out
    assert next(iter(rows["raw"])) == first
    assert list(rows) == [*PROBED, *CHOSEN, *(ZERO_SHOT if label == "key" else ())]
    tracks, splits = seen[0]
    player = np.array([t.name[1] for t in tracks])
    for parts in splits:
        train, valid, test = (set(player[part]) for part in parts)
        assert train and valid and test and not (train & valid or train & test or valid & test)
        assert how == "--group player" or (train, valid, test) == ({"0", "1"}, {"2"}, {"3", "4"})
    if label == "key":
        shot = rows["key template"]
        assert list(shot) == list(rows["raw"]) and list(rows["cpsd zero-shot"]) == ["signature", "KSEA"]
        shares = np.array(shot["signature"]["scores"]) * [len(test) for _, _, test in splits]
        assert shares.round(6).tolist() == shares.round().tolist() and shares.any()  # of the test tracks


@pytest.mark.parametrize("text, words, message", [
    ("file,style\na.wav,x\n", "--label mood", "has no column 'mood'; it has file, style"),
    ("name,style\na.wav,x\n", "--label style", "has no column 'file'"),
    ("file,style\na.wav,x\n", "--label style --split part", "has no column 'part'"),
    ("file,style\na.wav,x\n", "--label style --group who", "has no column 'who'"),
    ("file,style\n", "--label style", "no rows"), ("", "--label style", "no rows"),
    ('file,style\na.wav,"' + 200_000 * "x", "--label style", "not a readable CSV file"),  # a quote without an end
    ("file,loud\na.wav,nan\nb.wav,much\n", "--label loud --kind regression", "no row has a usable loud"),
    ("file,style,part\na.wav,x,train\nb.wav,y,so\n", "--label style --split part", "'so' in part is none of train"),
    ("file,key\na.wav,X\nb.wav,\n", "--label key", "no row has a usable key"),
    ("file,style\na.wav,x\nb.wav,y\n", "--label style", r"none of its files is there, such as .*a\.wav; .*--audio")],
    ids=range(11))
def test_csv_that_cannot_be_used_is_refused(text, words, message, run, tmp_path):
    """One line that names the file and what is wrong."""
    write(tmp_path / "labels.csv", text)
    with pytest.raises(data.InputError, match=message) as error:
        run("csv", "--data", tmp_path / "labels.csv", *words.split())
    assert "\n" not in str(error.value) and "labels.csv" in str(error.value)


def test_folders_table(own, run):
    """A class per sub-folder, groups by a regex on the file's path."""
    out, rows = run("folders", "--data", own / "audio", "--group", r"take \d|broken"), written("folders-audio-class")
    assert list(rows["raw"]) == ["accuracy"] and list(rows) == [*PROBED, *CHOSEN] and "class: 5 outputs" in out
    assert "15 of 16 files; 1 missing or unreadable: p1/broken.wav" in out and "10 groups" in out
    for pattern in ("take", "(take"):
        with pytest.raises(data.InputError, match=re.escape(f"--group '{pattern}' does not match")):
            run("folders", "--data", own / "audio", "--group", pattern)
    with pytest.raises(data.InputError, match="holds 0 sub-folder"):
        run("folders", "--data", own / "audio/p0")


def test_list_names_every_task_and_where_it_looks(run):
    out = run("list")
    assert set(re.findall(r"^([\w-]+)[:,]", out, flags=re.M)) == {*probe.TASKS, "folders", "synth"}
    assert "in datasets/gtzan: " in out and "in datasets/ballroom or datasets/gtzan: " in out


def test_the_exercise_of_the_laboratory_book(run, tmp_path, monkeypatch):
    """A probe task of one's own: a reader and an entry of TASKS, as printed there."""
    book = (Path(__file__).parent / "README.md").read_text()
    code = textwrap.dedent(re.search(r"^    def read_mood.*?(?=^## )", book, flags=re.S | re.M)[0])
    own = vars(probe) | dict(TASKS={})
    exec(code, own)
    monkeypatch.setitem(probe.TASKS, "mood", own["TASKS"]["mood"])
    for i in range(6):
        clip(tmp_path / f"{i}.wav", i)
    write_table(tmp_path / "moods.csv", ("file", "mood", "album"), *((f"{i}.wav", "calm tense".split()[i % 2], i // 2) for i in range(6)))
    out = run("mood", "--data", tmp_path)
    assert "6 of 6 files" in out and "3 groups" in out and "accuracy" in written("mood")["raw"]
