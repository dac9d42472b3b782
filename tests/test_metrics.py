"""Labels and metrics: every value here can be worked out by hand."""
import itertools
from functools import partial

import numpy as np
import pytest
import torch

import probe
from data import InputError
from probe import ALL_KEYS, FRAME_SECONDS, KEY_SCORES, parse_chord, parse_key


def one_hot(classes, count):
    return np.eye(count)[classes]


def target(kind, labels, frames=1):
    """A target of `frames` items a track, one every 32 ms."""
    owner, time = np.repeat(np.arange(len(labels)), frames), np.tile(np.arange(frames) * FRAME_SECONDS, len(labels))
    return probe.TARGETS[kind](labels, probe.Items({}, owner, time))


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("text, key", [
    # as stored by GiantSteps, MTG key, FMAK, keylab
    ("C minor", 12), ("D# minor", 15), ("d# minor\t2\t", 15), ("B major ", 11), ("F# Major", 6), ("E minor", 16), ("E", 4), ("C:min", 12),
    # spellings: one pitch class whatever its name
    ("Cb major", 11), ("B# minor", 12), ("E# minor", 17), ("Fb", 4), ("Db", 1), ("C#", 1), ("bb", 22), ("Bbb minor", 21), ("F## minor", 19),
    # modes: words in any case, single letters in one
    ("D MINOR", 14), ("d Min", 14), ("G maj", 7), ("Am", 21), ("A m", 21), ("A M", 9), ("Bb:maj", 10), ("a", 21), ("Eb  minor\n", 15)])
def test_key_names(text, key):
    assert parse_key(text) == key


@pytest.mark.parametrize("text", ["-", "", " ", "X", "unknown", "Silence", "other", "C/G", "C | D", "C minor | D minor", "C dorian", "C:mix", "H major",
                                  "C majorish", "Cx minor", "minor", "# minor", "3", "-1", "\tC major", "C minor major", "C:7"])
def test_what_names_no_single_key_is_rejected(text):
    assert parse_key(text) is None


def test_key_names_come_back():
    assert len(ALL_KEYS) == 24 and [parse_key(name) for name in ALL_KEYS] == list(range(24))
    assert [parse_key(f"{name} minor") for name in ALL_KEYS[12:]] == list(range(12, 24)) and parse_key("c major") == 0


@pytest.mark.parametrize("key, signature", [("C", 0), ("Am", 0), ("Em", 7), ("G", 7), ("Dm", 5), ("F#m", 9), ("Cm", 3), ("B", 11)])
def test_relative_keys_share_a_signature(key, signature):
    assert probe.SIGNATURES[parse_key(key)] == signature


# ---------------------------------------------------------------- chords


MAJOR = ("maj", "maj6", "7", "maj7", "9", "maj9", "11", "maj11", "13", "maj13")
MINOR = ("min", "min6", "min7", "minmaj7", "min9", "min11", "min13")
NEITHER = ("dim", "dim7", "hdim7", "aug", "aug7", "sus2", "sus4", "1", "5")


@pytest.mark.parametrize("quality, offset", [(q, 0) for q in MAJOR] + [(q, 12) for q in MINOR] + [(q, None) for q in NEITHER])
def test_chord_qualities(quality, offset):
    for root, name in enumerate(probe.KEY_NAMES):
        assert parse_chord(f"{name}:{quality}") == (-1 if offset is None else root + offset)


def test_no_quality_is_missing():
    assert set(probe.QUALITIES) == {*MAJOR, *MINOR, *NEITHER}


@pytest.mark.parametrize("label, chord", [
    ("N", 24), ("X", -1), ("G", 7), ("C#", 1), ("Db", 1), ("Cb", 11), ("E#:min", 17), ("F##:min7", 19),
    # edits: strict, after removals and additions
    ("Bb:maj(*3)", -1), ("C:maj(2)", -1), ("C:maj(9)", 0), ("C:maj(*5)", -1), ("C:min(*b3)", -1), ("C:sus4(*4,3)", 0), ("C:maj(*3,b3)", 12),
    ("D:maj(11, 13)", 2), ("A:min(b6)", 21), ("C:maj(#4)", -1), ("F:7(#9)", 5), ("C:5(3)", 0), ("C:min7(*5)", -1),
    # degrees only
    ("C:(1,5)", -1), ("C:(1,3,5)", 0), ("D:(b3,5)", 14), ("C:(3,5,b7)", 0),
    # the bass is a note too
    ("C:maj/3", 0), ("C:7/b7", 0), ("D:maj/2", -1), ("G/5", 7), ("A:min/b3", 21), ("A:min/3", -1), ("F/4", -1), ("F/9", -1), ("C:(1,5)/3", 0), ("C:sus4(*4)/3", 0)])
