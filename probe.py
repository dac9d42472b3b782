"""Evaluation by linear probing: frozen features and one linear layer, beside untrained and raw baselines.

    python probe.py list                                    the tasks, and where each looks for its files
    python probe.py gtzan [--data DIR]                      one task of the field, from files you have
    python probe.py synth                                   the embedded songs, nothing needed
    python probe.py folders --data DIR [--group REGEX]      your recordings, one sub-folder per class
    python probe.py csv --data labels.csv --audio DIR --label COLUMN [--split COLUMN] [--group COLUMN]
    python probe.py key SONG_OR_FOLDER... [--keys CSV]      key without labels (zero-shot)
    python probe.py embed FOLDER... --out FILE.npz          embeddings of every track
    python probe.py show SONG [--out DIR]                   figures: spectrograms, attention, key, self-similarity
    python probe.py map --data DIR [--keys CSV]             PCA of the class tokens of a folder of music
    python probe.py emergence [--data DIR]                  chords, beats and onsets, layer by layer
    python probe.py compare A.json B.json...                tables of several runs side by side

Pipeline: a task is tracks with labels; a label belongs to a track (its genre) or to its frames (chords, beats). Items
are 4 s windows (or frames), each with the features of a frozen network. `fit` trains a linear layer on items, a Target
turns the outputs on the items of a track into one row per track, and metrics take these rows.

Protocol `linear`. Windows do not overlap; a rest under 4 s is dropped unless it is all there is; nothing is padded.
Tracks are split before anything else. Adam, rate 1e-3, batch 128, at most 50 x 128 steps (CoJEPA); features
standardised by the training items; the weights of the lowest validation loss are kept, and the fit ends when it has not
fallen for 640 steps (our choice). Per frame: batch 2048, rests are kept; `synth`: at most 640 steps, chords at rate
3e-3. A track's prediction is the mean of its windows' outputs. Whatever is selected (a grid point, a row, a beat
threshold) is selected by the validation metric. Test tracks are predicted once. Five seeds, or the folds of the task,
or five folds where it has none, mean and standard deviation; in brackets the 95 % interval of 1000 bootstrap draws of
test tracks (of the first seed where seeds share the test set).

`--grid` selects among the 216 configurations of jukemir. Departures, for two CPU cores: successive halving (all for 64
steps, the better half for 128, ... 14 for 1024), with a patience of 256 steps instead of 2048.

Rows:

    cpsd, ntxent ...   each class token           average, concat    of the class tokens
    sequence mean      of the sequence tokens     sequence mean+std  mean and standard deviation over time
    all tokens mean    of class and sequence tokens
    sequence           the sequence tokens themselves, one item a frame, in `chords` and `beats`
    untrained ...      the same of the same network at initialisation: its blocks are the identity, all layers one
    raw mean           mean over time of CQT and mel (also with --inputs mel); compare with sequence mean, class tokens
    raw                mean and standard deviation over time; compare with sequence mean+std
    ... zero-shot      key outputs without any probe           key template    losses.template_keys, without training
    chosen on validation; untrained, chosen    in each seed the row with the best validation metric
    chance             all outputs are the mean target of the training items (the most frequent class; no beat)

`--layers` adds inner layers, through the final norm as in DINO. Only what is above both raw and untrained counts.
"""
import argparse
import hashlib
import io
import json
import re
from collections import namedtuple
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (AUDIO_SUFFIXES, DYNAMIC_RANGE, FRAME_SECONDS, KEY_NAMES, MAX_CROP, N_BINS, N_MELS,
                  PITCH_CROP, SCALES, SEGMENT, SYNTH_SPLITS, TIMBRES, FrontEnd, InputError,
                  audio_to_frames, compose, crop_views, find_audio, parse_key, prepare_files, prepare_folders,
                  prepare_synth, read_audio, read_labels, read_table, render, run_cli, walk, write_atomic)
from losses import centred, template_keys
from model import MT2, load_checkpoint, pick_amp

SEEDS = 5  # of a task with a given split
FOLDS = 5  # of a task without one

# ---------------------------------------------------------------- labels: keys, chords, beats

# Keys and chords are numbers: tonic or root in semitones above C (0..11), plus 12 for minor. Minor keys in lower case.
ALL_KEYS = KEY_NAMES + "c c# d eb e f f# g g# a bb b".split()
# Tonic of the major key with the same seven notes, hence the same signature: A minor (21) -> C (0).
SIGNATURES = np.array([*range(12), *((tonic + 3) % 12 for tonic in range(12))])
NO_CHORD, UNKNOWN = 24, -1

# Chord qualities by their notes within a fifth (7 semitones) of the root; what lies above does not decide.
TRIADS = {"maj 7 maj7 maj6 9 maj9 11 maj11 13 maj13": {0, 4, 7}, "min min7 minmaj7 min6 min9 min11 min13": {0, 3, 7},
          "aug aug7": {0, 4}, "dim dim7 hdim7": {0, 3, 6}, "sus2": {0, 2, 7}, "sus4": {0, 5, 7}, "5": {0, 7}, "1": {0}}
QUALITIES = {name: notes for names, notes in TRIADS.items() for name in names.split()}
DEGREE = r"[#b]*[1-9]\d*"
EDIT = rf"\s*\*?{DEGREE}\s*"
# root:quality(edits)/bass
CHORD = re.compile(rf"([A-G][#b]*)(?::(?=[a-z0-9(])([a-z0-9]+)?(?:\(({EDIT}(?:,{EDIT})*)\))?)?(?:/({DEGREE}))?")


def pitch_class(note):
    """'Bb' -> 10: a letter A..G with any number of sharps and flats, in semitones above C, 0..11."""
    return ("C D EF G A B".index(note[0]) + note.count("#") - note.count("b")) % 12


def semitones(degree):
    """Degree of the major scale, with sharps and flats -> semitones above the root: '5' 7, 'b7' 10, '9' 14."""
    octave, step = divmod(int(degree.lstrip("#b")) - 1, 7)
    return 12 * octave + SCALES["major"][step] + degree.count("#") - degree.count("b")


def parse_chord(label):
    """'Bb:maj7/3', 'G', 'N' -> 0..11 major, 12..23 minor, 24 no chord, -1 neither (no loss, not scored).

    The rule of mir_eval's majmin: after the edits in parentheses (a * removes a degree), and with the bass note folded
    into the octave, the notes within a fifth of the root must be exactly a major or minor triad. So C:7/b7 is C major,
    but D:maj/2, D:maj/9 and Bb:maj(*3) are -1.
    """
    if label == "N":
        return NO_CHORD
    match = CHORD.fullmatch(label)
    if not match or (match[2] or "maj") not in QUALITIES:
        return UNKNOWN
    root, quality, edits, bass = match.groups(default="")
    notes = set(QUALITIES[quality or ("1" if edits else "maj")])
    for removed, degree in re.findall(rf"(\*?)({DEGREE})", edits):
        notes = notes - {semitones(degree)} if removed else notes | {semitones(degree)}
    if bass:
        notes.add(semitones(bass) % 12)
    triad = {note for note in notes if note <= 7}
    if triad == QUALITIES["maj"]:
        return pitch_class(root)
    return 12 + pitch_class(root) if triad == QUALITIES["min"] else UNKNOWN


def read_chord_intervals(path):
    """[(start, end, class)], seconds, of a .lab file (any white space) or a ;-separated csv with a header."""
    if path.suffix == ".csv":
        rows = [[*row.values()][:2] + [row.get("majmin", row.get("chord"))] for row in read_table(path, ";")]
    else:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        rows = [(fields[0], fields[1], fields[-1]) for fields in map(str.split, lines) if len(fields) >= 3]
    try:
        return [(float(start), float(end), parse_chord(label)) for start, end, label in rows]
    except (TypeError, ValueError):
        raise InputError(f"{path}: is not a chord file; give lines of start, end and label") from None


def read_beat_times(path):
    """Beat times in seconds, sorted: the first field of every line."""
    try:
        return sorted(float(line.split()[0]) for line in path.read_text().splitlines() if line.strip())
    except ValueError:
        raise InputError(f"{path}: is not a beat file; give one time in seconds at the start of every line") from None


# ---------------------------------------------------------------- tasks: tracks with labels

# labels {target: label}; split: "train", "valid", "test", a fold number, or None (then groups become folds). Tracks of
# one group (an artist, an album) stay on one side. path is None where the audio is missing.
Track = namedtuple("Track", "name path labels split group")
# what, needs: for `list` and for the message when files are missing; homes: default folders in datasets/;
# read(Files) yields Tracks; targets {name: kind in TARGETS}, all per track or per frame, key first; official: count.
Task = namedtuple("Task", "what needs homes read targets official", defaults=(None,))
# Other names of the parts.
PARTS = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid", "eval": "test",
         "evaluation": "test"}


class Files:
    """The files below some folders, found by name: data sets circulate in many layouts, their file names stay."""

    def __init__(self, roots):
        self.roots, self.by_name = roots, {}
        self.paths = [path for root in roots for path in walk(root)]
        for path in sorted(self.paths, key=lambda path: path.suffix.lower() != ".wav"):  # .wav is preferred to .au
            if path.suffix.lower() in AUDIO_SUFFIXES:
                for name in (path.stem, f"{path.parent.name}/{path.stem}"):
                    self.by_name.setdefault(self.plain(name), path)

    @staticmethod
    def plain(name):
        return name.lower().replace("hip-hop", "hiphop")  # GTZAN has both spellings

    def track(self, name, labels, split, group=None, also=()):
        """Track of the audio file called `name` or one of `also`: "stem" or "folder/stem", any case."""
        paths = [self.by_name[self.plain(n)] for n in (name, *also) if self.plain(n) in self.by_name]
        return Track(name, paths[0] if paths else None, labels, PARTS.get(split, split), group or name)

    def matching(self, pattern):
        """Sorted paths that the regex finds, with a / before the first folder."""
        return [p for p in self.paths if re.search(pattern, "/" + p.as_posix())]

    def rows(self, name, delimiter=","):
        """Rows of the table with this file name. Raises InputError."""
        path = next((p for p in self.paths if p.name == name), None)
        if path is None:
            raise InputError(f"no {name} below {' or '.join(map(str, self.roots))}")
        return read_table(path, delimiter)


