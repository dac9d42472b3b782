"""The judge must be honest: windows, features, the probe, its choices and its splits, without a leak."""
import itertools
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model
import probe
from probe import LINEAR, Head, Track, fit


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """fp32 on every machine, so that two ways to the same number may be compared closely."""
    monkeypatch.setattr(probe, "pick_amp", lambda device: (False, "fp32"))


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("length, keep_rest, spans", [
    (126, False, [(0, 126)]), (125, False, [(0, 125)]), (127, False, [(0, 126)]), (127, True, [(0, 126), (126, 127)]), (1, False, [(0, 1)]), (1, True, [(0, 1)]),
    (377, False, [(0, 126), (126, 252)]), (377, True, [(0, 126), (126, 252), (252, 377)]), (378, True, [(0, 126), (126, 252), (252, 378)])])
def test_cut_windows(length, keep_rest, spans):
    assert probe.cut_windows(length, keep_rest) == spans


def song(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (length, data.COLUMNS), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 128])
@pytest.mark.parametrize("keep_rest", [False, True])
def test_window_batches_hold_every_window_once_and_nothing_else(size, keep_rest):
    tracks = [song(length, i) for i, length in enumerate((300, 40, 126, 41, 252, 40, 40))]
    spans = [probe.cut_windows(len(t), keep_rest) for t in tracks]
    expected = [t[start:stop] for t, cuts in zip(tracks, spans) for start, stop in cuts]
    found = {}
    for indices, windows in probe.window_batches(iter(tracks), spans, size):
        assert len(indices) == len(windows) <= size and windows.dtype == torch.uint8
        assert indices == sorted(indices)
        found |= dict(zip(indices, windows.numpy(), strict=True))
    assert sorted(found) == list(range(len(expected))) and all(np.array_equal(found[i], w) for i, w in enumerate(expected))
    assert len(expected) == (2 + 1 + 1 + 1 + 2 + 1 + 1) + keep_rest


def test_windows_of_different_tracks_share_a_batch():
    tracks = [song(length) for length in (126, 40, 252, 40, 77)]
    batches = list(probe.window_batches(tracks, [probe.cut_windows(len(t)) for t in tracks], 3))
    assert [(indices, windows.shape[1]) for indices, windows in batches] == [([0, 2, 3], 126), ([1, 4], 40), ([5], 77)]


# ---------------------------------------------------------------- features


def network(tokens=("cpsd", "ntxent"), seed=1, depth=2, **config):
    """A small network whose (at birth silent) blocks are loud enough to matter."""
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


def test_extract_takes_tokens_and_the_mean_of_the_frames():
    net, tracks = network(), [song(260), song(45, seed=1)]
    arrays = probe.extract(net, tracks, "cpu", layers=[1, 2])
    assert arrays["tokens"].shape == (3, 2, 2, 24) and arrays["sequence"].shape == (3, 2, 24) and arrays["tokens"].dtype == torch.float16
    for i, window in enumerate((tracks[0][:126], tracks[0][126:252], tracks[1])):
        for k, layer in enumerate((1, 2)):
            every = by_hand(net, window, layer)
            same(arrays["tokens"][i, k].float(), every[:2], 3e-3)
            same(arrays["sequence"][i, k].float(), every[2:].mean(dim=0), 3e-3)


def test_extract_per_frame_keeps_the_rest_and_the_order():
    net, tracks = network(("ntxent",)), [song(130), song(45, seed=1), song(131, seed=2)]
    found = probe.extract(net, tracks, "cpu", per_frame=True)
    assert list(found) == ["sequence"] and found["sequence"].shape == (130 + 45 + 131, 1, 24)
    windows = [tracks[0][:126], tracks[0][126:], tracks[1], tracks[2][:126], tracks[2][126:]]
    same(found["sequence"][:, 0].float(), torch.cat([by_hand(net, w, 2)[1:] for w in windows]), 3e-3)
    raw = probe.extract(None, tracks, "cpu", per_frame=True)["raw"]
    views = torch.cat(probe.views_of(torch.from_numpy(np.concatenate(tracks))[None], "cpu"), dim=-1)[0]
    same(raw.float(), views, 1e-3)


