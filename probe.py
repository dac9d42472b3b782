"""What did it learn? Frozen features, judged by one linear layer, beside the rows that learned nothing.

    python probe.py list                                    the tasks, where each looks for its files, what is there
    python probe.py gtzan [--data DIR]                      one task of the field, from files you have
    python probe.py synth                                   the embedded songs, nothing needed
    python probe.py folders --data DIR [--group REGEX]      your recordings, one sub-folder per class
    python probe.py csv --data labels.csv --audio DIR --label COLUMN [--split COLUMN] [--group COLUMN]
    python probe.py key SONG_OR_FOLDER... [--keys CSV]      keys without labels
    python probe.py embed FOLDER... --out FILE.npz          class tokens of every track, for work of your own
    python probe.py show SONG [--out DIR]                   figures: what it sees, hears, looks at and finds alike
    python probe.py map --data DIR [--keys CSV]             a folder of music on a plane, by each class token
    python probe.py emergence [--data DIR]                  what its inside knows though nobody asked: chords, beats, onsets
    python probe.py compare A.json B.json...                runs side by side

The story: tasks (whose files, whose labels) -> features (frozen, cached) -> probe (the only thing trained) -> metrics.

The protocol, `linear`. A track is a recording with a label, say its genre. It is cut into 4 s windows that do not overlap (a
rest under 4 s is dropped unless it is all there is; nothing is padded), and the network's last layer gives one feature vector
a window. Tracks are split before anything else. One linear layer is trained on the windows of the training tracks, each with
its track's label; a track's prediction is the mean of its windows' outputs. Adam, rate 1e-3, batch 128, at most 50 x 128
steps (CoJEPA); features standardised by the training windows; the weights of the best validation score are kept, and the fit
ends when that has not risen for 640 steps (our choice). The test tracks are predicted once. Five seeds, mean and standard
deviation; in brackets the 95 % interval of 1000 bootstrap draws of test tracks (of the first seed, as all seeds share the
test set; of all seeds together where each has its own).

`--grid` tries 216 configurations (jukemir): standardise or not, linear or 512 ReLU units, batch 64 or 256, rate 1e-5,
1e-4 or 1e-3, dropout .25, .5 or .75 (on the input too), L2 0, 1e-4 or 1e-3. The best validation score wins, ties by order;
the code that chooses is never given a test track (where every seed has its own, every seed has its own choice). The
winner is then trained with five seeds. Two departures, for two CPU cores: after 64, 128, 256 and 512 steps the worse half by
validation leaves, and 256 steps without a better score (jukemir: 2048) end a fit.

Local tasks label every frame: `chords` (25 classes, the overlap weighted by duration) and `beats`, where the layer says
"beat" or not. Beat activations are smoothed by (1, 2, 1) / 4; a beat is a frame higher than its four neighbours on each
side and than a threshold, which is the best of 19 on the validation tracks. F-measure with +-70 ms, every beat counted.

Every readout is a row; none is picked by its test score:

    cpsd, ntxent ...   each class token           average, concat    of the class tokens
    sequence mean      of the frames' tokens      all tokens mean    of class tokens and frames' tokens
    sequence           each frame's own token, in local tasks
    untrained ...      the same readouts of the same network with random weights
    raw                mean and deviation over time of the very spectrograms the network sees
    chosen on validation; untrained, chosen    of one network's rows, in each seed the best on validation: what a user would do

`--layers` gives each inner layer its rows too, through the network's final norm as in DINO.
A row is evidence only if it beats raw and untrained: pooled spectrograms already tell a linear layer a lot.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import re
import sys
import time
from collections import Counter, namedtuple
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (AUDIO_SUFFIXES, CROP_BINS, DYNAMIC_RANGE, FMIN, FRAME_SECONDS, HOP, KEY_NAMES, MAX_CROP, N_BINS, N_MELS, PITCH_CROP, SAMPLE_RATE, SCALES, SEGMENT, SYNTH_SPLITS,
                  TIMBRES, FrontEnd, InputError, audio_to_frames, compose, crop_views, find_audio, prepare_files,
                  parse_key, prepare_folders, prepare_synth, read_audio, read_labels, read_table, render_note, run_cli, walk, write_atomic)
import model as networks
from model import MT2, pick_amp

SEEDS = 5


# ---------------------------------------------------------------- labels: keys, chords

# What a key and a chord are, data.py says above its songs. Both are numbers here: the tonic of a key, or the root of a chord, in
# semitones above C (0..11), plus 12 for minor.
ALL_KEYS = KEY_NAMES + "c c# d eb e f f# g g# a bb b".split()  # index 0..23; minor keys in lower case, spelled as in their major relatives
# Tonic of the major key with the same seven notes, hence the same signature: A minor (21) -> C (0).
SIGNATURES = np.array([*range(12), *((tonic + 3) % 12 for tonic in range(12))])


def pitch_class(note):
    """'Bb' -> 10: a letter A..G with any number of sharps and flats, in semitones above C, 0..11."""
    return ("C D EF G A B".index(note[0]) + note.count("#") - note.count("b")) % 12


# Chord qualities by their notes within a fifth (7 semitones) of the root: what lies above, such as sevenths, does not decide.
QUALITIES = {name: set(notes) for notes, names in {
    (0, 4, 7): "maj 7 maj7 maj6 9 maj9 11 maj11 13 maj13", (0, 3, 7): "min min7 minmaj7 min6 min9 min11 min13", (0, 4): "aug aug7",
    (0, 3, 6): "dim dim7 hdim7", (0, 2, 7): "sus2", (0, 5, 7): "sus4", (0, 7): "5", (0,): "1"}.items() for name in names.split()}
DEGREE = r"[#b]*[1-9]\d*"
EDIT = rf"\s*\*?{DEGREE}\s*"
CHORD = re.compile(rf"([A-G][#b]*)(?::(?=[a-z0-9(])([a-z0-9]+)?(?:\(({EDIT}(?:,{EDIT})*)\))?)?(?:/({DEGREE}))?")  # root:quality(edits)/bass
NO_CHORD, UNKNOWN = 24, -1


def semitones(degree):
    """Degree of the major scale, with sharps and flats -> semitones above the root: '5' 7, 'b7' 10, '9' 14."""
    octave, step = divmod(int(degree.lstrip("#b")) - 1, 7)
    return 12 * octave + SCALES["major"][step] + degree.count("#") - degree.count("b")


def parse_chord(label):
    """'Bb:maj7/3', 'G', 'N' -> 0..11 major, 12..23 minor, 24 no chord, -1 neither (no loss, not scored).

    The strict rule of mir_eval's majmin: after the edits in parentheses (a * takes a degree away), and with the bass note
    added, the notes within a fifth of the root must be exactly a major or minor triad. So C:7/b7 is C major, but D:maj/2 and
    Bb:maj(*3) are -1.
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
    return pitch_class(root) if triad == {0, 4, 7} else 12 + pitch_class(root) if triad == {0, 3, 7} else UNKNOWN


def read_intervals(path):
    """Chord intervals [(start, end, class)] of a .lab file (any white space) or a ;-separated csv with a header."""
    if path.suffix == ".csv":
        rows = [(row.get("start", row.get("t_start")), row.get("end", row.get("t_end")), row.get("majmin", row.get("chord")))
                for row in read_table(path, ";")]
    else:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        rows = [(fields[0], fields[1], fields[-1]) for fields in map(str.split, lines) if len(fields) >= 3]
    try:
        return [(float(start), float(end), parse_chord(label)) for start, end, label in rows]
    except (TypeError, ValueError):
        raise InputError(f"{path}: is not a chord file; give lines of start, end and label") from None


def read_times(path):
    """Beat times in seconds, sorted: the first field of every line, whatever white space follows."""
    try:
        return np.sort(np.array([float(line.split()[0]) for line in path.read_text().splitlines() if line.strip()]))
    except ValueError:
        raise InputError(f"{path}: is not a beat file; give one time in seconds at the start of every line") from None


# ---------------------------------------------------------------- tasks: whose files, whose labels

# labels {target: label}; split "train", "valid", "test", a fold number, or None (then groups are split); tracks of one group
# (an artist, an album) stay on one side. path is None where the audio is missing.
Track = namedtuple("Track", "name path labels split group")
# what it is, where to obtain it, what to place in datasets/ and in which `homes` there; read(Files) -> Tracks; targets {name: kind}, see
# metrics_of; expected: the official number of tracks, (train, valid, test) or of all; broken: names that are known not to decode.
Task = namedtuple("Task", "what obtain place homes read targets expected broken note", defaults=((), ""))
LOCAL = ("chords", "beats")


class Files:
    """The files below some folders, found by name: data sets circulate in many layouts, their file names stay."""

    def __init__(self, roots):
        self.roots, self.paths, self.by_name = roots, [], {}
        for root in roots:
            self.paths += walk(root)
        for path in sorted(self.paths, key=lambda path: path.suffix.lower() != ".wav"):  # a .wav is preferred to its .au
            if path.suffix.lower() in AUDIO_SUFFIXES:
                for name in (path.stem, f"{path.parent.name}/{path.stem}"):
                    self.by_name.setdefault(self.plain(name), path)

    @staticmethod
    def plain(name):
        return name.lower().replace("hip-hop", "hiphop")  # GTZAN has both spellings

    def audio(self, *names):
        """Path of the audio file with one of these names ("stem" or "folder/stem", any case), or None."""
        return next((self.by_name[self.plain(name)] for name in names if self.plain(name) in self.by_name), None)

    def matching(self, pattern):
        """Paths that the regex finds, a / before the first folder, in sorted order."""
        return [p for p in self.paths if re.search(pattern, "/" + p.as_posix())]

    def rows(self, *names, delimiter=","):
        """Rows of the first table found under one of these file names. Raises InputError with the names tried."""
        path = next((p for name in names for p in self.paths if p.name == name), None)
        if path is None:
            raise InputError(f"no {' or '.join(names)} below {' or '.join(map(str, self.roots))}")
        return read_table(path, delimiter)


def hashed(text, modulus):
    """A number 0 .. modulus - 1 that depends on the text alone: splits that are the same everywhere."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % modulus


# The fault-filtered split of GTZAN (Kereliuk, Sturm and Larsen 2015): clip 0 .. 99 of each genre; t train, v valid, e test.
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
GTZAN_PART = {f"{genre}.{i:05d}": {"t": "train", "v": "valid", "e": "test"}[letter] for genre, letters in GTZAN_SPLIT.items()
              for i, letter in enumerate(letters) if letter != "."}
PARTS = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid", "eval": "test", "evaluation": "test"}  # other names


def read_gtzan(files):
    """genres/blues/blues.00000.wav or .au; Data/genres_original/...; any folder."""
    for name, part in GTZAN_PART.items():
        yield Track(name, files.audio(name), {"genre": name.split(".")[0]}, part, name)


def read_gtzan_key(files):
    """blues.00000.lerch.txt holds one integer counted from A: 0-11 A..G# major, 12-23 a..g# minor, -1 no single key."""
    for path in files.matching(r"\.lerch\.txt$"):
        name, value = path.name[:-len(".lerch.txt")], int(path.read_text())
        if value >= 0 and name in GTZAN_PART:  # -1 before the formula, or it becomes Ab major
            key = (value % 12 + 9) % 12 + 12 * (value >= 12)
            yield Track(name, files.audio(name), {"key": key}, GTZAN_PART[name], name)


def giantsteps_test(files):
    """annotations/key/10089.LOFI.key: "D major". 604 tracks."""
    found = [p for p in files.matching(r"/annotations/key/[^/]*\.LOFI\.key$") if "mtg" not in p.parents[2].name.lower()]
    if not found and files.matching(r"/keys_gs\+/"):
        raise InputError("this is GiantSteps+ (600 tracks, revised labels), not the benchmark's giantsteps-key-dataset (604)")
    for path in found:
        yield Track(path.stem, files.audio(path.stem), {"key": parse_key(path.read_text())}, "test", path.stem)


def read_giantsteps(files):
    """Training: giantsteps-mtg-key-dataset/annotations/annotations.txt, confidence 2 and one key; artists split by hash."""
    artists = {row["ID"]: [a.strip() for a in row["ARTIST"].split(",")] for row in files.rows("beatport_metadata.txt", delimiter="\t")}
    valid = {a for several in artists.values() for a in several if hashed(a.lower(), 116) >= 100}
    for _ in range(2):  # who made a track with a validation artist is one too, twice removed
        for several in artists.values():
            if valid & set(several):
                valid |= set(several)
    for row in files.rows("annotations.txt", delimiter="\t"):
        key = parse_key(row["MANUAL KEY"])
        if row["C"] == "2" and key is not None:  # "-", blanks and several keys ("a/b") name no single key
            part = "valid" if valid & set(artists.get(row["ID"], [])) else "train"
            yield Track(f"{row['ID']}.LOFI", files.audio(f"{row['ID']}.LOFI"), {"key": key}, part, row["ID"])
    yield from giantsteps_test(files)


def read_fmak(files):
    """fmakv2.csv or fma_keys_metadata.csv: track_id, key_and_mode; 10 -> 000/000010.mp3. Validation: a tenth, by artist."""
    artist = {}
    for path in files.matching(r"/tracks\.csv$"):  # FMA's metadata, three lines of header
        with open(path, newline="", encoding="utf-8") as file:
            above, below, *rows = csv.reader(file)
            column = list(zip(above, below)).index(("artist", "id"))
            artist = {row[0]: row[column] for row in rows if len(row) > column}
    for row in files.rows("fmakv2.csv", "fma_keys_metadata.csv"):
        group = artist.get(row["track_id"], f"track {row['track_id']}")
        name = f"{int(row['track_id']):06d}"
        part = "valid" if hashed(group, 10) == 0 else "train"
        yield Track(name, files.audio(f"{name[:3]}/{name}", name), {"key": parse_key(row["key_and_mode"])}, part, group)
    yield from giantsteps_test(files)


MTT_TAGS = ("guitar,classical,slow,techno,strings,drums,electronic,rock,fast,piano,ambient,beat,violin,vocal,synth,female,indian,"
            "opera,male,singing,vocals,no vocals,harpsichord,loud,quiet,flute,woman,male vocal,no vocal,pop,soft,sitar,solo,man,"
            "classic,choir,voice,new age,dance,male voice,female vocal,beats,harp,cello,no voice,weird,country,metal,female voice,"
            "choral").split(",")
MTT_CORRUPT = {"35644", "55753", "57881"}


def read_mtt(files):
    """annotations_final.csv, tab separated: clip_id, 188 tags, mp3_path. Split by the first character of mp3_path."""
    for row in files.rows("annotations_final.csv", delimiter="\t"):
        tags = [tag for tag in MTT_TAGS if row[tag] == "1"]
        if row["mp3_path"] and tags and str(int(row["clip_id"])) not in MTT_CORRUPT:
            folder, stem = row["mp3_path"].split("/")[0], Path(row["mp3_path"]).stem
            part = "train" if folder in "0123456789ab" else "valid" if folder == "c" else "test"
            yield Track(f"{folder}/{stem}", files.audio(f"{folder}/{stem}", stem), {"tags": tags}, part, row["clip_id"])


def read_emomusic(files):
    """songs_info.csv names the official test set; the rest is split by artist. Arousal and valence, 1 to 9."""
    means = {int(row["song_id"]): (float(row["mean_arousal"]), float(row["mean_valence"])) for row in files.rows("static_annotations.csv")}
    for row in files.rows("songs_info.csv"):
        song = int(row["song_id"])
        artist = re.sub(" +", " ", re.sub("[^a-z ]", "", row["Artist"].lower())).strip()
        official = row["Mediaeval 2013 set"] == "evaluation"
        part = "test" if official else "valid" if hashed(artist, 10) >= 8 else "train"
        if song in means:
            yield Track(f"{song}", files.audio(f"{song}", f"{song:04d}"), {"emotion": means[song]}, part, artist)