def hashed(text, modulus):
    """A number 0 .. modulus - 1 that depends on the text alone: splits that are the same everywhere."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % modulus


# The fault-filtered split of GTZAN (Kereliuk, Sturm and Larsen 2015), clip 0 .. 99: t train, v valid, e test.
GTZAN_SPLIT = {
    "blues":     "vvvvvvvvvvvveeeeeeeeeeeeeeeeetttttttttttttttttttttvvvvvvvvvvveeeeeeeeeeeetttttttttttttttttttttttttee",
    "classical": "vvvvvvvvvvveeeeeeeeeeeeeeeeeeetttteeeeeeee.ttttttettttttttttttttttttvvvvvvvvveeetttttttttttttttttttt",
    "country":   "vvvvvvvv.vvvvvvvvvvttttttttvtteeeeeeeeeeevveeveeevee.eeeeeeeeeeeettttttttttttttttttttttttttttttttttt",
    "disco":     "vevvvtvvvvvvvvvttttttetttttttttttttttt.tttttttvtvt..vtt.ttet.teeeeevvet.vttveeeeeeeeeeeeetveeeevee.e",
    "hiphop":    "e.tttttttttttttttttttttttteettetttttttt.etteee.....eeeettttttteeeeeeeeeeeeee.ttttvvvvvvvvvvvvvvvvvve",
    "jazz":      "ttvvvvvvvvvttttttttttttttvvvvvvvv........t.....tttttttttttttttttttttttttteeeeeeeeeeeeeeeeeeeeeeeeeee",
    "metal":     "vvtt.tvvvvvveeeevvvvvteeteeeeeeeee.tvvee......tttttttttttt.ttttttttevtetteeevvettvveteteettttttttttt",
    "pop":       "eettttttttvttee.ttttt..ttttttt.tttttt.tttttet.t..tt..v.v..vvvvveeee..eeeeeeeeeeetvevvvv.eeeeeeeeettt",
    "reggae":    "ttt.t.t..t.tt.ttttttttttttttttttt.eeeeeee.tttteeettteetttttttvvteeeeetvev.v.vvve..eeev.eeee.vvvvvvvv",
    "rock":      "tttttttttteeeeeettttttttttteeeeeeeeeeeveeeeeeeeeevvvvvvvvttttttttttttttvvvvvvvvvvvvvvveeeeettttttttt",
}
GTZAN_PART = {f"{genre}.{i:05d}": dict(t="train", v="valid", e="test")[letter]
              for genre, letters in GTZAN_SPLIT.items() for i, letter in enumerate(letters) if letter != "."}


def read_gtzan(files):
    """genres/blues/blues.00000.wav or .au; Data/genres_original/...; any folder."""
    for name, part in GTZAN_PART.items():
        yield files.track(name, {"genre": name.split(".")[0]}, part)


def read_gtzan_key(files):
    """blues.00000.lerch.txt: an integer counted from A, 0-11 A..G# major, 12-23 a..g# minor, -1 no single key."""
    for path in files.matching(r"\.lerch\.txt$"):
        name, value = path.name.removesuffix(".lerch.txt"), int(path.read_text())
        if value >= 0 and name in GTZAN_PART:
            yield files.track(name, {"key": (value % 12 + 9) % 12 + 12 * (value >= 12)}, GTZAN_PART[name])


def giantsteps_test(files):
    """annotations/key/10089.LOFI.key: "D major". 604 tracks."""
    for path in files.matching(r"/annotations/key/[^/]*\.LOFI\.key$"):
        if "mtg" not in path.parents[2].name.lower():
            yield files.track(path.stem, {"key": parse_key(path.read_text())}, "test")


def read_giantsteps(files):
    """Training: giantsteps-mtg-key-dataset/annotations/annotations.txt, confidence 2, one key; split by artist."""
    artists = {}
    for row in files.rows("beatport_metadata.txt", delimiter="\t"):
        artists[row["ID"]] = {name.strip() for name in row["ARTIST"].split(",")}
    valid = {name for names in artists.values() for name in names if hashed(name.lower(), 116) >= 100}
    for _ in range(2):  # collaborators of validation artists are validation artists, twice removed
        for names in artists.values():
            if valid & names:
                valid |= names
    for row in files.rows("annotations.txt", delimiter="\t"):
        key = parse_key(row["MANUAL KEY"])
        if row["C"] == "2" and key is not None:  # "-", blanks and several keys ("a/b") name no single key
            part = "valid" if valid & artists.get(row["ID"], set()) else "train"
            yield files.track(f"{row['ID']}.LOFI", {"key": key}, part)
    yield from giantsteps_test(files)


def read_fmak(files):
    """fmakv2.csv: track_id, key_and_mode; 10 -> 000010.mp3. Every tenth artist of FMA's raw_tracks.csv: validation."""
    artist = {row["track_id"]: row["artist_id"] for row in files.rows("raw_tracks.csv")}
    for row in files.rows("fmakv2.csv"):
        group = artist.get(row["track_id"], f"track {row['track_id']}")
        part = "valid" if hashed(group, 10) == 0 else "train"
        yield files.track(f"{int(row['track_id']):06d}", {"key": parse_key(row["key_and_mode"])}, part, group)
    yield from giantsteps_test(files)


MTT_TAGS = ("guitar,classical,slow,techno,strings,drums,electronic,rock,fast,piano,ambient,beat,violin,vocal,synth,"
            "female,indian,opera,male,singing,vocals,no vocals,harpsichord,loud,quiet,flute,woman,male vocal,no vocal,"
            "pop,soft,sitar,solo,man,classic,choir,voice,new age,dance,male voice,female vocal,beats,harp,cello,"
            "no voice,weird,country,metal,female voice,choral").split(",")
MTT_CORRUPT = {"35644", "55753", "57881"}


def read_mtt(files, untagged=False):
    """annotations_final.csv, tab separated: clip_id, 188 tags, mp3_path. Split by the first character of mp3_path.

    untagged: keep clips with none of the 50 tags, as jukemir and Myna do.
    """
    for row in files.rows("annotations_final.csv", delimiter="\t"):
        tags = [tag for tag in MTT_TAGS if row[tag] == "1"]
        if row["mp3_path"] and (tags or untagged) and str(int(row["clip_id"])) not in MTT_CORRUPT:
            name = row["mp3_path"].removesuffix(".mp3")
            part = "train" if name[0] in "0123456789ab" else "valid" if name[0] == "c" else "test"
            yield files.track(name, {"tags": tags}, part)


def read_jamendo(files, tags):
    """split-0/autotagging_genre-train.tsv: TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS, a field each."""
    for path in files.matching(rf"/split-0/autotagging_{tags}-(train|validation|test)\.tsv$"):
        for line in path.read_text().splitlines()[1:]:
            _, artist, _, audio, _, *found = line.split("\t")
            name = audio.removesuffix(".mp3")
            yield files.track(name, {"tags": found}, path.stem.split("-")[1], artist, also=[f"{name}.low"])


def read_emomusic(files):
    """songs_info.csv names the official test set; the rest is split by artist. Arousal and valence, 1 to 9."""
    means = {row["song_id"]: (float(row["mean_arousal"]), float(row["mean_valence"]))
             for row in files.rows("static_annotations.csv")}
    for row in files.rows("songs_info.csv"):
        song, part = row["song_id"], row["Mediaeval 2013 set"]
        artist = " ".join(re.sub("[^a-z ]", "", row["Artist"].lower()).split())
        if part != "evaluation":
            part = "valid" if hashed(artist, 10) >= 8 else "train"
        if song in means:
            yield files.track(song, {"emotion": means[song]}, part, artist, also=[song.zfill(4)])


def read_medleysolos(files):
    """Medley-solos-DB_test-0_UUID.wav; subset and song are columns of Medley-solos-DB_metadata.csv."""
    for row in files.rows("Medley-solos-DB_metadata.csv"):
        name = f"Medley-solos-DB_{row['subset']}-{row['instrument_id']}_{row['uuid4']}"
        yield files.track(name, {"instrument": row["instrument"]}, row["subset"], row["song_id"])


def read_nsynth(files):
    """nsynth-train/examples.json {"organ_electronic_001-060-127": {"pitch": 60, ...}}, nsynth-train/audio/*.wav."""
    for part in ("train", "valid", "test"):
        for path in files.matching(rf"nsynth-{part}[^/]*/examples\.json$")[:1]:
            for name, note in json.loads(path.read_text()).items():
                labels = {"instrument": note["instrument_family_str"], "pitch": note["pitch"]}
                yield files.track(name, labels, part, note["instrument_str"])


def read_tinysol(files):
    """TinySOL_metadata.csv: Path, Fold, Instrument (in full), Pitch ID (MIDI). Five official folds."""
    for row in files.rows("TinySOL_metadata.csv"):
        labels = {"instrument": row["Instrument (in full)"], "pitch": int(row["Pitch ID"])}
        yield files.track(Path(row["Path"]).stem, labels, int(row["Fold"]))


def read_tempo(files):
    """annotations_v2/tempo/28952.LOFI.bpm (0.0: no tempo, dropped); splits/fold01..10.txt list each fold's files."""
    fold = {}
    for path in files.matching(r"/fold\d\d\.txt$"):
        for name in path.read_text().split():
            fold[name.removesuffix(".mp3")] = int(path.stem[4:]) - 1
    for path in files.matching(r"/annotations_v2/tempo/[^/]*\.bpm$"):
        bpm = float(path.read_text())
        if bpm > 0 and path.stem in fold:
            yield files.track(path.stem, {"tempo": bpm}, fold[path.stem])


def read_chords(files):
    """song.lab beside or apart from song.wav (Isophonics, or your own); RWC's N001-M01-T01.lab; Winterreise's csv.

    Split by album folder where there are at least five, else by song; performances of one Schubert song stay together.
    """
    found = files.matching(r"\.lab$|/ann_audio_chord/[^/]*\.csv$|_preprocessed/chords/.*\.csv$")
    found = [p for p in found if not {"keylab", "seglab"} & set(p.parts)]
    stems, by_song = [p.stem for p in found], len({p.parent for p in found}) < 5
    for path in found:
        name, group = f"{path.parent.name}/{path.stem}", path.stem if by_song else str(path.parent)
        also = [path.stem] * (stems.count(path.stem) == 1)                 # the same name elsewhere is another song
        if rwc := re.fullmatch(r"N\d+-M(\d+)-T(\d+)", path.stem):
            also = [f"rwc-p-m{rwc[1]}/{int(rwc[2])}", f"rwc-p-m{rwc[1]}/{rwc[2]}"]
            group = path.stem
        if lied := re.search(r"D911-\d+", path.stem):
            group = lied[0]
        yield files.track(name, {"chords": read_chord_intervals(path)}, None, group, also)


BALLROOM_TWICE = {f"Albums-{name}" for name in (
    "AnaBelen_Veneo-15", "Ballroom_Magic-18", "Chrisanne2-12", "Fire-09", "Latin_Jam-13", "Latin_Jam-14",
    "Latin_Jam-15", "Latin_Jam2-13", "Latin_Jam2-14", "Latin_Jam2-15")}
BALLROOM_TWICE |= {"Media-103414", "Media-103415", "Media-104705"}


def read_beats(files):
    """Train on Ballroom (Media-105901.beats), test on GTZAN (gtzan_blues_00000.beats); or your own, split by song."""
    found = files.matching(r"\.beats$")
    benchmark = any(p.name.startswith("gtzan_") for p in found)
    for path in found:
        name, part = path.stem.removeprefix("ballroom_"), None
        if name.endswith("_noposition") or name in BALLROOM_TWICE:
            continue
        if benchmark:
            part = "valid" if hashed(name, 10) == 0 else "train"
        if gtzan := re.fullmatch(r"gtzan_([a-z]+)_(\d{5})", name):
            name, part = f"{gtzan[1]}.{gtzan[2]}", "test"
        yield files.track(name, {"beats": read_beat_times(path)}, part)