def test_a_frame_of_a_patch_network_has_the_mean_of_the_patches_above_each_other():
    """16 bands x 16 frames: patch 8 * column + row; 130 frames are 8 columns, and 2 frames more than they; beside them 63 of 2 frames."""
    net, tracks = network(("ntxent",), patch="16x16,128x2"), [song(130), song(9, seed=1)]
    found = probe.extract(net, tracks, "cpu", layers=[1], per_frame=True)["sequence"][:, 0].float()
    assert found.shape == (139, 48)
    for window, rows in ((tracks[0][:126], found[:126]), (tracks[0][126:], found[126:130]), (tracks[1], found[130:])):
        for patch, (bands, width) in enumerate(((16, 16), (128, 2))):
            with torch.no_grad():
                every = net.norm(net(*probe.views_of(torch.from_numpy(window)[None], "cpu"), layers=[1], patch=patch)[1][1][0, 1:])
            tall = 128 // bands
            expected = torch.stack([every[tall * c:tall * c + tall].mean(dim=0) for c in (min(f // width, len(every) // tall - 1) for f in range(len(window)))])
            same(rows[:, 24 * patch:24 * patch + 24], expected, 3e-3)


def test_extract_raw_is_mean_and_deviation_over_time():
    tracks = [song(45), song(126, seed=1)]
    raw = probe.extract(None, tracks, "cpu")["raw"]
    assert raw.shape == (2, 2 * (84 + 128))
    for found, frames in zip(raw, tracks):
        seen = np.concatenate([frames[:, probe.PITCH_CROP:probe.PITCH_CROP + 84], frames[:, data.N_BINS:]], axis=1) / 255
        same(found.float(), torch.from_numpy(np.concatenate([seen.mean(axis=0), seen.std(axis=0)])).float(), 1e-3)


def test_a_window_alone_says_what_it_says_in_a_batch(monkeypatch):
    net, tracks = network(), [song(300), song(41, seed=1), song(126, seed=2), song(41, seed=3)]
    together = probe.extract(net, tracks, "cpu")
    monkeypatch.setattr(probe, "window_batches", partial(probe.window_batches, size=1))
    for name, value in probe.extract(net, tracks, "cpu").items():
        same(value.float(), together[name].float(), 2e-3)


def test_extract_leaves_no_trace_of_training(songs):
    """What comes out can be trained on, whether just made or from the cache."""
    for _ in range(2):
        x = probe.all_rows(network(), songs, np.arange(3), "cpu")[0]["concat"]
        torch.nn.Linear(x.shape[1], 2)(x.float()).sum().backward()


def test_readouts_by_definition_with_unequal_frame_counts():
    generator = torch.Generator().manual_seed(0)
    tokens, sequence = torch.randn(4, 1, 2, 6, generator=generator).half(), torch.randn(4, 1, 6, generator=generator).half()
    counts = np.array([126, 126, 1, 40])
    rows = probe.readouts(dict(tokens=tokens, sequence=sequence), ("cpsd", "ntxent"), counts)
    assert list(rows) == ["cpsd", "ntxent", "average", "concat", "sequence mean", "all tokens mean"]
    first, second, mean = tokens[:, 0, 0].float(), tokens[:, 0, 1].float(), sequence[:, 0].float()
    n = torch.tensor(counts)[:, None]
    expected = {"cpsd": first, "ntxent": second, "average": (first + second) / 2, "concat": torch.cat([first, second], dim=1),
                "sequence mean": mean, "all tokens mean": (first + second + n * mean) / (2 + n)}
    for name, value in rows.items():
        assert value.dtype == torch.float16
        same(value.float(), expected[name], 1e-3)
    single = probe.readouts(dict(tokens=tokens[:, :, 1:], sequence=sequence), ("ntxent",), counts)
    assert list(single) == ["ntxent", "sequence mean", "all tokens mean"]
    same(single["all tokens mean"].float(), (second + n * mean) / (1 + n), 1e-3)


def test_readouts_name_their_layer_when_there_are_several():
    tokens, sequence = torch.arange(2 * 3 * 2 * 5).view(2, 3, 2, 5).half(), torch.zeros(2, 3, 5).half()
    rows = probe.readouts(dict(tokens=tokens, sequence=sequence), ("cpsd", "ntxent"), np.array([126, 126]), layers=(0, 1, 4))
    assert len(rows) == 18 and {"cpsd L0", "concat L1", "all tokens mean L4"} < set(rows)
    assert torch.equal(rows["concat L1"], tokens[:, 1].flatten(1)) and torch.equal(rows["ntxent L4"], tokens[:, 2, 1])
    frames = torch.arange(7 * 2 * 5).view(7, 2, 5).half()
    rows = probe.readouts(dict(sequence=frames), ("cpsd",), np.array([3, 4]), layers=(0, 2))
    assert list(rows) == ["sequence L0", "sequence L2"] and torch.equal(rows["sequence L2"], frames[:, 1])
    assert list(probe.readouts(dict(sequence=frames[:, :1]), ("cpsd",), np.array([3, 4]))) == ["sequence"]


def test_all_rows_are_those_of_both_networks_and_raw(songs):
    net = network()
    rows, owner = probe.all_rows(net, songs, np.array([0, 1, 2]), "cpu")
    names = ["cpsd", "ntxent", "average", "concat", "sequence mean", "all tokens mean"]
    assert list(rows) == names + [f"untrained {n}" for n in names] + ["raw"] and owner.tolist() == [0, 1, 2, 2]
    assert all(len(value) == 4 for value in rows.values()) and rows["concat"].shape == (4, 48) and rows["raw"].shape == (4, 424)
    every = by_hand(net, songs.track(1), 2)                                                         # 40 frames: fewer than a segment
    same(rows["all tokens mean"][1].float(), every.mean(dim=0), 3e-3)
    every = by_hand(probe.untrained(net, "cpu"), songs.track(2)[126:], 2)
    same(rows["untrained ntxent"][3].float(), every[1], 3e-3)
    assert (rows["cpsd"].float() - rows["untrained cpsd"].float()).abs().max() > 0.1


def test_all_rows_of_some_tracks_layers_and_frames(songs):
    net = network(("cpsd",))
    rows, owner = probe.all_rows(net, songs, np.array([2, 1]), "cpu", layers=[0, 2])
    assert owner.tolist() == [0, 0, 1] and "untrained all tokens mean L2" in rows and "raw" in rows and "raw L0" not in rows
    same(rows["cpsd L2"][2].float(), by_hand(net, songs.track(1), 2)[0], 3e-3)
    rows, owner = probe.all_rows(net, songs, np.array([0, 1]), "cpu", per_frame=True)
    assert list(rows) == ["sequence", "untrained sequence", "raw"] and owner.tolist() == [0] * 130 + [1] * 40
    assert rows["sequence"].shape == (170, 24) and rows["raw"].shape == (170, 212)


def test_untrained_is_the_same_network_with_other_weights():
    net = network(depth=1)
    first, second = probe.untrained(net, "cpu"), probe.untrained(net, "cpu")
    assert first.config == net.config and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not torch.equal(first.positions, net.positions)


@pytest.fixture
def calls(monkeypatch):
    """How often extract() ran."""
    calls, real = [], probe.extract
    monkeypatch.setattr(probe, "extract", lambda *args: calls.append(args) or real(*args))
    return calls


def cached(net, songs, numbers=(0, 1), layers=(2,), per_frame=False):
    return probe.cached(net, songs, np.array(numbers), "cpu", list(layers), per_frame, None)


def test_features_are_made_once(songs, calls):
    net = network()
    first, again = cached(net, songs), cached(net, songs)
    assert len(calls) == 1 and set(first) == {"tokens", "sequence"} and all(torch.equal(first[name], again[name]) for name in first)
    probe.cached(None, songs, np.array([0, 1]), "cpu", None, False, None)
    probe.cached(None, songs, np.array([0, 1]), "cpu", None, False, None)
    assert len(calls) == 2


@pytest.mark.parametrize("other", ["weights", "heads", "tracks", "order", "layers", "per_frame", "store", "precision"])
def test_the_cache_is_missed_by_what_would_change_the_features(songs, calls, other, monkeypatch):
    net = network()
    cached(net, songs)
    if other == "weights":
        with torch.no_grad():
            net.blocks[1].mlp[2].bias[3] += 0.01
    if other == "heads":                                                                            # the same weights, read otherwise
        net, state = network(heads=3), net.state_dict()
        net.load_state_dict(state)
    if other == "precision":
        monkeypatch.setattr(probe, "pick_amp", lambda device: (True, "bf16"))
    if other == "store":
        songs.info = {"checksum": "abd"}
    numbers = dict(tracks=(0, 2), order=(1, 0)).get(other, (0, 1))
    cached(net, songs, numbers, (1,) if other == "layers" else (2,), other == "per_frame")
    assert len(calls) == 2


def test_a_torn_cache_file_is_made_again(songs, calls):
    net = network()
    first = cached(net, songs)
    folder = Path("data/features")
    path, = folder.iterdir()
    for content in (path.read_bytes()[:200], b""):
        path.write_bytes(content)
        assert torch.equal(cached(net, songs)["tokens"], first["tokens"])
    assert len(calls) == 3 and list(folder.iterdir()) == [path]
    cached(net, songs)
    assert len(calls) == 3


# ---------------------------------------------------------------- a head


def make_head(weights, mean=(0.0, 0.0), scale=(1.0, 1.0), offset=0.0, gain=1.0):
    return Head(torch.tensor(mean), torch.tensor(scale), [torch.tensor(w) for w in weights], torch.tensor(offset), torch.tensor(gain), None)


def test_outputs_of_a_track_are_the_mean_over_its_windows():
    """Track 1 has three windows. One layer: x0 + 2 x1 + 3 and -x0."""
    x, owner = torch.tensor([[9.0, 9], [1, 0], [2, 1], [6, 5], [4, 4]]), np.array([0, 1, 1, 1, 2])
    head = make_head([[[1.0, -1], [2, 0]], [[3.0, 0]]])
    assert head(x, owner, np.array([1])).tolist() == [[pytest.approx((4 + 7 + 19) / 3), -3]]
    assert head(x, owner, np.array([2, 0])).tolist() == [[15, -4], [30, -9]]                        # in the order asked for
    head = make_head([[[1.0, -1], [2, 0]], [[3.0, 0]]], mean=(1.0, 0.0), scale=(2.0, 0.5), offset=10.0, gain=-2.0)
    first = (0 + 0 + 3, 0.5 + 4 + 3, 2.5 + 20 + 3)                                                  # (x0 - 1) / 2 + 2 x1 / 0.5 + 3
    assert head(x, owner, np.array([1]))[0, 0].item() == pytest.approx(10 - 2 * sum(first) / 3)


def test_a_hidden_layer_is_averaged_after_its_corner():
    """relu(x0), relu(-x0) of windows -3 and 1: the mean of what is said, not what is said of the mean."""
    x, owner = torch.tensor([[-3.0, 0], [1, 0]]), np.array([0, 0])
    head = make_head([[[1.0, -1], [0, 0]], [[0.0, 0]], [[1.0, 0], [0, 1]], [[0.0, 0.5]]])
    assert head(x, owner, np.array([0])).tolist() == [[0.5, 2]]


def test_averaging_the_windows_first_is_a_shortcut_for_linear_layers():
    x, owner, y, _, _ = problem()
    head = fit(x, owner, y, "class", [run()], log_score(y), steps=16, every=8)[0]
    tracks = np.array([31, 4, 17, 25])
    long_way = head.outputs(*probe.track_items(x, owner, tracks, head.mean, head.scale, linear=False))
    same(head(x, owner, tracks), long_way)
    expected = torch.stack([((x[owner == t].float() - head.mean) / head.scale @ head.weights[0] + head.weights[1]).mean(dim=0) for t in tracks])
    same(long_way, expected)


# ---------------------------------------------------------------- fit


def problem(tracks=60, dim=7, classes=3, spread=1.0, seed=0):
    """(x, owner, y, windows of each track 1 to 4, centres): clusters by class; parts of the tracks are TRAIN, VALID, TEST."""
    generator, windows = torch.Generator().manual_seed(seed), np.random.default_rng(seed).integers(1, 5, tracks)
    y, owner = torch.arange(tracks) * 7 % classes, np.repeat(np.arange(tracks), windows)
    centres = 2 * torch.randn(classes, dim, generator=generator)
    return (centres[y[owner]] + spread * torch.randn(len(owner), dim, generator=generator)).half(), owner, y, windows, centres


TRAIN, VALID, TEST = np.split(np.random.default_rng(1).permutation(60), [30, 45])


def run(**changes):
    return {**LINEAR, "seed": 0, "train": TRAIN, "valid": VALID, "batch": 16, **changes}


def log_score(y):
    return lambda outputs, numbers: -float(F.cross_entropy(outputs, y[numbers]))


def accuracy_score(y):
    return lambda outputs, numbers: probe.accuracy(outputs.numpy(), y[numbers].numpy())


def assert_identical(a, b):
    assert a.score == b.score
    for first, second in zip([a.mean, a.scale, *a.weights, a.offset, a.gain], [b.mean, b.scale, *b.weights, b.offset, b.gain], strict=True):
        assert torch.equal(first, second)


def test_defaults_are_the_published_protocol():
    assert LINEAR | dict(batch=128, lr=1e-3) == LINEAR and (probe.STEPS, probe.EVERY * probe.PATIENCE, probe.SEEDS) == (6400, 640, 5)


@pytest.mark.parametrize("hidden, amp", [(0, False), (12, False), (12, True)])
def test_fit_learns_clusters_and_not_shuffled_labels(monkeypatch, hidden, amp):
    if amp:
        monkeypatch.setattr(probe, "pick_amp", lambda device: (True, "bf16"))
    x, owner, y, _, _ = problem()
    runs = [run(seed=seed, lr=1e-2, hidden=hidden) for seed in range(2)]
    test = accuracy_score(y)
    assert min(test(head(x, owner, TEST), TEST) for head in fit(x, owner, y, "class", runs, test, steps=256)) > 0.85
    y = y[torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    test = accuracy_score(y)
    assert np.mean([test(head(x, owner, TEST), TEST) for head in fit(x, owner, y, "class", runs, test, steps=256)]) < 0.6


def test_scaler_is_of_the_training_items():
    x, owner, y, _, _ = problem()
    plain, scaled = fit(x, owner, y, "class", [run(standardize=False), run()], log_score(y), steps=0)
    items = x[np.isin(owner, TRAIN)].float()
    same(scaled.mean, items.mean(dim=0))
    same(scaled.scale, items.std(dim=0))
    assert not plain.mean.any() and (plain.scale == 1).all()


@pytest.mark.parametrize("changes", [dict(), dict(hidden=9, dropout=0.25, l2=1e-3), dict(standardize=False)])
def test_nothing_but_training_and_validation_tracks_reaches_a_head(changes):
    """Other features and labels of all other tracks, NaN among them, leave it unchanged bit for bit."""
    x, owner, y, _, _ = problem()
    wild, others = x.clone(), y.clone()
    wild[np.isin(owner, TEST)] = torch.nan
    others[TEST] = (others[TEST] + 1) % 3
    fitted = fit(x, owner, y, "class", [run(**changes)], log_score(y), steps=48, every=8)[0]
    assert_identical(fitted, fit(wild, owner, others, "class", [run(**changes)], log_score(others), steps=48, every=8)[0])
    assert all(w.isfinite().all() for w in fitted.weights)


def test_validation_features_steer_but_do_not_train():
    """Wild validation features change the score, not the scaler, and with a score that ignores them not the weights."""
    x, owner, y, _, _ = problem()
    wild = x.clone()
    wild[np.isin(owner, VALID)] *= 100
    blind = lambda: lambda outputs, numbers, count=itertools.count(): next(count)
    a, b = (fit(features, owner, y, "class", [run()], blind(), steps=16, every=8)[0] for features in (x, wild))
    assert_identical(a, b)


STACKS = {
    "seeds": [dict(seed=s) for s in (0, 7, 2)], "sets": [dict(), dict(train=TRAIN[:11]), dict(train=TEST)],
    "settings": [dict(l2=0.1), dict(standardize=False), dict(dropout=0.5)],
    "mixed": [dict(), dict(seed=3), dict(l2=0.1), dict(dropout=0.5, seed=3), dict(dropout=0.75, standardize=False), dict(lr=1e-2, standardize=False, l2=1e-3),
              dict(train=TRAIN[:11], valid=VALID[3:]), dict(train=VALID, valid=TRAIN, dropout=0.25, l2=1e-3, seed=4), dict(batch=5), dict(batch=5, dropout=0.25)]}


@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("kind, stack", [("class", "seeds"), ("class", "sets"), ("class", "settings"), ("class", "mixed"), ("regression", "sets"), ("tags", "mixed")])
def test_runs_trained_together_equal_runs_trained_alone(kind, stack, hidden):
    x, owner, y, _, _ = problem()
    if kind != "class":
        y = F.one_hot(y).float() * (1 if kind == "tags" else torch.arange(60)[:, None])
    loss = {"class": F.cross_entropy, "tags": F.binary_cross_entropy_with_logits, "regression": F.mse_loss}[kind]
    score = lambda outputs, numbers: -float(loss(outputs, y[numbers]))
    runs = [run(**{"lr": 3e-3, "hidden": hidden, **changes}) for changes in STACKS[stack]] + [run(hidden=9 - hidden)]
    together = fit(x, owner, y, kind, runs, score, steps=40, every=8)
    for one, head in zip(runs, together):
        alone = fit(x, owner, y, kind, [one], score, steps=40, every=8)[0]
        assert head.score == pytest.approx(alone.score, rel=1e-4)
        for a, b in zip(head.weights, alone.weights, strict=True):
            same(a, b, 2e-4)
        for name in ("mean", "scale", "offset", "gain"):
            assert torch.equal(getattr(head, name), getattr(alone, name))
    assert len({head.score for head in together}) == len(runs)                                      # every setting has an effect


def test_dropout_is_on_the_input_and_on_the_hidden_layer_while_training(monkeypatch):
    """Features of 1, not standardised: what is kept is scaled up, and equal seeds lose the same."""
    x, owner, y, _, _ = problem()
    seen, real = [], probe.forward
    monkeypatch.setattr(probe, "forward", lambda weights, x, keep=None: seen.append((x, keep)) or real(weights, x, keep))
    runs = [run(hidden=50, batch=40, standardize=False, dropout=rate, seed=seed) for rate, seed in ((0.25, 0), (0.75, 0), (0.75, 1), (0.0, 1))]
    fit(torch.ones_like(x), owner, y, "class", runs, log_score(y), steps=8, every=8)
    training = [(x, keep) for x, keep in seen if keep is not None]
    assert len(training) == 8 and len(seen) == 8 + 2 * len(runs)
    assert all((x == 1).all() for x, keep in seen if keep is None)                                  # validation
    for noisy in (torch.stack([x for x, _ in training]), torch.stack([keep for _, keep in training])):
        assert noisy.shape[1:3] == (4, 40) and (noisy[:, 3] == 1).all()
        for k, rate in enumerate((0.25, 0.75, 0.75)):
            values, counts = noisy[:, k].unique(return_counts=True)
            same(values, torch.tensor([0, 1 / (1 - rate)]))
            assert counts[0] / counts.sum() == pytest.approx(rate, abs=0.05)
        assert (noisy[:, 0][noisy[:, 1] > 0] > 0).all() and not torch.equal(noisy[:, 1], noisy[:, 2])


def test_a_run_that_has_ended_disturbs_nobody():
    """Early stopping of one run shrinks the stack; the others go on as if alone."""
    x, owner, y, _, _ = problem()
    runs = [run(seed=1), run(lr=0.0, valid=VALID[::-1].copy()), run(dropout=0.5, train=TRAIN[:9])]
    calls = []
    score = lambda outputs, numbers: calls.append(numbers[0]) or log_score(y)(outputs, numbers)
    together = fit(x, owner, y, "class", runs, score, steps=48, every=4, patience=3)
    assert calls.count(VALID[-1]) == 4 and calls.count(VALID[0]) > 20                               # a rate of 0 does not gain
    for one, head in zip(runs, together):
        for a, b in zip(head.weights, fit(x, owner, y, "class", [one], log_score(y), steps=48, every=4, patience=3)[0].weights):
            same(a, b, 2e-4)


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("kind", ["class", "tags", "regression"])
def test_the_optimiser_is_adam_with_l2_in_the_gradient(hidden, kind):
    """Two training items that are the same: every batch is known, so torch.optim.Adam must arrive at the same weights."""
    generator = torch.Generator().manual_seed(0)
    item = torch.randn(5, generator=generator)
    x, owner = torch.cat([item[None], item[None], torch.randn(3, 5, generator=generator)]), np.arange(5)
    y = {"class": torch.tensor([1, 1, 0, 3, 2]), "tags": torch.tensor([[1.0, 0]] * 2 + [[0.0, 1]] * 3),
         "regression": torch.tensor([[3.0], [3]] + [[1.0]] * 3)}[kind]                              # 3 is the training mean: 0 to be learnt
    settings = [dict(hidden=hidden, standardize=False, batch=3, seed=5, train=np.array([0, 1]), valid=np.array([2, 3, 4]), lr=lr, l2=l2, dropout=0.0)
                for lr, l2 in ((1e-2, 0.0), (3e-3, 0.5))]
    rising = lambda outputs, numbers, count=itertools.count(): next(count)
    start = fit(x, owner, y, kind, settings, rising, steps=0)
    end = fit(x, owner, y, kind, settings, rising, steps=24, every=8)
    for setting, first, last in zip(settings, start, end):
        weights = [w.clone().requires_grad_() for w in first.weights]
        adam = torch.optim.Adam(weights, lr=setting["lr"], weight_decay=setting["l2"])
        for _ in range(24):
            out = torch.relu(item @ weights[0] + weights[1]) @ weights[2] + weights[3] if hidden else item @ weights[0] + weights[1]
            loss = F.cross_entropy(out, y[:1]) if kind == "class" else F.binary_cross_entropy_with_logits(out, y[:1]) if kind == "tags" else (out ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        for w, expected in zip(last.weights, weights, strict=True):
            same(w, expected.detach(), 1e-4)


def test_initial_weights_are_those_of_a_linear_layer_and_differ_by_seed():
    x, owner, y, _, _ = problem()
    one, again, other, alone = (heads[0] for heads in (fit(x, owner, y, "class", [run(seed=s, hidden=40)], log_score(y), steps=0) for s in (0, 0, 1, 2)))
    assert_identical(one, again)
    assert len({w[0, 0].item() for w in (one.weights[0], other.weights[0], alone.weights[0])}) == 3
    for weight, fan_in in ((one.weights[0], 7), (one.weights[2], 40)):
        assert 0.8 < weight.abs().max() * fan_in ** 0.5 <= 1 and abs(weight.mean()) * fan_in ** 0.5 < 0.2


def test_early_stopping_keeps_the_weights_of_the_best_validation_score():
    x, owner, y, _, _ = problem()
    said, scores = [], [0.1, 0.3, 0.2, 0.7, 0.7, 0.1, 0.6, 0.9]
    score = lambda outputs, numbers: said.append(outputs.clone()) or scores[len(said) - 1]
    head = fit(x, owner, y, "class", [run(lr=1e-2)], score, steps=400, every=4, patience=3)[0]
    assert len(said) == 7 and head.score == 0.7                                                     # an equal score is no gain: stopped three later
    assert torch.equal(head(x, owner, VALID), said[3]) and not torch.equal(said[3], said[4])


def test_the_best_of_all_scores_is_kept_to_the_end():
    x, owner, y, _, _ = problem(spread=3)
    said = []
    score = lambda outputs, numbers: said.append(log_score(y)(outputs, numbers)) or said[-1]
    head = fit(x, owner, y, "class", [run(lr=0.1)], score, steps=37, every=5, patience=100)[0]
    assert len(said) == 8 and head.score == max(said) == log_score(y)(head(x, owner, VALID), VALID)


def test_halving_lets_the_worse_half_leave():
    """Runs told apart by their validation set; a later one scores better, all gain at every step."""
    x, owner, y, _, _ = problem()
    runs, calls = [run(valid=VALID[i:]) for i in range(7)], []
    score = lambda outputs, numbers: calls.append(len(VALID) - len(numbers)) or calls[-1] + 0.01 * len(calls) / 100
    heads = fit(x, owner, y, "class", runs, score, steps=10, every=2, patience=3, halve=(4, 8))
    assert [calls.count(i) for i in range(7)] == [3, 3, 3, 5, 5, 6, 6]                              # 7 runs, 4 after step 4, 2 after step 8
    assert [int(head.score) for head in heads] == list(range(7))


def test_regression_predicts_in_original_units():
    generator = torch.Generator().manual_seed(0)
    heard, owner = torch.randn(60, 6, generator=generator), np.repeat(np.arange(60), 3)
    x = heard[owner] + 0.2 * torch.randn(180, 6, generator=generator)
    y = heard @ torch.randn(6, 2, generator=generator) * torch.tensor([0.02, 300]) + torch.tensor([5.0, -1000])
    r2 = lambda outputs, numbers: probe.r2(outputs.numpy(), y[numbers].numpy())
    for head in fit(x, owner, y, "regression", [run(lr=1e-2), run(lr=1e-2, hidden=16, seed=1)], lambda o, n: float(r2(o, n).mean()), steps=768):
        assert min(r2(head(x, owner, TEST), TEST)) > 0.8 and head.score == pytest.approx(r2(head(x, owner, VALID), VALID).mean())
        assert torch.equal(head.offset, y[TRAIN].mean(dim=0)) and head.gain.tolist() == pytest.approx(y[TRAIN].std(dim=0).tolist(), rel=1e-3)


def test_tags_are_learnt_each_for_itself():
    x, owner, classes, _, _ = problem()
    y = torch.stack([classes == 0, classes != 1, classes == 2, classes >= 0], dim=1).float()
    score = lambda outputs, numbers: float(np.nanmean(probe.tag_scores(outputs.numpy(), y[numbers].numpy())[0]))
    outputs = fit(x, owner, y, "tags", [run(lr=1e-2)], score, steps=256)[0](x, owner, TEST)
    auc = probe.tag_scores(outputs.numpy(), y[TEST].numpy())[0]
    assert outputs.shape == (15, 4) and min(auc[:3]) > 0.9 and np.isnan(auc[3]) and outputs[:, 3].min() > 0


@pytest.mark.parametrize("kind", ["class", "chords", "unbalanced", "key", "tempo", "tags", "beats", "regression"])
def test_losses_are_one_number_per_probe(kind):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 5, 4, generator=generator)
    target = torch.rand(3, 5, 4, generator=generator).round() if kind in ("tags", "beats", "regression") else torch.randint(4, (3, 5), generator=generator)
    one = {"tags": F.binary_cross_entropy_with_logits, "beats": F.binary_cross_entropy_with_logits, "regression": F.mse_loss}.get(kind, F.cross_entropy)
    same(probe.item_loss(kind, outputs, target), torch.stack([one(o, t) for o, t in zip(outputs, target)]))


# ---------------------------------------------------------------- the grid


def test_the_grid_is_the_published_one():
    entries = {(g["standardize"], g["hidden"], g["batch"], g["lr"], g["dropout"], g["l2"]) for g in probe.GRID}
    published = set(itertools.product((True, False), (0, 512), (64, 256), (1e-3, 1e-4, 1e-5), (0.75, 0.5, 0.25), (1e-3, 1e-4, 0)))
    assert len(probe.GRID) == 216 and entries == published and all(set(g) == set(LINEAR) for g in probe.GRID)
    assert probe.GRID_FIT["every"] * probe.GRID_FIT["patience"] == 256 and probe.GRID_FIT["halve"] == (64, 128, 256, 512)
    assert all(step % probe.GRID_FIT["every"] == 0 for step in probe.GRID_FIT["halve"])


@pytest.fixture
def small_grid(monkeypatch):
    """Six configurations; the fourth learns, the fifth is its twin."""
    base = dict(hidden=0, batch=8, lr=1e-6, dropout=0.25, l2=0.0, standardize=True)
    grid = [base, dict(base, hidden=5), dict(base, batch=5), dict(base, lr=3e-2), dict(base, lr=3e-2), dict(base, lr=1e-5)]
    monkeypatch.setattr(probe, "GRID", grid)
    monkeypatch.setattr(probe, "GRID_FIT", dict(steps=48, every=8, patience=32, halve=(16,)))
    return grid


def test_choose_needs_no_test_track(small_grid):
    """NaN in every test row and other test labels: the choice is the same."""
    x, owner, y, _, _ = problem()
    wild, others = x.clone(), y.clone()
    wild[np.isin(owner, TEST)] = torch.nan
    others[TEST] = (others[TEST] + 1) % 3
    chosen = probe.choose(x, owner, y, "class", TRAIN, VALID, log_score(y))
    assert chosen is small_grid[3] and chosen is probe.choose(wild, owner, others, "class", TRAIN, VALID, log_score(others))


def test_choose_breaks_ties_by_grid_order(small_grid):
    x, owner, y, _, _ = problem()
    assert probe.choose(x, owner, y, "class", TRAIN, VALID, lambda outputs, numbers: 0.5) is small_grid[0]
    best = lambda outputs, numbers: float(outputs.shape[1] == 3 and outputs.std() > 1.5)
    assert probe.choose(x, owner, y, "class", TRAIN, VALID, best) is small_grid[3]


def quick_fit(monkeypatch, steps=16):
    """fit() of few steps, whatever its caller wants. Returns the list that its runs will be in."""
    asked = []

    def quick(x, owner, y, kind, runs, *rest, **named):
        asked.extend(runs)
        return fit(x, owner, y, kind, runs, *rest, **named | dict(steps=steps, every=8, patience=steps))

    monkeypatch.setattr(probe, "fit", quick)
    return asked


def test_the_grid_is_chosen_without_the_test_tracks_of_any_seed(monkeypatch):
    """Where seeds or folds have test tracks of their own, the configuration of each was chosen without them."""
    quick_fit(monkeypatch)
    x, owner, y, _, _ = problem(tracks=25)
    tracks = [Track(f"{i}", None, {"class": f"class{c}"}, None, f"group{i % 10}") for i, c in enumerate(y.tolist())]
    seen = []
    monkeypatch.setattr(probe, "choose", lambda x, owner, y, kind, train, valid, score: seen.append({*train, *valid}) or LINEAR)
    probe.probe_global({"row": x}, owner, tracks, {"class": "class"}, True, [])
    for _, _, test in probe.splits_of(tracks):
        assert any(not known & set(test) for known in seen)


def test_probe_global_scores_every_row_metric_and_share(monkeypatch):
    asked = quick_fit(monkeypatch, steps=256)
    x, owner, y, _, _ = problem(tracks=50, spread=0.5)
    part = {0: "test", 1: "valid"}
    tracks = [Track(f"{i}", None, {"genre": "abc"[c]}, part.get(i // 3 % 4, "train"), f"{i}") for i, c in enumerate(y.tolist())]
    results, chance, remarks, predictions = probe.probe_global({"good": x * 5, "bad": x * 0}, owner, tracks, {"genre": "unbalanced"}, False, [0.25])
    assert list(results) == ["good", "bad", "chosen on validation"] and list(results["good"]) == ["accuracy", "class mean", "accuracy @25 %"]
    assert remarks == ["genre: 3 classes", "chosen on validation, genre: " + ", ".join(["good"] * 5)]
    good, bad = results["good"]["accuracy"], results["bad"]["accuracy"]
    assert len(good["scores"]) == 5 and good["mean"] > 0.9 > bad["mean"] and good["interval"][0] <= good["scores"][0] <= good["interval"][1]
    assert len(results["good"]["accuracy @25 %"]["scores"]) == 4 and "interval" not in results["good"]["class mean"]
    outputs, truth, names = predictions["good", "genre"]
    known, valid, _ = probe.splits_of(tracks)[0]
    assert len(asked) == 2 * (5 + 4) and all({*r["train"]} <= {*known} and {*r["valid"]} == {*valid} for r in asked)
    assert names == ["a", "b", "c"] and chance["class mean"] == pytest.approx(1 / 3) and probe.accuracy(outputs, truth) == good["scores"][0]


def test_a_row_is_chosen_by_validation_and_not_by_the_test(monkeypatch):
    """Features that know train and validation and nothing of the test are chosen, and pay for it; untrained rows have a choice of their own."""
    quick_fit(monkeypatch, steps=256)
    x, owner, y, _, _ = problem(tracks=50, spread=0.5)
    part = {0: "test", 1: "valid"}
    tracks = [Track(f"{i}", None, {"genre": "abc"[c]}, part.get(i // 3 % 4, "train"), f"{i}") for i, c in enumerate(y.tolist())]
    false, noise = x.clone(), torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    tested = np.isin(owner, np.flatnonzero([t.split == "test" for t in tracks]))
    false[tested] = noise[tested].to(x.dtype)
    rows = {"false": 5 * false, "honest": x + noise, "untrained a": noise, "untrained b": 5 * x, "raw": 9 * x}
    results, _, remarks, _ = probe.probe_global(rows, owner, tracks, {"genre": "class"}, False, [])
    assert results["false"]["accuracy"]["mean"] < results["honest"]["accuracy"]["mean"]
    assert results["chosen on validation"] == results["false"] and results["untrained, chosen"] == results["untrained b"]
    assert remarks[1:] == ["chosen on validation, genre: " + ", ".join(["false"] * 5), "untrained, chosen, genre: " + ", ".join(["untrained b"] * 5)]


@pytest.fixture
def clips(tmp_path):
    """Six clips with beats, given split: ({row: frames}, owner, tracks). In one row the features announce the beats."""
    tracks, beats = [], []
    for i, part in enumerate(["train", "test", "train", "valid", "test", "test"]):
        (tmp_path / f"{i}.beats").write_text("\n".join(f"{(12 + i + 14 * k) * probe.FRAME_SECONDS:.4f}" for k in range(8)))
        tracks.append(Track(f"{i}", None, {"beats": tmp_path / f"{i}.beats"}, part, f"{i}"))
        beats.append(np.isin(np.arange(130 + i), 12 + i + 14 * np.arange(8)[:, None] + [-1, 0, 1]))
    owner, beat = np.repeat(np.arange(6), [len(b) for b in beats]), np.concatenate(beats)
    noise = np.random.default_rng(0).normal(size=(len(owner), 5))
    return {name: torch.from_numpy(np.column_stack([level * beat, noise])).float() for name, level in (("announced", 9), ("noise", 0))}, owner, tracks


@pytest.fixture
def intervals(monkeypatch):
    """What interval() was given; it draws 60 times."""
    given, real = [], probe.interval
    monkeypatch.setattr(probe, "interval", lambda *args, **named: given.append(args[:3]) or real(*args, **named | dict(draws=60)))
    return given


def test_probe_local_counts_hits_and_draws_tracks(clips, intervals, monkeypatch):
    """Where seeds share the test tracks, the interval is of the first seed, however much the seeds differ."""
    quick_fit(monkeypatch, steps=96)
    monkeypatch.setitem(LINEAR, "lr", 0.1)
    results, chance = probe.probe_local(*clips, "beats")
    assert set(results["noise"]) == {"F", "F (pooled)"} and chance == {} and len(results["noise"]["F"]["scores"]) == 5
    assert results["announced"]["F"]["mean"] > 0.8 > results["noise"]["F"]["mean"]
    for (metric, outputs, truths), row in zip(list(intervals), results, strict=True):
        assert results[row]["F"]["interval"] == probe.interval(metric, outputs[:1], truths[:1])


def test_beat_threshold_is_chosen_without_the_test_tracks(clips, intervals, monkeypatch):
    """With other beats in the test tracks as many are estimated there."""
    quick_fit(monkeypatch)
    probe.probe_local(*clips, "beats")
    for track in clips[2]:
        if track.split == "test":
            track.labels["beats"].write_text("".join(f"{0.2 * k + 0.1:.2f}\n" for k in range(20)))
    probe.probe_local(*clips, "beats")
    for (_, before, _), (_, after, _) in zip(intervals[:2], intervals[2:], strict=True):
        assert all(np.array_equal(a[:, 1], b[:, 1]) and not np.array_equal(a[:, 2], b[:, 2]) for a, b in zip(before, after))


def test_probe_local_of_chords_leaves_out_frames_without_a_label(tmp_path, monkeypatch):
    """Features tell the chord. Frames of chords that are neither major nor minor are neither learnt nor scored."""
    quick_fit(monkeypatch, steps=96)
    monkeypatch.setitem(LINEAR, "lr", 0.1)
    names, tracks, heard = ["C", "A:min", "N", "F:sus4"], [], []
    for i, part in enumerate(["train", "valid", "test", "train", "test"]):
        order = np.roll(np.arange(4), i)
        (tmp_path / f"{i}.lab").write_text("".join(f"{0.64 * k:.2f} {0.64 * (k + 1):.2f} {names[c]}\n" for k, c in enumerate(order)))
        tracks.append(Track(f"{i}", None, {"chords": tmp_path / f"{i}.lab"}, part, f"{i}"))
        heard.append(np.append(np.repeat(order, 20), np.full(i, 3)))                                    # the end has no label
    owner, heard = np.repeat(np.arange(5), [len(h) for h in heard]), np.concatenate(heard)
    x = torch.from_numpy(np.eye(4)[heard]).float() + 0.1 * torch.randn(len(heard), 4, generator=torch.Generator().manual_seed(0))
    results, chance = probe.probe_local({"clear": x, "deaf": x * 0}, owner, tracks, "chords")
    assert results["clear"]["overlap"]["mean"] == results["clear"]["overlap (pooled)"]["mean"] == 1
    assert chance == pytest.approx({"overlap": 1 / 3, "overlap (pooled)": 1 / 3}) and results["deaf"]["overlap"]["mean"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("count, sizes", [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (10, (6, 2, 2)), (25, (15, 5, 5))])
def test_groups_stay_on_one_side_and_every_group_is_tested(count, sizes):
    groups = [f"font{i * i % count if i < 40 else i % count}" for i in range(4 * count + 40)]
    tested = set()
    splits = probe.group_splits(groups)
    for parts in splits:
        assert sorted(np.concatenate(parts)) == list(range(len(groups)))
        sides = [{groups[i] for i in part} for part in parts]
        assert tuple(map(len, sides)) == sizes and len(set.union(*sides)) == count
        tested |= sides[2]
    assert len(splits) == probe.SEEDS and len(tested) == count
    assert all(np.array_equal(a, b) for first, again in zip(splits, probe.group_splits(groups)) for a, b in zip(first, again))


def test_two_groups_cannot_be_split():
    with pytest.raises(data.InputError, match="2 group"):
        probe.group_splits(["a", "b"] * 5)


def tracks_with(parts, groups=None):
    return [Track(f"{i}", None, {}, part, groups[i] if groups else f"song{i}") for i, part in enumerate(parts)]


def test_a_given_split_is_used_as_it_is_by_every_seed():
    splits = probe.splits_of(tracks_with(["test", "train", "valid", "train", "test", "valid", "train"]))
    assert [[part.tolist() for part in split] for split in splits] == [[[1, 3, 6], [2, 5], [0, 4]]] * probe.SEEDS


def test_without_a_validation_part_a_fifth_of_the_training_groups_is_given_up():
    groups = [f"artist {i % 60}" for i in range(240)]
    train, valid, test = probe.splits_of(tracks_with(["train"] * 200 + ["test"] * 40, groups))[0]
    assert test.tolist() == list(range(200, 240)) and sorted([*train, *valid]) == list(range(200))
    assert not {groups[i] for i in train} & {groups[i] for i in valid} and 0.1 < len(valid) / 200 < 0.3
    more = probe.splits_of(tracks_with(["train"] * 150 + ["test"] * 40, groups))[0]                 # a group stays where it is, whoever else is there
    assert set(more[1]) == {i for i in valid if i < 150}


def test_which_splits_share_their_test_tracks():
    assert probe.share_test(probe.splits_of(tracks_with(["test", "train", "valid", "train"])))
    assert not probe.share_test(probe.splits_of(tracks_with([None] * 9))) and not probe.share_test(probe.splits_of(tracks_with([0, 1, 2, 0, 1, 2])))


def test_folds_rotate():
    fold = [3, 0, 1, 2, 0, 3, 1, 2, 2]
    splits = probe.splits_of(tracks_with(fold))
    assert len(splits) == 4
    for f, (train, valid, test) in enumerate(splits):
        assert sorted([*train, *valid, *test]) == list(range(9))
        assert {fold[i] for i in test} == {f} and {fold[i] for i in valid} == {(f + 1) % 4} and len({fold[i] for i in train}) == 2


def test_groups_are_split_when_nothing_is_given():
    groups = [f"album{i % 6}" for i in range(18)]
    for got, expected in zip(probe.splits_of(tracks_with([None] * 18, groups)), probe.group_splits(groups), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("parts", [["train", "valid"], ["train", "test"], ["valid", "test"], ["test"], [0, 1, 0, 1], [4, 4, 4], [None, None]])
def test_a_part_without_tracks_is_refused(parts):
    groups = ["one"] * len(parts) if parts == ["train", "test"] else None
    with pytest.raises(data.InputError):
        probe.splits_of(tracks_with(parts, groups))


@pytest.mark.parametrize("share, counts", [(0.01, (1, 1, 1)), (0.1, (1, 3, 5)), (0.5, (5, 15, 25)), (1, (10, 30, 50))])
def test_a_share_of_the_labels_keeps_the_classes(share, counts):
    y = torch.tensor([0] * 12 + [1] * 34 + [2] * 54 + [1] * 7)
    train = np.sort(np.concatenate([np.random.default_rng(0).permutation(np.flatnonzero(y.numpy()[:100] == c))[:n] for c, n in enumerate((10, 30, 50))]))
    draws = [probe.labelled_part(train, y, share, draw) for draw in range(4)]
    for draw, part in enumerate(draws):
        assert set(part) <= set(train) and len(set(part)) == len(part) and np.bincount(y[part]).tolist() == list(counts)
        assert np.array_equal(part, probe.labelled_part(train, y, share, draw))
    assert len({tuple(part) for part in draws}) == (1 if share == 1 else 4)


def test_a_share_of_tags_or_targets_is_drawn_from_all():
    y, train = torch.zeros(90, 3), np.arange(5, 85)
    draws = [probe.labelled_part(train, y, 0.25, draw) for draw in range(4)]
    assert all(len(set(part)) == 20 and set(part) <= set(train) for part in draws) and len({tuple(part) for part in draws}) == 4
    assert len(probe.labelled_part(train, y, 0.001, 0)) == 2


def test_constant_outputs_say_what_training_suggests():
    y = torch.tensor([2, 1, 1, 0, 3, 3, 3])
    outputs = probe.constant_outputs(y, np.array([0, 1, 2, 3]), 5)
    assert outputs.shape == (5, 4) and (outputs.argmax(axis=1) == 1).all()
    y = torch.tensor([[1.0, 10], [3, 20], [90, 90]])
    assert probe.constant_outputs(y, np.array([0, 1]), 4).tolist() == [[2, 15]] * 4


@pytest.mark.parametrize("kind, labels, y, names", [
    ("class", ["rock", "blues", "rock"], [1, 0, 1], ["blues", "rock"]), ("class", [60, 48, 72], [1, 0, 2], [48, 60, 72]),
    ("tempo", [120.5, 90.0, 120.5], [1, 0, 1], [90.0, 120.5]), ("key", [14, 0, 14], [14, 0, 14], probe.ALL_KEYS),
    ("tags", [["b", "a"], ["c"], ["a", "a"]], [[1, 1, 0], [0, 0, 1], [1, 0, 0]], ["a", "b", "c"])])
def test_labels_become_numbers(kind, labels, y, names):
    found, found_names = probe.encode([Track("", None, {"x": label}, None, "") for label in labels], "x", kind)
    assert found.tolist() == y and found_names == names


def test_targets_become_axes():
    found, names = probe.encode([Track("", None, {"emotion": pair}, None, "") for pair in ((1.5, 2.0), (3.0, 4.5))], "emotion", "regression")
    assert found.tolist() == [[1.5, 2.0], [3.0, 4.5]] and found.dtype == torch.float32 and names == ["arousal", "valence"]
    found, names = probe.encode([Track("", None, {"height": (value,)}, None, "") for value in (1.0, 2.0)], "height", "regression")
    assert found.shape == (2, 1) and names == ["height"]


# ---------------------------------------------------------------- tables


RESULTS = {"concat": {"accuracy": dict(mean=0.5, std=0.012, scores=[0.488, 0.512], interval=[0.25, 0.75]), "class mean": dict(mean=0.1, std=0.0, scores=[0.1])},
           "raw": {"accuracy": dict(mean=1.0, std=0.0, scores=[1.0], interval=[1, 1])}}


def test_table_shows_means_intervals_chance_and_published_figures(capsys):
    probe.print_table("the title", RESULTS, {"accuracy": 0.125}, "gtzan")
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("  ")[0]: line for line in lines if line}
    assert found["concat"].split() == ["concat", "50.0", "±", "1.2", "[25.0", "75.0]", "10.0", "±", "0.0"] and found["chance"].split()[-1] == "12.5"
    assert lines[1] == "the title" and "100.0 ± 0.0 [100.0 100.0]" in found["raw"]
    assert "61.7" in found["MT2, cpsd token *a"] and any(line.startswith("  *a published, not ours") for line in lines)


def test_tables_are_written_and_compared(tmp_path, capsys):
    paths = []
    for name, mean in (("first", 0.25), ("second", 0.75)):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "probe-gtzan.json")
        results = {"concat": {"accuracy": dict(RESULTS["concat"]["accuracy"], mean=mean)}, f"only {name}": {"F": dict(mean=mean, std=0, scores=[mean])}}
        probe.publish(tmp_path / name / "checkpoint.pt", "gtzan", "title", results, {"accuracy": 0.1})
        assert json.loads(paths[-1].read_text()) == dict(title="title", rows=results, chance={"accuracy": 0.1})
    capsys.readouterr()
    probe.print_comparison(paths)
    out = capsys.readouterr().out
    assert re.search(r"first +second\nconcat +25\.0 ± *1\.2 +75\.0 ± *1\.2\nchance +10\.0 +10\.0\n", out)
    assert re.search(r"only first +25\.0", out) and re.search(r"only second +75\.0", out)


@pytest.mark.parametrize("content", [None, "", "shopping list", "[1]", "{}", '{"rows": {}}'])
def test_files_that_are_no_tables_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(data.InputError, match="a.json"):
        probe.print_comparison([tmp_path / "a.json"])


def test_confusion_counts_and_names_the_relations_of_keys(tmp_path, capsys):
    truth, estimate = np.array([0, 0, 0, 21]), np.array([0, 7, 5, 0])
    probe.print_confusion(np.eye(24)[estimate], truth, probe.ALL_KEYS, tmp_path / "figure.png")
    out = capsys.readouterr().out
    assert "same 25.0 %, fifth above 25.0 %, fifth below 25.0 %, relative 25.0 %, parallel 0.0 %, other 0.0 %" in out
    row = next(line for line in out.splitlines() if line.startswith("C "))
    assert row.split()[1:9] == ["1", ".", ".", ".", ".", "1", ".", "1"]


# ---------------------------------------------------------------- key without labels


@pytest.mark.filterwarnings("ignore:invalid value")
def test_template_hears_the_pitch_fork():
    fork = probe.pitch_fork()
    moved = np.roll(fork, 3, axis=1)                                                                # three semitones up; what leaves at the top is quiet
    assert probe.template_keys([fork, moved, np.zeros_like(fork)]).tolist() == [0, 3, 0]


@pytest.mark.parametrize("mode, tonic", [("major", 0), ("major", 10), ("minor", 9), ("minor", 4), ("minor", 0)])
def test_template_recognises_its_own_profiles(mode, tonic):
    """The magnitudes of each octave follow a profile of the template; the first bin is A."""
    magnitude = np.roll(probe.KRUMHANSL[mode], tonic)[(np.arange(data.N_BINS) + 9) % 12] / 10
    frames = np.zeros((5, data.COLUMNS), np.uint8)
    frames[:, :data.N_BINS] = np.round(255 * (1 + 20 * np.log10(magnitude) / data.DYNAMIC_RANGE))
    assert probe.template_keys([frames]).tolist() == [tonic + 12 * (mode == "minor")]


class Ear:
    """Stands for a network that hears pitch classes, and calls the first bin it is shown `turn`."""
    config, turn, outputs = {}, 0, 12
    heads = property(lambda self: {"cpsd": self})
    key_token = lambda self: "cpsd"

    def __call__(self, cqt, mel):
        return {"cpsd": torch.roll((cqt ** 4).mean(dim=1).view(len(cqt), 7, 12).sum(dim=1), self.turn, dims=1)}, {}

    def keys(self, token):
        return token / token.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("turn", [0, 5])
def test_calibration_hears_the_fork_as_c_major(turn):
    ear, fork = Ear(), probe.pitch_fork()
    ear.turn = turn
    at_one_crop = probe.key_outputs(ear, [fork], "cpu", [probe.PITCH_CROP])[0]
    assert probe.calibrate(ear, "cpu") == at_one_crop.argmax() == (3 - probe.PITCH_CROP + turn) % 12  # C is three above the first bin, A
    heard = probe.key_probabilities(ear, [fork, np.roll(fork, 3, axis=1), np.roll(fork, -5, axis=1)], "cpu")
    assert heard.shape == (3, 12) and heard.argmax(dim=1).tolist() == [0, 3, 7]


def test_thirteen_crops_are_turned_back_to_one_pitch():
    """A clip shown at a higher crop seems lower: twelve crops that agree on a class outvote the one that errs."""

    class Odd(Ear):
        def __call__(self, cqt, mel):
            place = cqt[:, 0].argmax(dim=1) % 12
            return {"cpsd": F.one_hot(torch.where(place == 5, 1, place), 12).float()}, {}

    frames = np.zeros((10, data.COLUMNS), np.uint8)
    frames[:, 5 + probe.PITCH_CROP + 12] = 255                                                      # at the crop in use: bin 17, class 5, misheard
    answers = probe.key_outputs(Odd(), [frames], "cpu")[0]
    # The twelve give class 5 a probability of 1 and the rest the floor 1e-4, the odd one the reverse: a product to the power 1/13.
    five, one = 1e-4 ** (1 / 13), 1e-4 ** (12 / 13)
    assert answers.argmax() == 5 and answers[5] == pytest.approx(five / (five + one + 10 * 1e-4), rel=1e-4)


def test_calibration_undoes_the_rotation():
    """A head whose classes are rotated by 5 gives the same signatures: one clip settles the rotation."""
    net, track = network(("cpsd",), dim=48, depth=1), song(260)
    before, rotation = probe.key_probabilities(net, [track], "cpu"), probe.calibrate(net, "cpu")
    with torch.no_grad():
        head = net.heads["cpsd"].head
        head.weight.copy_(head.weight.roll(5, 0))
        head.bias.copy_(head.bias.roll(5, 0))
    same(probe.key_probabilities(net, [track], "cpu"), before, 1e-3)
    assert probe.calibrate(net, "cpu") == (rotation + 5) % 12


def test_answer_of_a_track_is_the_product_of_its_windows():
    net, tracks = network(), [song(260), song(30, seed=1)]
    profiles = probe.key_outputs(net, tracks, "cpu", [probe.PITCH_CROP])
    windows = [tracks[0][:126], tracks[0][126:252], tracks[1]]
    with torch.no_grad():
        said = torch.cat([net.heads["cpsd"].keys(net(*probe.views_of(torch.from_numpy(w)[None], "cpu"))[0]["cpsd"]) for w in windows])
    same(profiles, torch.stack([F.normalize(said[:2].prod(dim=0).sqrt(), p=1, dim=0), said[2]]))


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
    assert "4 tracks used, 1 name no single key" in out and "Krumhansl template" in out and "untrained" in out
    table = json.loads(checkpoint.with_name(f"probe-key-{song_folder.name}.json").read_text())
    assert table["chance"]["signature"] == pytest.approx(1 / 12) and "interval" in table["rows"]["cpsd"]["signature"]
    assert "accuracy" not in table["rows"]["cpsd"] and {"accuracy", "weighted"} <= set(table["rows"]["Krumhansl template"])  # 12 outputs know no mode
    for text in ("file,tonality\na.wav,C\n", "file,key\nlost.wav,C\n", "file,key\nlost.wav\n", ""):
        (tmp_path / "keys.csv").write_text(text)
        with pytest.raises(data.InputError, match="keys.csv"):
            command(monkeypatch, "key", song_folder, "--keys", tmp_path / "keys.csv", "--checkpoint", checkpoint)


def test_table_of_the_embedded_songs_finds_what_is_planted(tmp_path, monkeypatch):
    """Frames that show instrument and chord, and nothing else: raw features name both, and guess the key from a chord or two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "SYNTH_SPLITS", {"train": range(0, 512), "valid": range(515, 540), "test": range(541, 581)})
    monkeypatch.setattr(probe, "SYNTH_STEPS", 64)
    monkeypatch.setattr(probe, "FRAMES", dict(batch=256, every=32, patience=1))
    monkeypatch.setitem(LINEAR, "lr", 0.1)

    class Planted(Songs):
        def track(self, i):
            score, frames = data.compose(i), np.zeros((126 + i % 9, data.COLUMNS), np.uint8)
            frames[:, data.N_BINS + score["instrument"]] = 255
            for frame, moment in enumerate(np.arange(len(frames)) * probe.FRAME_SECONDS):
                frames[frame, data.N_BINS + 20 + next(c for start, end, c in score["chords"] if start <= moment < end)] = 255
            return frames

    monkeypatch.setattr(probe, "prepare_synth", lambda: Planted([126 + i % 9 for i in range(581)]))
    net = network(("skey",), depth=1)
    torch.save(dict(config=net.config, model=net.state_dict()), "m.pt")
    command(monkeypatch, "synth", "--checkpoint", "m.pt")
    table = json.loads(Path("probe-synth.json").read_text())
    rows, chance = table["rows"], table["chance"]
    assert list(rows) == ["skey", "sequence mean", "all tokens mean", "untrained skey", "untrained sequence mean", "untrained all tokens mean", "raw"]
    assert rows["raw"]["instrument @512"]["mean"] > 0.95 and rows["raw"]["chord"]["mean"] > 0.9 > 0.7 > rows["raw"]["key @512"]["mean"]
    labelled = ["key @64", "key @512", "instrument @64", "instrument @512", "tempo @512", "retrieval"]
    assert list(rows["untrained skey"]) == labelled + ["key sig. 0-shot", "key 0-shot"] and list(rows["sequence mean"]) == labelled + ["chord"]
    songs = [data.compose(i) for i in range(541, 581)]
    assert chance["key @64"] == pytest.approx(max(np.bincount([s["key"] for s in songs])) / 40) and chance["retrieval"] == 1 / 128


def test_probing_without_a_key_token_or_a_run_is_refused(song_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = model.MT2(("ntxent",), dim=24, depth=1, heads=2)
    torch.save(dict(config=net.config, model=net.state_dict()), tmp_path / "n.pt")
    with pytest.raises(data.InputError, match="no token that hears keys"):
        command(monkeypatch, "key", song_folder, "--checkpoint", tmp_path / "n.pt")
    monkeypatch.setattr(probe, "SHIPPED", tmp_path / "weights" / "mt2.pt")
    with pytest.raises(data.InputError, match="no run in out/"):
        command(monkeypatch, "key", song_folder)


def test_without_a_run_the_weights_that_come_along_are_used(song_folder, tmp_path, monkeypatch, capsys):
    """And said so; what is found with them goes to out/, not beside them. A run in out/ goes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "SHIPPED", tmp_path / "weights" / "mt2.pt")
    net = network(("skey", "ntxent"))
    (tmp_path / "weights").mkdir()
    torch.save(dict(config=net.config, model={name: weight.half() for name, weight in net.state_dict().items()}), probe.SHIPPED)
    first = sorted(str(p.relative_to(song_folder)) for p in song_folder.rglob("*.wav"))[0]
    (tmp_path / "keys.csv").write_text(f"file,key\n{first},C major\n")
    command(monkeypatch, "key", song_folder, "--keys", tmp_path / "keys.csv")
    assert "no run in out/: listening with" in capsys.readouterr().out
    assert list((tmp_path / "out").glob("probe-key-*.json")) and list((tmp_path / "weights").iterdir()) == [probe.SHIPPED]
    (tmp_path / "out" / "mine").mkdir()
    shutil.copy(probe.SHIPPED, tmp_path / "out" / "mine" / "checkpoint.pt")
    command(monkeypatch, "key", song_folder)
    assert "checkpoint out/mine/checkpoint.pt" in capsys.readouterr().out