def read_medleysolos(files):
    """Medley-solos-DB_test-0_UUID.wav; the subset and the song are columns of Medley-solos-DB_metadata.csv."""
    for row in files.rows("Medley-solos-DB_metadata.csv"):
        name = f"Medley-solos-DB_{row['subset']}-{row['instrument_id']}_{row['uuid4']}"
        yield Track(name, files.audio(name), {"instrument": row["instrument"]}, PARTS.get(row["subset"], row["subset"]), row["song_id"])


def read_nsynth(files):
    """nsynth-train/examples.json {"organ_electronic_001-060-127": {"pitch": 60, ...}} and nsynth-train/audio/*.wav."""
    for part in ("train", "valid", "test"):
        for path in files.matching(rf"nsynth-{part}[^/]*/examples\.json$")[:1]:
            for name, note in json.loads(path.read_text()).items():
                labels = {"instrument": note["instrument_family_str"], "pitch": note["pitch"]}
                yield Track(name, files.audio(name), labels, part, note["instrument_str"])


def read_tinysol(files):
    """TinySOL_metadata.csv: Path, Fold, Instrument (in full), Pitch ID (MIDI). Five official folds."""
    for row in files.rows("TinySOL_metadata.csv"):
        stem = Path(row["Path"]).stem
        labels = {"instrument": row["Instrument (in full)"], "pitch": int(row["Pitch ID"])}
        yield Track(stem, files.audio(stem), labels, int(row["Fold"]), stem)


def read_tempo(files):
    """annotations_v2/tempo/28952.LOFI.bpm (0.0 = no tempo: dropped); splits/fold01..10.txt list the files of each fold."""
    fold = {line.strip().removesuffix(".mp3"): int(path.stem[4:]) - 1 for path in files.matching(r"/fold\d\d\.txt$")
            for line in path.read_text().splitlines() if line.strip()}
    for path in files.matching(r"/annotations_v2/tempo/[^/]*\.bpm$"):
        bpm = float(path.read_text())
        if bpm > 0 and path.stem in fold:
            yield Track(path.stem, files.audio(path.stem), {"tempo": bpm}, fold[path.stem], path.stem)


def read_chords(files):
    """song.lab beside or apart from song.wav (Isophonics, or your own); RWC's N001-M01-T01.lab; Winterreise's csv files.

    Split by album folder where there are at least five, else by song; the performances of one Schubert song stay together.
    """
    found = [p for p in files.matching(r"\.lab$|/ann_audio_chord/[^/]*\.csv$|_preprocessed/chords/.*\.csv$")
             if not {"keylab", "seglab"} & set(p.parts)]
    folders = {p.parent for p in found}
    for path in found:
        rwc, lied = re.fullmatch(r"N\d+-M(\d+)-T(\d+)", path.stem), re.search(r"D911-\d+", path.stem)
        names = [f"rwc-p-m{rwc[1]}/{int(rwc[2])}", f"rwc-p-m{rwc[1]}/{rwc[2]}"] if rwc else [f"{path.parent.name}/{path.stem}", path.stem]
        group = lied[0] if lied else path.stem if rwc or len(folders) < 5 else str(path.parent)
        yield Track(f"{path.parent.name}/{path.stem}", files.audio(*names), {"chords": path}, None, group)


BALLROOM_TWICE = {f"Albums-{name}" for name in ("AnaBelen_Veneo-15", "Ballroom_Magic-18", "Chrisanne2-12", "Fire-09", "Latin_Jam-13",
                                                "Latin_Jam-14", "Latin_Jam-15", "Latin_Jam2-13", "Latin_Jam2-14", "Latin_Jam2-15")
                  } | {"Media-103414", "Media-103415", "Media-104705"}


def read_beats(files):
    """Train on Ballroom (Media-105901.beats), test on GTZAN (gtzan_blues_00000.beats); or .beats files of your own, split by song."""
    found = files.matching(r"\.beats$")
    benchmark = any(p.name.startswith("gtzan_") for p in found)
    for path in found:
        stem = path.stem.removeprefix("ballroom_")
        gtzan = re.fullmatch(r"gtzan_([a-z]+)_(\d{5})", stem)
        if stem.endswith("_noposition") or stem in BALLROOM_TWICE:
            continue
        name = f"{gtzan[1]}.{gtzan[2]}" if gtzan else stem
        part = None if not benchmark else "test" if gtzan else "valid" if hashed(stem, 10) == 0 else "train"
        yield Track(name, files.audio(name, path.stem), {"beats": path}, part, name)


TASKS = {
    "gtzan": Task("genre of 930 clips of 30 s, fault-filtered split", "the GTZAN genre collection (Kaggle: GTZAN Dataset - Music Genre "
                  "Classification; Hugging Face: marsyas/gtzan)", "genre folders with blues.00000.wav ...", ("gtzan",), read_gtzan,
                  {"genre": "class"}, (443, 197, 290), ("jazz.00054",), "jazz.00054 does not decode in the common copy"),
    "gtzan-key": Task("key of GTZAN's clips, filtered split", "GTZAN, and the repository alexanderlerch/gtzan_key", "the genre folders and "
                      "gtzan_key/ with its .lerch.txt files", ("gtzan",), read_gtzan_key, {"key": "key"}, (364, 165, 240), ("jazz.00054",)),
    "giantsteps": Task("key of 604 electronic tracks; training: MTG key, split by artist", "the repositories GiantSteps/giantsteps-key-dataset and "
                       "GiantSteps/giantsteps-mtg-key-dataset, with their audio scripts", "both repositories with their audio/ folders",
                       ("giantsteps",), read_giantsteps, {"key": "key"}, (923, 236, 604)),
    "fmak": Task("key: trained on FMAKv2, tested on GiantSteps", "Zenodo 12759100 (fmakv2.csv), FMA audio, and giantsteps-key-dataset",
                 "fmakv2.csv, FMA's folders 000/ ..., and giantsteps-key-dataset", ("fmak", "giantsteps"), read_fmak, {"key": "key"}, None),
    "mtt": Task("50 tags of MagnaTagATune, clips with at least one of them", "The MagnaTagATune Dataset (MIRG, City, University of London)",
                "annotations_final.csv and the folders 0/ ... f/", ("mtt",), read_mtt, {"tags": "tags"}, (15247, 1529, 4332)),
    "emomusic": Task("arousal and valence of 744 clips", "Emotion in Music Database (University of Geneva)",
                     "clips_45seconds/, songs_info.csv and static_annotations.csv", ("emomusic",), read_emomusic, {"emotion": "regression"},
                     (504, 115, 125), note="columns arousal, valence"),
    "medleysolos": Task("8 instruments, 3 s clips", "Zenodo 3464194", "Medley-solos-DB_metadata.csv and the wav files", ("medleysolos",),
                        read_medleysolos, {"instrument": "unbalanced"}, (5841, 3494, 12236)),
    "nsynth": Task("instrument family and pitch of notes", "magenta.tensorflow.org/datasets/nsynth (jsonwav archives)",
                   "nsynth-train/, nsynth-valid/ and nsynth-test/, each with examples.json and audio/", ("nsynth",), read_nsynth,
                   {"instrument": "class", "pitch": "class"}, (289205, 12678, 4096)),
    "tinysol": Task("14 instruments and pitch of notes, five folds", "Zenodo 3685367", "TinySOL_metadata.csv and the audio folders", ("tinysol",),
                    read_tinysol, {"instrument": "class", "pitch": "class"}, 2913),
    "giantsteps-tempo": Task("tempo of 661 electronic tracks, ten folds, annotations v2", "the repository GiantSteps/giantsteps-tempo-dataset",
                             "the repository with its audio/ folder", ("giantsteps-tempo",), read_tempo, {"tempo": "tempo"}, 661),
    "chords": Task("25 chords per frame: Isophonics, RWC, Winterreise, or .lab files of your own", "Isophonics; AIST (RWC); Zenodo 3968389; the "
                   "audio from your CDs", "audio files and .lab files of the same names", ("chords",), read_chords, {"chords": "chords"}, None),
    "beats": Task("beats per frame: Ballroom -> GTZAN, or .beats files of your own", "Ballroom (MTG, ISMIR 2004) with CPJKU/BallroomAnnotations; GTZAN "
                  "with TempoBeatDownbeat/gtzan_tempo_beat", "audio files and .beats files of the same names", ("ballroom", "gtzan"), read_beats,
                  {"beats": "beats"}, None, ("jazz.00054",)),
}


def read_folders(folder, pattern):
    """One class per sub-folder, grouped by what the regex `pattern` (or None) finds in a file's name. Raises InputError.

    Returns (tracks, {target: kind}).
    """
    files = [(Path(name).parts[1:], path) for name, path in find_audio([folder]) if len(Path(name).parts) > 2]
    classes = {parts[0] for parts, _ in files}
    if len(classes) < 2:
        raise InputError(f"{folder}: holds {len(classes)} sub-folder(s) with audio; a class is a sub-folder, give at least two")
    tracks = []
    for parts, path in files:
        try:
            group = re.search(pattern, path.name).group() if pattern else str(path)
        except (re.error, AttributeError):  # not a regex; no match
            raise InputError(f"--group {pattern!r} does not match {path.name}; give a regex that matches every file name") from None
        tracks.append(Track("/".join(parts), path, {"class": parts[0]}, None, group))
    return tracks, {"class": "class"}


def is_number(text):
    """Whether a text is a finite number."""
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def read_csv(args):
    """Your own table: a column `file` (path below --audio) and a column of labels. Returns (tracks, {target: kind}).

    The kind follows from the column unless --kind says it: named key -> keys; every value a number -> regression; a "|"
    anywhere -> tags; else classes. Rows without a label, or whose key names no single key, are counted and left out.
    Raises InputError.
    """
    audio, rows = Path(args.audio or Path(args.data).parent), read_table(args.data)
    for column in filter(None, ("file", args.label, args.split, args.group)):
        if not rows or column not in rows[0]:
            raise InputError(f"{args.data}: has no column {column!r}; it has {', '.join(rows[0]) if rows else 'no rows'}")
    values = [row[args.label] for row in rows if row[args.label]]
    words = [value for value in values if not is_number(value)]
    kind = args.kind or ("key" if args.label == "key" else "regression" if values and not words
                         else "tags" if any("|" in value for value in values) else "class")
    if kind == "regression" and words:
        raise InputError(f"{args.data}: {words[0]!r} in {args.label} is not a number; use --kind class")
    parse = {"key": parse_key, "regression": lambda value: (float(value),), "class": str,
             "tags": lambda value: [tag.strip() for tag in value.split("|") if tag.strip()]}[kind]
    tracks = {}
    for row in rows:
        part = row[args.split].lower() if args.split else None
        part = PARTS.get(part, part)
        if part not in (None, "train", "valid", "test"):
            raise InputError(f"{args.data}: {row[args.split]!r} in {args.split} is none of train, valid, test")
        label = parse(row[args.label]) if row[args.label] else None
        if label is not None:
            name, path = os.path.normpath(row["file"]), audio / row["file"]
            tracks[name] = Track(name, path if path.is_file() else None, {args.label: label}, part, row[args.group] if args.group else name)
    print(f"{args.label}: {kind}; {len(tracks)} of {len(rows)} rows have a label")
    if not tracks:
        raise InputError(f"{args.data}: no row has a usable {args.label}")
    if not any(t.path for t in tracks.values()) and not args.features:
        raise InputError(f"{args.data}: none of its files is there, such as {audio / next(iter(tracks))}; name their folder with --audio")
    return list(tracks.values()), {args.label: kind}


# ---------------------------------------------------------------- features: frozen, cached


def cut_windows(length, keep_rest=False):
    """[(start, stop)] of a track's windows: whole segments of 126 frames; the rest only if asked for, or if it is all."""
    whole = length // SEGMENT
    spans = [(i * SEGMENT, (i + 1) * SEGMENT) for i in range(whole)]
    rest = length % SEGMENT and (keep_rest or not whole)
    return spans + [(whole * SEGMENT, length)] if rest else spans


def window_batches(tracks, spans, size=128):
    """Yields (indices, windows (n <= size, frames, 224) uint8): windows of many tracks together, of one length each.

    tracks: iterable of (frames, 224) uint8; spans: per track what cut_windows gave. Nothing is padded: the short rest of
    a track waits for others as short as itself. indices counts windows in the order of tracks.
    """
    batch = lambda bucket: ([i for i, _ in bucket], torch.from_numpy(np.stack([window for _, window in bucket])))
    waiting = {}                                                                      # {length: [(index, window)]}
    for i, window in enumerate(frames[start:stop] for frames, cuts in zip(tracks, spans) for start, stop in cuts):
        bucket = waiting.setdefault(len(window), [])
        bucket.append((i, window))
        if len(bucket) == size:
            yield batch(waiting.pop(len(window)))
    yield from map(batch, waiting.values())


def views_of(windows, device, crop=PITCH_CROP):
    """(windows, frames, 224) uint8 -> cqt (windows, frames, 84), mel (windows, frames, 128) on the device, at one crop."""
    windows = windows.to(device)
    return crop_views(windows, torch.full((len(windows),), crop, device=device))