def test_chords_edits_and_bass(label, chord):
    assert parse_chord(label) == chord


@pytest.mark.parametrize("label", ["C:min7/G", "", " ", "n", "H", "c", "C major", "Cmaj", "C:foo", "C:Maj", "C:maj(", "C:maj)", "C:maj(x)", "C:maj(0)", "C:maj(3,)x",
                                   "C:maj/", "C/G", "C/0", "C:", "C:()", "N:maj", "X/3", "C:maj7/3/5", "Silence", "&pause", "1", "C:maj(**3)"])
def test_junk_is_no_chord(label):
    assert parse_chord(label) == -1


@pytest.mark.parametrize("degree, expected", [("1", 0), ("2", 2), ("b3", 3), ("4", 5), ("5", 7), ("b7", 10), ("7", 11), ("9", 14), ("#11", 18), ("13", 21), ("bb7", 9)])
def test_scale_degrees(degree, expected):
    assert probe.semitones(degree) == expected


# ---------------------------------------------------------------- files of chords and beats


@pytest.mark.parametrize("name, text", [
    ("spaces.lab", "0.0 1.5 C\n1.5 2.25 E:min\n2.25 3.0 N\n"),
    ("tabs.lab", "0.0\t1.5\tC:maj7\n\n1.5\t2.25\tE:min\r\n2.25\t3\tN"),
    ("mixed.lab", "\ufeff 0.0  1.5 \t C\n1.5   2.25\tE:min7 \n2.25 3.0 N\n"),
    ("four.lab", "0.0 1.5 chord C\n1.5 2.25 chord E:min\n2.25 3.0 chord N\n"),
    ("winterreise.csv", '\ufeff"start";"end";"shorthand";"extended";"majmin";"majmin_inv"\n'
     '0.0;1.5;"C:maj/G";"C";"C:maj";"C:maj/5"\n1.5;2.25;"E:min7/G";"E";"E:min";"E:min/b3"\n2.25;3.0;"N";"N";"N";"N"\n'),
    ("rwc.csv", "t_start;t_end;chord\n0.0;1.5;C:maj(9)\n1.5;2.25;E:min\n2.25;3.0;N\n")])