TASKS = {
    "gtzan": Task(
        "genre of 930 clips of 30 s, fault-filtered split", "the genre folders of GTZAN with blues.00000.wav ... "
        "(Kaggle: GTZAN Dataset - Music Genre Classification; Hugging Face: marsyas/gtzan)",
        ("gtzan",), read_gtzan, {"genre": "class"}, 930),
    "gtzan-key": Task(
        "key of GTZAN's clips, filtered split", "GTZAN's genre folders, and gtzan_key/ with its .lerch.txt files "
        "(GitHub: alexanderlerch/gtzan_key)", ("gtzan",), read_gtzan_key, {"key": "key"}, 769),
    "giantsteps": Task(
        "key of 604 electronic tracks; training: MTG key, split by artist", "the repositories "
        "GiantSteps/giantsteps-key-dataset and GiantSteps/giantsteps-mtg-key-dataset, and audio/ by their scripts",
        ("giantsteps",), read_giantsteps, {"key": "key"}, 1763),
    "fmak": Task(
        "key: trained on FMAKv2, tested on GiantSteps", "fmakv2.csv (Zenodo 12759100), FMA's folders 000/ ... and "
        "raw_tracks.csv (fma_metadata.zip), and giantsteps-key-dataset",
        ("fmak", "giantsteps"), read_fmak, {"key": "key"}),
    "mtt": Task(
        "50 tags of MagnaTagATune, clips with at least one of them", "annotations_final.csv and the folders 0/ ... f/ "
        "(The MagnaTagATune Dataset; MIRG, City, University of London)",
        ("mtt",), read_mtt, {"tags": "tags"}, 21108),
    "emomusic": Task(
        "arousal and valence of 744 clips", "clips_45seconds/, songs_info.csv and static_annotations.csv (Emotion in "
        "Music Database, University of Geneva)", ("emomusic",), read_emomusic, {"emotion": "emotion"}, 744),
    "medleysolos": Task(
        "8 instruments, 3 s clips", "Medley-solos-DB_metadata.csv and the wav files (Zenodo 3464194)",
        ("medleysolos",), read_medleysolos, {"instrument": "unbalanced"}, 21571),
    "nsynth": Task(
        "instrument family and pitch of notes", "nsynth-train/, nsynth-valid/ and nsynth-test/, each with "
        "examples.json and audio/ (magenta.tensorflow.org/datasets/nsynth, jsonwav archives)",
        ("nsynth",), read_nsynth, {"instrument": "class", "pitch": "class"}, 305979),
    "tinysol": Task(
        "14 instruments and pitch of notes, five folds", "TinySOL_metadata.csv and the audio folders (Zenodo 3685367)",
        ("tinysol",), read_tinysol, {"instrument": "class", "pitch": "class"}, 2913),
    "giantsteps-tempo": Task(
        "tempo of 661 electronic tracks, ten folds, annotations v2", "the repository "
        "GiantSteps/giantsteps-tempo-dataset, and audio/ by its script",
        ("giantsteps-tempo",), read_tempo, {"tempo": "tempo"}, 661),
    "chords": Task(
        "25 chords per frame: Isophonics, RWC, Winterreise, or .lab files of your own", "audio files and .lab files of "
        "the same names (labels: Isophonics; AIST for RWC; Zenodo 3968389)",
        ("chords",), read_chords, {"chords": "chords"}),
    "beats": Task(
        "beats per frame: Ballroom -> GTZAN, or .beats files of your own", "audio files and .beats files of the same "
        "names (Ballroom: MTG, ISMIR 2004, with CPJKU/BallroomAnnotations; TempoBeatDownbeat/gtzan_tempo_beat)",
        ("ballroom", "gtzan"), read_beats, {"beats": "beats"}),
}
TASKS["mtt-all"] = TASKS["mtt"]._replace(what="50 tags, with untagged clips, as in jukemir and Myna", official=25860,
                                         read=partial(read_mtt, untagged=True))
for name, tags, official in (("top50", "top50tags", 54380), ("genre", "genre", 55094),
                             ("instrument", "instrument", 24976), ("mood", "moodtheme", 17982)):
    TASKS[f"jamendo-{name}"] = Task(
        f"{name} tags of MTG-Jamendo's full songs, split 0", "data/splits/split-0/ of the repository "
        "MTG/mtg-jamendo-dataset, and the folders 00/ ... 99/ of its audio or audio-low",
        ("jamendo",), partial(read_jamendo, tags=tags), {"tags": "tags"}, official)


def read_folders(args):
    """One class per sub-folder of --data, grouped by what --group finds in a file's path: (tracks, targets)."""
    tracks = []
    for name, path in find_audio([args.data]):
        _, *folders, file = Path(name).parts
        name = "/".join([*folders, file])
        try:
            match = re.search(args.group or ".+", name)
        except re.error:
            match = None
        if not match:
            raise InputError(f"--group {args.group!r} does not match {name}; give a regex that matches every file")
        if folders:
            tracks.append(Track(name, path, {"class": folders[0]}, None, match.group()))
    classes = {t.labels["class"] for t in tracks}
    if len(classes) < 2:
        raise InputError(f"{args.data}: holds {len(classes)} sub-folder(s) with audio; a class is a sub-folder, "
                         "give at least two")
    return tracks, {"class": "class"}


def number(text):
    """'0.5' -> (0.5,); None for what is no finite number."""
    try:
        return (float(text),) if np.isfinite(float(text)) else None
    except ValueError:
        return None


def kind_of(column, values):
    """Kind of a column's labels: key if it is called so, regression of numbers, tags if there is a |, else class."""
    if column == "key":
        return "key"
    if all(map(number, values)):
        return "regression"
    return "tags" if "|" in "".join(values) else "class"


def read_csv(args):
    """A table of labels: column `file` (path below --audio) and column --label. (tracks, targets). Raises InputError.

    Rows without a label of the kind are counted and left out, as those whose key names no single key.
    """
    audio, rows = Path(args.audio or Path(args.data).parent), read_table(args.data)
    for column in filter(None, ("file", args.label, args.split, args.group)):
        if not rows or column not in rows[0]:
            there = ", ".join(rows[0]) if rows else "no rows"
            raise InputError(f"{args.data}: has no column {column!r}; it has {there}")
    labelled = [row for row in rows if row[args.label]]
    kind, tracks = args.kind or kind_of(args.label, [row[args.label] for row in labelled]), {}
    parse = {"key": parse_key, "regression": number, "class": str,
             "tags": lambda value: [tag.strip() for tag in value.split("|") if tag.strip()]}[kind]
    for row in labelled:
        part = PARTS.get(row[args.split].lower(), row[args.split].lower()) if args.split else None
        if part not in (None, "train", "valid", "test"):
            raise InputError(f"{args.data}: {row[args.split]!r} in {args.split} is none of train, valid, test")
        if (label := parse(row[args.label])) is not None:
            name, path = str(Path(row["file"])), audio / row["file"]
            group = row[args.group] if args.group else name
            tracks[name] = Track(name, path if path.is_file() else None, {args.label: label}, part, group)
    print(f"{args.label}: {kind}; {len(tracks)} of {len(rows)} rows have a label")
    if not tracks:
        raise InputError(f"{args.data}: no row has a usable {args.label}")
    if not any(t.path for t in tracks.values()) and not args.features:
        raise InputError(f"{args.data}: none of its files is there, such as {audio / next(iter(tracks))}; "
                         "name their folder with --audio")
    return list(tracks.values()), {args.label: kind}


# ---------------------------------------------------------------- features of a frozen network

# What a probe is trained on: rows {name: (items, dim)}, owner (items,) the track of each, time (items,) its start in s.
Items = namedtuple("Items", "rows owner time")


def windows_of(songs, keep_rest=False):
    """Windows of songs [(frames, 224) uint8], in order: (song of each, first frame of each, [(frames, 224) uint8]).

    Whole segments of 126 frames; a rest under 4 s if asked for, or if it is all there is.
    """
    found = []
    for song, frames in enumerate(songs):
        whole = len(frames) // SEGMENT * SEGMENT
        end = len(frames) if keep_rest or not whole else whole
        found += [(song, start, frames[start:start + SEGMENT]) for start in range(0, end, SEGMENT)]
    owner, start, windows = zip(*found)
    return np.array(owner), np.array(start), windows


def batches_of(windows, size=64):
    """Yields (indices, windows (n <= size, frames, 224) uint8): every window once, windows of one length together."""
    lengths, batches = np.array([len(window) for window in windows]), []
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        batches += np.split(alike, range(size, len(alike), size))
    for indices in tqdm(batches, desc="windows", unit="batch", delay=2):
        yield indices, torch.from_numpy(np.stack([windows[i] for i in indices]))


def views_of(windows, device, crop=PITCH_CROP):
    """(n, frames, 224) uint8 -> cqt (n, frames, 84), mel (n, frames, 128) on the device, at one crop."""
    windows = windows.to(device)
    return crop_views(windows, torch.full((len(windows),), crop, device=device))


