"""Inside the network: embeddings of folders, attention, figures, maps, and emergence."""
import json
import sys
from functools import partial

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import data
import probe
from conftest import frame_items, wave_of
import test_probe
from probe import FIFTH_NAMES
from test_probe import command, network, same, song

checkpoint, single_precision = test_probe.checkpoint, test_probe.single_precision


def save(path, net):
    torch.save(dict(config=net.config, model=net.state_dict()), path)


@pytest.fixture
def synth(tmp_path_factory, monkeypatch):
    """Nine embedded songs, made once."""
    folder = tmp_path_factory.getbasetemp() / "synth"
    monkeypatch.setattr(probe, "prepare_synth", lambda: data.prepare_synth(9, folder))
    monkeypatch.setattr(probe, "SYNTH_SPLITS", {"train": range(0, 4), "valid": range(4, 6), "test": range(6, 9)})


@pytest.fixture(scope="module")
def excerpts(tmp_path_factory):
    """Three excerpts of 9 s of each of four songs, in a folder a song, beside a file that is no audio."""
    folder = tmp_path_factory.mktemp("excerpts") / "songs"
    for i in range(4):
        (folder / f"song{i}").mkdir(parents=True)
        for part in range(3):
            sf.write(folder / f"song{i}" / f"{part}.wav", wave_of(i)[part * 48000:][:9 * 16000], 16000)
    (folder / "song0" / "torn.wav").write_bytes(b"RIFF")
    return folder


