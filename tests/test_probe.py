"""Probing: windows, features, the fit, selection and splits, without a leak from the test tracks."""
import itertools
import json
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model
import probe
from conftest import frame_items
from losses import template_keys
from probe import LINEAR, Items, Track


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """fp32 on every machine, so that two ways to the same number may be compared closely; few bootstrap draws."""
    monkeypatch.setattr(probe, "pick_amp", lambda device: (False, "fp32"))
    monkeypatch.setattr(probe, "interval", partial(probe.interval, draws=50))


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("length, keep_rest, spans", [
    (126, False, [(0, 126)]), (125, False, [(0, 125)]), (127, False, [(0, 126)]), (127, True, [(0, 126), (126, 127)]), (1, False, [(0, 1)]), (1, True, [(0, 1)]),
    (377, False, [(0, 126), (126, 252)]), (377, True, [(0, 126), (126, 252), (252, 377)]), (378, True, [(0, 126), (126, 252), (252, 378)])])
def test_windows_are_whole_segments_and_the_rest_if_asked_for(length, keep_rest, spans):
    frames = song(length)
    owner, start, windows = probe.windows_of([song(9), frames], keep_rest)
    assert owner.tolist() == [0] + [1] * len(spans) and start.tolist() == [0, *(begin for begin, _ in spans)]
    assert all(np.array_equal(window, frames[slice(*span)]) for window, span in zip(windows[1:], spans, strict=True))