def autocast(device):
    """The precision in which the network was trained."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_amp(device)[0])


def untrained(model, device, blocks=0, seed=0):
    """The same network at initialisation: what tokenisers and norm are worth. Its blocks, still the identity, are left
    out but for the first `blocks` (None: all)."""
    torch.manual_seed(seed)
    network = MT2(**model.config).to(device).eval()
    network.blocks = network.blocks[:blocks]
    return network


def readouts(names, tokens, sequence):
    """{row: (n, dim)} of class tokens (n, tokens, dim) and sequence tokens (n, sequence, dim)."""
    rows = dict(zip(names, tokens.unbind(dim=1)))
    if len(rows) > 1:
        rows |= {"average": tokens.mean(dim=1), "concat": tokens.flatten(1)}
    rows["sequence mean"] = sequence.mean(dim=1)
    rows["sequence mean+std"] = torch.cat([sequence.mean(dim=1), sequence.std(dim=1, unbiased=False)], dim=-1)
    if tokens.shape[1]:
        rows["all tokens mean"] = torch.cat([tokens, sequence], dim=1).mean(dim=1)
    return rows


def tokens_of_frames(sequence, size, frames):
    """The token of each frame: sequence (n, sequence, dim) -> (n, frames, dim).

    With patches of `size` (bands, frames) it is the mean of the patches at that time; frames that fill no patch take
    the last one.
    """
    bands, width = size or (N_MELS, 1)
    columns = sequence.unflatten(1, (-1, N_MELS // bands)).mean(dim=2)     # (n, columns, dim)
    return columns[:, (torch.arange(frames) // width).clamp(max=columns.shape[1] - 1)]


def network_rows(model, cqt, mel, layers, per_frame):
    """{row: (n, dim)} of windows, or {row: (n, frames, dim)} per frame; also each patch size alone, if several."""
    rows, first, depth = {}, model.class_token_count, len(model.blocks)
    for patch, size in enumerate(model.patches):
        with autocast(cqt.device):
            inside = model(cqt, mel, layers=layers, patch_index=patch)[1]  # {layer: (n, tokens + sequence, dim)}
        for layer, x in inside.items():
            x = x.float() if layer == depth else model.norm(x.float())     # the final norm, as in DINO
            sequence = x[:, first:]
            found = {"sequence": tokens_of_frames(sequence, size, cqt.shape[1])} if per_frame else \
                readouts(model.tokens, x[:, :first], sequence)
            for name, value in found.items():
                title = name if layers == [depth] else f"{name} L{layer}"
                rows.setdefault(title, []).append(value)
                if model.patches[1:]:
                    rows[f"{title} {size[0]}x{size[1]}"] = [value]
    return {name: torch.cat(parts, dim=-1) for name, parts in rows.items()}


def raw_rows(cqt, mel, per_frame):
    """{"raw mean": (n, 212), "raw": (n, 424) mean and deviation over time}; per frame {"raw": (n, frames, 212)}."""
    frames = torch.cat([cqt, mel], dim=-1)                                 # (n, frames, 212)
    if per_frame:
        return {"raw": frames}
    rows = readouts((), frames[:, :0], frames)
    return {"raw mean": rows["sequence mean"], "raw": rows["sequence mean+std"]}


@torch.inference_mode()
def extract(model, songs, device, layers=None, per_frame=False):
    """Items of every window, or of every frame, in the order of the songs, with rows of float16 features.

    songs: [(frames, 224) uint8]; model None gives the raw rows; layers: default the last one.
    """
    owner, start, windows = windows_of(songs, keep_rest=per_frame)
    counts = np.array([len(window) if per_frame else 1 for window in windows])       # items of each window
    first, places, parts = np.cumsum(counts) - counts, [], {}
    for indices, batch in batches_of(windows):
        cqt, mel = views_of(batch, device)
        if model is None:
            rows = raw_rows(cqt, mel, per_frame)
        else:
            rows = network_rows(model, cqt, mel, layers or [len(model.blocks)], per_frame)
        places.append((first[indices][:, None] + np.arange(counts[indices[0]])).ravel())
        for name, value in rows.items():
            parts.setdefault(name, []).append(value.flatten(0, -2).cpu().half())     # (items of the batch, dim)
    order = np.argsort(np.concatenate(places))
    rows = {name: torch.cat(parts.pop(name))[order] for name in list(parts)}         # (items, dim) each
    frame = np.repeat(start - first, counts) + np.arange(counts.sum())               # (items,) first frame of each
    return Items(rows, np.repeat(owner, counts), frame * FRAME_SECONDS)


def all_items(model, songs, device, layers=None, per_frame=False):
    """Items of songs [(frames, 224) uint8] with the rows of the trained and the untrained network and raw."""
    rows = {}
    for prefix, network in (("", model), ("untrained ", untrained(model, device)), ("", None)):
        items = extract(network, songs, device, layers if network is model else None, per_frame)
        rows |= {prefix + name: x for name, x in items.rows.items()}
    return items._replace(rows=rows)


# ---------------------------------------------------------------- metrics

# All take one row per track, predicted and true, so that a bootstrap can draw tracks.


def accuracy(outputs, truth):
    """Share of tracks whose largest output is the true class."""
    return float((outputs.argmax(axis=1) == truth).mean())


def class_mean_accuracy(outputs, truth):
    """Accuracy of each class, then the mean over the classes that occur."""
    right = outputs.argmax(axis=1) == truth
    return float(np.mean([right[truth == c].mean() for c in np.unique(truth)]))


def key_scores():
    """{metric: (24 true, 24 estimated)}.

    weighted (MIREX): 1 for the key, 0.5 for a fifth above it, 0.3 for its relative (same signature), 0.2 for its
    parallel (same tonic). mir_eval counts only an estimate a fifth *above*; MIREX since 2017 either way: "both".
    KSEA (STONE): 1 for the key signature, 0.5 for one a fifth away, either way.
    """
    true, estimated = np.arange(24)[:, None], np.arange(24)
    up, signature = (estimated - true) % 12, (SIGNATURES[estimated] - SIGNATURES[true]) % 12      # (24, 24) semitones
    mode = estimated // 12 == true // 12
    weighted = np.where(mode, (up == 0) + 0.5 * (up == 7), 0.2 * (up == 0) + 0.3 * (signature == 0))
    return {"weighted": weighted, "weighted (both)": weighted + 0.5 * (mode & (up == 5)), "accuracy": mode & (up == 0),
            "signature": signature == 0, "KSEA": (signature == 0) + 0.5 * np.isin(signature, (5, 7)), "mode": mode}


KEY_SCORES = key_scores()


def key_metric(scores, outputs, truth):
    return float(scores[truth, outputs.argmax(axis=1)].mean())


def tag_scores(outputs, truth):
    """ROC-AUC and average precision of every tag that some tracks have and others have not, (tags, 2).

    AUC: chance that a track with the tag scores higher than one without, ties half. AP: sum of (R_n - R_n-1) P_n over
    the distinct thresholds, not interpolated.
    """
    found = []
    for score, hit in zip(outputs.T, truth.T > 0.5):                       # (tracks,) each
        if hit.all() or not hit.any():
            continue
        order = np.argsort(-score, kind="stable")
        last = np.append(np.diff(score[order]) != 0, True)                 # ends of runs of equal scores
        true, false = np.cumsum(hit[order])[last], np.cumsum(~hit[order])[last]
        gain = np.diff(true, prepend=0)
        area = (np.diff(false, prepend=0) * (true - gain / 2)).sum()       # trapezoids: ties count half
        found.append((area / (true[-1] * false[-1]), (gain * true / (true + false)).sum() / true[-1]))
    return np.array(found).reshape(-1, 2)


def finite_mean(values):
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def r2(outputs, truth):
    """1 - SS_res / SS_tot of each axis, SS_tot about the mean of these tracks. (axes,)"""
    return 1 - ((outputs - truth) ** 2).sum(axis=0) / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)


def tempo_accuracy(estimate, bpm, factors):
    """Share of tracks whose tempo is within 4 % of the true one times any of `factors`."""
    allowed = bpm[:, None] * np.array(factors)
    return float((np.abs(estimate[:, None] - allowed) <= 0.04 * allowed).any(axis=1).mean())


def beat_hits(estimated, true):
    """Largest one-to-one matching of two sorted lists of times, |difference| <= 70 ms (boundary included)."""
    hits = i = j = 0
    while i < len(estimated) and j < len(true):
        gap = estimated[i] - true[j]
        if abs(gap) <= 0.070 + 1e-9:
            hits, i, j = hits + 1, i + 1, j + 1
        elif gap < 0:
            i += 1
        else:
            j += 1
    return hits


def f_measure(counts):
    """counts (tracks, 3): hits, estimated, true -> F = 2 hits / (estimated + true) of each track; 0 when both are 0."""
    return 2 * counts[:, 0] / np.maximum(counts[:, 1] + counts[:, 2], 1)


def pick_beats(activation, time, threshold):
    """Beat probability (frames,) at `time` (frames,) s -> times of its peaks.

    Smoothed by (1, 2, 1) / 4; a peak is a frame above the threshold and above its four neighbours on each side.
    """
    smooth = np.convolve(np.pad(activation, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
    around = np.lib.stride_tricks.sliding_window_view(np.pad(smooth, 4, constant_values=-1), 9)   # (frames, 9)
    peak = (smooth >= threshold) & (smooth == around.max(axis=1)) & (smooth > around[:, :4].max(axis=1))
    return time[peak]


def interval(metric, outputs, truths, draws=1000):
    """95 % bootstrap interval over tracks: percentiles 2.5 and 97.5 of the metric on tracks drawn with replacement.

    outputs, truths: one array per seed; each draw is the mean over seeds. Draws without a score (R2 of equal targets)
    are left out.
    """
    rng, values = np.random.default_rng(0), []
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(draws):
            drawn = [rng.integers(0, len(o), len(o)) for o in outputs]
            values.append(np.mean([metric(o[d], t[d]) for o, t, d in zip(outputs, truths, drawn)]))
    values = np.array(values)[np.isfinite(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if values.size else [np.nan] * 2


def retrieval(first, second):
    """Top-1 accuracy of retrieving a track's second excerpt among 128 by the cosine to its first, both ways.

    first, second (tracks, dim). One score per seed, which draws the tracks.
    """
    both = torch.stack([first, second]).float()
    first, second = F.normalize(both - both.mean((0, 1)), dim=-1)      # a common offset would hide the differences
    scores = []
    for seed in range(SEEDS):
        drawn = np.random.default_rng(seed).choice(len(first), min(128, len(first)), replace=False)
        cosine, right = first[drawn] @ second[drawn].T, torch.arange(len(drawn))
        hits = torch.cat([cosine.argmax(dim=1) == right, cosine.argmax(dim=0) == right])
        scores.append(hits.float().mean().item())
    return scores


# ---------------------------------------------------------------- targets: one class per kind of label


def track_mean(values, owner, tracks):
    """values (items, n), owner (items,) -> (len(tracks), n): the mean over the items of each of the sorted tracks."""
    place = torch.from_numpy(np.searchsorted(tracks, owner))
    total = torch.zeros(len(tracks), values.shape[1]).index_add_(0, place, values)
    return total / torch.bincount(place, minlength=len(tracks))[:, None]


class Target:
    """What a probe predicts. A subclass is made of labels, one per track, and Items, and has

    y          (items,) int64 or (items, n) float: the target of every item; of a frame below 0 where it has none
    truth      (tracks, ...) array: what the metrics compare with
    names      of the n outputs
    loss       (outputs (items, n), y) -> scalar
    metrics    {name: function(predicted, truth)} of one row per track; the first one selects
    settings   values of a parameter of `predict` that is selected on validation
    """
    loss, settings, per_frame = staticmethod(F.cross_entropy), (None,), False
    metrics = {"accuracy": accuracy}

    def __init__(self, truth, items):
        """For one label per track: every item of a track has its label."""
        self.items, self.truth = items, np.array(truth)
        self.y = torch.from_numpy(self.truth[items.owner])                 # (items, ...)

    def predict(self, outputs, items, tracks, setting=None):
        """Outputs of `items` -> one row for each of `tracks` (sorted numbers)."""
        return track_mean(outputs, self.items.owner[items], tracks).numpy()

    def items_of(self, tracks, labelled=True):
        """Numbers of the items of some tracks, by default of those that have a target."""
        mine = np.isin(self.items.owner, tracks)
        if labelled and self.per_frame:
            mine &= (self.y.view(len(mine), -1)[:, 0] >= 0).numpy()
        return np.flatnonzero(mine)


class Classes(Target):
    def __init__(self, labels, items):
        self.names = sorted(set(labels))
        super().__init__([self.names.index(label) for label in labels], items)


class Unbalanced(Classes):
    metrics = {"accuracy": accuracy, "class mean": class_mean_accuracy}


class Keys(Target):
    metrics, names = {name: partial(key_metric, scores) for name, scores in KEY_SCORES.items()}, ALL_KEYS


class Tempo(Classes):
    """Classes of beats per minute: ACC1 within 4 %, ACC2 also at 2, 3, 1/2, 1/3 of the tempo."""
    metrics = {"ACC1": partial(tempo_accuracy, factors=(1,)),
               "ACC2": partial(tempo_accuracy, factors=(1, 2, 3, 1 / 2, 1 / 3))}

    def __init__(self, labels, items):
        super().__init__(labels, items)
        self.truth = np.array(labels)

    def predict(self, *args):
        return np.array(self.names)[super().predict(*args).argmax(axis=1)]


class Tags(Target):
    loss = staticmethod(F.binary_cross_entropy_with_logits)
    metrics = {"ROC-AUC": lambda o, t: finite_mean(tag_scores(o, t)[:, 0]),
               "AP": lambda o, t: finite_mean(tag_scores(o, t)[:, 1])}

    def __init__(self, labels, items):
        self.names = sorted(set().union(*labels))
        super().__init__(np.float32([np.isin(self.names, tags) for tags in labels]), items)       # (tracks, tags)


class Regression(Target):
    """Labels: one tuple of numbers a track. Outputs are in units of the training items' mean and deviation."""
    loss, names = staticmethod(F.mse_loss), ("",)
    metrics = {"R2": lambda o, t: float(r2(o, t).mean())}

    def __init__(self, labels, items):
        super().__init__(np.float32(labels), items)                                               # (tracks, axes)


class Emotion(Regression):
    names = ("arousal", "valence")
    metrics = {"R2 joint": Regression.metrics["R2"], "R2 arousal": lambda o, t: float(r2(o, t)[0]),
               "R2 valence": lambda o, t: float(r2(o, t)[1])}