def test_embeddings_are_the_means_of_the_windows(excerpts, checkpoint, monkeypatch, capsys):
    """And nearest to an excerpt is another one of the same song."""
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", checkpoint)
    assert "of 12 tracks; 1 files skipped" in capsys.readouterr().out
    command(monkeypatch, "embed", excerpts, "--out", "deep/w.npz", "--windows", "--checkpoint", checkpoint)
    tracks, windows = np.load("e.npz"), np.load("deep/w.npz")
    assert set(tracks) == {"paths", "cpsd", "ntxent", "sequence"} and set(windows) == {*tracks, "track", "time"}
    names = [f"songs/song{i // 3}/{i % 3}.wav" for i in range(12)]
    assert tracks["paths"].tolist() == names == windows["paths"].tolist()
    assert (windows["track"] == np.arange(24) // 2).all() and windows["time"].tolist() == pytest.approx([0, 4.032] * 12)
    frames = [data.prepare_folders([excerpts]).track(i) for i in range(12)]
    rows = probe.extract(probe.load_checkpoint(checkpoint), frames, "cpu").rows
    for name in ("cpsd", "ntxent", "sequence"):
        expected = rows[name.replace("sequence", "sequence mean")].float()
        assert tracks[name].shape == (12, 24) and tracks[name].dtype == np.float32
        assert np.array_equal(windows[name], expected.numpy())
        same(torch.from_numpy(tracks[name]), expected.view(12, 2, 24).mean(dim=1))
    x = F.normalize(torch.from_numpy(tracks["ntxent"]), dim=1)
    itself, nearest = (x @ x.T).topk(2).indices.T
    assert itself.tolist() == list(range(12)) and (nearest // 3).tolist() == [i // 3 for i in range(12)]


def test_a_network_without_class_tokens_has_a_sequence_of_both_patch_sizes(excerpts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("m.pt", network(("ntxent",), pool="mean", patch="16x16,128x2"))
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", "m.pt")
    assert {name: x.shape for name, x in np.load("e.npz").items()} == {"paths": (12,), "sequence": (12, 48)}


# ---------------------------------------------------------------- attention and onsets


def test_attention_is_what_the_block_uses():
    """Weights times values, projected, are the block's own attention output."""
    block, x = network(heads=3).blocks[1], torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    weights, v = block.attention(x)
    assert weights.shape == (2, 3, 9, 9)
    same(weights.sum(dim=-1), torch.ones(2, 3, 9))
    after = x + block.out((weights @ v).transpose(1, 2).reshape(2, 9, 24))
    same(after + block.mlp(block.norm2(after)), block(x))


def test_attention_of_tracks_is_that_of_their_windows():
    net, tracks = network(("cpsd", "ntxent", "byol"), heads=3), [song(300), song(130, seed=1)]
    found = probe.class_attention(net, tracks, "cpu")
    assert found.shape == (3, 2, 3, 3, 126) and (found.sum(dim=-1) < 1).all() and found.sum(dim=-1).min() > 0.8
    for i, window in enumerate((tracks[0][:126], tracks[0][126:252], tracks[1][:126])):
        with torch.no_grad():
            inside = net(*probe.views_of(torch.from_numpy(window)[None], "cpu"), layers=[0, 1])[1]
            for layer, block in enumerate(net.blocks):                     # (heads, tokens, 126) of the class tokens
                same(found[i, layer], block.attention(inside[layer])[0][0, :, :3, 3:].transpose(0, 1))


def test_onsets_are_rises_of_the_mel():
    """Half the bands up by 80 dB, then down; the CQT does not count."""
    frames = np.zeros((260, data.COLUMNS), np.uint8)
    frames[:, :data.N_BINS] = song(260)[:, :data.N_BINS]
    frames[130:140, data.N_BINS:data.N_BINS + 64] = 255
    windows = probe.onset_windows([frames, frames[100:226]])
    assert windows.shape == (3, 126) and windows.count_nonzero() == 2
    assert windows[1, 4].item() == windows[2, 30].item() == pytest.approx(40)


def test_correlations():
    rng = np.random.default_rng(0)
    x, envelope = rng.normal(size=(2, 3, 126)), rng.random((2, 126))
    found = probe.correlations(torch.from_numpy(x), torch.from_numpy(envelope)[:, None])
    for w, i in np.ndindex(2, 3):
        assert found[w, i] == pytest.approx(np.corrcoef(x[w, i], envelope[w])[0, 1], abs=1e-9)
    assert not probe.correlations(torch.zeros(126), torch.rand(126)).any()                        # a silent window


def planted(monkeypatch, *layers):
    """Attention of one token in each layer, (windows, 126), in the place of the network's."""
    weights = torch.stack(layers, dim=1)[:, :, None, None].expand(-1, -1, 1, 2, -1)
    monkeypatch.setattr(probe, "class_attention", lambda net, tracks, device: weights)


def test_attention_that_follows_the_clicks_is_found(monkeypatch):
    """Clicks at odd times: r is high where attention lies on them, and small where it is noise."""
    rng = np.random.default_rng(0)
    wave, times = rng.normal(0, 1e-3, 260 * data.HOP), np.cumsum(rng.uniform(0.25, 0.8, 13))
    for time in times:
        wave[int(time * data.SAMPLE_RATE):][:320] += rng.normal(0, 0.3, 320)
    frames = data.audio_to_frames(torch.from_numpy(wave).float(), data.FrontEnd())
    at_clicks = torch.zeros(252)
    at_clicks[(times[times < 8] / probe.FRAME_SECONDS).round()] = 1
    planted(monkeypatch, at_clicks.view(2, 126), torch.from_numpy(rng.random((2, 126))).float())
    table = probe.attention_to_onsets(network(("ntxent",)), [frames], "cpu", "untrained ")
    for name, least, most in (("untrained sequence L1", 0.8, 1), ("untrained sequence L2", -0.25, 0.25)):
        assert least < table[name]["ntxent ~ onsets"]["mean"] < most


def test_similar_moments_are_those_that_come_back():
    a, b, c = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)) + 5               # four cells each
    matrix = probe.self_similarity(torch.cat([a, b, a, c, a[:9]]), 16)                           # 9 frames fill no cell
    same(matrix.diagonal(), torch.ones(16))
    same(matrix.diagonal(8)[:4], torch.ones(4))                                                   # a, eight cells later
    assert matrix[4:8, 12:].abs().max() < 0.95 and matrix.mean().abs() < 0.05


def test_principal_directions_by_eigenvectors():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 1, 4, 1, 1])
    places, shares = probe.principal(x)
    value, vector = np.linalg.eigh(np.cov(x.T.numpy()))
    for axis in (0, 1):
        along = (x - x.mean(dim=0)).numpy() @ vector[:, -1 - axis]
        np.testing.assert_allclose(abs(places[:, axis]), abs(along), atol=1e-3)
        assert shares[axis] == pytest.approx(value[-1 - axis] / value.sum(), rel=1e-3)