def autocast(device):
    """The precision the network was trained in."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_amp(device)[0])


def untrained(model, device):
    """The same network with fresh random weights: what the architecture alone is worth."""
    torch.manual_seed(0)
    return MT2(**model.config).to(device).eval()


def frame_tokens(x, size, frames):
    """Each frame's own token: sequence tokens x (n, layers, sequence, dim) -> (n, layers, frames, dim).

    With patches of `size` (bands, frames) it is the mean of the patches above each other at that time; whole frames: None.
    """
    bands, width = size or (N_MELS, 1)
    x = x.unflatten(2, (-1, N_MELS // bands)).mean(dim=3)                             # (n, layers, columns, dim)
    return x[:, :, (torch.arange(frames) // width).clamp(max=x.shape[2] - 1)]         # what fills no column has the last one's


@torch.inference_mode()
def extract(model, tracks, device, layers=None, per_frame=False, progress=None):
    """What the network says of every window. tracks: [(frames, 224) uint8]; layers: default the last one.

    Returns {array: float16 tensor}, windows in the order of tracks:
        a network       "tokens" (windows, layers, tokens, dim) and "sequence" (windows, layers, dim), the mean over frames
        None            "raw" (windows, 424): mean and deviation over time of the spectrograms
        per_frame       "sequence" (frames, layers, dim), or "raw" (frames, 212); all frames, the rests of tracks too
    Of several patch sizes the answers stand side by side in dim.
    """
    spans = [cut_windows(len(t), per_frame) for t in tracks]
    counts = np.array([stop - start if per_frame else 1 for cuts in spans for start, stop in cuts])   # rows that each window fills
    begin, arrays = np.cumsum(counts) - counts, {}
    for indices, windows in window_batches(tqdm(tracks, desc=progress, unit="track", disable=progress is None), spans):
        cqt, mel = views_of(windows, device)                                          # (n, frames, 84), (n, frames, 128)
        if model is None:
            both = torch.cat([cqt, mel], dim=-1)                                      # (n, frames, 212)
            found = {"raw": both if per_frame else torch.cat([both.mean(dim=1), both.std(dim=1, unbiased=False)], dim=-1)[:, None]}
        else:
            layers, first = layers or [model.config["depth"]], model.class_token_count
            with autocast(device):
                inside = [model(cqt, mel, layers=layers, patch=patch)[1] for patch in range(len(model.patches))]
            # An inner layer passes the final norm too (DINO): what is played, not how loud.
            normed = lambda x, layer: (x if layer == model.config["depth"] else model.norm(x)).float()
            every = [torch.stack([normed(x[layer], layer) for layer in layers], dim=1) for x in inside]  # (n, layers, tokens + sequence, dim) each
            if per_frame:
                frames = [frame_tokens(x[:, :, first:], size, windows.shape[1]) for x, size in zip(every, model.patches)]
                found = {"sequence": torch.cat(frames, dim=-1).transpose(1, 2)}           # (n, frames, layers, dim)
            else:
                found = {"tokens": torch.cat([x[:, :, :first] for x in every], dim=-1)[:, None],
                         "sequence": torch.cat([x[:, :, first:].mean(dim=2) for x in every], dim=-1)[:, None]}
        rows = begin[indices][:, None] + np.arange(counts[indices[0]])                # (n, frames or 1)
        for name, value in found.items():                                             # (n, frames or 1, ...)
            if name not in arrays:
                arrays[name] = torch.empty((counts.sum(), *value.shape[2:]), dtype=torch.float16)
            arrays[name][rows] = value.cpu().half()
    return arrays


def cached(model, store, numbers, device, layers, per_frame, progress):
    """extract() of the tracks `numbers` of a store, kept in data/features under a hash of all it depends on."""
    digest = hashlib.sha256(json.dumps([model and model.config, store.info["checksum"], [store.paths[i] for i in numbers], layers, per_frame,
                                        pick_amp(torch.device(device))[0]]).encode())
    for name, weight in sorted((model.state_dict() if model is not None else {}).items()):
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    path = Path("data/features") / f"{digest.hexdigest()[:24]}.pt"
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # missing, or torn by a full disk: make it (again)
        arrays = extract(model, [store.track(i) for i in numbers], device, layers, per_frame, progress)
    buffer = io.BytesIO()  # torch.save to a file turns a full disk into a RuntimeError
    torch.save(arrays, buffer)
    write_atomic(path, buffer.getbuffer())
    return arrays


def readouts(arrays, names, counts, layers=(None,)):
    """{row: (windows, dim)} of one network. arrays from extract(); counts (windows,) frames each; names of the class tokens.

    With several layers a row says which: "concat L4". Without class tokens (pool "mean") the sequence mean is the only row.
    """
    if "raw" in arrays:
        return arrays
    found = {}
    for i, layer in enumerate(layers):
        if "tokens" not in arrays:
            rows = {"sequence": arrays["sequence"][:, i]}                             # (frames, dim)
        else:
            tokens, sequence = arrays["tokens"][:, i].float(), arrays["sequence"][:, i].float()  # (windows, tokens, dim), (windows, dim)
            rows = dict(zip(names, tokens.unbind(dim=1)))
            if len(rows) > 1:
                rows |= {"average": tokens.mean(dim=1), "concat": tokens.flatten(1)}
            rows["sequence mean"] = sequence
            if tokens.shape[1]:
                frames = torch.as_tensor(counts)[:, None]                             # (windows, 1)
                rows["all tokens mean"] = (tokens.sum(dim=1) + frames * sequence) / (len(names) + frames)
        found |= {name if len(layers) == 1 else f"{name} L{layer}": value.half() for name, value in rows.items()}
    return found


def all_rows(model, store, numbers, device, layers=None, per_frame=False):
    """Rows of the trained network, of the untrained one, and raw: ({row: (items, dim)}, owner (items,) the track of each).

    Items are windows, or frames with `per_frame`.
    """
    lengths = store.lengths[numbers]
    spans = [cut_windows(n, per_frame) for n in lengths]
    counts = np.array([stop - start for cuts in spans for start, stop in cuts])
    layers = [model.config["depth"]] if layers is None else layers
    rows = {}
    for prefix, network in (("", model), ("untrained ", untrained(model, device)), ("", None)):
        arrays = cached(network, store, numbers, device, layers if network is not None else None, per_frame, f"{prefix}features")
        rows |= {prefix + name: value for name, value in readouts(arrays, model.tokens, counts, layers).items()}
    return rows, np.repeat(np.arange(len(numbers)), lengths if per_frame else [len(cuts) for cuts in spans])


# ---------------------------------------------------------------- the probe: all that is trained

# Provenance: rate, batch and 50 x 128 steps: CoJEPA. Standardised, no dropout, no L2: our choice.
LINEAR = dict(hidden=0, batch=128, lr=1e-3, dropout=0.0, l2=0.0, standardize=True)
STEPS, EVERY, PATIENCE = 50 * 128, 32, 20  # at most; validation is read every 32; 20 readings without a better score end a fit
FRAMES = dict(batch=2048, every=128, patience=5)  # local tasks: frames a step, and how often validation is read (our choice)
GRID = [dict(standardize=s, hidden=h, batch=b, lr=r, dropout=d, l2=w) for s, h, b, r, d, w in
        product((False, True), (0, 512), (64, 256), (1e-5, 1e-4, 1e-3), (0.25, 0.5, 0.75), (0.0, 1e-4, 1e-3))]
GRID_FIT = dict(steps=1024, every=8, patience=32, halve=(64, 128, 256, 512))
SYNTH_STEPS = 640  # every training run ends with this table: 65 fits in half a minute (our choice)


class Head(namedtuple("Head", "mean scale weights offset gain score")):
    """A trained probe. head(x, owner, tracks) -> (tracks, outputs): the mean of the outputs of each track's items.

    mean, scale (dim,) standardise the input; weights: see forward; offset, gain (outputs,) give the units of the targets
    back; score: the best on validation.
    """

    def __call__(self, x, owner, tracks):
        return self.outputs(*track_items(x, owner, tracks, self.mean, self.scale, linear=len(self.weights) == 2))

    @torch.no_grad()
    def outputs(self, inputs, place, count):
        """inputs (items, dim) standardised, place (items,) which of `count` tracks they belong to -> (count, outputs)."""
        values = forward([w[None] for w in self.weights], inputs[None])[0]           # (items, outputs)
        return track_mean(values, place, count) * self.gain + self.offset


def track_mean(values, place, count):
    """(items, n) -> (count, n), the mean over the items of each track."""
    if torch.equal(place, torch.arange(count)):
        return values
    total = torch.zeros(count, values.shape[1]).index_add_(0, place, values)
    return total / torch.bincount(place, minlength=count)[:, None]


def track_items(x, owner, tracks, mean, scale, linear):
    """The standardised items of `tracks`, in their order: (inputs (items, dim), place (items,), count), as Head.outputs takes them.

    A linear layer commutes with the mean, so for one the items of a track are averaged first, which saves time.
    """
    where = np.full(owner.max() + 1, -1)
    where[tracks] = np.arange(len(tracks))
    mine = np.flatnonzero(where[owner] >= 0)
    place, inputs = torch.from_numpy(where[owner[mine]]), (x[mine].float() - mean) / scale
    if linear:
        inputs, place = track_mean(inputs, place, len(tracks)), torch.arange(len(tracks))
    return inputs, place, len(tracks)


def forward(weights, x, hidden_keep=None):
    """Outputs of a stack of probes, float32: x (stack, items, dim) -> (stack, items, outputs).

    weights: matrix (stack, dim, outputs) and bias (stack, 1, outputs) of a linear layer, or two of each with ReLU units
    between them; hidden_keep (stack, items, hidden): their dropout.
    """
    if len(weights) == 2:
        return torch.baddbmm(weights[1], x, weights[0])
    with autocast("cpu"):
        x = torch.relu(torch.baddbmm(weights[1], x, weights[0]))                     # (stack, items, hidden)
        x = x * hidden_keep if hidden_keep is not None else x
        return torch.baddbmm(weights[3], x, weights[2]).float()


def item_loss(kind, outputs, target):
    """Loss per probe of a stack, (stack,): outputs (stack, items, n), target (stack, items) classes or (stack, items, n)."""
    if kind in ("tags", "beats"):
        return F.binary_cross_entropy_with_logits(outputs, target, reduction="none").mean(dim=(1, 2))
    if kind == "regression":
        return F.mse_loss(outputs, target, reduction="none").mean(dim=(1, 2))
    return F.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(dim=1)


@torch.no_grad()
def adam_step(step, lr, l2, weight, gradient, m, v):
    """Adam, in place, for a stack of tensors (n, ...) whose rates and L2 differ: lr, l2 (n, 1, 1). m, v: the two moments."""
    gradient = gradient.addcmul(weight, l2)
    m.lerp_(gradient, 0.1)
    v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    unbias = (1 - 0.999 ** (step + 1)) ** 0.5
    weight.addcmul_(m / v.sqrt().div_(unbias).add_(1e-8), -lr / (1 - 0.9 ** (step + 1)))


def fit(x, owner, y, kind, runs, score, steps=STEPS, every=EVERY, patience=PATIENCE, halve=()):
    """Train many probes as one batched problem. Returns a Head per run, none of which has seen a test track.

    x (items, dim), owner (items,) the track of each; y per track: (tracks,) int64 classes or (tracks, n) float; runs:
    dictionaries of LINEAR's keys, `seed`, and the track numbers `train` and `valid` (arrays); score(outputs, tracks) of the
    validation tracks, higher is better; at the steps `halve` the worse half of the runs leaves. Runs of equal `hidden` and
    `batch` are stacked and trained by one bmm. Random numbers depend on a run's seed alone, so whoever shares the stack
    changes nothing: the same weights, items and dropout noise for all configurations of a seed, which also makes their
    comparison fairer.
    """
    heads, stacks = [None] * len(runs), {}
    for i, run in enumerate(runs):
        stacks.setdefault((run["hidden"], run["batch"]), []).append(i)
    for members in stacks.values():
        for i, head in zip(members, fit_stack(x, owner, y, kind, [runs[i] for i in members], score, steps, every, patience, halve)):
            heads[i] = head
    return heads


def fit_stack(x, owner, y, kind, runs, score, steps, every, patience, halve):
    """fit() of runs of one `hidden` and one `batch`."""
    hidden, batch, dim = runs[0]["hidden"], runs[0]["batch"], x.shape[1]
    outputs = y.shape[1] if y.ndim == 2 else int(y.max()) + 1
    column = lambda name: torch.tensor([float(run[name]) for run in runs])[:, None, None]         # (runs, 1, 1)
    lr, l2, dropout = column("lr"), column("l2"), column("dropout")
    dropping = bool(dropout.any())

    # What the runs learn from: the items of their training tracks. Equal tracks make one set.
    names = [run["train"].tobytes() for run in runs]
    different = dict(zip(names, (run["train"] for run in runs)))
    sets = [torch.from_numpy(np.flatnonzero(np.isin(owner, tracks))) for tracks in different.values()]  # numbers of their items
    sizes = torch.tensor([len(s) for s in sets])
    items = torch.nn.utils.rnn.pad_sequence(sets, batch_first=True)                               # (sets, most items)
    which = torch.tensor([list(different).index(name) for name in names])                         # (runs,) the set of each

    # Standardised inputs, and in regression targets, by the training tracks.
    plain = torch.tensor([not run["standardize"] for run in runs])
    mean = torch.stack([x[s].float().mean(dim=0) for s in sets])[which]                           # (runs, dim)
    scale = torch.stack([x[s].float().std(dim=0) + 1e-6 for s in sets])[which]
    mean[plain], scale[plain] = 0, 1
    offset, gain = torch.zeros(len(runs), outputs), torch.ones(len(runs), outputs)
    if kind == "regression":
        offset = torch.stack([y[run["train"]].mean(dim=0) for run in runs])
        gain = torch.stack([y[run["train"]].std(dim=0) + 1e-6 for run in runs])
    judged_by = [(name, run["valid"].tobytes(), run["standardize"]) for name, run in zip(names, runs)]
    judged = {}                                                                                   # validation items, equal ones once
    for r, run in enumerate(runs):
        if judged_by[r] not in judged:
            judged[judged_by[r]] = track_items(x, owner, run["valid"], mean[r], scale[r], linear=not hidden)

    # Equal seeds draw equal numbers; dropout has a generator of its own, so that who uses none disturbs nobody.
    seeds = sorted({run["seed"] for run in runs})
    of_seed = torch.tensor([seeds.index(run["seed"]) for run in runs])
    generators, noise = ([torch.Generator().manual_seed(seed + shift) for seed in seeds] for shift in (0, 1 << 20))
    draw = lambda source, *shape: torch.stack([torch.rand(shape, generator=g) for g in source])  # (seeds, *shape)
    layers = [(dim, hidden), (hidden, outputs)] if hidden else [(dim, outputs)]
    weights = []
    for fan_in, fan_out in layers:  # nn.Linear's range
        weights += [((2 * draw(generators, fan_in, fan_out) - 1) / fan_in ** 0.5)[of_seed], torch.zeros(len(runs), 1, fan_out)]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))                    # Adam's moments
    heads = [Head(mean[r], scale[r], [w[r].clone() for w in weights], offset[r], gain[r], -np.inf) for r in range(len(runs))]
    last_gain = [0] * len(runs)
    active = torch.arange(len(runs))  # numbers of the runs that still train
    # A stack is worked off in parts whose weights, moments and activations stay in the processor's cache (16 MB).
    part = max(1, (1 << 22) // (4 * sum(a * b for a, b in layers) + 3 * batch * (dim + hidden)))
    for step in range(steps + 1):
        if step % every == 0:
            for k, r in enumerate(active.tolist()):
                now = heads[r]._replace(weights=[w[k] for w in weights])
                value = score(now.outputs(*judged[judged_by[r]]), runs[r]["valid"])
                if value > heads[r].score:
                    heads[r], last_gain[r] = now._replace(weights=[w.clone() for w in now.weights], score=value), step
            staying = [k for k, r in enumerate(active.tolist()) if step - last_gain[r] < patience * every]
            if step in halve:
                staying = sorted(staying, key=lambda k: -heads[active[k]].score)[:(len(staying) + 1) // 2]
            if not staying or step == steps:
                break
            if len(staying) < len(active):
                staying = torch.tensor(sorted(staying))
                active = active[staying]
                weights, first, second = ([t[staying] for t in tensors] for tensors in (weights, first, second))
        drawn = draw(generators, batch)                                                           # (seeds, batch)
        if dropping:
            muted, hidden_muted = draw(noise, batch, dim), draw(noise, batch, hidden)             # (seeds, batch, dim or hidden)
        for low in range(0, len(active), part):
            some = active[low:low + part]                                                         # (n,) runs
            now, seeded = which[some], of_seed[some]
            if len(now.unique()) == len(seeded.unique()) == 1:                                    # one batch serves them all
                now, seeded = now[:1], seeded[:1]
            chosen = items[now[:, None], (drawn[seeded] * sizes[now][:, None]).long()]            # (n or 1, batch)
            inputs = (x[chosen].float() - mean[some][:, None]) / scale[some][:, None]             # (n, batch, dim)
            target = y[torch.from_numpy(owner)[chosen]]                                           # (n or 1, batch) or (.., outputs)
            target = target.expand(len(some), *target.shape[1:])
            if kind == "regression":
                target = (target - offset[some][:, None]) / gain[some][:, None]
            hidden_keep = None
            if dropping:
                rate = dropout[some]
                inputs, hidden_keep = inputs * (muted[seeded] >= rate) / (1 - rate), (hidden_muted[seeded] >= rate) / (1 - rate)
            leaves = [w[low:low + part].requires_grad_() for w in weights]                        # views: trained in place
            # Summed over runs: every run sees the gradient it would see alone.
            gradients = torch.autograd.grad(item_loss(kind, forward(leaves, inputs, hidden_keep), target).sum(), leaves)
            for leaf, gradient, m, v in zip(leaves, gradients, first, second):
                adam_step(step, lr[some], l2[some], leaf, gradient, m[low:low + part], v[low:low + part])
    return heads


def choose(x, owner, y, kind, train, valid, score):
    """The grid's winner by validation score: a dictionary like LINEAR. Sees no test track."""
    runs = [dict(configuration, seed=0, train=train, valid=valid) for configuration in GRID]
    heads = fit(x, owner, y, kind, runs, score, **GRID_FIT)
    return GRID[max(range(len(GRID)), key=lambda i: (heads[i].score, -i))]