class Chords(Target):
    """25 classes per frame; a row is (frames right, frames with a label). Labels: [(start, end, class)] a track."""
    per_frame, names = True, range(25)
    metrics = {"overlap": lambda c, _: finite_mean(c[:, 0] / np.where(c[:, 1], c[:, 1], np.nan)),
               "overlap (pooled)": lambda c, _: float(c[:, 0].sum() / c[:, 1].sum())}

    def __init__(self, labels, items):
        self.items, self.truth, y = items, np.zeros(len(labels)), []
        for track, intervals in enumerate(labels):
            time = items.time[items.owner == track]
            y.append(np.full(len(time), UNKNOWN))
            for start, end, chord in intervals:
                y[-1][(time >= start) & (time < end)] = chord
        self.y = torch.from_numpy(np.concatenate(y))                       # (items,)

    def predict(self, outputs, items, tracks, setting=None):
        right = (outputs.argmax(dim=1) == self.y[items]).numpy()
        place = np.searchsorted(tracks, self.items.owner[items])
        return np.stack([np.bincount(place, hit, len(tracks)) for hit in (right, (self.y[items] >= 0).numpy())], axis=1)


class Beats(Target):
    """Beat or not, per frame; a row is (hits, beats estimated, beats true), every beat counted. Labels: beat times.

    Frames within one and a half frames of a beat are positive. Frames count from one beat period before the first
    beat to one after the last, as an intro without music has no beats. The threshold is selected on validation.
    """
    per_frame, settings, names = True, np.arange(1, 20) / 20, ("beat",)
    loss = staticmethod(F.binary_cross_entropy_with_logits)
    metrics = {"F": lambda c, _: float(f_measure(c).mean()),
               "F (pooled)": lambda c, _: f_measure(c.sum(axis=0)[None]).item()}

    def __init__(self, labels, items):
        self.items, self.truth, self.beats, y = items, np.zeros(len(labels)), [], []
        for track, beats in enumerate(map(np.array, labels)):
            time = items.time[items.owner == track]
            step = np.median(np.diff(time))
            beats = beats[beats < time[-1] + step]
            self.beats.append(beats)
            y.append(np.full((len(time), 1), UNKNOWN, np.float32))
            if len(beats) > 1:
                period = np.median(np.diff(beats))
                counted = (time >= beats[0] - period) & (time <= beats[-1] + period)
                y[-1][counted, 0] = np.abs(time[counted, None] - beats).min(axis=1) <= 1.5 * step
        self.y = torch.from_numpy(np.concatenate(y))                       # (items, 1)

    def predict(self, outputs, items, tracks, setting=0.5):
        activation, owner, rows = outputs[:, 0].sigmoid().numpy(), self.items.owner[items], []
        for track in tracks:
            mine = owner == track
            found = pick_beats(activation[mine], self.items.time[items[mine]], setting)
            rows.append([beat_hits(found, self.beats[track]), len(found), len(self.beats[track])])
        return np.array(rows)


TARGETS = {"class": Classes, "unbalanced": Unbalanced, "key": Keys, "tempo": Tempo, "tags": Tags,
           "regression": Regression, "emotion": Emotion, "chords": Chords, "beats": Beats}


# ---------------------------------------------------------------- the probe

LINEAR = dict(hidden=0, batch=128, lr=1e-3, dropout=0.0, l2=0.0, standardize=True)
GRID = [dict(standardize=s, hidden=h, batch=b, lr=r, dropout=d, l2=w) for s, h, b, r, d, w in
        product((False, True), (0, 512), (64, 256), (1e-5, 1e-4, 1e-3), (0.25, 0.5, 0.75), (0.0, 1e-4, 1e-3))]
STEPS, EVERY, PATIENCE = 50 * 128, 32, 640  # at most (CoJEPA); validation every 32 steps, patience 640 (our choice)
GRID_STEPS = (64, 128, 256, 512, 1024)      # of the rounds of successive halving (our choice)
FRAME_BATCH = 2048                          # frames a step where labels belong to frames (our choice)
SYNTH_STEPS = 640                           # every training run ends with this table: short fits (our choice)


class Probe(nn.Module):
    """Standardised features -> linear layer, or `hidden` ReLU units and a linear layer -> units of the target."""

    def __init__(self, x, target, train, hidden, dropout, standardize):
        super().__init__()
        features, dim = x[train].float(), x.shape[1]
        self.mean, self.scale = 0.0, 1.0
        if standardize:
            self.mean, self.scale = features.mean(dim=0), features.std(dim=0, unbiased=False) + 1e-6
        self.offset, self.gain = 0.0, 1.0
        if isinstance(target, Regression):
            self.offset, self.gain = target.y[train].mean(dim=0), target.y[train].std(dim=0, unbiased=False) + 1e-6
        layers = [nn.Dropout(dropout), nn.Linear(dim, hidden), nn.ReLU()] if hidden else []
        self.net = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden or dim, len(target.names)))

    def forward(self, x):
        """(items, dim) -> (items, outputs)."""
        return self.net((x.float() - self.mean) / self.scale) * self.gain + self.offset


@contextmanager
def one_thread():
    """One thread inside: the products of a probe are small, a second thread costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def fit(x, target, train, valid, seed, batch, lr, l2, steps=STEPS, patience=PATIENCE, **network):
    """Train a probe on the items `train`; the weights of the lowest loss on the items `valid` are kept.

    x (items, dim); train, valid: item numbers; network: hidden, dropout, standardize of Probe.
    """
    torch.manual_seed(seed)
    probe = Probe(x, target, train, **network)
    optimizer = torch.optim.Adam(probe.parameters(), lr=lr, weight_decay=l2, fused=True)
    best_loss, best_step, best = np.inf, 0, deepcopy(probe.state_dict())
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            probe.eval()
            with torch.no_grad():
                loss = target.loss(probe(x[valid]), target.y[valid]).item()
            if loss < best_loss:
                best_loss, best_step, best = loss, step, deepcopy(probe.state_dict())
            if step == steps or step - best_step >= patience:
                break
            probe.train()
        chosen = train[torch.randint(len(train), (batch,))]
        loss = target.loss(probe(x[chosen]), target.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probe.load_state_dict(best)
    return probe.eval()


@torch.no_grad()
def predict(probe, x, target, tracks, setting=None):
    """One row for each of `tracks` (sorted numbers), from the outputs of `probe` on all their items."""
    items = target.items_of(tracks, labelled=False)
    return target.predict(probe(x[items]), items, tracks, setting)


def score(target, predicted, tracks):
    """The metric that selects, on rows of predictions."""
    metric = next(iter(target.metrics.values()))
    return metric(predicted, target.truth[tracks])


def fit_split(x, target, split, seed, **config):
    """Fit on one split and select the target's setting: (score on its validation tracks, rows of its test tracks)."""
    train, valid, test = split
    probe = fit(x, target, target.items_of(train), target.items_of(valid), seed, **config)
    scores = {setting: score(target, predict(probe, x, target, valid, setting), valid) for setting in target.settings}
    setting = max(scores, key=scores.get)
    return scores[setting], predict(probe, x, target, test, setting)