def song(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (length, data.COLUMNS), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_batches_hold_every_window_once_and_nothing_else(size):
    expected, found = [song(length, i) for i, length in enumerate((126, 40, 126, 41, 126, 40, 40))], {}
    for indices, windows in probe.batches_of(expected, size):
        assert len(indices) == len(windows) <= size and windows.dtype == torch.uint8
        assert list(indices) == sorted(indices)
        found |= dict(zip(indices, windows.numpy(), strict=True))
    assert sorted(found) == list(range(len(expected))) and all(np.array_equal(found[i], w) for i, w in enumerate(expected))


def test_windows_of_one_length_share_a_batch():
    batches = list(probe.batches_of([song(length) for length in (126, 40, 126, 126, 40, 77)], size=3))
    assert [(indices.tolist(), windows.shape[1]) for indices, windows in batches] == [([1, 4], 40), ([5], 77), ([0, 2, 3], 126)]


# ---------------------------------------------------------------- features


def network(tokens=("cpsd", "ntxent"), seed=1, depth=2, **config):
    """A small network whose blocks, zero at initialisation, have an effect."""
    torch.manual_seed(seed)
    made = model.MT2(tokens, **dict(dim=24, depth=depth, heads=2) | config).eval()
    with torch.no_grad():
        for block in made.blocks:
            torch.nn.init.xavier_uniform_(block.out.weight)
            torch.nn.init.xavier_uniform_(block.mlp[-1].weight)
        made.norm.weight.copy_(torch.linspace(0.5, 1.5, len(made.norm.weight)))
    return made


class Songs:
    """Stands for a frame store."""

    def __init__(self, lengths=(130, 40, 252)):
        self.lengths, self.paths, self.info = np.array(lengths), [f"{i}.wav" for i in range(len(lengths))], {"checksum": "abc"}

    def track(self, i):
        return song(self.lengths[i], seed=i)


@pytest.fixture
def songs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Songs()


def by_hand(net, frames, layer):
    """All tokens of one window, straight from the network, inner layers through the final norm: (tokens + frames, dim)."""
    with torch.no_grad():
        tokens = net(*probe.views_of(torch.from_numpy(frames)[None], "cpu"), layers=[layer])[1][layer][0]
        return tokens if layer == len(net.blocks) else net.norm(tokens)


def test_rows_of_a_network_are_its_readouts():
    net, tracks = network(), [song(260), song(45, seed=1)]
    rows = probe.extract(net, tracks, "cpu").rows
    assert list(rows) == ["cpsd", "ntxent", "average", "concat", "sequence mean", "sequence mean+std",
                          "all tokens mean"]
    assert all(len(x) == 3 and x.dtype == torch.float16 for x in rows.values())
    for i, window in enumerate((tracks[0][:126], tracks[0][126:252], tracks[1])):
        every = by_hand(net, window, 2)
        for name, expected in (("cpsd", every[0]), ("ntxent", every[1]), ("average", every[:2].mean(dim=0)),
                               ("concat", every[:2].flatten()), ("sequence mean", every[2:].mean(dim=0)),
                               ("sequence mean+std", torch.cat([every[2:].mean(0), every[2:].std(0, False)])),
                               ("all tokens mean", every.mean(dim=0))):
            same(rows[name][i].float(), expected, 3e-3)


def test_inner_layers_pass_the_final_norm_and_are_named():
    net, track = network(("ntxent",)), song(126)
    rows = probe.extract(net, [track], "cpu", layers=[0, 2]).rows
    assert {"ntxent L0", "sequence mean L2"} < set(rows) and len(rows) == 8
    same(rows["ntxent L0"][0].float(), by_hand(net, track, 0)[0], 3e-3)
    same(rows["ntxent L2"][0].float(), by_hand(net, track, 2)[0], 3e-3)


def test_items_per_frame_keep_the_rest_and_the_order():
    net, tracks = network(("ntxent",)), [song(130), song(45, seed=1), song(131, seed=2)]
    found = probe.extract(net, tracks, "cpu", per_frame=True).rows
    assert list(found) == ["sequence"] and found["sequence"].shape == (130 + 45 + 131, 24)
    windows = [tracks[0][:126], tracks[0][126:], tracks[1], tracks[2][:126], tracks[2][126:]]
    same(found["sequence"].float(), torch.cat([by_hand(net, w, 2)[1:] for w in windows]), 3e-3)


def test_a_frame_of_a_patch_network_has_the_mean_of_the_patches_at_that_time():
    net, track = network(("ntxent",), patch="64x4", pool="mean"), song(126)
    found = probe.extract(net, [track], "cpu", per_frame=True).rows["sequence"].float()                # (126, 24)
    sequence = by_hand(net, track, 2).view(31, 2, 24).mean(dim=1)                                 # (31 columns, 24)
    same(found, sequence[(torch.arange(126) // 4).clamp(max=30)], 3e-3)
    assert list(probe.extract(net, [track], "cpu").rows) == ["sequence mean", "sequence mean+std"]     # no class tokens


def test_raw_is_the_mean_and_deviation_over_time():
    tracks = [song(45), song(126, seed=1)]
    raw, mean = (probe.extract(None, tracks, "cpu").rows[name] for name in ("raw", "raw mean"))
    assert torch.equal(raw[:, :212], mean)
    assert raw.shape == (2, 2 * (84 + 128))
    for found, frames in zip(raw, tracks):
        crop = frames[:, probe.PITCH_CROP:probe.PITCH_CROP + 84]
        both = np.concatenate([crop, frames[:, data.N_BINS:]], axis=1) / 255
        expected = torch.from_numpy(np.concatenate([both.mean(axis=0), both.std(axis=0)])).float()
        same(found.float(), expected, 1e-3)


def test_features_do_not_depend_on_the_batch(monkeypatch):
    net, tracks = network(), [song(300), song(41, seed=1), song(126, seed=2), song(41, seed=3)]
    together = probe.extract(net, tracks, "cpu").rows
    monkeypatch.setattr(probe, "batches_of", partial(probe.batches_of, size=1))
    for name, value in probe.extract(net, tracks, "cpu").rows.items():
        same(value.float(), together[name].float(), 2e-3)


def test_items_of_a_store_have_both_networks_raw_owners_and_times(songs):
    net = network()
    items = probe.all_items(net, [songs.track(2), songs.track(1)], "cpu")
    assert items.owner.tolist() == [0, 0, 1] and items.time.tolist() == [0, 126 * probe.FRAME_SECONDS, 0]
    assert len(items.rows) == 16 and all(len(x) == 3 for x in items.rows.values())
    fresh = by_hand(probe.untrained(net, "cpu", blocks=None), songs.track(2)[126:], 2)
    same(items.rows["untrained ntxent"][1].float(), fresh[1], 3e-3)
    torch.nn.Linear(48, 2)(items.rows["concat"].float()).sum().backward()                         # may be trained on
    items = probe.all_items(net, [songs.track(0), songs.track(1)], "cpu", per_frame=True)
    assert list(items.rows) == ["sequence", "untrained sequence", "raw"]
    assert items.owner.tolist() == [0] * 130 + [1] * 40
    assert items.time[131] == probe.FRAME_SECONDS and items.rows["raw"].shape == (170, 212)


def test_untrained_is_the_same_network_with_other_weights():
    net = network(depth=1)
    first, second = (probe.untrained(net, "cpu", blocks=None) for _ in range(2))
    assert first.config == net.config and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    for other in (net, probe.untrained(net, "cpu", blocks=None, seed=1)):
        assert not torch.equal(first.positions, other.positions)


# ---------------------------------------------------------------- fit


def problem(tracks=60, dim=7, classes=3, spread=1.0, seed=0):
    """(Items of one row, class of each track): clusters by class, 1 to 4 windows a track."""
    generator = torch.Generator().manual_seed(seed)
    windows = np.random.default_rng(seed).integers(1, 5, tracks)
    y, owner = np.arange(tracks) * 7 % classes, np.repeat(np.arange(tracks), windows)
    centres = 2 * torch.randn(classes, dim, generator=generator)
    x = centres[torch.from_numpy(y[owner])] + spread * torch.randn(len(owner), dim, generator=generator)
    return Items({"x": x.half()}, owner, np.zeros(len(owner))), y


TRAIN, VALID, TEST = map(np.sort, np.split(np.random.default_rng(1).permutation(60), [30, 45]))
NETWORK = dict(hidden=0, dropout=0.0, standardize=True)


def fitted(items, labels, kind="class", **changes):
    """(probe, target) of a fit on TRAIN and VALID."""
    target = probe.TARGETS[kind](labels, items)
    options = dict(NETWORK, seed=0, batch=16, lr=1e-2, l2=0.0, steps=256) | changes
    return probe.fit(items.rows["x"], target, target.items_of(TRAIN), target.items_of(VALID), **options), target


def score_on_test(items, target, trained):
    return probe.score(target, probe.predict(trained, items.rows["x"], target, TEST), TEST)


@pytest.mark.parametrize("hidden", [0, 12])
def test_fit_learns_clusters_and_not_shuffled_labels(hidden):
    items, y = problem()
    trained, target = fitted(items, y.tolist(), hidden=hidden, steps=128)
    assert score_on_test(items, target, trained) > 0.85
    scores = []
    for seed in range(3):
        trained, target = fitted(items, np.random.default_rng(seed).permutation(y).tolist(), hidden=hidden, steps=128)
        scores.append(score_on_test(items, target, trained))
    assert np.mean(scores) < 0.55


def test_the_scaler_is_fitted_on_the_training_items():
    items, y = problem()
    trained, target = fitted(items, y.tolist(), steps=0)
    x = items.rows["x"][target.items_of(TRAIN)].float()
    same(trained.mean, x.mean(dim=0))
    same(trained.scale, x.std(dim=0, unbiased=False), 1e-4)
    plain, _ = fitted(items, y.tolist(), steps=0, standardize=False)
    assert (plain.mean, plain.scale) == (0.0, 1.0)


@pytest.mark.parametrize("changes", [dict(), dict(hidden=9, dropout=0.25, l2=1e-3), dict(standardize=False)])
def test_no_test_track_reaches_a_fit(changes):
    """Other features and labels of the test tracks, NaN among them, leave it unchanged bit for bit."""
    items, y = problem()
    wild, labels = items.rows["x"].clone(), y.copy()
    wild[np.isin(items.owner, TEST)] = torch.nan
    labels[TEST] = (labels[TEST] + 1) % 3
    a, _ = fitted(items, y.tolist(), steps=48, **changes)
    b, _ = fitted(items._replace(rows={"x": wild}), labels.tolist(), steps=48, **changes)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all()


def test_equal_seeds_are_equal_and_others_differ():
    items, y = problem()
    a, b, c = (next(fitted(items, y.tolist(), steps=32, seed=seed)[0].parameters()) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_weights_of_the_lowest_validation_loss_are_kept():
    """At a rate so high that later weights are worse, a longer fit is never worse on validation, and it ends by itself."""
    items, y = problem(spread=3)
    losses = []
    for steps, patience in ((0, 640), (32, 640), (64, 640), (160, 640), (10 ** 6, 160)):
        trained, target = fitted(items, y.tolist(), lr=0.3, steps=steps, patience=patience)
        valid = target.items_of(VALID)
        with torch.no_grad():
            losses.append(target.loss(trained(items.rows["x"][valid]), target.y[valid]).item())
    assert losses == sorted(losses, reverse=True)


def test_regression_predicts_in_original_units():
    generator = torch.Generator().manual_seed(0)
    latent, owner = torch.randn(60, 6, generator=generator), np.repeat(np.arange(60), 3)
    items = Items({"x": latent[owner] + 0.2 * torch.randn(180, 6, generator=generator)}, owner, np.zeros(180))
    y = latent @ torch.randn(6, 2, generator=generator) * torch.tensor([0.02, 300]) + torch.tensor([5.0, -1000])
    trained, target = fitted(items, y.tolist(), "emotion", steps=768)
    assert min(probe.r2(probe.predict(trained, items.rows["x"], target, TEST), y[TEST].numpy())) > 0.8
    assert list(target.metrics) == ["R2 joint", "R2 arousal", "R2 valence"]


def test_tags_are_learnt_each_for_itself():
    items, y = problem()
    labels = [[name for name, has in (("a", c == 0), ("b", c != 1), ("c", c == 2)) if has] for c in y]
    trained, target = fitted(items, labels, "tags")
    scores = probe.tag_scores(probe.predict(trained, items.rows["x"], target, TEST), target.truth[TEST])
    assert target.names == ["a", "b", "c"] and min(scores[:, 0]) > 0.9


def test_the_prediction_of_a_track_is_the_mean_over_its_windows():
    target = probe.Classes(["a", "b", "a"], Items({}, np.array([0, 1, 1, 1, 2]), np.zeros(5)))
    x = torch.tensor([[9.0, 9], [1, 0], [2, 1], [6, 5], [4, 4]])
    rows = probe.predict(lambda x: torch.relu(x - 2), x, target, np.array([1, 2]))
    np.testing.assert_allclose(rows, [[4 / 3, 1], [2, 2]], rtol=1e-6)


# ---------------------------------------------------------------- the grid and other choices


def test_the_grid_is_the_published_one():
    entries = {(g["standardize"], g["hidden"], g["batch"], g["lr"], g["dropout"], g["l2"]) for g in probe.GRID}
    published = set(itertools.product((True, False), (0, 512), (64, 256), (1e-3, 1e-4, 1e-5), (0.75, 0.5, 0.25),
                                      (1e-3, 1e-4, 0)))
    assert len(probe.GRID) == 216 and entries == published and all(set(g) == set(LINEAR) for g in probe.GRID)


@pytest.fixture
def small_grid(monkeypatch):
    """Five configurations, of which the fourth learns."""
    base = dict(hidden=0, batch=8, lr=1e-6, dropout=0.25, l2=0.0, standardize=True)
    grid = [base, dict(base, hidden=5), dict(base, batch=5), dict(base, lr=3e-2), dict(base, lr=1e-5)]
    monkeypatch.setattr(probe, "GRID", grid)
    monkeypatch.setattr(probe, "GRID_STEPS", (16, 48))
    return grid


def test_the_grid_needs_no_test_track(small_grid):
    items, y = problem()
    wild, labels = items.rows["x"].clone(), y.copy()
    wild[np.isin(items.owner, TEST)] = torch.nan
    labels[TEST] = (labels[TEST] + 1) % 3
    for x, known in ((items.rows["x"], y), (wild, labels)):
        assert probe.choose(x, probe.Classes(known.tolist(), items), TRAIN, VALID) is small_grid[3]


def test_each_fold_has_a_choice_without_its_test_tracks(monkeypatch):
    items, y = problem(tracks=25)
    seen, splits = [], probe.splits_of(tracks_with([None] * 25, [f"group{i % 10}" for i in range(25)]))

    def choose(x, target, train, valid):
        seen.append({*train, *valid})
        return dict(LINEAR, steps=0)

    monkeypatch.setattr(probe, "choose", choose)
    probe.probe_rows(items.rows, probe.Classes(y.tolist(), items), splits, grid=True)
    assert len(seen) == 5 and all(not used & set(test) for used, (_, _, test) in zip(seen, splits))


def genre_tracks(y):
    parts = {0: "test", 1: "valid"}
    return [Track(f"{i}", None, {"genre": "abc"[c]}, parts.get(i // 3 % 4, "train"), f"{i}") for i, c in enumerate(y)]


def test_every_row_metric_and_share_has_a_cell():
    items, y = problem(tracks=50, spread=0.5)
    x, tracks = items.rows["x"], genre_tracks(y)
    items = items._replace(rows={"good": x * 5, "bad": x * 0})
    table, remarks = probe.probe_targets(items, tracks, {"genre": "unbalanced"}, shares=[0.25], steps=128)
    assert list(table) == ["good", "bad", "chosen on validation", "chance"]
    accuracy, mean, share = table["good"]
    assert (accuracy, mean, share) == ("accuracy", "class mean", "accuracy @25 %")
    good, bad = table["good"]["accuracy"], table["bad"]["accuracy"]
    assert good["mean"] > 0.9 > bad["mean"] and good["interval"][0] <= good["scores"][0] <= good["interval"][1]
    assert len(table["good"][share]["scores"]) == 5 and "interval" not in table["good"]["class mean"]
    assert remarks == ["genre: 3 outputs", "chosen on validation: " + ", ".join(["good"] * 5)]
    assert table["chance"]["class mean"]["mean"] == pytest.approx(1 / 3)


def test_a_row_is_chosen_by_validation_and_not_by_the_test(monkeypatch):
    """A row that is right on train and validation and wrong on the test is chosen; untrained rows are chosen apart."""
    monkeypatch.setattr(probe, "SEEDS", 2)
    items, y = problem(tracks=50, spread=0.5)
    x, tracks = items.rows["x"], genre_tracks(y)
    false, noise = x.clone(), torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).half()
    tested = np.isin(items.owner, np.flatnonzero([t.split == "test" for t in tracks]))
    false[tested] = noise[tested]
    rows = {"false": 5 * false, "honest": x + noise, "untrained a": noise, "untrained b": 5 * x, "raw": 9 * x}
    table, remarks = probe.probe_targets(items._replace(rows=rows), tracks, {"genre": "class"}, steps=128)
    assert table["false"]["accuracy"]["mean"] < table["honest"]["accuracy"]["mean"]
    assert table["chosen on validation"] == table["false"] and table["untrained, chosen"] == table["untrained b"]
    assert remarks[1:] == ["chosen on validation: false, false",
                           "untrained, chosen: untrained b, untrained b"]


# ---------------------------------------------------------------- labels per frame


@pytest.fixture
def clips():
    """Six clips with beats and a given split: (Items, tracks). In one row the features mark the beats."""
    tracks, beats = [], []
    for i, part in enumerate(["train", "test", "train", "valid", "test", "test"]):
        times = [(12 + i + 14 * k) * probe.FRAME_SECONDS for k in range(8)]
        tracks.append(Track(f"{i}", None, {"beats": times}, part, f"{i}"))
        beats.append(np.isin(np.arange(130 + i), 12 + i + 14 * np.arange(8)[:, None] + [-1, 0, 1]))
    lengths = np.array([len(b) for b in beats])
    noise = np.random.default_rng(0).normal(size=(lengths.sum(), 5))
    rows = {name: torch.from_numpy(np.column_stack([level * np.concatenate(beats), noise])).float()
            for name, level in (("marked", 9), ("noise", 0))}
    return frame_items(lengths, rows), tracks


def test_beats_are_counted_per_track(clips):
    table, _ = probe.probe_targets(*clips, {"beats": "beats"}, steps=96, lr=0.1)
    assert list(table["noise"]) == ["F", "F (pooled)"] and len(table["noise"]["F"]["scores"]) == 5
    assert table["marked"]["F"]["mean"] > 0.8 > table["noise"]["F"]["mean"] and table["chance"]["F"]["mean"] == 0


def test_the_beat_threshold_is_selected_without_the_test_tracks(clips):
    """With other beats in the test tracks as many are estimated there."""
    (items, tracks), found = clips, []
    for _ in range(2):
        target, options = probe.Beats([t.labels["beats"] for t in tracks], items), dict(LINEAR, batch=2048, steps=32)
        found.append([probe.fit_split(x, target, probe.splits_of(tracks)[0], 0, **options)[1] for x in items.rows.values()])
        for track in tracks:
            if track.split == "test":
                track.labels["beats"] = [0.2 * k + 0.1 for k in range(20)]
    for before, after in zip(*found):
        assert np.array_equal(before[:, 1], after[:, 1]) and not np.array_equal(before[:, 2], after[:, 2])


def test_frames_without_a_chord_label_are_neither_learnt_nor_scored():
    classes, tracks, chords = [0, 21, 24, -1], [], []
    for i, part in enumerate(["train", "valid", "test", "train", "test"]):
        order = np.roll(np.arange(4), i)
        intervals = [(0.64 * k, 0.64 * (k + 1), classes[c]) for k, c in enumerate(order)]
        tracks.append(Track(f"{i}", None, {"chords": intervals}, part, f"{i}"))
        chords.append(np.append(np.repeat(order, 20), np.full(i, 3)))      # the end has no label
    lengths, chords = np.array([len(c) for c in chords]), np.concatenate(chords)
    x = torch.from_numpy(np.eye(4)[chords]).float()
    x = x + 0.1 * torch.randn(len(chords), 4, generator=torch.Generator().manual_seed(0))
    items = frame_items(lengths, {"clear": x, "zero": x * 0})
    table, _ = probe.probe_targets(items, tracks, {"chords": "chords"}, steps=96, lr=0.1)
    assert table["clear"]["overlap"]["mean"] == table["clear"]["overlap (pooled)"]["mean"] == 1
    assert table["chance"]["overlap"]["mean"] == pytest.approx(1 / 3)
    assert table["zero"]["overlap"]["mean"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- splits


def tracks_with(parts, groups=None):
    return [Track(f"{i}", None, {}, part, groups[i] if groups else f"song{i}") for i, part in enumerate(parts)]


@pytest.mark.parametrize("count, sizes", [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (10, (6, 2, 2)), (25, (15, 5, 5))])
def test_groups_stay_on_one_side_and_every_group_is_tested_once(count, sizes):
    groups = [f"font{i * i % count if i < 40 else i % count}" for i in range(4 * count + 40)]
    splits, tested = probe.splits_of(tracks_with([None] * len(groups), groups)), []
    for parts in splits:
        assert sorted(np.concatenate(parts)) == list(range(len(groups)))
        sides = [{groups[i] for i in part} for part in parts]
        assert tuple(map(len, sides)) == sizes and len(set.union(*sides)) == count
        tested += sides[2]
    assert len(splits) == min(count, 5) and len(set(tested)) == len(tested) == count
    again = probe.splits_of(tracks_with([None] * len(groups), groups))
    assert all(np.array_equal(a, b) for first, second in zip(splits, again) for a, b in zip(first, second))


def test_two_groups_cannot_be_split():
    with pytest.raises(data.InputError, match=r"2 fold\(s\) or group"):
        probe.splits_of(tracks_with([None] * 10, ["a", "b"] * 5))


def test_a_given_split_is_used_as_it_is_by_every_seed():
    splits = probe.splits_of(tracks_with(["test", "train", "valid", "train", "test", "valid", "train"]))
    assert [[part.tolist() for part in split] for split in splits] == [[[1, 3, 6], [2, 5], [0, 4]]] * probe.SEEDS


def test_every_fold_is_tested():
    """Also where there are more than five."""
    items, y = problem(tracks=21)
    tracks = [Track(f"{i}", None, {"genre": "abc"[c]}, i % 7, f"{i}") for i, c in enumerate(y)]
    table, _ = probe.probe_targets(items, tracks, {"genre": "class"}, steps=0)
    assert len(table["x"]["accuracy"]["scores"]) == 7


def test_folds_rotate():
    fold = [3, 0, 1, 2, 0, 3, 1, 2, 2]
    splits = probe.splits_of(tracks_with(fold))
    assert len(splits) == 4
    for f, (train, valid, test) in enumerate(splits):
        assert sorted([*train, *valid, *test]) == list(range(9))
        assert {fold[i] for i in test} == {f} and {fold[i] for i in valid} == {(f + 1) % 4} and len({fold[i] for i in train}) == 2


@pytest.mark.parametrize("parts", [["train", "valid"], ["train", "test"], ["valid", "test"], ["test"], [0, 1, 0, 1], [4, 4, 4], [None, None]])
def test_a_part_without_tracks_is_refused(parts):
    with pytest.raises(data.InputError):
        probe.splits_of(tracks_with(parts))


@pytest.mark.parametrize("share, counts", [(0.01, (1, 1, 1)), (0.1, (1, 3, 5)), (0.5, (5, 15, 25)), (1, (10, 30, 50))])
def test_a_share_of_the_labels_keeps_the_classes(share, counts):
    y = np.array([0] * 12 + [1] * 34 + [2] * 54 + [1] * 7)
    target = probe.Classes(y.tolist(), Items({}, np.arange(107), np.zeros(107)))
    rng, train = np.random.default_rng(0), []
    for c, n in enumerate((10, 30, 50)):
        train.append(rng.permutation(np.flatnonzero(y[:100] == c))[:n])
    train = np.sort(np.concatenate(train))
    draws = [probe.labelled_part(target, train, share, seed) for seed in range(4)]
    for seed, part in enumerate(draws):
        assert set(part) <= set(train) and len(set(part)) == len(part) and np.bincount(y[part]).tolist() == list(counts)
        assert np.array_equal(part, probe.labelled_part(target, train, share, seed))
    assert len({tuple(part) for part in draws}) == (1 if share == 1 else 4)


def test_a_share_of_tags_is_drawn_from_all():
    target = probe.Tags([["a"]] * 90, Items({}, np.arange(90), np.zeros(90)))
    draws = [probe.labelled_part(target, np.arange(5, 85), 0.25, seed) for seed in range(4)]
    assert all(len(set(part)) == 20 and set(part) <= set(range(5, 85)) for part in draws)
    assert len({tuple(part) for part in draws}) == 4
    assert len(probe.labelled_part(target, np.arange(5, 85), 0.001, 0)) == 1


@pytest.mark.parametrize("kind, labels, y, names", [
    ("class", ["rock", "blues", "rock"], [1, 0, 1], ["blues", "rock"]), ("class", [60, 48, 72], [1, 0, 2], [48, 60, 72]),
    ("tempo", [120.5, 90.0, 120.5], [1, 0, 1], [90.0, 120.5]), ("key", [14, 0, 14], [14, 0, 14], probe.ALL_KEYS),
    ("tags", [["b", "a"], ["c"], ["a", "a"]], [[1, 1, 0], [0, 0, 1], [1, 0, 0]], ["a", "b", "c"]),
    ("emotion", [(1.5, 2.0), (3.0, 4.5), (1.0, 1.0)], [[1.5, 2.0], [3.0, 4.5], [1.0, 1.0]], ["arousal", "valence"])])
def test_labels_become_targets_of_items(kind, labels, y, names):
    target = probe.TARGETS[kind](labels, Items({}, np.array([0, 0, 1, 2]), np.zeros(4)))
    assert target.truth.tolist() == (labels if kind == "tempo" else y) and list(target.names) == names
    assert target.y.tolist() == [y[0], y[0], y[1], y[2]]


# ---------------------------------------------------------------- tables


TABLE = {"concat": {"accuracy": dict(mean=0.5, std=0.012, scores=[0.488, 0.512], interval=[0.25, 0.75]),
                    "class mean": dict(mean=0.1, std=0.0, scores=[0.1])},
         "raw": {"accuracy": dict(mean=1.0, std=0.0, scores=[1.0], interval=[1, 1])}}


def test_a_table_shows_means_deviations_and_intervals(capsys):
    probe.print_table("the title", TABLE)
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("  ")[0]: line for line in lines if line}
    assert found["concat"].split() == ["concat", "50.0", "±", "1.2", "[25.0", "75.0]", "10.0", "±", "0.0"]
    assert lines[1] == "the title" and "100.0 ± 0.0 [100.0 100.0]" in found["raw"]


def compare(*paths):
    probe.print_comparison(type("Args", (), dict(tables=paths)))


def test_tables_are_written_and_compared(tmp_path, capsys):
    paths = []
    for name, mean in (("first", 0.25), ("second", 0.75)):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "probe-gtzan.json")
        table = {"concat": {"accuracy": dict(TABLE["concat"]["accuracy"], mean=mean)},
                 f"only {name}": {"F": dict(mean=mean, std=0, scores=[mean])}}
        probe.publish(tmp_path / name / "checkpoint.pt", "gtzan", "title", table)
        assert json.loads(paths[-1].read_text()) == dict(title="title", rows=table)
    capsys.readouterr()
    compare(*paths)
    out = capsys.readouterr().out
    assert re.search(r"first/\S+ +\S+second/\S+\nconcat +25\.0 ± *1\.2 \[\S+ \S+ +75\.0 ± *1\.2 \[", out)
    assert re.search(r"only first +25\.0", out) and re.search(r"only second +75\.0", out)


@pytest.mark.parametrize("content", [None, "", "shopping list", "[1]", "{}"])
def test_files_that_are_no_tables_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(data.InputError, match="a.json"):
        compare(tmp_path / "a.json")


# ---------------------------------------------------------------- zero-shot key


def test_the_template_moves_with_the_music():
    """Three semitones up; and silence has no key, but finite values."""
    song = probe.known_songs()[0][0]
    first, moved = probe.template_rows([song, np.roll(song, 3, axis=1)]).argmax(axis=1)
    assert moved % 12 == (first + 3) % 12 and moved // 12 == first // 12
    assert np.isfinite(probe.template_rows([np.zeros_like(song)])).all()


class Folded:
    """Stands for a network that folds octaves; the first bin of its crop is class `turn`."""
    config, turn, outputs = {}, 0, 12
    tasks = property(lambda self: {"cpsd": self})
    key_token = lambda self: "cpsd"

    def __call__(self, cqt, mel):
        return {"cpsd": torch.roll((cqt ** 4).mean(dim=1).view(len(cqt), 7, 12).sum(dim=1), self.turn, dims=1)}, {}

    def log_keys(self, token):
        return (token / token.sum(dim=1, keepdim=True)).log()


@pytest.mark.parametrize("turn", [0, 5])
def test_calibration_finds_the_class_of_c_major(turn):
    """The key template in the place of a network, its classes rotated: it takes the first bin of a crop for an A."""

    class Rotated(Folded):
        def __call__(self, cqt, mel):
            keys = (15 * template_keys(cqt)).softmax(dim=-1)
            return {"cpsd": (keys[:, :12] + keys[:, 12:].roll(3, dims=1)).roll(turn, dims=1)}, {}

    songs, signatures = probe.known_songs()
    assert probe.calibrate(Rotated(), "cpu") == (turn - probe.PITCH_CROP) % 12
    right = probe.key_probabilities(Rotated(), songs, "cpu").argmax(dim=1).numpy() == signatures
    assert len(songs) == 32 and right.mean() >= 0.75


def test_calibration_follows_most_songs(monkeypatch):
    """A network that is a fifth off on the first ten songs, 31 % of them, is calibrated by the others."""
    signatures = torch.tensor(probe.known_songs()[1])
    off = torch.where(torch.arange(len(signatures)) < 10, 7, 0)
    monkeypatch.setattr(probe, "key_outputs", lambda *_: F.one_hot((signatures + 2 + off) % 12, 12).float())
    assert probe.calibrate(None, "cpu") == 2


def test_outputs_of_five_crops_are_transposed_back():
    """A higher crop shows lower music: four crops that agree outweigh the one that errs."""

    class Odd(Folded):
        def __call__(self, cqt, mel):
            place = cqt[:, 0].argmax(dim=1) % 12
            return {"cpsd": F.one_hot(torch.where(place == 5, 1, place), 12).float()}, {}

    frames = np.zeros((10, data.COLUMNS), np.uint8)
    frames[:, 5 + probe.PITCH_CROP + 12] = 255                                                      # at the crop in use: bin 17, class 5, wrong
    outputs = probe.key_outputs(Odd(), [frames], "cpu")[0]
    # The four give class 5 a probability of 1 and the rest the floor 1e-4, the odd one the reverse: a product to the power 1/5.
    five, one = 1e-4 ** (1 / 5), 1e-4 ** (4 / 5)
    assert outputs.argmax() == 5 and outputs[5] == pytest.approx(five / (five + one + 10 * 1e-4), rel=1e-4)


def test_calibration_undoes_the_rotation():
    """A head whose classes are rotated by 5 gives the same signatures: one clip determines it."""
    net, track = network(("cpsd",), dim=48, depth=1), song(260)
    before, rotation = probe.key_probabilities(net, [track], "cpu"), probe.calibrate(net, "cpu")
    with torch.no_grad():
        head = net.tasks["cpsd"].head
        head.weight.copy_(head.weight.roll(5, 0))
        head.bias.copy_(head.bias.roll(5, 0))
    same(probe.key_probabilities(net, [track], "cpu"), before, 1e-3)
    assert probe.calibrate(net, "cpu") == (rotation + 5) % 12


def test_a_network_of_the_cqt_alone_is_evaluated_like_any_other():
    net, track = network(("cpsd", "ntxent"), inputs="cqt"), song(260)
    louder = track.copy()
    louder[:, data.N_BINS:] = 255                                           # another mel
    rows, other = (probe.extract(net, [frames], "cpu").rows for frames in (track, louder))
    assert {"cpsd", "ntxent", "concat", "sequence mean"} < set(rows) and all(torch.equal(rows[name], other[name]) for name in rows)
    assert probe.key_probabilities(net, [track], "cpu").shape == (1, 12)


def test_the_output_of_a_track_is_the_product_of_its_windows():
    net, tracks = network(), [song(260), song(30, seed=1)]
    profiles = probe.key_outputs(net, tracks, "cpu", [probe.PITCH_CROP])
    windows = [tracks[0][:126], tracks[0][126:252], tracks[1]]
    with torch.no_grad():
        each = torch.cat([net.tasks["cpsd"].log_keys(net(*probe.views_of(torch.from_numpy(w)[None], "cpu"))[0]["cpsd"]).exp() for w in windows])
    same(profiles, torch.stack([F.normalize(each[:2].prod(dim=0).sqrt(), p=1, dim=0), each[2]]))


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = model.MT2(dim=24, depth=1, heads=2)
    torch.save(dict(config=net.config, model=net.state_dict()), tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, words), "--device", "cpu"])
    probe.main()


def test_key_of_files_and_of_labelled_folders(song_folder, checkpoint, tmp_path, monkeypatch, capsys):
    files = [path for _, path in data.find_audio([song_folder])]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    command(monkeypatch, "key", files[0], broken, "--checkpoint", checkpoint)
    out = capsys.readouterr().out
    assert "major /" in out and "skipped" in out and "broken.wav" in out
    rows = "\n".join(f"{path.relative_to(song_folder)},C major" for path in files[:4])
    (tmp_path / "keys.csv").write_text(f"file,key\n{rows}\nlost.wav,A minor\n{files[4].relative_to(song_folder)},X\n", encoding="utf-8")
    command(monkeypatch, "key", song_folder, "--keys", tmp_path / "keys.csv", "--checkpoint", checkpoint)
    out = capsys.readouterr().out
    assert "zero-shot key, 4 tracks (1 name no single key)" in out and "key template" in out
    table = json.loads(checkpoint.with_name(f"probe-key-{song_folder.name}.json").read_text())
    assert "interval" in table["rows"]["cpsd zero-shot"]["signature"]
    assert set(table["rows"]["cpsd zero-shot"]) == {"signature", "KSEA"}                          # 12 outputs have no mode
    assert {"accuracy", "weighted"} <= set(table["rows"]["key template"])
    with pytest.raises(data.InputError, match="none of 1 files could be read"):
        command(monkeypatch, "key", broken, "--checkpoint", checkpoint)
    with pytest.raises(data.InputError, match="missing.wav: no such file or folder"):
        command(monkeypatch, "key", tmp_path / "missing.wav", "--checkpoint", checkpoint)
    for text in ("file,tonality\na.wav,C\n", "file,key\nlost.wav,C\n", "file,key\nlost.wav\n", ""):
        (tmp_path / "keys.csv").write_text(text)
        with pytest.raises(data.InputError, match="keys.csv"):
            command(monkeypatch, "key", song_folder, "--keys", tmp_path / "keys.csv", "--checkpoint", checkpoint)


def test_table_of_the_embedded_songs_finds_what_is_planted(tmp_path, monkeypatch):
    """Frames that hold instrument and chord, and nothing else: raw features have both, and little of the key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "SYNTH_SPLITS", {"train": range(0, 320), "valid": range(323, 348), "test": range(349, 389)})
    fit, compose = probe.fit, cache(data.compose)
    monkeypatch.setattr(probe, "fit", lambda *args, **options: fit(*args, **options | dict(lr=0.1, steps=48)))
    monkeypatch.setattr(probe, "compose", compose)

    class Planted(Songs):
        def track(self, i):
            score, frames = compose(i), np.zeros((126 + i % 2, data.COLUMNS), np.uint8)
            frames[:, data.N_BINS + score["instrument"]] = 255
            for frame, moment in enumerate(np.arange(len(frames)) * probe.FRAME_SECONDS):
                chord = next(c for start, end, c in score["chords"] if start <= moment < end)
                frames[frame, data.N_BINS + 20 + chord] = 255
            return frames

    monkeypatch.setattr(probe, "prepare_synth", lambda: Planted([126 + i % 2 for i in range(389)]))
    net = network(("skey",), depth=1)
    torch.save(dict(config=net.config, model=net.state_dict()), "m.pt")
    command(monkeypatch, "synth", "--checkpoint", "m.pt")
    rows = json.loads(Path("probe-synth.json").read_text())["rows"]
    raw = {column: cell["mean"] for column, cell in rows["raw"].items()}
    assert raw["instrument accuracy"] > 0.95 and raw["chords overlap (pooled)"] > 0.8 and raw["key accuracy"] < 0.7
    assert "retrieval" in raw
    assert set(rows["untrained skey zero-shot"]) == {"key signature", "key accuracy"}


def test_probing_without_a_key_token_or_a_run_is_refused(song_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = model.MT2(("ntxent",), dim=24, depth=1, heads=2)
    torch.save(dict(config=net.config, model=net.state_dict()), tmp_path / "n.pt")
    with pytest.raises(data.InputError, match="has no key token"):
        command(monkeypatch, "key", song_folder, "--checkpoint", tmp_path / "n.pt")
    monkeypatch.setattr(probe, "SHIPPED", tmp_path / "weights" / "mt2.pt")
    with pytest.raises(data.InputError, match="no such checkpoint"):
        command(monkeypatch, "key", song_folder)


def test_without_a_run_the_shipped_weights_are_used(song_folder, tmp_path, monkeypatch, capsys):
    """Their tables go to out/. A run in out/ goes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "SHIPPED", tmp_path / "weights" / "mt2.pt")
    net = network(("skey", "ntxent"))
    (tmp_path / "weights").mkdir()
    torch.save(dict(config=net.config, model={name: weight.half() for name, weight in net.state_dict().items()}), probe.SHIPPED)
    first = sorted(str(p.relative_to(song_folder)) for p in song_folder.rglob("*.wav"))[0]
    (tmp_path / "keys.csv").write_text(f"file,key\n{first},C major\n")
    command(monkeypatch, "key", song_folder, "--keys", tmp_path / "keys.csv")
    assert "no run in out/: using the shipped weights" in capsys.readouterr().out
    assert list((tmp_path / "out").glob("probe-key-*.json")) and list((tmp_path / "weights").iterdir()) == [probe.SHIPPED]
    (tmp_path / "out" / "mine").mkdir()
    shutil.copy(probe.SHIPPED, tmp_path / "out" / "mine" / "checkpoint.pt")
    command(monkeypatch, "key", song_folder)
    assert "checkpoint out/mine/checkpoint.pt" in capsys.readouterr().out