# ---------------------------------------------------------------- metrics

# All take what was predicted and what is true, one row a track, so that a bootstrap can draw tracks.


def accuracy(outputs, truth):
    """Share of tracks whose largest output is the true class."""
    return float((outputs.argmax(axis=1) == truth).mean())


def class_mean_accuracy(outputs, truth):
    """Accuracy of each class, then the plain mean over the classes that occur."""
    right = outputs.argmax(axis=1) == truth
    return float(np.mean([right[truth == c].mean() for c in np.unique(truth)]))


def key_scores():
    """{metric: (24 true, 24 estimated)}: what an answer scores.

    weighted (MIREX): 1 for the key, 0.5 for a fifth above it, 0.3 for its relative (same signature), 0.2 for its parallel
    (same tonic). mir_eval, and with it most published tables, counts only an estimate a fifth *above*; MIREX since 2017
    either way: "both". KSEA (STONE): 1 for the key signature, 0.5 for one a fifth away, either way.
    """
    true, estimated = np.arange(24)[:, None], np.arange(24)
    up, signature = (estimated - true) % 12, (SIGNATURES[estimated] - SIGNATURES[true]) % 12      # (24, 24) semitones
    mode = estimated // 12 == true // 12
    weighted = np.where(mode, (up == 0) + 0.5 * (up == 7), 0.2 * (up == 0) + 0.3 * (signature == 0))
    return {"weighted": weighted, "weighted (both)": weighted + 0.5 * (mode & (up == 5)), "accuracy": mode & (up == 0),
            "KSEA": (signature == 0) + 0.5 * np.isin(signature, (5, 7)), "mode": mode}


KEY_SCORES = key_scores()


def tag_scores(outputs, truth):
    """ROC-AUC and average precision of every tag, (tags,) each; NaN for a tag with one class only.

    AUC: the chance that a track with the tag scores higher than one without, ties half. AP: sum of (R_n - R_n-1) P_n over
    the distinct thresholds, not interpolated.
    """
    auc, precision = np.full((2, outputs.shape[1]), np.nan)
    for t in range(outputs.shape[1]):
        order = np.argsort(-outputs[:, t], kind="stable")
        score, hit = outputs[order, t], truth[order, t] > 0.5
        positives = hit.sum()
        if positives in (0, len(hit)):
            continue
        last = np.append(score[1:] != score[:-1], True)                               # ends of runs of equal scores
        true, false = np.cumsum(hit)[last], np.cumsum(~hit)[last]
        area = (np.diff(false, prepend=0) * (true + np.append(0, true[:-1])) / 2).sum()  # trapezoids: ties count half
        auc[t] = area / (positives * (len(hit) - positives))
        precision[t] = (np.diff(true, prepend=0) / positives * (true / (true + false))).sum()
    return auc, precision


def r2(outputs, truth):
    """1 - SS_res / SS_tot of each axis, SS_tot about the mean of these tracks. (axes,)"""
    return 1 - ((outputs - truth) ** 2).sum(axis=0) / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)


def tempo_accuracy(estimate, bpm, factors):
    """Share of tracks whose tempo is within 4 % of the true one times any of `factors`."""
    allowed = bpm[:, None] * np.array(factors)
    return float((np.abs(estimate[:, None] - allowed) <= 0.04 * allowed).any(axis=1).mean())


def beat_hits(estimated, true, tolerance=0.070):
    """Largest one-to-one matching of two sorted lists of times, |difference| <= tolerance (seconds, boundary included)."""
    hits = i = j = 0
    while i < len(estimated) and j < len(true):
        gap = estimated[i] - true[j]
        if abs(gap) <= tolerance + 1e-9:
            hits, i, j = hits + 1, i + 1, j + 1
        elif gap < 0:
            i += 1
        else:
            j += 1
    return hits


def f_measure(counts):
    """counts (tracks, 3): hits, estimated, true -> F = 2 hits / (estimated + true) of each track; 0 when both are empty."""
    return 2 * counts[:, 0] / np.maximum(counts[:, 1] + counts[:, 2], 1)