def choose(x, target, train, valid):
    """The grid's best configuration by validation score, by successive halving. It is given no test track."""
    configs, split = GRID, (train, valid, valid)
    for steps in GRID_STEPS:
        scores = [fit_split(x, target, split, 0, steps=steps, patience=256, **config)[0] for config in configs]
        order = np.argsort(-np.array(scores), kind="stable")               # ties by the order of the grid
        configs = [configs[i] for i in order[:(len(order) + 1) // 2]]
    return configs[0]


# ---------------------------------------------------------------- splits


def splits_of(tracks):
    """[(train, valid, test)] track numbers, one per run: the given split for every seed, or rotating folds.

    Folds: one run each with fold f as test and f + 1 as validation. Tracks without a split make five folds of whole
    groups. Raises InputError.
    """
    parts = [t.split for t in tracks]
    if set(parts) == {None}:
        groups = np.random.default_rng(0).permutation(sorted({t.group for t in tracks}))
        fold = {group: i % FOLDS for i, group in enumerate(groups)}
        parts = [fold[t.group] for t in tracks]
    parts = np.array(parts)
    if parts.dtype.kind == "i":
        folds = np.unique(parts)
        if len(folds) < 3:
            raise InputError(f"{len(folds)} fold(s) or group(s) found; train, valid and test need at least three")
        return [(np.flatnonzero((parts != test) & (parts != valid)), np.flatnonzero(parts == valid),
                 np.flatnonzero(parts == test)) for test, valid in zip(folds, np.roll(folds, -1))]
    split = tuple(np.flatnonzero(parts == name) for name in ("train", "valid", "test"))
    if 0 in map(len, split):
        raise InputError("{} train, {} valid and {} test tracks; each part needs some".format(*map(len, split)))
    return [split] * SEEDS


def labelled_part(target, train, share, seed):
    """A share of the training tracks, drawn by the seed; of each class, where there are classes, at least one track."""
    rng, truth, picked = np.random.default_rng(seed), target.truth[train], []
    classes = truth if truth.dtype.kind == "i" else np.zeros(len(train))
    for c in np.unique(classes):
        mine = train[classes == c]
        picked.append(rng.choice(mine, max(1, round(share * len(mine))), replace=False))
    return np.sort(np.concatenate(picked))


def chance(x, target, train, test):
    """Rows of the test tracks when all outputs are the mean target of the training items (beats: there are none)."""
    y = target.y[target.items_of(train)]
    mean = (y if y.is_floating_point() else F.one_hot(y, len(target.names))).float().mean(dim=0)  # (outputs,)
    return predict(lambda x: mean.expand(len(x), -1), x, target, test, target.settings[-1])


def fit_splits(x, target, splits, share, configs):
    """Every split, on a share of its training labels: (validation scores, rows of the test tracks)."""
    found = []
    for seed, (train, *rest) in enumerate(splits):
        split = labelled_part(target, train, share, seed), *rest
        found.append(fit_split(x, target, split, seed, **configs[seed]))
    return tuple(zip(*found))


# ---------------------------------------------------------------- from items to a table

# A table is {row: {column: cell}}, a cell dict(mean, std, scores of each seed, sometimes interval).


def mean_of(values):
    """The cell of a table, from one score per seed."""
    return dict(mean=float(np.nanmean(values)), std=float(np.nanstd(values)), scores=list(map(float, values)))


def cells_of(metrics, truth, splits, outputs):
    """{metric: cell}, the first with its interval. truth of all tracks; outputs: rows of the test tracks per split."""
    truths = [truth[test] for _, _, test in splits]
    cells = {name: mean_of(list(map(metric, outputs, truths))) for name, metric in metrics.items()}
    first, shared = next(iter(metrics)), splits[0] is splits[-1]           # seeds that share their test tracks
    differing = slice(1 if shared else None)                               # differ little: the first stands for all
    cells[first]["interval"] = interval(metrics[first], outputs[differing], truths[differing])
    return cells


def add_columns(table, more, prefix=""):
    """Put the columns of a table into another one, row by row."""
    for name, row in more.items():
        table.setdefault(name, {}).update({prefix + column: cell for column, cell in row.items()})


def probe_targets(items, tracks, targets, runs=None, grid=False, shares=(), **config):
    """Probe every row of `items` on all targets {label: kind}, in the first `runs` splits: (table, remarks).

    grid: select the configuration of each row; shares: of the training labels, as extra columns; config: changes to
    LINEAR.
    """
    splits, table, remarks = splits_of(tracks)[:runs], {}, []
    for label, kind in targets.items():
        target = TARGETS[kind]([t.labels[label] for t in tracks], items)
        rows, more = probe_rows(items.rows, target, splits, grid, shares, **config)
        add_columns(table, rows, f"{label} " if len(targets) > 1 else "")
        remarks += [f"{label}: {len(target.names)} outputs", *more]
    return table, remarks


def probe_rows(rows, target, splits, grid=False, shares=(), **config):
    """Probe rows {name: (items, dim)} on one target, once per split: (table, remarks)."""
    config = LINEAR | (dict(batch=FRAME_BATCH) if target.per_frame else {}) | config
    cells, table, remarks, runs = partial(cells_of, target.metrics, target.truth, splits), {}, [], {}
    for name, x in tqdm(rows.items(), desc="probes", unit="row"):
        configs = [config] * len(splits)
        if grid:
            different = splits[:1] if splits[0] is splits[-1] else splits
            configs = [choose(x, target, train, valid) for train, valid, _ in different]
            remarks += [f"{name}: {config}" for config in configs]
            configs *= len(splits) // len(different)
        runs[name] = fit_splits(x, target, splits, 1, configs)
        table[name] = cells(runs[name][1])
        for share in shares:
            metric, cell = next(iter(cells(fit_splits(x, target, splits, share, configs)[1]).items()))
            table[name][f"{metric} @{100 * share:g} %"] = cell
    for title, chosen in (("chosen on validation", [n for n in runs if not n.startswith(("raw", "untrained "))]),
                          ("untrained, chosen", [n for n in runs if n.startswith("untrained ")])):
        if len(chosen) > 1:
            best = [max(chosen, key=lambda name: runs[name][0][seed]) for seed in range(len(splits))]
            table[title] = cells([runs[name][1][seed] for seed, name in enumerate(best)])
            remarks.append(f"{title}: {', '.join(best)}")
    table["chance"] = cells([chance(x, target, train, test) for train, _, test in splits])
    return table, remarks


def text_of(cell):
    """'52.1 ± 1.0 [48.3 55.9]': a cell in %."""
    text = f"{100 * cell['mean']:.1f} ±{100 * cell['std']:4.1f}"
    return text + " [{:.1f} {:.1f}]".format(*(100 * v for v in cell["interval"])) if "interval" in cell else text


def print_table(title, table):
    """Aligned table in %; missing cells stay empty."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [["", *columns]]
    for name, row in table.items():
        lines.append([name, *(text_of(row[column]) if column in row else "" for column in columns)])
    widths = [max(map(len, texts)) + 2 for texts in zip(*lines)]
    print(f"\n{title}")
    for name, *texts in lines:
        print(name.ljust(widths[0]) + "".join(map(str.rjust, texts, widths[1:])))


def publish(source, name, title, table, remarks=()):
    """Print a table, and write it to probe-NAME.json beside `source` (for the shipped weights: to out/)."""
    print_table(title, table)
    print(*remarks, sep="\n")
    folder = Path("out") if Path(source).resolve() == SHIPPED else Path(source).parent
    write_atomic(folder / f"probe-{name}.json", json.dumps(dict(title=title, rows=table), indent=1).encode())
    print(f"written to {folder / f'probe-{name}.json'}")


def print_comparison(args):
    """Tables of several runs: for each column, one column a run. Raises InputError for other files."""
    tables = {}                                                            # {column: {row: {run: cell}}}
    for path in map(str, args.tables):
        try:
            rows = json.loads(Path(path).read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path}: is not a table written by probe.py") from None
        for name, row in rows.items():
            for column, cell in row.items():
                tables.setdefault(column, {}).setdefault(name, {})[path] = cell
    for column, table in tables.items():
        print_table(column, table)


# ---------------------------------------------------------------- zero-shot key


@cache
def known_songs():
    """32 synthetic songs whose key is known: [(frames, 224) uint8], [tonic of the major key with their signature]."""
    songs, front_end = [compose(i) for i in range(32)], FrontEnd()
    frames = [audio_to_frames(torch.from_numpy(render(song)), front_end) for song in songs]
    return frames, [song["signature"] for song in songs]


def transpose(keys, steps):
    """Key probabilities (..., 12 or 24) of music `steps` semitones higher: index q goes to q + steps in each mode."""
    return keys.unflatten(-1, (-1, 12)).roll(steps, dims=-1).flatten(-2)


@torch.inference_mode()
def key_outputs(model, tracks, device, crops=range(0, MAX_CROP + 1, 3)):
    """Key probabilities of each track, (tracks, 12 signatures or 24 keys), before calibration.

    Test-time augmentation: every window at five crops (all 13 are no better on real recordings), transposed back. The
    mean over crops and windows is geometric: a window that excludes a key counts more than one that favours it.
    """
    name, (owner, _, windows) = model.key_token(), windows_of(tracks)
    logs = torch.zeros(len(owner), model.tasks[name].outputs)                                     # (windows, 12 or 24)
    for indices, batch in batches_of(windows):
        for crop in crops:
            with autocast(device):
                keys = model.tasks[name].log_keys(model(*views_of(batch, device, crop))[0][name]).exp()  # (n, 12 or 24)
            logs[indices] += transpose(keys.cpu(), crop - PITCH_CROP).clamp(min=1e-4).log() / len(crops)
    return track_mean(logs, owner, np.arange(len(tracks))).softmax(dim=1)


def calibrate(model, device):
    """The class of C major: CPSD leaves one rotation of the circle open, and songs of known key determine it.

    (STONE: one clip, a pitch fork. A network may be a fifth off on a third of all songs: eight are too few.)
    """
    frames, signatures = known_songs()
    keys = key_outputs(model, frames, device, [PITCH_CROP]).unflatten(-1, (-1, 12)).sum(dim=1)     # (songs, 12)
    return sum(key.roll(-signature) for key, signature in zip(keys, signatures)).argmax().item()


def key_probabilities(model, tracks, device, turn=None):
    """Zero-shot key probabilities, (tracks, 12 signatures or 24 keys as in ALL_KEYS), calibrated.

    12: index = tonic of the major key with that signature (0 = C). turn: what `calibrate` returned, if it is known.
    """
    turn = calibrate(model, device) if turn is None else turn
    keys = transpose(key_outputs(model, tracks, device), -turn)
    return torch.cat([keys[:, :12], keys[:, 12:].roll(9, dims=1)], dim=1)  # output 12 + q is the relative minor of q


def template_rows(tracks):
    """losses.template_keys of whole tracks: (tracks, 24) array, keys as in ALL_KEYS."""
    cqts = (torch.from_numpy(frames[:, :N_BINS].astype(np.float32) / 255) for frames in tracks)   # (frames, 96) each
    return torch.cat([template_keys(cqt[None]) for cqt in cqts]).numpy()


def zero_shot(model, songs, device, truth, splits=None):
    """Table of the key token, its untrained version and the template, without a probe.

    truth (songs,) keys 0..23; splits: by default every song is a test song.
    """
    splits = splits or [((), (), np.arange(len(songs)))]
    rows, table = {"key template": template_rows(songs)}, {}
    if name := model.key_token():
        for prefix, network in (("", model), ("untrained ", untrained(model, device))):
            rows[f"{prefix}{name} zero-shot"] = key_probabilities(network, songs, device).numpy()
    for name, outputs in rows.items():
        names = KEY_SCORES if outputs.shape[1] == 24 else ("signature", "KSEA")  # 12 outputs have no mode
        metrics = {metric: Keys.metrics[metric] for metric in names}
        table[name] = cells_of(metrics, np.array(truth), splits, [outputs[test] for _, _, test in splits])
    return table


# ---------------------------------------------------------------- inside one song


@torch.inference_mode()
def class_attention(model, songs, device):
    """Attention of each class token on the frames of every whole window: (windows, layers, tokens, heads, 126)."""
    first, found = model.class_token_count, []
    for _, batch in batches_of(windows_of(songs)[2]):                      # of one length: they come in order
        inside = model(*views_of(batch, device), layers=range(len(model.blocks)))[1]    # inputs of each block
        weights = [block.attention(inside[i])[0][..., :first, first:] for i, block in enumerate(model.blocks)]
        found.append(torch.stack(weights, dim=1).transpose(2, 3).cpu())    # (n, layers, tokens, heads, 126)
    return torch.cat(found)


def onset_windows(songs):
    """Spectral flux of every whole window, (windows, 126): mean rise of the mel from the frame before, in dB."""
    fluxes = []
    for frames in songs:
        mel = frames[:, N_BINS:].astype(np.float32) * DYNAMIC_RANGE / 255                # (frames, 128) dB
        fluxes.append(np.diff(mel, axis=0, prepend=mel[:1]).clip(min=0).mean(axis=1))    # (frames,)
    return torch.from_numpy(np.stack(windows_of(fluxes)[2]))


def correlations(x, envelope):
    """Pearson's r of x (..., frames) with the envelope (..., frames): (...); 0 where one of them is constant."""
    return (centred(x) * centred(envelope)).sum(dim=-1)


def self_similarity(x, size):
    """Cosines of cells of `size` frames, the song's mean removed: x (frames, dim) -> (cells, cells)."""
    x = x[:len(x) // size * size].float().unflatten(0, (-1, size)).mean(dim=1)       # (cells, dim)
    x = F.normalize(x - x.mean(dim=0), dim=-1)
    return x @ x.T


def attention_to_onsets(model, songs, device, prefix=""):
    """Table: correlation of class-token attention (mean over heads) with the onset envelope, by layer, over windows."""
    r = correlations(class_attention(model, songs, device).mean(dim=3), onset_windows(songs)[:, None, None])
    table = {}                                                                       # r (windows, layers, tokens)
    for layer, token in product(range(r.shape[1]), range(r.shape[2])):
        row = table.setdefault(f"{prefix}sequence L{layer + 1}", {})
        row[f"{model.tokens[token]} ~ onsets"] = mean_of(r[:, layer, token].tolist())
    return table


# ---------------------------------------------------------------- figures

FIFTHS = [7 * i % 12 for i in range(12)]  # C G D A ...: neighbours share six of seven notes
FIFTH_NAMES = "C/a G/e D/b A/f# E/c# B/g# Gb/eb Db/bb Ab/f Eb/c Bb/g F/d".split()


def pyplot():
    """matplotlib.pyplot, or None where it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures without matplotlib: pip install matplotlib")
        return None
    plt.rcParams["figure.constrained_layout.use"] = True
    return plt


def save_figure(plt, figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"figure in {path}")


def draw_panels(plt, path, panels, begin, end):
    """Images over one time axis, begin to end in s: panels [(title, image (rows, frames), row names or ())]."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 3 * len(panels)), sharex=True, squeeze=False)
    for ax, (title, image, names) in zip(axes[:, 0], panels):
        extent = (begin, end, -0.5, len(image) - 0.5)                      # row 0 at the bottom
        drawn = ax.imshow(image, origin="lower", aspect="auto", extent=extent, vmax=np.quantile(image, 0.995))
        ax.set(title=title, yticks=range(len(names)), yticklabels=names, xlabel="time, s")
        figure.colorbar(drawn, ax=ax, pad=0.01)
    save_figure(plt, figure, path)


def principal(x):
    """PCA: x (tracks, dim) -> (tracks, 2), and each direction's share of the variance."""
    u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    return u[:, :2] * s[:2], (s[:2] ** 2 / s.square().sum()).tolist()


def draw_map(plt, path, rows):
    """rows [({name: (tracks, dim)}, labels of the tracks, by: key, folder or instrument)], one row of panels each."""
    width = len(rows[0][0])
    figure, panels = plt.subplots(len(rows), width, figsize=(1 + 4.8 * width, 9), squeeze=False)
    for line, (found, labels, by) in zip(panels, rows):
        names = [name for name in FIFTH_NAMES if name in labels]           # keys by fifths, other labels by name
        names += sorted(set(labels) - set(names))
        for ax, (name, x) in zip(line, found.items()):
            places, shares = principal(x)
            for i, label in enumerate(names):
                mine = np.array(labels) == label
                ax.scatter(*places.numpy()[mine].T, s=22, color=plt.cm.hsv(i / len(names)), label=label)
            ax.set(title=f"{name}, by {by}", xlabel=f"PC 1 ({100 * shares[0]:.0f} % of the variance)",
                   ylabel=f"PC 2 ({100 * shares[1]:.0f} %)")
        ax.legend(title=by, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(plt, figure, path)


# ---------------------------------------------------------------- what a command works on

SHIPPED = Path(__file__).resolve().parent / "tests" / "weights" / "mt2.pt"
EMERGENCE_SONGS = dict(train=64, valid=16, test=32)  # enough to compare layers in a minute (our choice)


def open_model(args, frames=False):
    """(path, network): --checkpoint, or the newest run in out/, or the shipped weights. Raises InputError.

    frames: the command needs class tokens beside frames.
    """
    path = args.checkpoint or max(Path("out").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime, default=SHIPPED)
    if not args.checkpoint:
        print(f"no run in out/: using the shipped weights {path}" if path == SHIPPED else f"checkpoint {path}")
    try:
        model = load_checkpoint(path, args.device)
    except (ValueError, RuntimeError, AssertionError) as error:  # the last two: torch has no such device
        raise InputError(str(error).partition("\n")[0]) from None
    if frames and (model.patches != [None] or model.pool != "token"):
        raise InputError(f"{args.task}: needs class tokens beside frames; {path} was trained with --patch "
                         f"{model.config['patch']} --pool {model.pool}, give one with --patch 1 and --pool token")
    return path, model


def songs_of(store):
    return [store.track(i) for i in range(len(store.paths))]


def synth_tracks(**parts):
    """The first songs of some parts of the embedded set, as train=64: ([(frames, 224) uint8], tracks)."""
    store, songs, tracks = prepare_synth(), [], []
    for part, count in parts.items():
        for i in SYNTH_SPLITS[part][:count]:
            songs.append(store.track(i))
            tracks.append(Track(store.paths[i], None, compose(i), part, str(i)))
    return songs, tracks


def tracks_of(args):
    """Labels of the task that the command names: (tracks, {target: kind}). Raises InputError; nothing is downloaded."""
    if args.task in ("folders", "csv"):
        return read_folders(args) if args.task == "folders" else read_csv(args)
    task, tracks = TASKS[args.task], []
    roots = [args.data] if args.data else [Path("datasets") / home for home in task.homes]
    try:
        tracks = [t for t in task.read(Files(roots)) if None not in t.labels.values()]
        problem = "none of its audio files found"
    except InputError as error:
        problem = str(error)
    except (KeyError, ValueError) as error:
        problem = f"a label file is not as published: {type(error).__name__} {error}"
    if not any(t.path for t in tracks) and not (args.features and tracks):
        raise InputError(f"{args.task}: {task.what}; {problem}\n  needs below {' and '.join(map(str, roots))}, or in "
                         f"another folder with --data: {task.needs}")
    return tracks, task.targets


def open_tracks(name, tracks):
    """Prepare the audio of `tracks`, broken files left out: ([(frames, 224) uint8], the tracks that are there)."""
    tracks = {t.name: t for t in tracks}
    files = [(name, t.path.resolve()) for name, t in sorted(tracks.items()) if t.path]
    store = prepare_files(files, Path("data") / f"{name}-{hashed(str(files), 16 ** 8):08x}")
    return songs_of(store), [tracks[name] for name in store.paths]


def open_features(path, tracks, per_frame):
    """Embeddings of another model: (Items, tracks found). Raises InputError.

    An npz with `features` (items, dim), `track` (items,) names, and for labels per frame `time` (items,) in seconds.
    A track is named as in the task: "blues.00000", or the `file` of a CSV.
    """
    try:
        with np.load(path) as file:
            features = torch.from_numpy(np.float32(file["features"]))
            names = file["track"].tolist()
            seconds = np.float64(file["time"]) if per_frame else np.zeros(len(names))
    except Exception:  # np.load has no exception of its own: zip, pickle, value and end-of-file errors
        arrays = "features (items, dim), track (items,)" + (", time (items,)" if per_frame else "")
        raise InputError(f"{path}: is not an npz with the arrays {arrays}") from None
    if features.ndim != 2 or not 0 < len(features) == len(names) == len(seconds) or not features.isfinite().all():
        raise InputError(f"{path}: features {tuple(features.shape)} must be (items, dim), finite, one row for each of "
                         f"{len(names)} tracks")
    number = {t.name: i for i, t in enumerate(tracks)}
    owner = np.array([number.get(str(name), -1) for name in names])        # -1: not in the task
    order = np.lexsort((seconds, owner))                                   # by track, then by time
    order = order[owner[order] >= 0]
    if not order.size:
        raise InputError(f"{path}: none of its tracks ({names[0]}, ...) is in the task ({tracks[0].name}, ...)")
    found, owner = np.unique(owner[order], return_inverse=True)
    return Items({"features": features[order]}, owner, seconds[order]), [tracks[i] for i in found]


def layers_of(args, model):
    """--layers as a list of numbers, by default the last one. Raises InputError."""
    possible = list(map(str, range(model.config["depth"] + 1)))
    asked = possible if args.layers == "all" else (args.layers or possible[-1]).split(",")
    if not set(asked) <= set(possible):
        raise InputError(f"--layers {args.layers}: this network has layers 0 to {possible[-1]}; give numbers, or all")
    return [int(n) for n in asked]


def counts_line(official, tracks, kept):
    """'926 of 930 files; missing or unreadable: ...', against the official number of tracks where there is one."""
    # GTZAN's jazz.00054 does not decode in the copy that circulates.
    lost = sorted({t.name for t in tracks} - {t.name for t in kept} - {"jazz.00054"})
    line = f"{len(kept)} of {official or len(tracks)} files"
    if lost:
        line += f"; {len(lost)} missing or unreadable: {', '.join(lost[:8])}" + (", ..." if lost[8:] else "")
    if official and (lost or len(tracks) != official):
        return line + "; INCOMPLETE: not comparable with the benchmark"
    return line + "; complete: the benchmark's set" if official else line


# ---------------------------------------------------------------- commands


def run_task(args):
    """One task from files to table."""
    tracks, targets = tracks_of(args)
    (label, kind), shot = next(iter(targets.items())), {}
    if args.features:
        source = args.features
        items, kept = open_features(source, tracks, TARGETS[kind].per_frame)
    else:
        source, model = open_model(args)
        songs, kept = open_tracks(args.task, tracks)
        items = all_items(model, songs, args.device, layers_of(args, model), TARGETS[kind].per_frame)
        if kind == "key":
            shot = zero_shot(model, songs, args.device, [t.labels[label] for t in kept], splits_of(kept))
    splits = splits_of(kept)
    table, remarks = probe_targets(items, kept, targets, None, args.grid, args.shares)
    add_columns(table, shot)
    name, official = f"{args.task}-{Path(args.data or '').resolve().stem}-{label}", None
    if args.task in TASKS:
        name, official = args.task, TASKS[args.task].official
    name = re.sub(r"[^\w-]+", "-", name) + ("-grid" if args.grid else "")
    runs = "seeds" if splits[0] is splits[-1] else "folds"
    sizes = "{} train, {} valid, {} test".format(*map(len, splits[0]))
    title = (f"{args.task}: {source}\n{counts_line(official, tracks, kept)}\nprotocol "
             f"{'grid' if args.grid else 'linear'}, {len(splits)} {runs}; split of the first: {sizes}; "
             f"{len({t.group for t in kept})} groups; in %, mean ± deviation [95 % interval over tracks]")
    publish(source, name, title, table, remarks)


def print_list(args):
    """Which tasks there are, where each looks and what it needs."""
    for name, task in TASKS.items():
        print(f"{name}: {task.what}\n    in datasets/{' or datasets/'.join(task.homes)}: {task.needs}")
    print("folders, csv: your recordings, one sub-folder per class or a table of labels\nsynth: the embedded songs")


SYNTH_COLUMNS = ("key signature", "key accuracy", "instrument accuracy", "chords overlap (pooled)", "retrieval")


def synth_table(model, device):
    """All tasks of the embedded songs, as one table."""
    songs, tracks = synth_tracks(train=512, valid=128, test=256)
    items = all_items(model, songs, device)
    shown = [*model.tokens[:model.class_token_count], "sequence mean"]  # the other readouts take as long as these
    shown += [f"untrained {name}" for name in shown] + ["raw"]
    items = items._replace(rows={name: items.rows[name] for name in shown})
    table, _ = probe_targets(items, tracks, {"key": "key", "instrument": "class"}, steps=SYNTH_STEPS)
    test = splits_of(tracks)[0][2]
    first, last = np.searchsorted(items.owner, test), np.searchsorted(items.owner, test, side="right") - 1
    for name, x in items.rows.items():  # first and last window of each test track
        table[name]["retrieval"] = mean_of(retrieval(x[first], x[last]))
    some, parts = synth_tracks(train=96, valid=32, test=64)
    frames = all_items(model, some, device, per_frame=True)
    add_columns(table, probe_targets(frames, parts, {"chords": "chords"}, 1, steps=SYNTH_STEPS, lr=3e-3)[0], "chords ")
    keys = [tracks[i].labels["key"] for i in test]
    add_columns(table, zero_shot(model, [songs[i] for i in test], device, keys), "key ")
    for name, row in table.items():
        table[name] = {column: row[column] for column in SYNTH_COLUMNS if column in row}
    return table


def print_synth(checkpoint, device):
    """The table of the embedded songs for one checkpoint, printed and written beside it."""
    title = (f"{checkpoint} on {len(SYNTH_SPLITS['test'])} held-out synthetic songs, in %, {SEEDS} probe seeds\n"
             "(512 labelled songs; chords: 64 songs, one seed; retrieval: the same song among 128)")
    publish(checkpoint, "synth", title, synth_table(load_checkpoint(checkpoint, device), device))


def name_of(probabilities):
    """'C major / A minor (93 %)' of 12 probabilities, 'A minor (88 %)' of 24."""
    best = probabilities.argmax().item()
    full = lambda key: f"{ALL_KEYS[key].capitalize()} {'major' if key < 12 else 'minor'}"
    relative = f" / {full(12 + (best + 9) % 12)}" if len(probabilities) == 12 else ""
    return f"{full(best)}{relative} ({100 * probabilities[best]:.0f} %)"


def print_key(args):
    """Zero-shot key of songs, also per 16 s; with a CSV of keys, its scores."""
    path, model = open_model(args)
    if model.key_token() is None:
        raise InputError(f"{path}: has no key token; give another --checkpoint, or train one with --tokens skey,ntxent")
    if args.keys:
        return score_keys(args, path, model)
    front_end, piece, files, readable = FrontEnd(), 4 * SEGMENT, [], 0
    turn = cache(partial(calibrate, model, args.device))                   # once, for the first file that can be read
    for song in args.songs:
        files += [song] if Path(song).is_file() else [path for _, path in find_audio([song])]
    for file in files:
        try:
            frames = audio_to_frames(read_audio(file), front_end)
        except InputError as error:
            print(f"skipped {error}")
            continue
        readable += 1
        parts = [frames[i:i + piece] for i in range(0, max(1, len(frames) - SEGMENT), piece)]
        keys = key_probabilities(model, [frames, *parts], args.device, turn())
        print(f"{file}: {name_of(keys[0])}")
        for i, key in enumerate(keys[1:] if len(parts) > 2 else []):
            seconds = int(i * piece * FRAME_SECONDS)
            print(f"    {seconds // 60}:{seconds % 60:02d}  {name_of(key)}")
    if not readable:
        raise InputError(f"none of {len(files)} files could be read as audio; see the lines above")


def score_keys(args, path, model):
    """Table of zero-shot keys against those of a CSV: the network, the untrained one and the template."""
    store = prepare_folders(args.songs)
    labels = read_labels(args.keys, "key", store.paths)
    keys = [parse_key(labels.get(name, "")) for name in store.paths]
    truth = {i: key for i, key in enumerate(keys) if key is not None}
    if not truth:
        raise InputError(f"{args.keys}: no row has a single key (F# minor) of a file below {' '.join(args.songs)}")
    table = zero_shot(model, [store.track(i) for i in truth], args.device, list(truth.values()))
    title = (f"zero-shot key, {len(truth)} tracks ({len(labels) - len(truth)} name no single key), in % [95 % "
             "bootstrap interval]\nsignature: relatives count; KSEA: half for a fifth; weighted: MIREX, ascending")
    publish(path, f"key-{Path(args.songs[0]).resolve().name}", title, table)


def embeddings(model, songs, device, windows=False):
    """{row: (tracks, dim)}: class tokens and sequence mean, mean over the windows of songs [(frames, 224) uint8].

    windows: {row: (windows, dim)} of every window, with `track` (windows,) its number and `time` (windows,) in seconds.
    """
    items = extract(model, songs, device)
    names = [*model.tokens[:model.class_token_count], "sequence mean"]
    rows = {name.removesuffix(" mean"): items.rows[name].float() for name in names}
    if windows:
        return rows | dict(track=items.owner, time=items.time)
    return {name: track_mean(x, items.owner, np.arange(len(songs))) for name, x in rows.items()}


def write_embeddings(args):
    """Class tokens and the sequence mean of every track below the folders, or of every 4 s window, as an npz."""
    (_, model), store = open_model(args), prepare_folders(args.folders)
    arrays = embeddings(model, songs_of(store), args.device, args.windows)
    file = io.BytesIO()
    np.savez(file, paths=np.array(store.paths), **arrays)
    write_atomic(args.out, file.getbuffer())
    print(f"{args.out}: paths, {', '.join(arrays)} of {len(store.paths)} tracks; {len(store.skipped)} files skipped, "
          f"{store.folder}/index.jsonl has the reasons")


def print_show(args):
    """Look inside one song: correlation of attention and onsets, and two figures where matplotlib is installed.

    closeup.png: 16 s from the middle, CQT, mel and attention; song.png: key signature of each 4 s, self-similarity.
    """
    _, model = open_model(args, frames=True)
    frames, depth = audio_to_frames(read_audio(args.song), FrontEnd()), model.config["depth"]
    if len(frames) < SEGMENT:
        raise InputError(f"{args.song}: is shorter than one window of 4 s; give a longer recording")
    weights = class_attention(model, [frames], args.device).mean(dim=3)              # (windows, layers, tokens, 126)
    r = correlations(weights, onset_windows([frames])[:, None, None]).mean(dim=0)    # (layers, tokens)
    for t, name in enumerate(model.tokens):
        print(f"{name}: correlation of its attention with onsets, by layer: {' '.join(f'{v:.2f}' for v in r[:, t])}")
    if (plt := pyplot()) is None:
        return
    first = max(0, len(weights) // 2 - 2)
    weights = weights[first:first + 4]                                               # (4, layers, tokens, 126)
    begin, end = first * SEGMENT, (first + len(weights)) * SEGMENT
    level = frames[begin:end].T * DYNAMIC_RANGE / 255 - DYNAMIC_RANGE                # (224, frames)
    near = [("CQT, dB: one bin a semitone, a view has 84 of 96 bins", level[:N_BINS], ()),
            ("mel spectrogram, dB: never cropped", level[N_BINS:], ())]
    for t, name in enumerate(model.tokens):
        attention = SEGMENT * weights[:, :, t].transpose(0, 1).flatten(1).numpy()    # (layers, frames)
        near.append((f"attention of the {name} token, x uniform", attention, [f"layer {i + 1}" for i in range(depth)]))
    far = []
    if model.key_token():
        keys = key_probabilities(model, windows_of([frames])[2], args.device)        # (windows, 12 or 24)
        keys = keys[:, :12] + (keys[:, 12:].roll(3, dims=1) if keys.shape[1] == 24 else 0)
        far.append(("key signature of each 4 s, probability", keys[:, FIFTHS].T.numpy(), FIFTH_NAMES))
    rows = extract(None, [frames], args.device, per_frame=True).rows
    rows |= extract(model, [frames], args.device, sorted({1, depth}), per_frame=True).rows
    size = max(16, len(frames) // 1000)                                              # of a cell: half a second or more
    for name, x in rows.items():
        far.append((f"self-similarity of {name}, mean of the song removed", self_similarity(x, size).numpy(), ()))
    folder = Path(args.out or f"{Path(args.song).stem}-figures")
    draw_panels(plt, folder / "closeup.png", near, begin * FRAME_SECONDS, end * FRAME_SECONDS)
    draw_panels(plt, folder / "song.png", far, 0, len(frames) * FRAME_SECONDS)


def print_map(args):
    """PCA of tracks by each class token: a folder's, trained above untrained, or the embedded songs, by two labels."""
    if args.keys and not args.data:
        raise InputError("--keys: are the keys of the songs in --data; give both, or neither for the embedded songs")
    if (plt := pyplot()) is None:
        return
    (_, model), rows = open_model(args), []
    circle = lambda key: "?" if key is None else FIFTH_NAMES[FIFTHS.index(SIGNATURES[key])]
    networks = {"": model}
    if args.data:
        networks["untrained "], store = untrained(model, args.device), prepare_folders([args.data])
        songs, labels = songs_of(store), {}
        if args.keys:
            keys = read_labels(args.keys, "key", store.paths)
            labels["key"] = [circle(parse_key(keys.get(name, ""))) for name in store.paths]
        else:
            labels["folder"] = [Path(p).parts[1] if len(Path(p).parts) > 2 else "." for p in store.paths]
    else:
        songs, tracks = synth_tracks(test=256)
        labels = {"key": [circle(t.labels["key"]) for t in tracks],
                  "instrument": [TIMBRES[t.labels["instrument"]] for t in tracks]}
    if len(songs) < 3:
        raise InputError(f"{args.data}: a map needs at least three tracks, here are {len(songs)}")
    for prefix, network in networks.items():
        found = embeddings(network, songs, args.device)
        names = model.tokens[:model.class_token_count] or ["sequence"]
        panels = {prefix + name: found[name] for name in names}
        rows += [(panels, values, by) for by, values in labels.items()]
    draw_map(plt, args.out, rows)


def print_emergence(args):
    """Linear probes of chords and beats on the sequence tokens of every layer, and class attention against onsets."""
    path, model = open_model(args, frames=True)
    layers, table, count = range(model.config["depth"] + 1), {}, sum(EMERGENCE_SONGS.values())
    songs = []
    for kind in ("chords", "beats"):
        if args.data:
            tracks = [t._replace(split=None) for t in TASKS[kind].read(Files([args.data])) if t.path]
            if not tracks:
                continue
            songs, tracks = open_tracks(kind, sorted(tracks, key=lambda t: hashed(t.name, 1 << 32))[:count])
        else:
            songs, tracks = synth_tracks(**EMERGENCE_SONGS)
        items = all_items(model, songs, args.device, layers, per_frame=True)
        add_columns(table, probe_targets(items, tracks, {kind: kind}, runs=1)[0], f"{kind} ")
    if not songs:
        print("no .lab (chords) or .beats files beside the songs: onsets alone, which need no labels")
        songs = songs_of(prepare_folders([args.data]))[:count]
    songs = [song for song in songs if len(song) >= SEGMENT]
    if not songs:
        raise InputError(f"{args.data}: every song is shorter than one window of 4 s; give longer recordings")
    for prefix, network in (("", model), ("untrained ", untrained(model, args.device, blocks=None))):
        add_columns(table, attention_to_onsets(network, songs, args.device, prefix))
    title = (f"emergence: {path} on {len(songs)} songs, in %; chords and beats: linear probe on sequence tokens\n"
             "~ onsets: 100 r of class-token attention with the onset envelope, over windows")
    name = f"emergence-{Path(args.data).resolve().name}" if args.data else "emergence"
    publish(path, name, title, table)


def shares_of(text):
    """'0.01,0.5' -> [0.01, 0.5]: shares of the labels, each above 0 and at most 1."""
    shares = list(map(float, text.split(",")))
    if not all(0 < share <= 1 for share in shares):
        raise ValueError
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--checkpoint", help="of a run (default: the newest in out/, or the shipped weights)")
    network.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the network")
    protocol = argparse.ArgumentParser(add_help=False, parents=[network])
    protocol.add_argument("--grid", action="store_true", help="select among 216 configurations on the validation set")
    protocol.add_argument("--labels", dest="shares", type=shares_of, default=[], metavar="SHARES",
                          help="also with these shares of the labels: 0.01,0.1,0.25,0.5")
    protocol.add_argument("--layers", help="all, or numbers: 0,6,12 (default: the last layer)")
    protocol.add_argument("--features", metavar="NPZ", help="probe these embeddings: arrays features, track[, time]")
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def command(name, run, text, parent=network):
        made = commands.add_parser(name, help=text, parents=[parent], allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    command("list", print_list, "what there is")
    command("synth", lambda args: print_synth(open_model(args)[0], args.device), "the embedded synthetic songs")
    for name, task in TASKS.items():
        made = command(name, run_task, task.what, protocol)
        made.add_argument("--data", help=f"folder of the data (default datasets/{task.homes[0]})")
    made = command("folders", run_task, "a folder with one sub-folder per class", protocol)
    made.add_argument("--data", required=True, help="the folder")
    made.add_argument("--group", help="regex; files whose match is equal stay on one side of the split")
    made = command("csv", run_task, "your own table of labels", protocol)
    made.add_argument("--data", required=True, help="CSV with a column `file`")
    made.add_argument("--audio", help="folder below which the files lie (default: the CSV's own)")
    made.add_argument("--label", required=True, help="column of the labels")
    made.add_argument("--kind", choices=("class", "tags", "regression", "key"), help="default: inferred")
    made.add_argument("--split", help="column with train, valid or test (default: five folds)")
    made.add_argument("--group", help="column; rows of one group stay in one fold")
    made = command("key", print_key, "zero-shot key")
    made.add_argument("songs", nargs="+", help="audio files or folders")
    made.add_argument("--keys", help="CSV with columns file (path below the folder) and key ('F# minor')")
    made = command("embed", write_embeddings, "embeddings of every track, as an npz")
    made.add_argument("folders", nargs="+", help="folders of audio files")
    made.add_argument("--out", required=True, metavar="NPZ", help="file to write: paths, one array per token, sequence")
    made.add_argument("--windows", action="store_true", help="one row per 4 s window, with the arrays track and time")
    made = command("show", print_show, "figures of one song")
    made.add_argument("song", help="an audio file")
    made.add_argument("--out", help="folder of the figures (default: SONG-figures)")
    made = command("map", print_map, "PCA of a folder of music")
    made.add_argument("--data", help="the folder; sub-folders are colours (default: the embedded songs)")
    made.add_argument("--keys", help="CSV with columns file (path below the folder) and key: keys are colours")
    made.add_argument("--out", default="map.png", metavar="PNG", help="the figure (default map.png)")
    made = command("emergence", print_emergence, "chords, beats and onsets by layer")
    made.add_argument("--data", help="folder of songs, with .lab and .beats files (default: the embedded songs)")
    made = command("compare", print_comparison, "tables side by side")
    made.add_argument("tables", nargs="+", help="JSON files that probe.py wrote")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