# ---------------------------------------------------------------- show and map, with figures and without


@pytest.fixture
def plain(monkeypatch):
    """matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def pyplot(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    return pytest.importorskip("matplotlib.pyplot", reason="figures need matplotlib, which is an extra")


def coloured(plt, path):
    return (np.ptp(plt.imread(path)[..., :3], axis=2) > 0.1).mean()        # share of the pixels: axes and text are grey


def test_show_in_words(song_folder, checkpoint, monkeypatch, capsys, plain):
    command(monkeypatch, "show", song_folder / "more/eight.wav", "--checkpoint", checkpoint)
    *lines, last = capsys.readouterr().out.splitlines()
    found = dict(line.split(": correlation of its attention with onsets, by layer: ") for line in lines)
    assert "pip install matplotlib" in last
    assert list(found) == ["cpsd", "ntxent"] and all(-1 < float(r) < 1 for r in found.values())   # one layer
    assert not list(checkpoint.parent.glob("**/*.png"))



def test_show_in_figures(song_folder, tmp_path, monkeypatch, pyplot):
    """A network without a key token has no panel of keys."""
    monkeypatch.chdir(tmp_path)
    save("m.pt", network())
    command(monkeypatch, "show", song_folder / "one.wav", "--checkpoint", "m.pt")
    shares = {path.stem: coloured(pyplot, path) for path in (tmp_path / "one-figures").iterdir()}
    assert sorted(shares) == ["closeup", "song"] and min(shares.values()) > 0.2
    found = []
    monkeypatch.setattr(probe, "draw_panels", lambda plt, path, panels, *_: found.append((str(path), [p[0] for p in panels])))
    save("m.pt", network(("ntxent",), depth=1))
    command(monkeypatch, "show", song_folder / "one.wav", "--out", "x/y", "--checkpoint", "m.pt")
    (closeup, near), (whole, far) = found
    assert (closeup, whole) == ("x/y/closeup.png", "x/y/song.png")
    assert [title.split(",")[0] for title in near] == ["CQT", "mel spectrogram", "attention of the ntxent token"]
    assert [title.split(",")[0] for title in far] == ["self-similarity of raw", "self-similarity of sequence"]


@pytest.mark.parametrize("keys, outputs", [([0, 7, 2], 12), ([12 + 9, 7, 12 + 11], 24)])
def test_keys_are_drawn_by_fifths(keys, outputs, checkpoint, monkeypatch, pyplot):
    """Of 24 keys, relatives count as one signature."""
    found = []
    sf.write("noise.wav", 0.1 * np.random.default_rng(0).normal(size=13 * 16000), 16000)
    monkeypatch.setattr(probe, "key_probabilities", lambda *_: F.one_hot(torch.tensor(keys), outputs).float())
    monkeypatch.setattr(probe, "draw_panels", lambda plt, path, panels, begin, end: found.append(panels))
    command(monkeypatch, "show", "noise.wav", "--checkpoint", checkpoint)
    title, image, names = found[1][0]
    assert title.startswith("key signature") and [names[row] for row in image.argmax(axis=0)] == ["C/a", "G/e", "D/b"]


def test_names_of_signatures_follow_the_circle():
    for name, tonic in zip(FIFTH_NAMES, probe.FIFTHS, strict=True):
        major, minor = name.split("/")
        assert probe.parse_key(major) == tonic and probe.SIGNATURES[probe.parse_key(f"{minor} minor")] == tonic


@pytest.mark.parametrize("pool, words, message", [
    ("token", "show short.wav", "shorter than one window"), ("token", "show lost.wav", "lost.wav"),
    ("token", "show .", "cannot be decoded"), ("token", "key torn.wav", "none of 1 files"),
    ("token", "map --keys keys.csv", "--data"), ("token", "emergence --data lost", "lost: no such file"),
    ("mean", "show short.wav", "--patch 16x16 --pool mean"), ("mean", "emergence", "--patch 16x16 --pool mean")])
def test_what_cannot_be_done_is_refused_in_one_line(pool, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sf.write("short.wav", 0.1 * np.random.default_rng(0).normal(size=32000), 16000)
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    save("m.pt", network() if pool == "token" else network(("ntxent",), patch="16x16", pool=pool))
    with pytest.raises(SystemExit) as end:
        data.run_cli(lambda: command(monkeypatch, *words.split(), "--checkpoint", "m.pt"))
    error, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and error.startswith("error: ") and message in error


@pytest.fixture
def maps(monkeypatch):
    """The rows of panels of every map: [({name: (tracks, dim)}, labels, by)]. Needs no matplotlib."""
    found = []
    monkeypatch.setattr(probe, "pyplot", lambda: True)
    monkeypatch.setattr(probe, "draw_map", lambda plt, path, rows: found.extend(rows))
    return found


def test_a_map_shows_the_embeddings_by_folder_or_key(excerpts, checkpoint, monkeypatch, maps):
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", checkpoint)
    (checkpoint.parent / "keys.csv").write_text("file,key\nsong0/1.wav,A minor\nsong3/2.wav,F# major\nsong1/0.wav,X\n")
    for words in ([], ["--keys", "keys.csv"]):
        command(monkeypatch, "map", "--data", excerpts, *words, "--checkpoint", checkpoint)
    folders, keys = [f"song{i // 3}" for i in range(12)], ["?", "C/a", *["?"] * 9, "Gb/eb"]
    assert [row[1:] for row in maps] == [(folders, "folder")] * 2 + [(keys, "key")] * 2
    assert list(maps[0][0]) == ["cpsd", "ntxent"] and list(maps[1][0]) == ["untrained cpsd", "untrained ntxent"]
    assert np.array_equal(maps[0][0]["ntxent"], np.load("e.npz")["ntxent"])
    assert not torch.equal(maps[0][0]["cpsd"], maps[1][0]["untrained cpsd"])


def test_a_map_needs_three_tracks(excerpts, checkpoint, monkeypatch, maps):
    few = checkpoint.parent / "few"
    few.mkdir()
    for name in ("0.wav", "1.wav", "2.wav"):
        with pytest.raises(data.InputError, match="no audio file" if name == "0.wav" else "at least three"):
            command(monkeypatch, "map", "--data", "few", "--checkpoint", checkpoint)
        (few / name).write_bytes((excerpts / "song0" / name).read_bytes())
    command(monkeypatch, "map", "--data", "few", "--checkpoint", checkpoint)
    assert maps[0][1] == ["."] * 3                                         # no sub-folders


def test_the_map_of_the_embedded_songs_has_keys_and_instruments(checkpoint, synth, monkeypatch, maps):
    command(monkeypatch, "map", "--checkpoint", checkpoint)
    songs = [data.compose(i) for i in range(6, 9)]
    assert maps[0][1:] == ([FIFTH_NAMES[probe.FIFTHS.index(s["signature"])] for s in songs], "key")
    assert maps[1][1:] == ([probe.TIMBRES[s["instrument"]] for s in songs], "instrument")


def test_a_map_in_a_figure(tmp_path, monkeypatch, pyplot):
    generator, rows, found, save = torch.Generator().manual_seed(0), [], [], probe.save_figure
    for labels, by in ((["G/e", "C/a", "?", "G/e"], "key"), (["pop", "jazz", "pop", "pop"], "folder")):
        rows.append(({name: torch.randn(4, 6, generator=generator) for name in ("cpsd", "ntxent")}, labels, by))
    monkeypatch.setattr(probe, "save_figure", lambda plt, figure, path: found.append(figure.axes) or save(plt, figure, path))
    probe.draw_map(pyplot, tmp_path / "deep" / "map.png", rows)
    panels, = found
    assert [len(axes.collections) for axes in panels] == [3, 3, 2, 2]      # a colour for each label
    assert [text.get_text() for text in panels[1].get_legend().get_texts()] == ["C/a", "G/e", "?"]
    points = np.concatenate([part.get_offsets() for part in panels[3].collections])
    np.testing.assert_allclose(points, probe.principal(rows[1][0]["ntxent"])[0][[1, 0, 2, 3]], atol=1e-6)  # jazz first
    assert coloured(pyplot, tmp_path / "deep" / "map.png") > 1e-4


# ---------------------------------------------------------------- emergence


@pytest.fixture
def quick(monkeypatch, synth):
    """Few songs, short fits and few draws."""
    fit, short = probe.fit, dict(batch=256, lr=0.1, steps=12)
    monkeypatch.setattr(probe, "interval", partial(probe.interval, draws=20))
    monkeypatch.setattr(probe, "fit", lambda *args, **options: fit(*args, **options | short))
    monkeypatch.setattr(probe, "EMERGENCE_SONGS", dict(train=3, valid=1, test=2))


def test_emergence_of_the_embedded_songs(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    save("m.pt", network(("cpsd", "ntxent")))
    command(monkeypatch, "emergence", "--checkpoint", "m.pt")
    title, rows = json.loads((tmp_path / "probe-emergence.json").read_text()).values()
    local = {"chords overlap", "chords overlap (pooled)", "beats F", "beats F (pooled)"}
    attention = {"cpsd ~ onsets", "ntxent ~ onsets"}
    assert "on 6 songs" in title and set(rows["raw"]) == set(rows["chance"]) == local
    assert set(rows["sequence L0"]) == set(rows["untrained sequence"]) == local
    assert set(rows["sequence L1"]) == set(rows["sequence L2"]) == local | attention
    assert set(rows["untrained sequence L1"]) == set(rows["untrained sequence L2"]) == attention
    assert rows["chance"]["chords overlap"]["mean"] < rows["raw"]["chords overlap"]["mean"]


def test_labels_of_the_embedded_songs_are_their_scores(quick):
    songs, tracks = probe.synth_tracks(**probe.EMERGENCE_SONGS)
    assert [t.group for t in tracks] == ["0", "1", "2", "4", "6", "7"]
    assert [t.split for t in tracks] == ["train", "train", "train", "valid", "test", "test"]
    score, items, moment = data.compose(7), frame_items([len(songs[5])], {}), 100 * probe.FRAME_SECONDS
    chords = probe.Chords([tracks[5].labels["chords"]], items).y           # (frames,)
    assert len(chords) == 751 and chords[100] == next(c for start, end, c in score["chords"] if start <= moment < end)
    beats = probe.Beats([tracks[5].labels["beats"]], items).y[:, 0]
    assert beats[round(score["beats"][3] / probe.FRAME_SECONDS)] == 1


def test_emergence_of_a_folder(song_folder, tmp_path, monkeypatch, capsys, quick):
    """Without labels onsets alone; else the labels that there are, here chords without beats for one song."""
    monkeypatch.chdir(tmp_path)
    save("m.pt", network(("ntxent",), depth=1))
    command(monkeypatch, "emergence", "--data", song_folder, "--checkpoint", "m.pt")
    assert "onsets alone" in capsys.readouterr().out
    rows = json.loads((tmp_path / "probe-emergence-music.json").read_text())["rows"]
    attention = {"ntxent ~ onsets"}
    assert set(rows) == {"sequence L1", "untrained sequence L1"} and set(rows["sequence L1"]) == attention
    for path in song_folder.rglob("*.*"):
        own = tmp_path / "own" / path.name
        own.parent.mkdir(exist_ok=True)
        own.write_bytes(path.read_bytes())
        own.with_suffix(".lab").write_text("0 5 C\n5 9 A:min\n")
        if path.name != "one.wav":
            own.with_suffix(".beats").write_text("\n".join(f"{0.5 * i}" for i in range(18)))
    command(monkeypatch, "emergence", "--data", "own", "--checkpoint", "m.pt")
    rows = json.loads((tmp_path / "probe-emergence-own.json").read_text())["rows"]
    assert {"chords overlap", "beats F"} | attention <= set(rows["sequence L1"])