def pick_beats(activation, threshold):
    """(frames,) beat probability -> times in seconds of its peaks. The protocol is in the text at the top of this file."""
    smooth = np.convolve(np.pad(activation, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
    around = np.lib.stride_tricks.sliding_window_view(np.pad(smooth, 4, constant_values=-1), 9)   # (frames, 9)
    peak = (smooth >= threshold) & (smooth == around.max(axis=1)) & (smooth > around[:, :4].max(axis=1))
    return np.flatnonzero(peak) * FRAME_SECONDS


def metrics_of(kind, names):
    """{metric: function(outputs, truth)}; the first one also steers early stopping and the grid. names: classes, axes."""
    if kind == "key":
        return {name: lambda o, t, scores=scores: float(scores[t, o.argmax(axis=1)].mean()) for name, scores in KEY_SCORES.items()}
    if kind == "tags":
        mean = lambda values: float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")
        return {"ROC-AUC": lambda o, t: mean(tag_scores(o, t)[0]), "AP": lambda o, t: mean(tag_scores(o, t)[1])}
    if kind == "regression":
        single = {f"R2 {name}": lambda o, t, i=i: float(r2(o, t)[i]) for i, name in enumerate(names)}
        return single if len(names) == 1 else {"R2 joint": lambda o, t: float(r2(o, t).mean())} | single
    if kind == "tempo":
        bpm = np.array(names)
        return {"ACC1": lambda o, t: tempo_accuracy(bpm[o.argmax(axis=1)], bpm[t], (1,)),
                "ACC2": lambda o, t: tempo_accuracy(bpm[o.argmax(axis=1)], bpm[t], (1, 2, 3, 1 / 2, 1 / 3))}
    if kind == "chords":  # counts (tracks, 2): frames right, frames with a label
        return {"overlap": lambda c, _: float((c[c[:, 1] > 0, 0] / c[c[:, 1] > 0, 1]).mean()),
                "overlap (pooled)": lambda c, _: float(c[:, 0].sum() / c[:, 1].sum())}
    if kind == "beats":  # counts (tracks, 3) of f_measure
        return {"F": lambda c, _: float(f_measure(c).mean()), "F (pooled)": lambda c, _: float(f_measure(c.sum(axis=0, keepdims=True))[0])}
    return {"accuracy": accuracy} | ({"class mean": class_mean_accuracy} if kind == "unbalanced" else {})


def interval(metric, outputs, truths, shared=False, draws=1000):
    """95 % bootstrap interval over tracks: percentiles 2.5 and 97.5 of the metric on tracks drawn with replacement.

    outputs, truths: one array per seed. Seeds that share their test tracks differ little, so the first stands for all;
    where every seed has test tracks of its own, each draw is the mean over seeds. Draws without a score (R2 of tracks
    that are all alike, a tag nobody has) are left out.
    """
    if shared:
        outputs, truths = outputs[:1], truths[:1]
    rng, values = np.random.default_rng(0), []
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(draws):
            drawn = [rng.integers(0, len(o), len(o)) for o in outputs]
            values.append(np.mean([metric(o[d], t[d]) for o, t, d in zip(outputs, truths, drawn)]))
    values = np.array(values)[np.isfinite(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else [float("nan")] * 2


def retrieval(first, second, size=128):
    """Top-1 accuracy of finding a track's second excerpt among `size` by the cosine to its first, both ways.

    first, second (tracks, dim). One score per seed, which draws the tracks.
    """
    scores = []
    for seed in range(SEEDS):
        chosen = np.random.default_rng(seed).choice(len(first), min(size, len(first)), replace=False)
        cosine = F.normalize(first[chosen].float(), dim=-1) @ F.normalize(second[chosen].float(), dim=-1).T
        right = torch.arange(len(chosen))
        scores.append(((cosine.argmax(dim=1) == right).float().mean() + (cosine.argmax(dim=0) == right).float().mean()).item() / 2)
    return scores


# ---------------------------------------------------------------- splits


def group_splits(groups):
    """Per seed, 60/20/20 % of the *groups* for training, validation and test; seeds rotate, so test groups change.

    groups: one name per item. With fewer groups than seeds some test groups come twice.
    Raises InputError with fewer than three groups.
    """
    names = np.random.default_rng(0).permutation(sorted(set(groups)))
    if len(names) < 3:
        raise InputError(f"{len(names)} group(s) cannot be split in train, valid and test; give at least three files or groups")
    part, splits = max(1, round(0.2 * len(names))), []
    for seed in range(SEEDS):
        order = np.roll(names, -round(seed * max(len(names), SEEDS) / SEEDS))
        place = {name: min(i // part, 2) for i, name in enumerate(order)}  # a part for the test, one for validation, the rest
        side = np.array([place[g] for g in groups])                        # (items,)
        splits.append(tuple(np.flatnonzero(side == k) for k in (2, 1, 0)))
    return splits


def splits_of(tracks):
    """[(train, valid, test)] track numbers, one per seed: the given split, rotating folds, or groups. Raises InputError.

    Folds: one run each with fold f as test and f + 1 as validation. A given split without a validation part gives up a
    fifth of its training groups.
    """
    parts = [t.split for t in tracks]
    if set(parts) <= {None}:
        return group_splits([t.group for t in tracks])
    if all(isinstance(part, int) for part in parts):
        folds, fold = sorted(set(parts)), np.array(parts)
        if len(folds) < 3:
            raise InputError(f"{len(folds)} fold(s) found; one to test on, one to validate on and some to train on are needed")
        return [(np.flatnonzero((fold != test) & (fold != valid)), np.flatnonzero(fold == valid), np.flatnonzero(fold == test))
                for test, valid in zip(folds, folds[1:] + folds[:1])]
    train, valid, test = (np.flatnonzero([part == name for part in parts]) for name in ("train", "valid", "test"))
    if len(valid) == 0:
        held = np.array([hashed(tracks[i].group, 5) == 0 for i in train], dtype=bool)
        train, valid = train[~held], train[held]
    if min(map(len, (train, valid, test))) == 0:
        raise InputError(f"{len(train)} train, {len(valid)} valid and {len(test)} test tracks found; each part needs some")
    return [(train, valid, test)] * SEEDS


def share_test(splits):
    """Whether all seeds are tested on the same tracks."""
    return all(np.array_equal(test, splits[0][2]) for _, _, test in splits)


def labelled_part(train, y, share, draw):
    """A share of the training tracks, one of four draws. Classes keep their shares, at least one track each."""
    rng = np.random.default_rng(draw)
    if y.ndim == 2:
        return np.sort(rng.choice(train, max(2, round(share * len(train))), replace=False))
    classes = y[train].numpy()
    picked = [rng.choice(train[classes == c], max(1, round(share * (classes == c).sum())), replace=False) for c in np.unique(classes)]
    return np.sort(np.concatenate(picked))


# ---------------------------------------------------------------- one task, from labels to rows

# Results of every command are {row: {column: cell}}, a cell being dict(mean, std, scores of each seed, sometimes interval).


def encode(tracks, target, kind):
    """Labels of all tracks -> (y, names of classes, tags or axes). y: (tracks,) int64 classes, or (tracks, names) float."""
    labels = [t.labels[target] for t in tracks]
    if kind == "key":
        return torch.tensor(labels), ALL_KEYS
    if kind == "regression":
        return torch.tensor(labels), ["arousal", "valence"] if target == "emotion" else [target]
    if kind == "tags":
        names = sorted(set().union(*labels))
        return torch.tensor([[float(name in tags) for name in names] for tags in labels]), names
    names = sorted(set(labels))
    return torch.tensor([names.index(label) for label in labels]), names


def constant_outputs(y, train, count):
    """What a probe that hears nothing says: the most frequent training class, or the mean of the training targets. (count, outputs)"""
    if y.ndim == 2:
        return y[train].mean(dim=0).repeat(count, 1).numpy()
    most = torch.bincount(y[train]).argmax()
    return F.one_hot(most, int(y.max()) + 1).repeat(count, 1).numpy()


def mean_of(values):
    """The cell of a table, from one score per seed."""
    return dict(mean=float(np.nanmean(values)), std=float(np.nanstd(values)), scores=[float(v) for v in values])


def cells_of(metrics, outputs, truths, shared):
    """{metric: cell}, the first with its interval. outputs, truths: per seed what was said of its test tracks and what is true (see interval)."""
    cells = {metric: mean_of([function(o, t) for o, t in zip(outputs, truths)]) for metric, function in metrics.items()}
    first = next(iter(metrics))
    cells[first]["interval"] = interval(metrics[first], outputs, truths, shared)
    return cells


def families(rows):
    """{a row that takes, in each seed, what is best on validation: the rows to choose from}, one of each network with several."""
    found = {"chosen on validation": [name for name in rows if name != "raw" and not name.startswith("untrained ")],
             "untrained, chosen": [name for name in rows if name.startswith("untrained ")]}
    return {chosen: names for chosen, names in found.items() if len(names) > 1}


def probe_global(rows, owner, tracks, targets, grid, shares):
    """Probe every row on every target: one answer a track.

    rows {row: (windows, dim)}, owner (windows,) track numbers, targets {label: kind}; grid: whether to choose a configuration
    for each row; shares: of the labels, to learn from these as well. With several targets the column says which.
    Returns results, chance {column: value}, remarks [str], and of the first seed {(row, target): (outputs, truth, names)}.
    """
    splits = splits_of(tracks)
    shared = share_test(splits)
    results, chance, remarks, predictions = {name: {} for name in (*rows, *families(rows))}, {}, [], {}
    bar = tqdm(total=len(rows) * len(targets), desc="probes", unit="row")
    for target, kind in targets.items():
        y, names = encode(tracks, target, kind)
        truths = [y[test].numpy() for _, _, test in splits]
        if kind == "tags":
            single = [name for name, share in zip(names, truths[0].mean(axis=0)) if share in (0, 1)]
            if single:
                remarks.append(f"tags with one class only in the test set, left out of the means: {', '.join(single)}")
        elif kind != "regression":
            remarks.append(f"{target}: {len(names)} classes")
        metrics = {metric if len(targets) == 1 else f"{target} {metric}": function for metric, function in metrics_of(kind, names).items()}
        column, steer = next(iter(metrics.items()))
        score = lambda outputs, numbers: steer(outputs.numpy(), y[numbers].numpy())
        constant = [constant_outputs(y, train, len(test)) for train, _, test in splits]
        seeds, said = range(len(splits)), {}                               # said {row: per seed (score on validation, outputs on test)}
        chance |= {metric: float(np.mean([function(o, t) for o, t in zip(constant, truths)])) for metric, function in metrics.items()}
        for name, x in rows.items():
            winners = [LINEAR] * len(splits)
            if grid:  # one choice where seeds share their test tracks, else one each: never with a track that is tested
                winners = [choose(x, owner, y, kind, train, valid, score) for train, valid, _ in splits[:1 if shared else None]]
                remarks += [f"{name}, {target}: " + ", ".join(f"{k} {v}" for k, v in winner.items()) for winner in winners]
                winners = winners * (len(splits) // len(winners))
            runs = [dict(winner, seed=seed, train=train, valid=valid) for seed, (winner, (train, valid, _)) in enumerate(zip(winners, splits))]
            said[name] = [(head.score, head(x, owner, test).numpy()) for head, (_, _, test) in zip(fit(x, owner, y, kind, runs, score), splits)]
            predictions[name, target] = said[name][0][1], truths[0], names
            results[name] |= cells_of(metrics, [outputs for _, outputs in said[name]], truths, shared)
            for share in shares:
                four = [(draw, runs[draw % len(runs)], splits[draw % len(splits)][2]) for draw in range(4)]
                fewer = [dict(run, seed=draw, train=labelled_part(run["train"], y, share, draw)) for draw, run, _ in four]
                scores = [score(head(x, owner, test), test) for head, (_, _, test) in zip(fit(x, owner, y, kind, fewer, score), four)]
                results[name][f"{column} @{100 * share:g} %"] = mean_of(scores)
            bar.update()
        for chosen, candidates in families(rows).items():
            best = [max(candidates, key=lambda name: said[name][seed][0]) for seed in seeds]
            results[chosen] |= cells_of(metrics, [said[name][seed][1] for seed, name in zip(seeds, best)], truths, shared)
            remarks.append(f"{chosen}, {target}: {', '.join(best)}")
    bar.close()
    return results, chance, remarks, predictions


def beats_of(label, count):
    """Beat times (s) within the `count` frames of a track, from its file or as they are (the embedded songs have no files)."""
    beats = read_times(label) if isinstance(label, Path) else label
    return beats[beats < count * FRAME_SECONDS]


def frame_labels(kind, label, count):
    """What is true of the frames of a track, (count,): chord classes, or 1 within a frame of a beat, else 0; -1 = not scored.

    A frame on a chord's boundary belongs to the chord that starts there. Beat frames are learnt from one beat period
    before the first beat to one after the last, as an intro without music has no beats to miss.
    """
    times = np.arange(count) * FRAME_SECONDS
    labels = np.full(count, -1)
    if kind == "chords":
        for start, end, chord in read_intervals(label) if isinstance(label, Path) else label:
            labels[(times >= start) & (times < end)] = chord
        return labels
    beats = beats_of(label, count)
    if len(beats) < 2:
        return labels
    period = np.median(np.diff(beats))
    labels[(times >= beats[0] - period) & (times <= beats[-1] + period)] = 0
    for frame in np.round(beats / FRAME_SECONDS).astype(int):
        labels[max(0, frame - 1):frame + 2] = 1
    return labels


def probe_local(rows, owner, tracks, kind, seeds=SEEDS):
    """Probe every frame for chords or beats: (results, chance). rows {row: (frames, dim)}, owner (frames,) track numbers.

    The metrics are of counts, one line a track: frames right and frames with a label; or hits, beats estimated, beats true.
    """
    frames = np.split(np.arange(len(owner)), np.searchsorted(owner, np.arange(1, len(tracks))))       # numbers of each track's frames
    y = torch.from_numpy(np.concatenate([frame_labels(kind, t.labels[kind], len(own)) for t, own in zip(tracks, frames)]))  # (frames,)
    place = [np.arange(len(own)) for own in frames]                                                   # each frame an item of its own
    labelled = lambda numbers: np.concatenate([own[(y[own] >= 0).numpy()] for own in (frames[i] for i in numbers)])
    if kind == "chords":
        target, thresholds = y, [None]
        decide = lambda outputs, _: outputs.argmax(dim=1)                                             # (frames, 25) -> (frames,)
        count = lambda chord, i: [int(((y[frames[i]] == chord) & (y[frames[i]] >= 0)).sum()), int((y[frames[i]] >= 0).sum())]
        score = lambda outputs, numbers: accuracy(outputs.numpy(), y[numbers].numpy())
    else:
        target, thresholds = y.float()[:, None], np.arange(1, 20) / 20                                # (frames, 1)
        truth = [beats_of(t.labels[kind], len(own)) for t, own in zip(tracks, frames)]
        decide = lambda outputs, threshold: pick_beats(outputs[:, 0].sigmoid().numpy(), threshold)    # (frames, 1) -> times
        count = lambda beats, i: [beat_hits(beats, truth[i]), len(beats), len(truth[i])]
        score = lambda outputs, numbers: -F.binary_cross_entropy_with_logits(outputs, target[numbers]).item()
    splits, metrics = splits_of(tracks)[:seeds], metrics_of(kind, None)
    steer = next(iter(metrics.values()))
    runs = [dict(LINEAR, batch=FRAMES["batch"], seed=seed, train=labelled(train), valid=labelled(valid))
            for seed, (train, valid, _) in enumerate(splits)]
    results, chance = {}, {}
    for name, x in tqdm(rows.items(), desc="probes", unit="row"):
        heads, counts = fit(x, np.arange(len(owner)), target, kind, runs, score, every=FRAMES["every"], patience=FRAMES["patience"]), []
        for head, (_, valid, test) in zip(heads, splits):
            said = {i: head(x[frames[i]], place[i], place[i]) for i in (*valid, *test)}               # (frames of i, outputs) each
            counts_of = lambda numbers, threshold: np.array([count(decide(said[i], threshold), i) for i in numbers])
            counts.append(counts_of(test, max(thresholds, key=lambda h: steer(counts_of(valid, h), None))))
        results[name] = cells_of(metrics, counts, counts, share_test(splits))
    if kind == "chords":  # always the most frequent chord of the training frames
        most = [torch.bincount(y[run["train"]]).argmax() for run in runs]
        constant = [np.array([count(chord, i) for i in test]) for chord, (_, _, test) in zip(most, splits)]
        chance = {metric: float(np.mean([function(c, c) for c in constant])) for metric, function in metrics.items()}
    return results, chance


# ---------------------------------------------------------------- tables

# Published figures, best known to us, for the eye only: other data, other protocols, not our measurement.
FOOTNOTES = {
    "a": "512-unit MLP on the last layer, one seed (What Makes a Good Layer?, Kanatas et al., ISMIR 2026)",
    "b": "the same, best layer",
    "c": "the best of a 216-point grid (Myna, its own tables)",
    "d": "no labels, a million songs (S-KEY, arXiv 2501.12907)",
    "e": "one linear layer on the last layer's class token, trained by contrast alone (CoJEPA)",
}
PUBLISHED = {  # task: [(model, footnote, {column: value})]
    "gtzan": [("MT2, ntxent token", "a", {"accuracy": 70.3}), ("MT2, cpsd token", "a", {"accuracy": 61.7}), ("MERT-95M", "a", {"accuracy": 65.9}),
              ("MERT-95M", "b", {"accuracy": 78.6}), ("Myna-Hybrid", "c", {"accuracy": 77.9})],
    "giantsteps": [("MT2, cpsd token", "a", {"weighted": 68.8}), ("MT2, ntxent token", "a", {"weighted": 65.4}), ("MERT-95M", "a", {"weighted": 61.0}),
                   ("Myna-Hybrid", "c", {"weighted": 68.0}), ("S-KEY", "d", {"weighted": 72.1})],
    "gtzan-key": [("S-KEY", "d", {"weighted": 74.4})],
    "fmak": [("ViT-1D", "e", {"weighted": 53.9})],
    "mtt": [("MT2, ntxent token", "a", {"ROC-AUC": 87.9, "AP": 32.6}), ("MERT-95M", "a", {"ROC-AUC": 89.0, "AP": 35.2}),
            ("Myna-Hybrid", "c", {"ROC-AUC": 91.0, "AP": 39.8}), ("ViT-1D", "e", {"ROC-AUC": 88.2, "AP": 39.3})],
    "emomusic": [("MERT-95M", "a", {"R2 arousal": 64.4, "R2 valence": 35.0}), ("Myna-Hybrid", "c", {"R2 arousal": 70.8, "R2 valence": 55.2})],
    "nsynth": [("MERT-95M", "a", {"pitch accuracy": 90.8, "instrument accuracy": 67.7})],
    "tinysol": [("ViT-1D", "e", {"pitch accuracy": 92.5, "instrument accuracy": 94.2})],
    "giantsteps-tempo": [("ViT-1D", "e", {"ACC1": 85.4, "ACC2": 91.7})],
    "beats": [("MERT-95M", "a", {"F (pooled)": 86.0})],
}


def print_table(title, results, chance, task=None):
    """Aligned table in %, with chance {column: value} and what is published on the task; missing cells stay empty."""
    def text(cell):
        low_high = " [{:.1f} {:.1f}]".format(*(100 * v for v in cell["interval"])) if "interval" in cell else ""
        return f"{100 * cell['mean']:.1f} ±{100 * cell['std']:4.1f}{low_high}"

    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    lines = {"": {column: column for column in columns}}
    lines |= {name: {column: text(cell) for column, cell in row.items()} for name, row in results.items()}
    lines["chance"] = {column: f"{100 * value:.1f}" for column, value in chance.items()}
    published = PUBLISHED.get(task, [])
    lines |= {f"{model} *{note}": {column: f"{value:.1f}" for column, value in values.items()} for model, note, values in published}
    width = max(map(len, lines)) + 2
    wide = {column: max(12, *(len(line.get(column, "")) for line in lines.values())) + 2 for column in columns}
    print(f"\n{title}")
    for name, line in lines.items():
        print(f"{name:{width}}" + "".join(f"{line.get(column, ''):>{wide[column]}}" for column in columns))
    for note in sorted({note for _, note, _ in published}):
        print(f"  *{note} published, not ours and another protocol: {FOOTNOTES[note]}")


def beside(source, name):
    """Where a file about a network or features belongs: in their folder. What is said of the weights that come along goes to out/."""
    return (Path("out") if Path(source) == SHIPPED else Path(source).parent) / name


def publish(source, name, title, results, chance, remarks=(), task=None):
    """Print a table and its remarks, and write its title, rows and chance to probe-NAME.json beside `source`, the network or features judged."""
    print_table(title, results, chance, task)
    for remark in remarks:
        print(remark)
    path = beside(source, f"probe-{name}.json")
    write_atomic(path, json.dumps(dict(title=title, rows=results, chance=chance), indent=1).encode())
    print(f"written to {path}")


def print_comparison(paths):
    """Runs side by side: for each column of the tables, one column a run. Raises InputError for other files."""
    runs = []
    for path in paths:
        try:
            run = json.loads(Path(path).read_text())
            runs.append((run["rows"], run["chance"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path}: is not a table written by probe.py") from None
    names = [Path(p).parent.name or Path(p).stem for p in paths]
    names = names if len(set(names)) == len(names) else list(map(str, paths))
    for column in dict.fromkeys(c for rows, _ in runs for row in rows.values() for c in row):
        merged = {}
        for run, (rows, _) in zip(names, runs):
            for name, row in rows.items():
                if column in row:
                    merged.setdefault(name, {})[run] = dict(mean=row[column]["mean"], std=row[column]["std"])
        print_table(column, merged, {run: chance[column] for run, (_, chance) in zip(names, runs) if column in chance})


def print_confusion(outputs, truth, names, path):
    """How often a class (line) is taken for another (column), of one seed's test tracks; keys also by relation."""
    estimate = outputs.argmax(axis=1)
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (truth, estimate), 1)
    width = max(4, len(str(counts.max())) + 1)
    label = max(map(len, map(str, names))) + 1
    print("\n" + " " * label + "".join(f"{str(name)[:width - 1]:>{width}}" for name in names))
    for name, row in zip(names, counts):
        print(f"{str(name):{label}}" + "".join(f"{n if n else '.':>{width}}" for n in row))
    if names is ALL_KEYS:
        weight, up = KEY_SCORES["weighted (both)"][truth, estimate], (estimate - truth) % 12
        relations = {"same": weight == 1, "fifth above": (weight == 0.5) & (up == 7), "fifth below": (weight == 0.5) & (up == 5),
                     "relative": weight == 0.3, "parallel": weight == 0.2, "other": weight == 0}
        print(", ".join(f"{name} {100 * hit.mean():.1f} %" for name, hit in relations.items()))
    if plt := pyplot():
        figure, axes = plt.subplots(figsize=(8, 8))
        axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="magma")
        axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names, xlabel="estimated", ylabel="true")
        axes.tick_params(axis="x", rotation=90)
        save_figure(plt, figure, path)


# ---------------------------------------------------------------- key without labels


def pitch_fork():
    """A clip known to be in C major, (frames, 224) uint8: the cadence C F G C on four timbres. (STONE's calibration.)"""
    wave = torch.zeros(0)
    for timbre in ("organ", "strings", "pluck", "epiano"):
        for chord in ((48, 60, 64, 67), (41, 60, 65, 69), (43, 59, 62, 67), (48, 60, 64, 67)):
            notes = [render_note(TIMBRES.index(timbre), pitch, 1.0, 1.0, np.random.default_rng(0)) for pitch in chord]
            wave = torch.cat([wave, torch.from_numpy(np.sum(notes, axis=0)) * 0.1])
    return audio_to_frames([wave], FrontEnd())


def turn(keys, steps):
    """Rotate key probabilities (..., 12 or 24): index q goes to q + steps, major and minor keys alike."""
    return keys.unflatten(-1, (-1, 12)).roll(steps, dims=-1).flatten(-2)


@torch.inference_mode()
def key_outputs(model, tracks, device, crops=range(MAX_CROP + 1)):
    """Key probabilities of each track, (tracks, 12 signatures or 24 keys), not calibrated.

    Every window is heard at each of `crops` and the answers are turned back to one pitch: thirteen opinions, one answer.
    Opinions of all windows are multiplied (their geometric mean): a window that rules a key out, because it holds a note
    that the key lacks, says more than one that merely likes it.
    """
    name = model.key_token()
    spans = [cut_windows(len(t)) for t in tracks]
    owner = torch.from_numpy(np.repeat(np.arange(len(tracks)), [len(cuts) for cuts in spans]))       # (windows,)
    answers = torch.zeros(len(owner), model.heads[name].outputs)                                     # (windows, 12 or 24) log probabilities
    for indices, windows in window_batches(tqdm(tracks, desc="keys", unit="track", delay=2), spans):
        for crop in crops:
            with autocast(device):
                keys = model.heads[name].keys(model(*views_of(windows, device, crop))[0][name])      # (n, 12 or 24)
            answers[indices] += turn(keys.cpu(), crop - PITCH_CROP).clamp(min=1e-4).log() / len(crops)
    return track_mean(answers, owner, len(tracks)).softmax(dim=1)


def calibrate(model, device):
    """The class that stands for C major. CPSD is blind to one rotation of the circle: a single clip settles it."""
    return key_outputs(model, [pitch_fork()], device)[0].view(-1, 12).sum(dim=0).argmax().item()


def by_tonic(outputs, rotation):
    """What key_outputs gives, (tracks, 12 or 24), calibrated and in the order of names.

    12: index = tonic of the major key with that signature (0 = C). 24: major keys, then minor keys, by their tonics.
    """
    keys = turn(outputs, -rotation)
    return torch.cat([keys[:, :12], keys[:, 12:].roll(9, dims=1)], dim=1)  # output 12 + q is the relative minor of q


def key_probabilities(model, tracks, device):
    """Probabilities of each track's key without labels, (tracks, 12 or 24), as by_tonic orders them."""
    return by_tonic(key_outputs(model, tracks, device), calibrate(model, device))


# How well each pitch class fits C major and C minor, as listeners rated it (Krumhansl and Kessler 1982).
KRUMHANSL = {"major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
             "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)}


def template_keys(tracks):
    """The classical answer: the 24 Krumhansl profiles against each track's chroma (mean magnitude by pitch class). (tracks,) keys 0..23."""
    fold = (np.arange(N_BINS) + round(12 * np.log2(FMIN / 440)) + 69) % 12           # pitch class of each CQT bin
    answers = []
    for frames in tracks:
        level = frames[:, :N_BINS].astype(np.float32) / 255                          # (frames, 96)
        magnitude = np.where(level > 0, 10 ** ((level - 1) * DYNAMIC_RANGE / 20), 0).mean(axis=0)
        chroma = np.bincount(fold, weights=magnitude, minlength=12)
        with np.errstate(invalid="ignore"):  # silence has no correlation
            fits = [np.corrcoef(chroma, np.roll(KRUMHANSL[mode], tonic))[0, 1] for mode in ("major", "minor") for tonic in range(12)]
        answers.append(int(np.nanargmax(fits)) if np.isfinite(fits).any() else 0)
    return np.array(answers)


# ---------------------------------------------------------------- embeddings of a folder

BLOCK = 64  # tracks between two files of the cache (our choice)


def embed(model, store, numbers, device):
    """What the network says of the tracks `numbers` of a store, window by window: (rows, owner, time).

    rows {class token or "sequence": (windows, dim) float32}, owner (windows,) which of `numbers` by its place, time (windows,)
    the seconds at which it starts. Every block of 64 tracks is a file of the feature cache: a killed run goes on at its block.
    """
    spans = [cut_windows(n) for n in store.lengths[numbers]]
    blocks = np.split(numbers, range(BLOCK, len(numbers), BLOCK))
    parts = [cached(model, store, block, device, [model.config["depth"]], False, None)
             for block in tqdm(blocks, desc="embedding", unit=f"{BLOCK} tracks")]
    tokens = torch.cat([part["tokens"][:, 0] for part in parts]).float()             # (windows, tokens, dim)
    sequence = torch.cat([part["sequence"][:, 0] for part in parts]).float()         # (windows, dim)
    rows = {name: tokens[:, i] for i, name in enumerate(model.tokens[:model.class_token_count])} | {"sequence": sequence}
    time = np.array([start for cuts in spans for start, _ in cuts]) * FRAME_SECONDS
    return rows, np.repeat(np.arange(len(spans)), [len(cuts) for cuts in spans]), time


def embed_tracks(model, store, numbers, device):
    """embed(), averaged over the windows of each track: {class token or "sequence": (tracks, dim)}."""
    rows, owner, _ = embed(model, store, numbers, device)
    return {name: track_mean(x, torch.from_numpy(owner), len(numbers)) for name, x in rows.items()}


# ---------------------------------------------------------------- inside one song: attention, key, likeness


@torch.inference_mode()
def class_attention(model, tracks, device):
    """How much each class token looks at each frame of every whole window: (windows, layers, tokens, heads, 126).

    Entry i of the layers belongs to block i + 1. The weights of a token, those on class tokens included, sum to 1.
    """
    first, spans = model.class_token_count, [cut_windows(len(t)) for t in tracks]
    found = torch.empty(sum(map(len, spans)), len(model.blocks), first, model.config["heads"], SEGMENT)
    for indices, windows in window_batches(tracks, spans):
        inside = model(*views_of(windows, device), layers=range(len(model.blocks)))[1]  # what goes into each block
        weights = [block.attention(inside[i])[:, :, :first, first:] for i, block in enumerate(model.blocks)]  # (n, heads, tokens, 126) each
        found[indices] = torch.stack(weights, dim=1).transpose(2, 3).cpu()
    return found


def onset_envelope(frames):
    """Spectral flux: how much the mel rises from the frame before, mean over its bands, in dB. (frames, 224) uint8 -> (frames,)."""
    mel = torch.from_numpy(frames[:, N_BINS:].astype(np.float32)) * (DYNAMIC_RANGE / 255)             # (frames, 128) dB
    return F.pad(mel.diff(dim=0).clamp(min=0).mean(dim=1), (1, 0))


def onset_windows(tracks):
    """The onset envelope of every whole window, (windows, 126): taken of the track, then cut."""
    return torch.cat([onset_envelope(t)[:len(t) // SEGMENT * SEGMENT].view(-1, SEGMENT) for t in tracks])


def correlations(x, envelope):
    """Pearson's r of x (..., frames) with the envelope (..., frames) moved round by 0, 1, 2 ... frames, (..., frames).

    Entry 0 is the correlation, the others say what a rhythm that is not this one gets. All shifts at once: a correlation
    in time is a product of spectra.
    """
    x, envelope = (F.normalize(y - y.mean(dim=-1, keepdim=True), dim=-1) for y in (x, envelope))
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(envelope).conj(), n=x.shape[-1])


def shift_chance(r):
    """Chance of a mean correlation: r (windows, ..., shifts) -> (100, ...), each a mean with another random shift in every window."""
    draws = torch.from_numpy(np.random.default_rng(0).integers(1, r.shape[-1], (100, len(r))))
    return torch.stack([r[torch.arange(len(r)), ..., draw].mean(dim=0) for draw in draws])


def key_course(model, frames, device):
    """Probabilities of the 12 key signatures in each 4 s window of a song, (windows, 12), calibrated."""
    windows = [frames[start:stop] for start, stop in cut_windows(len(frames))]
    return turn(key_outputs(model, windows, device), -calibrate(model, device)).unflatten(1, (-1, 12)).sum(dim=1)


def self_similarity(x, size):
    """Cosine of every cell of `size` frames of a song with every other: x (frames, dim) -> (cells, cells).

    All moments of a song share most of their vector, so the song's mean is taken away first: what is left is what changes.
    """
    x = x[:len(x) // size * size].float().unflatten(0, (-1, size)).mean(dim=1)       # (cells, dim)
    x = F.normalize(x - x.mean(dim=0), dim=-1)
    return x @ x.T


# ---------------------------------------------------------------- figures

FIFTHS = [7 * i % 12 for i in range(12)]  # C G D A E B Gb Db Ab Eb Bb F: neighbours share six of seven notes
FIFTH_NAMES = "C/a G/e D/b A/f# E/c# B/g# Gb/eb Db/bb Ab/f Eb/c Bb/g F/d".split()


def pyplot():
    """matplotlib.pyplot, for figures, or None where it is not installed: one line says so, and the numbers are printed anyway."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures without matplotlib: pip install matplotlib")
        return None
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlelocation": "left", "axes.titlesize": 10, "figure.titlesize": 10})
    return plt


def save_figure(plt, figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"figure in {path}")


def draw_image(figure, axes, image, left, right, title, label, **style):
    """image (rows, columns), row 0 at the bottom, from `left` to `right` seconds; label: of the colour scale."""
    drawn = axes.imshow(image, origin="lower", aspect="auto", extent=(left, right, -0.5, len(image) - 0.5), **style)
    axes.set_title(title)
    figure.colorbar(drawn, ax=axes, label=label, pad=0.01)


def draw_front_end(plt, frames):
    """CQT and mel of twelve seconds from the middle of a song, with the crops that two transposed views see."""
    begin = max(0, len(frames) // 2 - 3 * SEGMENT // 2)
    part = frames[begin:begin + 3 * SEGMENT].T * (DYNAMIC_RANGE / 255) - DYNAMIC_RANGE             # (224, frames) dB
    left, right = begin * FRAME_SECONDS, (begin + part.shape[1]) * FRAME_SECONDS
    figure, (cqt, mel) = plt.subplots(2, 1, figsize=(11, 8), sharex=True)
    shift = MAX_CROP - 2
    draw_image(figure, cqt, part[:N_BINS], left, right,
               f"CQT, a bin a semitone. The boxes are two views: in the green one the same music lies {shift} bins lower, so it sounds\n"
               f"{shift} semitones lower. Look for chords as stacks of lines that keep their shape when they move.", "level, dB", cmap="magma")
    for crop, inset, colour in ((1, 0.1, "cyan"), (1 + shift, 0.3, "lime")):
        cqt.add_patch(plt.Rectangle((left + inset, crop - 0.5), right - left - 2 * inset, CROP_BINS, fill=False, ec=colour, lw=2))
        cqt.text(left + inset + 0.1, crop + 1, f"crop {crop}", color=colour, va="bottom", weight="bold", backgroundcolor="black")
    octaves = range(round(12 * np.log2(440 / FMIN)) - 45, N_BINS, 12)                              # bins of C1, C2 ...: 45 semitones below A4
    cqt.set(yticks=octaves, yticklabels=[f"C{i + 1}" for i in range(len(octaves))], ylabel="note")
    draw_image(figure, mel, part[N_BINS:], left, right,
               "Mel spectrogram: never cropped. Look for timbre: vertical lines are attacks, clouds are drums and breath.", "level, dB", cmap="magma")
    hertz, filters = (125, 250, 500, 1000, 2000, 4000), FrontEnd().mel.filters
    centre = filters.argmax(dim=1).numpy() * SAMPLE_RATE / 2 / (filters.shape[1] - 1)              # (128,) Hz
    mel.set(yticks=np.searchsorted(centre, hertz), yticklabels=hertz, ylabel="frequency, Hz", xlabel="time, s")
    return figure


def draw_key(plt, course):
    """Key signatures over time on the circle of fifths. course (windows, 12)."""
    seconds, best = SEGMENT * FRAME_SECONDS, course.argmax(dim=1).tolist()
    figure, axes = plt.subplots(figsize=(11, 4.5))
    draw_image(figure, axes, course[:, FIFTHS].T.numpy(), 0, len(best) * seconds,
               "Key by the class token, no labels; the dot is the likeliest signature of each 4 s. Look for steps: a steady row is one\n"
               "key, a step to the next row a modulation by a fifth; two dark rows at once are a doubt between the two.", "probability",
               cmap="Blues", vmin=0, vmax=1)
    axes.plot((np.arange(len(best)) + 0.5) * seconds, [FIFTHS.index(k) for k in best], ".", color="crimson", ms=5)
    axes.set(yticks=range(12), yticklabels=FIFTH_NAMES, xlabel="time, s", ylabel="key signature, by fifths")
    return figure


def draw_attention(plt, names, attention, envelope, r, start):
    """attention (windows, layers, tokens, 126), envelope (windows, 126) dB, r (layers, tokens), start: s of the first window."""
    windows, layers, tokens, _ = attention.shape
    attention = SEGMENT * attention.permute(1, 2, 0, 3).flatten(2).numpy()                         # (layers, tokens, frames), x an even share
    envelope = envelope.flatten().numpy()                                                          # (frames,)
    end = start + windows * SEGMENT * FRAME_SECONDS
    figure, panels = plt.subplots(1 + tokens, 1, figsize=(11, 2 + (0.8 + 0.3 * layers) * tokens), sharex=True,
                                  height_ratios=[1.2] + [0.5 + 0.3 * layers] * tokens)
    panels[0].fill_between(np.linspace(start, end, len(envelope), endpoint=False), envelope, step="post", lw=0, color="black")
    panels[0].set(title="Onsets: mean rise of the mel from frame to frame (dotted: where windows meet)", ylabel="rise, dB", ylim=(0, None))
    for t, axes in enumerate(panels[1:]):
        draw_image(figure, axes, attention[:, t], start, end,
                   f"Where the {names[t]} token looks (r: correlation with the onsets, whole song). Look for columns under the peaks.", "x even share",
                   cmap="viridis", vmin=0, vmax=np.quantile(attention[:, t], 0.99), interpolation="nearest")
        axes.set(yticks=range(layers), yticklabels=[f"{i + 1}  (r = {r[i, t]:.2f})" for i in range(layers)], ylabel="layer")
    for axes in panels:
        for border in range(1, windows):
            axes.axvline(start + border * SEGMENT * FRAME_SECONDS, color="grey", ls=":", lw=1)
    panels[-1].set(xlabel="time, s")
    return figure


def draw_similarity(plt, matrices, seconds):
    """matrices {title: (cells, cells)}, seconds of a cell."""
    figure, panels = plt.subplots(1, len(matrices), figsize=(4 * len(matrices), 4.6), sharey=True)
    for axes, (title, matrix) in zip(panels, matrices.items()):
        end = len(matrix) * seconds
        drawn = axes.imshow(matrix.numpy(), origin="lower", cmap="RdBu_r", vmin=-1, vmax=1, extent=(0, end, 0, end))
        axes.set(title=title, xlabel="time, s")
    panels[0].set(ylabel="time, s")
    figure.colorbar(drawn, ax=panels, label="cosine, mean of the song removed", pad=0.01)
    figure.suptitle("Which moments are alike. Look for blocks: sections; for stripes beside the diagonal: repeats, as far away as they come back.")
    return figure


def principal(x):
    """x (tracks, dim) -> (tracks, 2) along its two widest directions (PCA), and the share of the variance of each.

    A direction has no sign of its own: its largest weight is made positive.
    """
    u, s, v = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    sign = v[:2].gather(1, v[:2].abs().argmax(dim=1, keepdim=True)).sign()[:, 0]
    return u[:, :2] * s[:2] * sign, (s[:2] ** 2 / s.square().sum()).tolist()


def draw_map(plt, rows):
    """rows [(points {name: ((tracks, 2), shares)}, labels [str] one a track, by: key, folder or instrument)], one row of panels each."""
    figure, panels = plt.subplots(len(rows), len(rows[0][0]), figsize=(1 + 4.8 * len(rows[0][0]), 9), squeeze=False)
    for line, (points, labels, by) in zip(panels, rows):
        names = [n for n in FIFTH_NAMES if n in labels] if by == "key" else sorted(set(labels))
        colour = {n: plt.cm.hsv(FIFTH_NAMES.index(n) / 12) if by == "key" else plt.cm.tab20(i % 20) for i, n in enumerate(names)}
        for axes, (name, (places, shares)) in zip(line, points.items()):
            for label in ["?"] * ("?" in labels) + names:
                mine = np.array(labels) == label
                axes.scatter(*places.numpy()[mine].T, s=22, color=colour.get(label, "lightgrey"), label=label, edgecolor="white", lw=0.4)
            axes.set(xlabel=f"first direction ({100 * shares[0]:.0f} % of the variance)", ylabel=f"second direction ({100 * shares[1]:.0f} %)")
            axes.set_title(f"{name}: a dot is a track, colour its {by}")
        axes.legend(title=by, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.suptitle("PCA of the tracks by each token. Look for colours that keep together: what tells them apart, the token knows.")
    return figure


# ---------------------------------------------------------------- emergence


def emergence_of_labels(model, store, numbers, tracks, device):
    """Linear probes of chords and beats on each frame's own token, layer by layer: (results, chance)."""
    depth, results, chance = model.config["depth"], {}, {}
    if not any(kind in t.labels for t in tracks for kind in LOCAL):
        return results, chance
    found, owner = all_rows(model, store, numbers, device, list(range(depth + 1)), per_frame=True)
    # The blocks of a fresh network add nothing, so one of its layers stands for all.
    rows = {f"layer {i}": found[f"sequence L{i}"] for i in range(depth + 1)}
    rows |= {f"untrained layer {depth}": found[f"untrained sequence L{depth}"], "raw": found["raw"]}
    for kind in LOCAL:
        mine, metric = [i for i, t in enumerate(tracks) if kind in t.labels], next(iter(metrics_of(kind, None)))
        if mine:
            keep = np.isin(owner, mine)
            probed, constant = probe_local({name: x[keep] for name, x in rows.items()}, np.searchsorted(mine, owner[keep]),
                                           [tracks[i] for i in mine], kind, seeds=1)
            for name, cells in probed.items():
                results.setdefault(name, {})[f"{kind} {metric}"] = cells[metric]
            chance |= {f"{kind} {metric}": constant[metric]} if constant else {}
    return results, chance


def emergence_of_onsets(model, songs, device, prefix=""):
    """Correlation of each class token's attention with the onsets, its heads averaged: (results, remarks).

    Block i makes layer i, so its attention stands in that row. Songs are (frames, 224), of 4 s and more.
    """
    results, weights = {}, class_attention(model, songs, device)
    each = correlations(weights, onset_windows(songs)[:, None, None, None])[..., 0].mean(dim=0)     # (layers, tokens, heads)
    r = correlations(weights.mean(dim=3), onset_windows(songs)[:, None, None])                      # (windows, layers, tokens, shifts)
    chance = shift_chance(r)                                                                        # (100, layers, tokens)
    for i, t in product(range(r.shape[1]), range(r.shape[2])):
        true, other = r[:, i, t, 0], chance[:, i, t]
        row = results.setdefault(f"{prefix}layer {i + 1}", {})
        row[f"{model.tokens[t]} ~ onsets"] = dict(mean=true.mean().item(), std=true.std().item())
        row[f"{model.tokens[t]}, shifted"] = dict(mean=other.mean().item(), std=other.std().item(), interval=np.percentile(other, [2.5, 97.5]).tolist())
    remarks = []
    for t, name in enumerate(model.tokens):
        layer, head = divmod(each[:, t].abs().argmax().item(), each.shape[2])
        remarks.append(f"{name}: the single head most tied to onsets is head {head + 1} of layer {layer + 1}, r = {each[layer, t, head]:.2f}")
    return results, remarks


def emergence(model, store, numbers, tracks, device):
    """What each layer knows that nobody asked for: (results, chance, remarks)."""
    songs = [store.track(i) for i in numbers]
    probed, chance = emergence_of_labels(model, store, numbers, tracks, device)
    trained, remarks = emergence_of_onsets(model, songs, device)
    fresh, _ = emergence_of_onsets(untrained(model, device), songs, device, "untrained ")
    layers = [f"layer {i}" for i in range(len(model.blocks) + 1)]
    results = {name: probed.get(name, {}) | trained.get(name, {}) | fresh.get(name, {}) for name in (*layers, *fresh, *probed.keys() & {"raw"})}
    for column in results[layers[-1]]:
        if not column.endswith("shifted"):
            best = max((name for name in layers if column in results[name]), key=lambda name: abs(results[name][column]["mean"]))
            remarks.append(f"{column}: strongest at {best} ({100 * results[best][column]['mean']:.1f})")
    return results, chance, remarks


# ---------------------------------------------------------------- what a command works on: network, tracks, features

EMERGENCE_SONGS = dict(train=64, valid=16, test=32)  # enough to compare layers in a minute (our choice)


SHIPPED = Path(__file__).resolve().parent / "tests" / "weights" / "mt2.pt"


def checkpoint_of(args):
    """The checkpoint that a command names, or the one written last below out/, or the weights that come along. Raises InputError when there is none."""
    if args.checkpoint:
        return args.checkpoint
    newest = max(Path("out").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime, default=None)
    if newest is None and not SHIPPED.exists():
        raise InputError("no run in out/; train one with: python train.py, or name a file with --checkpoint")
    print(f"checkpoint {newest}" if newest else f"no run in out/: listening with {SHIPPED}, see the model card in README")
    return newest or SHIPPED


def load_checkpoint(path, device="cpu"):
    """model.load_checkpoint, whose ValueError becomes an InputError."""
    try:
        return networks.load_checkpoint(path, device)
    except ValueError as error:
        raise InputError(str(error)) from None


def open_frames_model(args, checkpoint):
    """A network whose class tokens can be followed over frames. Raises InputError for patches, or without class tokens."""
    model = load_checkpoint(checkpoint, args.device)
    if model.patches != [None] or model.pool != "token":
        raise InputError(f"{args.task}: follows class tokens over frames; this network was trained with --patch {model.config['patch']} "
                         f"--pool {model.pool}, give one with --patch 1 and --pool token")
    return model


def synth_tracks(**parts):
    """The first songs of some parts of the embedded set, as train=64: (store, track numbers, tracks labelled with all that compose() says)."""
    store, numbers, tracks = prepare_synth(), [], []
    for part, count in parts.items():
        for i in SYNTH_SPLITS[part][:count]:
            song = compose(i)
            numbers.append(i)
            tracks.append(Track(store.paths[i], None, song | dict(beats=np.array(song["beats"])), part, str(i)))
    return store, np.array(numbers), tracks


def tracks_of(args):
    """Labels of the task that the command names: (tracks, targets {target: kind}). Raises InputError; nothing is downloaded."""
    if args.task == "folders":
        return read_folders(args.data, args.group)
    if args.task == "csv":
        return read_csv(args)
    task = TASKS[args.task]
    roots = [args.data] if args.data else [Path("datasets") / home for home in task.homes]
    try:
        tracks = [t for t in task.read(Files(roots)) if None not in t.labels.values()]
        problem = "none of its audio files found" if tracks else "no labels found"
    except InputError as error:
        tracks, problem = [], str(error)
    except (KeyError, ValueError) as error:
        tracks, problem = [], f"a label file is not as published: {type(error).__name__} {error}"
    if not any(Path(root).is_dir() for root in roots):
        problem = f"{' and '.join(map(str, roots))} not found"
    if not any(t.path for t in tracks) and not (args.features and tracks):
        raise InputError(f"{args.task}: {task.what}; {problem}\n  obtain: {task.obtain}\n  put:    {task.place} "
                         f"below {' and '.join(map(str, roots))}, or name the folder with --data")
    return tracks, task.targets


def open_tracks(args, tracks):
    """Prepare the audio of `tracks`, broken files left out: (store, its track numbers, the tracks that are there)."""
    files = {t.name: t.path for t in tracks if t.path}
    where = hashlib.sha256("|".join(sorted({str(path.resolve().parent) for path in files.values()})).encode()).hexdigest()[:8]
    store = prepare_files(sorted(files.items()), Path("data") / f"{args.task}-{where}")
    number = {name: i for i, name in enumerate(store.paths)}
    kept = [t for t in tracks if t.path and t.name in number]
    return store, np.array([number[t.name] for t in kept]), kept


def folder_tracks(args):
    """Songs of 4 s and more below --data, those with .lab or .beats files where there are any, at most 112: (store, track numbers, tracks)."""
    merged = {}
    for kind in LOCAL:
        for t in TASKS[kind].read(Files([args.data])):
            if t.path:
                merged.setdefault(t.path, t._replace(labels={}, split=None)).labels.update(t.labels)
    if not merged:
        print("no .lab (chords) or .beats files beside the songs: onsets alone, which need no labels")
        merged = {path: Track(name, path, {}, None, name) for name, path in find_audio([args.data])}
    tracks = sorted(merged.values(), key=lambda t: (hashed(t.name, 1 << 32), t.name))[:sum(EMERGENCE_SONGS.values())]
    store, numbers, tracks = open_tracks(args, tracks)
    whole = np.flatnonzero(store.lengths[numbers] >= SEGMENT)
    if len(whole) == 0:
        raise InputError(f"{args.data}: every song is shorter than one window of 4 s; give longer recordings")
    print(f"{len(whole)} of {len(merged)} songs")
    return store, numbers[whole], [tracks[i] for i in whole]


def counts_line(args, tracks, kept):
    """'926 of 930 files (train 442 of 443, ...), missing: ...': the names `kept`, against the official counts where there are any."""
    task = TASKS.get(args.task)
    official = dict(zip(("train", "valid", "test"), task.expected)) if task and isinstance(task.expected, tuple) else {}
    total = sum(official.values()) or (task and task.expected) or len(tracks)
    parts = Counter(t.split for t in tracks if t.name in kept)
    named = sorted(part for part in parts if isinstance(part, str))  # others are folds
    each = [f"{part} {parts[part]} of {n}" for part, n in official.items()] or [f"{part} {parts[part]}" for part in named]
    lost = [t.name for t in tracks if t.name not in kept]
    known = [name for name in lost if task and name in task.broken]
    lost = [name for name in lost if name not in known]
    said = [f"{len(kept)} of {total} files" + (f" ({', '.join(each)})" if each else "")]
    if known:
        said.append(f"known to be broken: {', '.join(known)}")
    if lost:
        said.append(f"missing or unreadable: {', '.join(lost[:8])}" + (f" and {len(lost) - 8} more" if len(lost) > 8 else ""))
    if task and task.expected:
        whole = not lost and len(tracks) == total
        said.append("complete: the benchmark's set" if whole else "INCOMPLETE: not comparable with the benchmark")
    return "; ".join(said)


def open_features(path, tracks):
    """Somebody's embeddings: an npz with `features` (items, dim) and `track` (items,) names. -> (rows, owner, tracks found).

    Several items of a track are its windows. A track is named as in the task ("blues.00000", the `file` of a CSV), or by
    the stem of that name.
    """
    try:
        with np.load(path) as file:
            features, names = torch.from_numpy(np.ascontiguousarray(file["features"], np.float32)), [str(n) for n in file["track"]]
    except Exception:  # np.load has no exception of its own: zip, pickle, value and end-of-file errors all mean the same
        raise InputError(f"{path}: is not an npz with the arrays features (items, dim) and track (items,)") from None
    if features.ndim != 2 or not 0 < len(features) == len(names) or not features.isfinite().all():
        raise InputError(f"{path}: features {tuple(features.shape)} must be (items, dim), finite, one row for each of {len(names)} tracks")
    stem = lambda name: Path(name).stem if Path(name).suffix.lower() in AUDIO_SUFFIXES else Path(name).name
    number = {key: i for i, t in enumerate(tracks) for key in (stem(t.name), t.name)}
    owner = np.array([number.get(name, number.get(stem(name), -1)) for name in names])
    found = np.unique(owner[owner >= 0])
    if len(found) == 0:
        raise InputError(f"{path}: none of its tracks ({names[0]}, ...) is one of the task ({tracks[0].name}, ...)")
    keep = np.flatnonzero(owner >= 0)
    return {"features": features[keep]}, np.searchsorted(found, owner[keep]), [tracks[i] for i in found]


def make_features(args, checkpoint, tracks, per_frame):
    """Features of `tracks` from their audio: (rows, owner, the tracks that are there, a line on the speed)."""
    start = time.perf_counter()
    model = load_checkpoint(checkpoint, args.device)
    possible = {str(n): n for n in range(model.config["depth"] + 1)}
    layers = list(possible.values()) if args.layers == "all" else [possible.get(n) for n in args.layers.split(",")] if args.layers else None
    if layers and None in layers:
        raise InputError(f"--layers {args.layers}: this network has layers 0 to {model.config['depth']}; give numbers with commas, or all")
    store, numbers, kept = open_tracks(args, tracks)
    rows, owner = all_rows(model, store, numbers, args.device, layers, per_frame)
    seconds, hours = time.perf_counter() - start, store.lengths[numbers].sum() * FRAME_SECONDS / 3600
    if args.save_features:
        arrays = {name.replace(" ", "_"): value.float().numpy() for name, value in rows.items()}
        best = "concat" if "concat" in arrays else next(iter(arrays))
        write_npz(args.save_features, features=arrays[best], track=np.array([kept[i].name for i in owner]), **arrays)
        print(f"features in {args.save_features}: {', '.join(arrays)}; `features` is {best}")
    return rows, owner, kept, (f"{len(kept)} tracks, {hours:.2f} h of audio to features in {seconds:.0f} s: {len(kept) / seconds:.1f} tracks/s, "
                               f"{hours / seconds * 60:.2f} h a minute (what is cached costs nothing)")


def write_npz(path, **arrays):
    """Named arrays as an npz: the old file or the new one, under just this name."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomic(path, file.getbuffer())


# ---------------------------------------------------------------- commands


def run_task(args):
    """One task from files to table."""
    tracks, targets = tracks_of(args)
    local = next((kind for kind in targets.values() if kind in LOCAL), None)
    if local and (args.features or args.grid or args.shares or args.layers or args.confusion):
        raise InputError(f"{args.task} is a local task: --features, --grid, --labels, --layers and --confusion do not apply to it")
    if args.features:
        source, speed = args.features, None
        rows, owner, kept = open_features(source, tracks)
    else:
        source = checkpoint_of(args)
        rows, owner, kept, speed = make_features(args, source, tracks, per_frame=bool(local))
    if args.rows:
        unknown = set(args.rows.split(",")) - set(rows)
        if unknown:
            raise InputError(f"--rows: no row {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
        rows = {name: rows[name] for name in args.rows.split(",")}
    if args.confusion and (args.confusion not in rows or {"tags", "regression", "tempo"} & set(targets.values())):
        raise InputError(f"--confusion {args.confusion}: give a row of this table, of a task with classes or keys")
    remarks, predictions = [], {}
    if local:
        results, chance = probe_local(rows, owner, kept, local)
    else:
        results, chance, remarks, predictions = probe_global(rows, owner, kept, targets, args.grid, args.shares)
    splits = splits_of(kept)
    title = (f"{args.task}: {source}\n{counts_line(args, tracks, {t.name for t in kept})}\n"
             f"protocol {'grid' if args.grid else 'linear'}, {len(splits)} {'folds' if isinstance(kept[0].split, int) else 'seeds'}; "
             f"split of the first: {', '.join(f'{len(part)} {name}' for part, name in zip(splits[0], ('train', 'valid', 'test')))}; "
             f"{len({t.group for t in kept})} groups; in %, mean ± deviation [95 % interval over tracks]")
    name = args.task
    if name in ("folders", "csv"):
        name = re.sub(r"[^\w-]+", "-", f"{name}-{Path(args.data).resolve().stem}-{args.label if name == 'csv' else ''}").strip("-")
    publish(source, f"{name}{'-grid' if args.grid else ''}", title, results, chance, remarks + ([speed] if speed else []), args.task)
    for (row, target), prediction in predictions.items():
        if row == args.confusion:
            print_confusion(*prediction, beside(source, f"confusion-{name}-{target}.png"))


def print_list():
    """Which tasks there are, where each looks, and what is there."""
    for name, task in TASKS.items():
        roots = [Path("datasets") / home for home in task.homes]
        there = " ".join(f"{root}/ {'found' if root.is_dir() else 'not there'}" for root in roots)
        print(f"{name:17} {task.what}\n{'':17} looks in {there}; needs {task.place}" + (f"\n{'':17} {task.note}" if task.note else ""))
    print(f"{'folders':17} your recordings, one sub-folder per class: --data DIR\n{'csv':17} your own table: --data labels.csv --audio DIR --label COLUMN\n"
          f"{'synth':17} the embedded songs, nothing needed\n{'key':17} key signature of any song, no labels")


def synth_table(model, device):
    """All tasks of the embedded songs: (results, chance)."""
    store, numbers, tracks = synth_tracks(train=512, valid=128, test=256)
    songs = [t.labels for t in tracks]
    valid, test = (np.array([i for i, t in enumerate(tracks) if t.split == part]) for part in ("valid", "test"))
    rows, owner = all_rows(model, store, numbers, device)
    tempo_class = lambda song: min(5, int(6 * np.log(song["tempo"] / 70) / np.log(160 / 70)))
    labels = {"key": [s["key"] for s in songs], "instrument": [s["instrument"] for s in songs], "tempo": [tempo_class(s) for s in songs]}
    results, chance = {name: {} for name in rows}, {}
    for task, count in (("key", 64), ("key", 512), ("instrument", 64), ("instrument", 512), ("tempo", 512)):
        y, column = torch.tensor(labels[task]), f"{task} @{count}"
        score = lambda outputs, numbers: accuracy(outputs.numpy(), y[numbers].numpy())
        draws = [np.sort(np.random.default_rng(seed).choice(512, count, replace=False)) for seed in range(SEEDS)]
        runs = [dict(LINEAR, seed=seed, train=draw, valid=valid) for seed, draw in enumerate(draws)]
        for name, x in rows.items():
            heads = fit(x, owner, y, "class", runs, score, steps=SYNTH_STEPS)
            results[name][column] = mean_of([score(head(x, owner, test), test) for head in heads])
        chance[column] = float(torch.bincount(y[test]).max() / len(test))
    first, last = np.searchsorted(owner, test), np.searchsorted(owner, test, side="right") - 1  # windows of each test track
    for name, x in rows.items():
        results[name]["retrieval"] = mean_of(retrieval(x[first], x[last]))

    # Chords: one answer per frame, from a part of the songs.
    _, some, parts = synth_tracks(train=96, valid=32, test=64)
    chords, _ = probe_local(*all_rows(model, store, some, device, per_frame=True), parts, "chords", seeds=1)
    for name, cells in chords.items():
        results[name.replace("sequence", "sequence mean")]["chord"] = cells["overlap (pooled)"]
    heard = np.concatenate([frame_labels("chords", t.labels["chords"], store.lengths[i]) for i, t in zip(some, parts) if t.split == "test"])
    chance |= {"chord": np.bincount(heard).max() / len(heard), "retrieval": 1 / 128}

    # Keys without labels: the largest of 12 outputs is a signature, of 24 a key.
    held_out, truth = [store.track(i) for i in numbers[test]], np.array(labels["key"])[test]
    right = lambda estimate: mean_of([(SIGNATURES[estimate] == SIGNATURES[truth]).mean()])
    results["raw"]["key sig. 0-shot"] = right(template_keys(held_out))
    if token := model.key_token():
        for prefix, network in (("", model), ("untrained ", untrained(model, device))):
            keys, row = key_probabilities(network, held_out, device), results[prefix + token]     # (tracks, 12 or 24)
            row["key sig. 0-shot"] = right(keys.argmax(dim=1).numpy())
            if keys.shape[1] == 24:
                row["key 0-shot"] = mean_of([(keys.argmax(dim=1).numpy() == truth).mean()])
    chance["key sig. 0-shot"] = 1 / 12
    return results, chance


def print_synth(checkpoint, device):
    """The table of the embedded songs for one checkpoint, printed and written beside it."""
    results, chance = synth_table(load_checkpoint(checkpoint, device), device)
    title = (f"{checkpoint} on {len(SYNTH_SPLITS['test'])} held-out synthetic songs: accuracy in %, {SEEDS} probe seeds\n"
             "(@n: n labelled songs; 0-shot: no labels, raw = Krumhansl template; retrieval: the same song among 128)")
    publish(checkpoint, "synth", title, results, chance)


def name_of(probabilities):
    """'C major / A minor (93 %)' of 12 probabilities, 'A minor (88 %)' of 24."""
    best = probabilities.argmax().item()
    spoken = lambda key: f"{ALL_KEYS[key].capitalize()} {'major' if key < 12 else 'minor'}"
    relative = f" / {spoken(12 + (best + 9) % 12)}" if len(probabilities) == 12 else ""
    return f"{spoken(best)}{relative} ({100 * probabilities[best]:.0f} %)"


def clock(seconds):
    """75.2 -> '1:15'."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_key(args):
    """Keys without labels: of each song, also per 15 s; or scored, with a CSV of keys."""
    checkpoint = checkpoint_of(args)
    model = load_checkpoint(checkpoint, args.device)
    if model.key_token() is None:
        raise InputError(f"{checkpoint}: has no token that hears keys; train one with --tokens cpsd,ntxent or skey,ntxent")
    if args.keys:
        return score_keys(args, checkpoint, model)
    front_end, piece, rotation = FrontEnd(), round(15 / FRAME_SECONDS), calibrate(model, args.device)
    files, skipped = [f for song in args.songs for f in ([song] if Path(song).is_file() else [p for _, p in find_audio([song])])], 0
    for file in files:
        try:
            frames = audio_to_frames(read_audio(file), front_end)
        except InputError as error:
            print(f"skipped {error}")
            skipped += 1
            continue
        parts = [frames[i:i + piece] for i in range(0, max(1, len(frames) - SEGMENT), piece)]
        keys = by_tonic(key_outputs(model, [frames, *parts], args.device), rotation)
        print(f"{file}: {name_of(keys[0])}")
        for i, key in enumerate(keys[1:] if len(parts) > 2 else []):
            print(f"    {clock(15 * i)}  {name_of(key)}")
    if skipped == len(files):
        raise InputError(f"none of {skipped} files could be read as audio; see the lines above")


def score_keys(args, checkpoint, model):
    """Keys without labels against those of a CSV: the network, the untrained one and the template."""
    store = prepare_folders(args.songs)
    keys = {path: parse_key(text) for path, text in read_labels(args.keys, "key", store.paths).items()}
    found = {i: keys[path] for i, path in enumerate(store.paths) if keys.get(path) is not None}
    print(f"{len(found)} tracks used, {len(keys) - len(found)} name no single key")
    if not found:
        raise InputError(f"{args.keys}: no row names a single key")
    tracks, truth = [store.track(i) for i in found], np.array(list(found.values()))
    rows = {f"{prefix}{model.key_token()}": key_probabilities(network, tracks, args.device).numpy()
            for prefix, network in (("", model), ("untrained ", untrained(model, args.device)))}
    rows["Krumhansl template"] = np.eye(24)[template_keys(tracks)]
    # The largest of 12 outputs is a signature, named by its major key; what asks for the mode needs all 24.
    metrics = metrics_of("key", ALL_KEYS)
    by_signature = {"signature": lambda o, t: float((SIGNATURES[o.argmax(axis=1)] == SIGNATURES[t]).mean()), "KSEA": metrics["KSEA"]}
    by_key = {name: metrics[name] for name in ("accuracy", "weighted", "weighted (both)", "mode")}
    results = {}
    for row, outputs in rows.items():
        results[row] = cells_of(by_signature, [outputs], [truth], True)
        if outputs.shape[1] == 24:
            results[row] |= cells_of(by_key, [outputs], [truth], True)
    title = (f"key without labels, {len(truth)} tracks, in % [95 % bootstrap interval]; signature: right but for the relative key; KSEA: half\n"
             "for a fifth; weighted: MIREX, ascending fifths (both: either way)")
    publish(checkpoint, f"key-{Path(args.songs[0]).resolve().name}", title, results, {"signature": 1 / 12, "KSEA": 1 / 6, "accuracy": 1 / 24, "mode": 0.5})


def write_embeddings(args):
    """Class tokens and the sequence mean of every track below the folders, or of every 4 s window, as arrays of an npz."""
    model, store = load_checkpoint(checkpoint_of(args), args.device), prepare_folders(args.folders)
    start, every, extra = time.perf_counter(), np.arange(len(store.paths)), {}
    if args.windows:
        rows, owner, times = embed(model, store, every, args.device)
        extra = dict(track=owner, time=times.astype(np.float32))
    else:
        rows = embed_tracks(model, store, every, args.device)
    seconds, hours = time.perf_counter() - start, store.lengths.sum() * FRAME_SECONDS / 3600
    write_npz(args.out, paths=np.array(store.paths), **extra, **{name: x.numpy() for name, x in rows.items()})
    print(f"{args.out}: {', '.join(f'{name} {tuple(x.shape)}' for name, x in rows.items())} of {len(store.paths)} tracks; {len(store.skipped)} files "
          f"skipped, {store.folder}/index.jsonl says why\n{hours:.2f} h of prepared audio in {seconds:.1f} s, {3600 * hours / seconds:.0f} x real time (what is cached costs nothing)")


def print_show(args):
    """Look inside: the key of a song, where class tokens look and which moments are alike, in some lines and four figures."""
    model = open_frames_model(args, checkpoint_of(args))
    frames, depth = audio_to_frames(read_audio(args.song), FrontEnd()), model.config["depth"]
    if len(frames) < SEGMENT:
        raise InputError(f"{args.song}: is shorter than one window of 4 s; give a longer recording")
    plt, course = pyplot(), None
    if model.key_token():
        course = key_course(model, frames, args.device)                                  # (windows, 12)
        best = course.argmax(dim=1).tolist()
        for i, (before, now) in enumerate(zip([None, *best], best)):
            if now != before:
                print(f"    {clock(i * SEGMENT * FRAME_SECONDS)}  {name_of(course[i])}")

    weights = class_attention(model, [frames], args.device).mean(dim=3)                  # (windows, layers, tokens, 126)
    envelope = onset_windows([frames])                                                   # (windows, 126)
    r = correlations(weights, envelope[:, None, None])[..., 0].mean(dim=0)               # (layers, tokens)
    for t, name in enumerate(model.tokens):
        print(f"{name} is most tied to onsets in layer {r[:, t].abs().argmax() + 1}; r by layer: {' '.join(f'{v:.2f}' for v in r[:, t])}")

    layers = sorted({1, (1 + depth) // 2, depth})
    sequence = extract(model, [frames], args.device, layers, per_frame=True)["sequence"]  # (frames, layers, dim)
    size = max(16, len(frames) // 1000)                                                  # half a second, more in recordings over 9 minutes
    matrices = {"spectrogram": self_similarity(extract(None, [frames], args.device, per_frame=True)["raw"], size)}
    matrices |= {f"layer {layer} of {depth}": self_similarity(sequence[:, i], size) for i, layer in enumerate(layers)}
    for title, matrix in matrices.items():
        lags = [matrix.diagonal(lag).mean().item() for lag in range(8, len(matrix) - 8)]  # eight cells: at least 4 s apart, 4 s long
        if lags:
            print(f"{title}: most like itself {(8 + np.argmax(lags)) * size * FRAME_SECONDS:.0f} s later (cosine {max(lags):.2f})")

    if plt is None:
        return
    middle = slice(first := max(0, len(weights) // 2 - 2), first + 4)
    figures = {"frontend": draw_front_end(plt, frames)} | ({} if course is None else {"key": draw_key(plt, course)})
    figures["attention"] = draw_attention(plt, model.tokens, weights[middle], envelope[middle], r, first * SEGMENT * FRAME_SECONDS)
    figures["similarity"] = draw_similarity(plt, matrices, size * FRAME_SECONDS)
    for name, figure in figures.items():
        save_figure(plt, figure, Path(args.out or f"{Path(args.song).stem}-figures") / f"{name}.png")


def print_map(args):
    """Tracks on a plane, by each class token: a folder's, trained above untrained, or the embedded songs, by key above by instrument.

    Without matplotlib the places are printed as a CSV.
    """
    if args.keys and not args.data:
        raise InputError("--keys: names the keys of the songs in --data; give both, or neither for the embedded songs")
    model = load_checkpoint(checkpoint_of(args), args.device)
    circle = lambda key: "?" if key is None else FIFTH_NAMES[FIFTHS.index(SIGNATURES[key])]
    if args.data:
        store = prepare_folders([args.data])
        numbers = np.arange(len(store.paths))
        labels, by = [Path(p).parts[1] if len(Path(p).parts) > 2 else "." for p in store.paths], "folder"
        if args.keys:
            keys = read_labels(args.keys, "key", store.paths)
            labels, by = [circle(parse_key(keys.get(p, ""))) for p in store.paths], "key"
    else:
        store, numbers, songs = synth_tracks(test=256)
        labels, by = [circle(song.labels["key"]) for song in songs], "key"
    if len(numbers) < 3:
        raise InputError(f"{args.data}: a map of {len(numbers)} tracks shows nothing; give at least three")
    places = lambda network, prefix="": {prefix + name: principal(x) for name, x in embed_tracks(network, store, numbers, args.device).items()
                                         if name in model.tokens or not model.class_token_count}
    rows = [(places(model), labels, by)]
    if args.data:
        rows.append((places(untrained(model, args.device), "untrained "), labels, by))
    else:
        rows.append((rows[0][0], [TIMBRES[song.labels["instrument"]] for song in songs], "instrument"))
    if plt := pyplot():
        return save_figure(plt, draw_map(plt, rows), args.out)
    points = {name: xy for row, _, _ in rows for name, (xy, _) in row.items()}
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["path", by, *(f"{name} {axis}" for name in points for axis in (1, 2))])
    for place, (i, label) in enumerate(zip(numbers, labels)):
        table.writerow([store.paths[i], label, *(f"{v:.3f}" for xy in points.values() for v in xy[place])])


def print_emergence(args):
    """The table of one network by layer, printed and written beside the checkpoint."""
    checkpoint = checkpoint_of(args)
    model = open_frames_model(args, checkpoint)
    store, numbers, tracks = folder_tracks(args) if args.data else synth_tracks(**EMERGENCE_SONGS)
    results, chance, remarks = emergence(model, store, numbers, tracks, args.device)
    title = (f"emergence: {checkpoint} on {len(tracks)} songs, in %; chords and beats: a linear probe on sequence tokens, one seed [95 % interval over\n"
             "test songs]; token ~ onsets: 100 r of its attention with the onset envelope, ± over windows; shifted: the same with the envelope\n"
             "moved round in each window, 100 times [where 95 % of them lie]")
    publish(checkpoint, f"emergence-{Path(args.data).resolve().name}" if args.data else "emergence", title, results, chance, remarks)


def shares_of(text):
    """'0.01,0.5' -> [0.01, 0.5]: shares of the labels, each above 0 and at most 1."""
    shares = [float(part) for part in text.split(",")]
    if not all(0 < share <= 1 for share in shares):
        raise ValueError
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--checkpoint", help="checkpoint.pt of a run (default: the newest below out/, or the weights that come along)")
    network.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the network runs")
    protocol = argparse.ArgumentParser(add_help=False, parents=[network])
    protocol.add_argument("--grid", action="store_true", help="choose among 216 configurations on the validation set")
    protocol.add_argument("--labels", dest="shares", type=shares_of, default=[], metavar="SHARES", help="also with these shares of the labels: 0.01,0.1,0.25,0.5")
    protocol.add_argument("--layers", help="all, or numbers: 0,6,12 (default: the last layer)")
    protocol.add_argument("--rows", help="only these rows of the table: cpsd,concat,raw")
    protocol.add_argument("--features", metavar="NPZ", help="probe these embeddings: arrays features (items, dim), track (items,)")
    protocol.add_argument("--save-features", metavar="NPZ", help="write the features of every row")
    protocol.add_argument("--confusion", metavar="ROW", help="print the confusion matrix of a row (and a figure, with matplotlib)")
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def command(name, run, text, *parents):
        made = commands.add_parser(name, help=text.replace("%", "%%"), parents=parents)
        made.set_defaults(run=run)
        return made

    command("list", lambda args: print_list(), "what there is")
    command("synth", lambda args: print_synth(checkpoint_of(args), args.device), "the embedded synthetic songs", network)
    for name, task in TASKS.items():
        command(name, run_task, task.what, protocol).add_argument("--data", help=f"folder of the data (default datasets/{task.homes[0]})")
    folders = command("folders", run_task, "a folder with one sub-folder per class", protocol)
    folders.add_argument("--data", required=True, help="the folder")
    folders.add_argument("--group", help="regex; files whose match is equal stay on one side of the split")
    table = command("csv", run_task, "your own table of labels", protocol)
    table.add_argument("--data", required=True, help="CSV with a column `file`")
    table.add_argument("--audio", help="folder below which the files lie (default: the CSV's own)")
    table.add_argument("--label", required=True, help="column of the labels")
    table.add_argument("--kind", choices=("class", "tags", "regression", "key"), help="what the labels are (default: guessed)")
    table.add_argument("--split", help="column that says train, valid or test (default: random, 60/20/20, five times)")
    table.add_argument("--group", help="column; rows of one group stay on one side of a random split")
    key = command("key", print_key, "keys without labels", network)
    key.add_argument("songs", nargs="+", help="audio files or folders")
    key.add_argument("--keys", help="CSV with columns file (path below the folder) and key ('F# minor')")
    vectors = command("embed", write_embeddings, "class tokens of every track, as an npz", network)
    vectors.add_argument("folders", nargs="+", help="folders of audio files")
    vectors.add_argument("--out", required=True, metavar="NPZ", help="file to write: arrays paths, one per class token, sequence")
    vectors.add_argument("--windows", action="store_true", help="one row per 4 s window, with the arrays track and time")
    show = command("show", print_show, "figures of one song", network)
    show.add_argument("song", help="an audio file")
    show.add_argument("--out", help="folder of the figures (default: SONG-figures)")
    plane = command("map", print_map, "a folder of music on a plane", network)
    plane.add_argument("--data", help="the folder; sub-folders are colours (default: the embedded songs)")
    plane.add_argument("--keys", help="CSV with columns file (path below the folder) and key: keys are colours")
    plane.add_argument("--out", default="map.png", metavar="PNG", help="the figure (default map.png)")
    layers = command("emergence", print_emergence, "what each layer knows of chords, beats and onsets", network)
    layers.add_argument("--data", help="folder of songs, with .lab and .beats files for chords and beats (default: the embedded songs)")
    command("compare", lambda args: print_comparison(args.tables), "tables side by side").add_argument("tables", nargs="+", help="JSON files that probe.py wrote")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