def test_chord_files_of_every_kind(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert probe.read_chord_intervals(tmp_path / name) == [(0.0, 1.5, 0), (1.5, 2.25, 16), (2.25, 3.0, 24)]


@pytest.mark.parametrize("name, content", [("a.lab", b"zero one C\n"), ("a.csv", b"start;end;majmin\n0;x;C\n"), ("b.csv", b"start,end,majmin\n0,1,C\n"),
                                           ("c.lab", b"0 1 C\n\xff\xfe 1 C\n")])
def test_files_that_hold_no_chords_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        probe.read_chord_intervals(tmp_path / name)


def test_a_boundary_belongs_to_the_chord_that_starts_there(tmp_path):
    """Frames at 0, 32, 64 ... ms. Boundaries on frames 1, 3 and 8 and between 5 and 6; gaps, and frames after the end, are -1."""
    path = tmp_path / "song.lab"
    path.write_text("0.032 0.096 C\n0.096 0.170 D:min\n0.192 0.220 E:sus4\n0.220 0.256 N\n0.280 0.300 G\n")
    assert target("chords", [probe.read_chord_intervals(path)], 11).y.tolist() == [-1, 0, 0, 14, 14, 14, -1, 24, -1, 7, -1]


@pytest.mark.parametrize("text", ["1.5 2\n0.25 1\n10 3\n", "1.5\t2\n0.25\t1\n\n10\t3", "0.25\n1.5\n10.0\n\n", "  0.25   1\r\n1.5 x\r\n1e1 3\r\n"])
def test_beat_files_of_every_kind(tmp_path, text):
    (tmp_path / "a.beats").write_text(text)
    assert probe.read_beat_times(tmp_path / "a.beats") == [0.25, 1.5, 10.0]


def test_files_that_hold_no_beats(tmp_path):
    (tmp_path / "a.beats").write_text("")
    assert len(probe.read_beat_times(tmp_path / "a.beats")) == 0
    (tmp_path / "a.beats").write_text("bar one\n")
    with pytest.raises(InputError, match="a.beats"):
        probe.read_beat_times(tmp_path / "a.beats")


def test_frames_of_beats():
    """Beats on frames 10, 20, 30 of 60, one beyond the end: frames 0 .. 40 are learnt from, a beat is three frames wide."""
    labels = target("beats", [[frame * FRAME_SECONDS for frame in (10, 20, 30, 90)]], 60).y[:, 0].numpy()
    assert np.flatnonzero(labels == 1).tolist() == [9, 10, 11, 19, 20, 21, 29, 30, 31]
    assert (labels[[*range(1, 9), *range(12, 19), *range(22, 29), *range(32, 40)]] == 0).all() and (labels[41:] == -1).all()
    assert (target("beats", [[0.1]], 9).y == -1).all()


# ---------------------------------------------------------------- key scores


@pytest.mark.parametrize("true, estimated, up, both", [
    ("C", "C", 1, 1), ("C", "G", 0.5, 0.5), ("C", "F", 0, 0.5), ("C", "Am", 0.3, 0.3), ("C", "Cm", 0.2, 0.2), ("C", "D", 0, 0), ("C", "Em", 0, 0),
    ("Am", "C", 0.3, 0.3), ("Am", "Am", 1, 1), ("Am", "Em", 0.5, 0.5), ("Am", "Dm", 0, 0.5), ("Am", "A", 0.2, 0.2), ("Am", "F#", 0, 0), ("B", "F#", 0.5, 0.5)])
def test_key_score(true, estimated, up, both):
    true, estimated = parse_key(true), parse_key(estimated)
    metrics = probe.Keys.metrics
    outputs, truth = one_hot([estimated], 24), np.array([true])
    assert list(metrics)[:2] == ["weighted", "weighted (both)"]
    assert metrics["weighted"](outputs, truth) == up and metrics["weighted (both)"](outputs, truth) == both
    assert metrics["accuracy"](outputs, truth) == (true == estimated) and metrics["mode"](outputs, truth) == (true // 12 == estimated // 12)


def test_swapping_truth_and_estimate_changes_the_ascending_score_only():
    up, both = KEY_SCORES["weighted"], KEY_SCORES["weighted (both)"]
    assert not np.array_equal(up, up.T) and np.array_equal(both, both.T)
    assert up.sum() == pytest.approx(24 * 2) and both.sum() == pytest.approx(24 * 2.5)


def test_key_score_is_the_mean_over_tracks():
    truth, estimate = np.array([0, 0, 0, 21]), np.array([0, 7, 5, 0])
    metrics = probe.Keys.metrics
    assert metrics["weighted"](one_hot(estimate, 24), truth) == pytest.approx(1.8 / 4)
    assert metrics["weighted (both)"](one_hot(estimate, 24), truth) == pytest.approx(2.3 / 4)
    assert metrics["KSEA"](one_hot(estimate, 24), truth) == pytest.approx(3 / 4)                    # A minor has C's signature


def test_ksea():
    ksea = probe.Keys.metrics["KSEA"]
    assert ksea(one_hot([0, 7, 5, 2, 6], 24), np.zeros(5, int)) == pytest.approx(2 / 5)
    assert ksea(one_hot([3], 24), np.array([8])) == 0.5 == ksea(one_hot([8], 24), np.array([3]))


# ---------------------------------------------------------------- classes, tags, axes, tempo


def test_accuracy_and_class_mean():
    outputs, truth = one_hot([0, 0, 0, 1, 2], 4), np.array([0, 0, 0, 0, 2])
    assert probe.accuracy(outputs, truth) == pytest.approx(4 / 5)
    assert probe.class_mean_accuracy(outputs, truth) == pytest.approx((3 / 4 + 1) / 2)              # class 1 and 3 do not occur
    assert list(probe.Classes.metrics) == ["accuracy"] and set(probe.Unbalanced.metrics) == {"accuracy", "class mean"}


def slow_tag_scores(scores, truth):
    """One tag, pair by pair and threshold by threshold."""
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[truth == 1] for n in scores[truth == 0]]
    precision = recall_before = 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        hits = truth[chosen].sum()
        precision += (hits / truth.sum() - recall_before) * hits / chosen.sum()
        recall_before = hits / truth.sum()
    return np.mean(wins), precision


@pytest.mark.parametrize("levels", [3, 10, 10 ** 6])
def test_tag_scores_against_a_slow_loop_with_ties(levels):
    rng = np.random.default_rng(levels)
    outputs, truth = rng.integers(0, levels, (37, 5)).astype(np.float32), (rng.random((37, 5)) < 0.3).astype(np.float32)
    expected = [slow_tag_scores(outputs[:, t], truth[:, t]) for t in range(5)]
    np.testing.assert_allclose(probe.tag_scores(outputs, truth), expected, atol=1e-12)


@pytest.mark.parametrize("scores, truth, auc, precision", [
    ([4, 3, 2, 1], [1, 1, 0, 0], 1, 1), ([4, 3, 2, 1], [0, 0, 1, 1], 0, (1 / 3 + 2 / 4) / 2), ([4, 3, 2, 1], [1, 0, 1, 0], 3 / 4, (1 + 2 / 3) / 2),
    ([5, 5, 5, 5], [1, 0, 0, 0], 1 / 2, 1 / 4), ([2, 1, 1, 0], [0, 1, 0, 1], 0.5 / 4, (1 / 3 + 2 / 4) / 2)])
def test_tag_scores_by_hand(scores, truth, auc, precision):
    found = probe.tag_scores(np.array(scores, float)[:, None], np.array(truth, float)[:, None])
    assert found.tolist() == [pytest.approx([auc, precision])]


def test_a_tag_with_one_class_is_left_out_of_the_mean():
    outputs = np.array([[3.0, 1, 1], [2, 2, 2], [1, 3, 3]])
    truth = np.array([[1.0, 0, 1], [0, 0, 1], [1, 0, 1]])
    metrics = probe.Tags.metrics
    assert len(probe.tag_scores(outputs, truth)) == 1 and len(probe.tag_scores(outputs, truth[:, 1:])) == 0
    assert metrics["ROC-AUC"](outputs, truth) == pytest.approx(1 / 2) and metrics["AP"](outputs, truth) == pytest.approx((1 + 2 / 3) / 2)


def test_r2_by_hand_with_the_mean_of_these_tracks():
    truth = np.array([[1.0, 10], [2, 20], [3, 30]])
    outputs = np.array([[1.0, 20], [2, 20], [4, 20]])
    np.testing.assert_allclose(probe.r2(outputs, truth), [1 - 1 / 2, 0])
    np.testing.assert_allclose(probe.r2(np.full((3, 2), 5.0), truth), [1 - (16 + 9 + 4) / 2, 1 - (25 + 225 + 625) / 200])  # a constant is worse than 0
    metrics = probe.Emotion.metrics
    assert {name: metric(outputs, truth) for name, metric in metrics.items()} == pytest.approx({"R2 joint": 0.25, "R2 arousal": 0.5, "R2 valence": 0})
    assert list(probe.Regression.metrics) == ["R2"]


@pytest.mark.parametrize("estimate, first, second", [(100, 1, 1), (104, 1, 1), (96, 1, 1), (104.01, 0, 0), (95.99, 0, 0), (200, 0, 1), (208, 0, 1), (208.1, 0, 0),
                                                     (50, 0, 1), (48, 0, 1), (47.9, 0, 0), (300, 0, 1), (311.9, 0, 1), (33.4, 0, 1), (400, 0, 0), (150, 0, 0)])
def test_tempo_at_the_edge_of_four_percent(estimate, first, second):
    tempo = target("tempo", [estimate, 100.0])
    outputs = torch.from_numpy(one_hot([tempo.names.index(estimate)] * 2, len(tempo.names))).float()
    found = tempo.predict(outputs, np.arange(2), np.arange(2))
    assert found.tolist() == [estimate] * 2 and tempo.truth.tolist() == [estimate, 100]
    scores = [metric(found[1:], tempo.truth[1:]) for metric in tempo.metrics.values()]
    assert list(tempo.metrics) == ["ACC1", "ACC2"] and scores == [first, second]


def test_tempo_accuracy_is_the_share_of_tracks():
    assert probe.tempo_accuracy(np.array([100.0, 100, 100]), np.array([100.0, 101, 50]), (1,)) == pytest.approx(2 / 3)


# ---------------------------------------------------------------- beats


@pytest.mark.parametrize("shift, hits", [(0, 4), (0.0699, 4), (-0.0699, 4), (0.070, 4), (0.0701, 0), (-0.0701, 0)])
def test_beats_at_the_edge_of_the_tolerance(shift, hits):
    true = np.array([0.5, 1.0, 1.5, 2.25])
    assert probe.beat_hits(true + shift, true) == hits


@pytest.mark.parametrize("estimated, true, hits", [([1.0, 1.01], [1.0], 1), ([1.0], [0.95, 1.05], 1), ([0.94, 1.0], [1.0, 1.06], 2), ([0.99, 1.05], [0.93, 0.99], 2),
                                                   ([], [1.0], 0), ([1.0], [], 0), ([], [], 0)])
def test_each_beat_is_hit_once(estimated, true, hits):
    assert probe.beat_hits(np.array(estimated), np.array(true)) == hits


def test_beat_hits_is_the_largest_matching():
    """Against all ways to pair, for small random lists that crowd each other."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        estimated, true = (np.sort(rng.uniform(0, 0.5, rng.integers(1, 6))) for _ in range(2))
        few, many = sorted((estimated, true), key=len)
        best = max(sum(abs(a - b) <= 0.07 for a, b in zip(few, order)) for order in itertools.permutations(many, len(few)))
        assert probe.beat_hits(estimated, true) == best


def test_f_measure():
    counts = np.array([[3, 4, 5], [0, 0, 7], [0, 6, 0], [0, 0, 0], [2, 2, 2]])
    np.testing.assert_allclose(probe.f_measure(counts), [6 / 9, 0, 0, 0, 1])                        # P 3/4, R 3/5
    metrics = probe.Beats.metrics
    assert metrics["F"](counts, None) == pytest.approx((6 / 9 + 1) / 5) and metrics["F (pooled)"](counts, None) == pytest.approx(10 / (12 + 14))


def test_chord_overlap_per_track_and_pooled():
    counts = np.array([[1, 2], [9, 9], [0, 4]])
    metrics = probe.Chords.metrics
    assert metrics["overlap"](counts, None) == pytest.approx(0.5) and metrics["overlap (pooled)"](counts, None) == pytest.approx(10 / 15)


def test_a_track_without_a_scored_frame_does_not_lower_the_overlap():
    assert probe.Chords.metrics["overlap"](np.array([[3, 4], [0, 0]]), None) == pytest.approx(0.75)


def test_pick_beats_finds_the_peaks_of_an_activation():
    activation = np.zeros(50)
    activation[[0, 12, 13, 30, 33, 49]] = [0.8, 0.9, 0.9, 0.9, 0.5, 0.7]                            # 12 and 13: a plateau; 33 is too close to 30
    frames = lambda threshold: (probe.pick_beats(activation, np.arange(50) * FRAME_SECONDS, threshold) / FRAME_SECONDS).round().astype(int).tolist()
    assert frames(0.1) == [0, 12, 30, 49]                                                           # smoothed: .6, .675, .45, .525
    assert frames(0.5) == [0, 12, 49] and frames(0.65) == [12] and frames(0.9) == []
    assert len(probe.pick_beats(np.zeros(7), np.arange(7), 0.05)) == 0


def test_pick_beats_smooths_before_it_compares():
    """A lone spike of 0.8 is worth 0.4 after (1, 2, 1) / 4; three frames of 0.6 are worth 0.6."""
    activation = np.zeros(40)
    activation[10], activation[24:27] = 0.8, 0.6
    assert probe.pick_beats(activation, np.arange(40) * FRAME_SECONDS, 0.5) == pytest.approx([25 * FRAME_SECONDS])
    assert probe.pick_beats(activation, np.arange(40) * FRAME_SECONDS, 0.4) == pytest.approx([10 * FRAME_SECONDS, 25 * FRAME_SECONDS])


# ---------------------------------------------------------------- intervals, retrieval


def hits(count, right, classes=3):
    """Outputs and truth of `count` tracks of which the first `right` are right."""
    truth = np.arange(count) % classes
    return one_hot((truth + (np.arange(count) >= right)) % classes, classes), truth


def test_interval_contains_the_mean_is_deterministic_and_narrows():
    outputs, truth = hits(50, 30)
    low, high = probe.interval(probe.accuracy, [outputs], [truth])
    assert low < 0.6 < high and [low, high] == probe.interval(probe.accuracy, [outputs], [truth])
    assert high - low == pytest.approx(2 * 1.96 * (0.6 * 0.4 / 50) ** 0.5, rel=0.15)                # the binomial's
    outputs, truth = hits(800, 480)
    assert np.diff(probe.interval(probe.accuracy, [outputs], [truth], draws=200))[0] < (high - low) / 3
    assert probe.interval(probe.accuracy, *([part] for part in hits(9, 9)), draws=50) == [1, 1]


def test_where_seeds_share_the_test_set_the_first_stands_for_all(monkeypatch):
    (outputs, truth), (other, _) = hits(40, 30), hits(40, 3)
    monkeypatch.setattr(probe, "interval", partial(probe.interval, draws=100))
    alone = probe.interval(probe.accuracy, [outputs], [truth])
    splits = [((), (), np.arange(40))] * 3
    cell = probe.cells_of({"accuracy": probe.accuracy}, truth, splits, [outputs, other, other])["accuracy"]
    assert cell["interval"] == alone and cell["scores"] == [0.75, 0.075, 0.075]


def test_where_every_seed_has_its_own_test_set_all_are_used():
    parts = [hits(40, 40), hits(30, 0), hits(35, 35), hits(32, 0)]
    low, high = probe.interval(probe.accuracy, [o for o, _ in parts], [t for _, t in parts], draws=50)
    assert low == high == 0.5
    (right, truth), (wrong, _) = hits(20, 20), hits(20, 0)                                          # labels that happen to be equal are no shared tracks
    assert probe.interval(probe.accuracy, [right, wrong], [truth, truth], draws=50) == [0.5, 0.5]
    parts = [hits(40 + i, 20) for i in range(4)]
    wide = np.diff(probe.interval(probe.accuracy, *([part] for part in parts[0])))[0]
    narrow = np.diff(probe.interval(probe.accuracy, [o for o, _ in parts], [t for _, t in parts]))[0]
    assert narrow == pytest.approx(wide / 2, rel=0.2)                                               # four times the tracks


@pytest.mark.filterwarnings("error")
def test_draws_without_a_score_are_left_out():
    """R2 of tracks that are all alike, and tags that no drawn track has."""
    truth, metrics = np.array([[1.0], [1], [2]]), probe.Regression.metrics
    assert probe.interval(metrics["R2"], [truth], [truth], draws=50) == [1, 1]
    assert np.isnan(probe.interval(metrics["R2"], [truth[:2]], [truth[:2]], draws=5)).all()
    tags, metrics = np.array([[1.0, 0], [0, 0], [0, 0]]), probe.Tags.metrics
    assert probe.interval(metrics["ROC-AUC"], [tags], [tags], draws=50) == probe.interval(metrics["AP"], [tags], [tags], draws=50) == [1, 1]
    assert np.isnan(metrics["AP"](tags[1:], tags[1:]))


def test_retrieval_closed_cases():
    same = torch.eye(150)
    assert probe.retrieval(same, 3 * same) == [1.0] * probe.SEEDS
    assert max(probe.retrieval(same, same.roll(1, 0))) < 0.05
    assert probe.retrieval(same[:7], same[:7].half()) == [1.0] * probe.SEEDS                        # fewer tracks than asked for


def test_retrieval_ignores_what_all_tracks_share():
    x, y = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    assert probe.retrieval(x + 100, x + y / 9 + 100) == probe.retrieval(x, x + y / 9)
    assert min(probe.retrieval(x, x + y / 9)) > 0.9


def test_retrieval_counts_both_ways():
    """First excerpts at 0, 10 and 90 degrees, second at 0, 2 and 90: 10 finds 2, but 2 finds 0. Right 3 and 2 of 3.

    The same once more on the other side, so that the mean is 0."""
    unit = lambda *degrees: torch.tensor([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees], dtype=torch.float32)
    assert probe.retrieval(unit(0, 10, 90, 180, 190, 270), unit(0, 2, 90, 180, 182, 270)) == pytest.approx([5 / 6] * probe.SEEDS)
