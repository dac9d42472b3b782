"""Looking inside: embeddings of folders, attention, figures, maps, and what emerges."""
import csv
import json
import sys

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import data
import model
import probe
from test_probe import checkpoint, command, network, same, single_precision, song  # noqa: F401  (fixtures among them)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def excerpts(tmp_path_factory):
    """Three excerpts of 9 s of each of four songs, in a folder a song, beside a file that is no audio."""
    folder = tmp_path_factory.mktemp("excerpts") / "songs"
    for i in range(4):
        (folder / f"song{i}").mkdir(parents=True)
        wave = data.render(data.compose(i))
        for part in range(3):
            sf.write(folder / f"song{i}" / f"{part}.wav", wave[part * 48000:][:9 * data.SAMPLE_RATE], data.SAMPLE_RATE)
    (folder / "song0" / "torn.wav").write_bytes(b"RIFF")
    return folder


# ---------------------------------------------------------------- embed


def test_embeddings_are_the_means_of_the_windows(excerpts, checkpoint, tmp_path, monkeypatch, capsys):  # noqa: F811
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", checkpoint)
    assert "of 12 tracks; 1 files skipped" in capsys.readouterr().out
    command(monkeypatch, "embed", excerpts, "--out", "deep/w.npz", "--windows", "--checkpoint", checkpoint)
    tracks, windows = arrays("e.npz"), arrays("deep/w.npz")
    assert list(tracks) == ["paths", "cpsd", "ntxent", "sequence"] and list(windows) == ["paths", "track", "time", "cpsd", "ntxent", "sequence"]
    assert tracks["paths"].tolist() == [f"songs/song{i}/{part}.wav" for i in range(4) for part in range(3)] == windows["paths"].tolist()
    store = data.prepare_folders([excerpts])
    found = probe.extract(model.load_checkpoint(checkpoint), [store.track(i) for i in range(12)], "cpu")
    assert windows["track"].tolist() == [i for i in range(12) for _ in range(2)] and windows["time"].tolist() == pytest.approx([0, 4.032] * 12)
    for name, said in (("cpsd", found["tokens"][:, 0, 0]), ("ntxent", found["tokens"][:, 0, 1]), ("sequence", found["sequence"][:, 0])):
        assert tracks[name].shape == (12, 24) and tracks[name].dtype == np.float32
        assert np.array_equal(windows[name], said.float().numpy())
        same(torch.from_numpy(tracks[name]), said.float().view(12, 2, 24).mean(dim=1))


def test_a_killed_run_goes_on_at_its_block(excerpts, checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr(probe, "BLOCK", 5)
    done, real = [], probe.extract

    def dies_in_the_third_block(net, tracks, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(tracks))
        return real(net, tracks, *rest)

    monkeypatch.setattr(probe, "extract", dies_in_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", checkpoint)
    assert done == [5, 5]
    rest = []
    monkeypatch.setattr(probe, "extract", lambda net, tracks, *more: rest.append(len(tracks)) or real(net, tracks, *more))
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", checkpoint)
    assert rest == [2]
    store = data.prepare_folders([excerpts])
    whole = real(model.load_checkpoint(checkpoint), [store.track(i) for i in range(12)], "cpu")
    same(torch.from_numpy(arrays("e.npz")["cpsd"]), whole["tokens"][:, 0, 0].float().view(12, 2, 24).mean(dim=1), 2e-3)


def test_a_network_without_class_tokens_has_a_sequence(excerpts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = network(("ntxent",), pool="mean", patch="16x16,128x2")
    torch.save(dict(config=net.config, model=net.state_dict()), "m.pt")
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", "m.pt")
    assert {name: x.shape for name, x in arrays("e.npz").items()} == {"paths": (12,), "sequence": (12, 48)}  # two patch sizes side by side


def test_nearest_neighbour_is_another_excerpt_of_the_song(excerpts, checkpoint, monkeypatch):  # noqa: F811
    """The snippet of the README."""
    command(monkeypatch, "embed", excerpts, "--out", "embeddings.npz", "--checkpoint", checkpoint)
    file = np.load("embeddings.npz")
    x = file["ntxent"] / np.linalg.norm(file["ntxent"], axis=1, keepdims=True)
    nearest = np.argsort(-(x @ x.T), axis=1)                                                           # itself first
    song_of = np.array([path.split("/")[1] for path in file["paths"]])
    assert (nearest[:, 0] == np.arange(12)).all() and (song_of[nearest[:, 1]] == song_of).all()


# ---------------------------------------------------------------- attention and onsets


def test_attention_is_what_the_block_uses():
    """Weights times values, projected, are the block's own attention output."""
    block, x = network(heads=3).blocks[1], torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    weights = block.attention(x)
    assert weights.shape == (2, 3, 9, 9)
    same(weights.sum(dim=-1), torch.ones(2, 3, 9))
    after = x + block.out((weights @ block.project(x)[2]).transpose(1, 2).reshape(2, 9, 24))
    same(after + block.mlp(block.norm2(after)), block(x))


def test_attention_of_tracks_is_that_of_their_windows():
    net, tracks = network(("cpsd", "ntxent", "byol"), heads=3), [song(300), song(130, seed=1)]
    found = probe.class_attention(net, tracks, "cpu")
    assert found.shape == (3, 2, 3, 3, 126) and (found.sum(dim=-1) < 1).all() and found.sum(dim=-1).min() > 0.8
    for i, window in enumerate((tracks[0][:126], tracks[0][126:252], tracks[1][:126])):
        cqt, mel = probe.views_of(torch.from_numpy(window)[None], "cpu")
        with torch.no_grad():
            x = net(cqt, mel, layers=[0])[1][0]
            q, k = (net.blocks[0].qkv(net.blocks[0].norm1(x))[0].view(129, 3, 3, 8)[:, j] for j in (0, 1))  # (tokens, heads, 8)
            for t in range(3):
                for h in range(3):
                    same(found[i, 0, t, h], (k[:, h] @ q[t, h] / 8 ** 0.5).softmax(dim=0)[3:])


def test_onsets_are_rises_of_the_mel():
    frames = np.zeros((260, data.COLUMNS), np.uint8)
    frames[:, :data.N_BINS] = song(260)[:, :data.N_BINS]                                                # the CQT does not count
    frames[130:140, data.N_BINS:data.N_BINS + 64] = 255                                                 # half the bands, up by 80 dB, then down
    envelope = probe.onset_envelope(frames)
    assert envelope.shape == (260,) and envelope[130].item() == pytest.approx(40) and envelope.count_nonzero() == 1
    windows = probe.onset_windows([frames, frames[100:226]])
    assert windows.shape == (3, 126) and windows.argmax(dim=1).tolist() == [0, 4, 30]


def test_correlations_of_all_shifts():
    rng = np.random.default_rng(0)
    x, envelope = rng.normal(size=(2, 3, 126)), rng.random((2, 126))
    found = probe.correlations(torch.from_numpy(x), torch.from_numpy(envelope)[:, None])
    for w in range(2):
        for i in range(3):
            slow = [np.corrcoef(x[w, i], np.roll(envelope[w], shift))[0, 1] for shift in range(126)]
            np.testing.assert_allclose(found[w, i], slow, atol=1e-9)
    assert not probe.correlations(torch.zeros(126), torch.rand(126)).any()                              # a silent window knows nothing


def test_chance_never_draws_the_true_place():
    r = torch.zeros(50, 2, 126)
    r[..., 0], r[:, 1, 1:] = 1, 0.25
    assert torch.equal(probe.shift_chance(r), torch.tensor([0, 0.25]).expand(100, 2))
    noise = torch.randn(400, 126, generator=torch.Generator().manual_seed(0))
    assert probe.shift_chance(noise).std().item() == pytest.approx(400 ** -0.5, rel=0.3)                # each window has a shift of its own


def test_key_course_is_the_key_of_each_window():
    net, track = network(("skey",), dim=48), song(380)
    course, windows = probe.key_course(net, track, "cpu"), [track[:126], track[126:252], track[252:378]]
    keys = probe.key_probabilities(net, windows, "cpu")                                                 # (3, 24), minor keys by their tonics
    same(course, torch.stack([keys[:, q] + keys[:, 12 + (q + 9) % 12] for q in range(12)], dim=1))


def test_similar_moments_are_those_that_come_back():
    a, b, c = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)) + 5                     # 64 frames: four cells
    matrix = probe.self_similarity(torch.cat([a, b, a, c, a[:9]]), 16)                                      # the last 9 frames fill no cell
    assert matrix.shape == (16, 16)
    same(matrix, matrix.T)
    same(matrix.diagonal(), torch.ones(16))
    same(matrix.diagonal(8)[:4], torch.ones(4))                                                         # a comes back after eight cells
    assert matrix[4:8, 12:].abs().max() < 0.95 and matrix.mean().abs() < 0.05


def test_principal_directions_by_eigenvectors():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 1, 4, 1, 1])
    places, shares = probe.principal(x)
    value, vector = np.linalg.eigh(np.cov(x.T.numpy()))
    for axis in (0, 1):
        direction = vector[:, -1 - axis] * np.sign(vector[np.abs(vector[:, -1 - axis]).argmax(), -1 - axis])
        np.testing.assert_allclose(places[:, axis], (x - x.mean(dim=0)).numpy() @ direction, atol=1e-3)
        assert shares[axis] == pytest.approx(value[-1 - axis] / value.sum(), rel=1e-3)
    order = torch.randperm(30)
    same(probe.principal(x[order])[0], places[order], 1e-3)


# ---------------------------------------------------------------- commands, with figures and without


@pytest.fixture
def plain(monkeypatch):
    """matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def drawing(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which is an extra")


def save(path, net):
    torch.save(dict(config=net.config, model=net.state_dict()), path)


def test_show_in_words(song_folder, checkpoint, monkeypatch, capsys, plain):  # noqa: F811
    command(monkeypatch, "show", song_folder / "more/eight.wav", "--checkpoint", checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert "pip install matplotlib" in lines[0] and "0:00" in lines[1] and " major / " in lines[1]
    assert [line.split(" is most tied")[0] for line in lines if "is most tied to onsets in layer 1" in line] == ["cpsd", "ntxent"]
    assert [line.split(":")[0] for line in lines if "most like itself" in line] == ["spectrogram", "layer 1 of 1"]
    assert not list(checkpoint.parent.glob("**/*.png"))


def test_show_in_figures(song_folder, tmp_path, monkeypatch, drawing):
    monkeypatch.chdir(tmp_path)
    save("m.pt", network(("cpsd", "ntxent"), depth=3))
    command(monkeypatch, "show", song_folder / "one.wav", "--checkpoint", "m.pt")
    assert {p.name for p in (tmp_path / "one-figures").iterdir()} == {"frontend.png", "key.png", "attention.png", "similarity.png"}
    save("n.pt", network(("ntxent",)))                                                                  # no key token, no figure of keys
    command(monkeypatch, "show", song_folder / "one.wav", "--out", "x/y", "--checkpoint", "n.pt")
    assert {p.name for p in (tmp_path / "x/y").iterdir()} == {"frontend.png", "attention.png", "similarity.png"}


def test_what_cannot_be_shown_is_refused(song_folder, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    sf.write("short.wav", 0.1 * np.random.default_rng(0).normal(size=32000), 16000)
    for name, message in (("short.wav", "shorter than one window"), ("lost.wav", "lost.wav"), (song_folder, "cannot be decoded")):
        with pytest.raises(data.InputError, match=message):
            command(monkeypatch, "show", name, "--checkpoint", checkpoint)
    save("m.pt", network(("ntxent",), patch="16x16", pool="mean"))
    for words in (("show", song_folder / "one.wav"), ("emergence",)):
        with pytest.raises(data.InputError, match="--patch 16x16 --pool mean"):
            command(monkeypatch, *words, "--checkpoint", "m.pt")


def table_of(text):
    """Rows of the CSV that map prints."""
    lines = text.splitlines()
    return list(csv.DictReader(lines[next(i for i, line in enumerate(lines) if line.startswith("path,")):]))


def test_map_in_numbers(excerpts, checkpoint, monkeypatch, capsys, plain):  # noqa: F811
    command(monkeypatch, "map", "--data", excerpts, "--checkpoint", checkpoint)
    rows = table_of(capsys.readouterr().out)
    assert [row["folder"] for row in rows] == [f"song{i}" for i in range(4) for _ in range(3)]
    command(monkeypatch, "embed", excerpts, "--out", "e.npz", "--checkpoint", checkpoint)
    places = probe.principal(torch.from_numpy(arrays("e.npz")["ntxent"]))[0]
    same(torch.tensor([[float(row["ntxent 1"]), float(row["ntxent 2"])] for row in rows]), places, 2e-3)
    assert {"cpsd 1", "untrained cpsd 2", "untrained ntxent 1"} < set(rows[0]) and "sequence 1" not in rows[0]
    capsys.readouterr()
    (checkpoint.parent / "keys.csv").write_text("file,key\nsong0/1.wav,A minor\nsong3/2.wav,F# major\nsong1/0.wav,X\n")
    command(monkeypatch, "map", "--data", excerpts, "--keys", "keys.csv", "--checkpoint", checkpoint)
    labels = {row["path"]: row["key"] for row in table_of(capsys.readouterr().out)}
    assert labels.pop("songs/song0/1.wav") == "C/a" and labels.pop("songs/song3/2.wav") == "Gb/eb" and set(labels.values()) == {"?"}
    for name in ("0.wav", "1.wav"):
        with pytest.raises(data.InputError, match="give at least three|no audio file"):
            (checkpoint.parent / "few").mkdir(exist_ok=True)
            command(monkeypatch, "map", "--data", "few", "--checkpoint", checkpoint)
        (checkpoint.parent / "few" / name).write_bytes((excerpts / "song0" / name).read_bytes())


def test_map_of_the_embedded_songs_has_keys_of_its_own(checkpoint, monkeypatch):  # noqa: F811
    with pytest.raises(data.InputError, match="--keys.*--data"):
        command(monkeypatch, "map", "--keys", "keys.csv", "--checkpoint", checkpoint)


def test_map_of_the_embedded_songs(checkpoint, monkeypatch, capsys, plain):  # noqa: F811
    monkeypatch.setattr(probe, "SYNTH_SPLITS", {"test": range(2, 6)})
    monkeypatch.setattr(probe, "prepare_synth", lambda: data.prepare_synth(6, checkpoint.parent / "synth"))
    command(monkeypatch, "map", "--checkpoint", checkpoint)
    rows = table_of(capsys.readouterr().out)
    assert [row["path"] for row in rows] == [f"synth/{i:05d}" for i in range(2, 6)]
    assert [probe.FIFTHS[probe.FIFTH_NAMES.index(row["key"])] for row in rows] == [data.compose(i)["signature"] for i in range(2, 6)]


def test_map_in_a_figure(excerpts, checkpoint, monkeypatch, drawing):  # noqa: F811
    (checkpoint.parent / "keys.csv").write_text("file,key\nsong0/1.wav,A minor\n")
    for out, words in (("map.png", ()), ("deep/keys.png", ("--keys", "keys.csv", "--out", "deep/keys.png"))):
        command(monkeypatch, "map", "--data", excerpts, *words, "--checkpoint", checkpoint)
        assert (checkpoint.parent / out).read_bytes().startswith(b"\x89PNG")


def test_names_of_signatures_follow_the_circle():
    for name, tonic in zip(probe.FIFTH_NAMES, probe.FIFTHS, strict=True):
        major, minor = name.split("/")
        assert probe.parse_key(major) == tonic and probe.SIGNATURES[probe.parse_key(f"{minor} minor")] == tonic


# ---------------------------------------------------------------- emergence


@pytest.fixture
def quick(monkeypatch):
    """Few songs and short fits."""
    monkeypatch.setattr(probe, "FRAMES", dict(batch=256, every=4, patience=2))
    monkeypatch.setattr(probe, "EMERGENCE_SONGS", dict(train=4, valid=2, test=3))
    monkeypatch.setattr(probe, "SYNTH_SPLITS", {"train": range(0, 5), "valid": range(5, 8), "test": range(8, 12)})
    real = data.prepare_synth
    monkeypatch.setattr(probe, "prepare_synth", lambda: real(songs=12))


def test_emergence_of_the_embedded_songs(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    save("m.pt", network(("cpsd", "ntxent")))
    tables = []
    for _ in range(2):
        command(monkeypatch, "emergence", "--checkpoint", "m.pt")
        tables.append((tmp_path / "probe-emergence.json").read_text())
    assert tables[0] == tables[1]
    rows = json.loads(tables[0])["rows"]
    assert list(rows) == ["layer 0", "layer 1", "layer 2", "untrained layer 1", "untrained layer 2", "raw"]
    local, attention = ["chords overlap", "beats F"], ["cpsd ~ onsets", "cpsd, shifted", "ntxent ~ onsets", "ntxent, shifted"]
    assert {name: list(row) for name, row in rows.items()} == {"layer 0": local, "layer 1": local + attention, "layer 2": local + attention,
                                                              "untrained layer 1": attention, "untrained layer 2": local + attention, "raw": local}
    out = capsys.readouterr().out
    assert "9 songs" in out and "chords overlap: strongest at layer" in out and "cpsd: the single head most tied to onsets is head" in out


def test_labels_of_the_embedded_songs_are_their_scores(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    store, numbers, tracks = probe.synth_tracks(**probe.EMERGENCE_SONGS)
    assert numbers.tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10] and [t.split for t in tracks] == ["train"] * 4 + ["valid"] * 2 + ["test"] * 3
    score = data.compose(8)
    chords = probe.frame_labels("chords", tracks[6].labels["chords"], store.lengths[8])
    assert len(chords) == 751 and chords[100] == next(c for start, end, c in score["chords"] if start <= 100 * probe.FRAME_SECONDS < end)
    assert probe.frame_labels("beats", tracks[6].labels["beats"], 751)[round(score["beats"][3] / probe.FRAME_SECONDS)] == 1


def test_emergence_finds_attention_that_follows_onsets(tmp_path, monkeypatch, quick):
    """One head of layer 2 looks exactly where the mel rises: r = 1 for it, and chance stays at zero."""
    monkeypatch.chdir(tmp_path)
    real = probe.class_attention

    def planted(net, tracks, device):
        weights = real(net, tracks, device).clone()
        weights[:, 1, 0, 1] = probe.onset_windows(tracks)
        return weights

    monkeypatch.setattr(probe, "class_attention", planted)
    store, numbers, tracks = probe.synth_tracks(**probe.EMERGENCE_SONGS)
    rows, _, remarks = probe.emergence(network(("cpsd", "ntxent")), store, numbers, tracks, "cpu")
    cell, chance = rows["layer 2"]["cpsd ~ onsets"], rows["layer 2"]["cpsd, shifted"]
    assert cell["mean"] > 0.95 and abs(rows["layer 1"]["cpsd ~ onsets"]["mean"]) < 0.5
    assert chance["interval"][0] < chance["mean"] < chance["interval"][1] < 0.3
    assert "cpsd: the single head most tied to onsets is head 2 of layer 2, r = 1.00" in remarks


def test_emergence_of_a_folder(song_folder, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    save("m.pt", network(("ntxent",), depth=1))
    with pytest.raises(data.InputError, match="lost: no such file or folder"):
        command(monkeypatch, "emergence", "--data", "lost", "--checkpoint", "m.pt")
    command(monkeypatch, "emergence", "--data", song_folder, "--checkpoint", "m.pt")                   # no labels: onsets alone
    assert "onsets alone" in capsys.readouterr().out
    rows = json.loads((tmp_path / "probe-emergence-music.json").read_text())["rows"]
    assert rows["layer 0"] == {} and set(rows["layer 1"]) == set(rows["untrained layer 1"]) == {"ntxent ~ onsets", "ntxent, shifted"}
    for path in song_folder.rglob("*.*"):
        own = tmp_path / "own" / path.name
        own.parent.mkdir(exist_ok=True)
        own.write_bytes(path.read_bytes())
        own.with_suffix(".lab").write_text("0 5 C\n5 9 A:min\n")
        if path.name != "one.wav":                                                                      # this one has chords alone
            own.with_suffix(".beats").write_text("\n".join(f"{0.5 * i}" for i in range(18)))
    command(monkeypatch, "emergence", "--data", "own", "--checkpoint", "m.pt")
    assert "8 of 8 songs" in capsys.readouterr().out
    rows = json.loads((tmp_path / "probe-emergence-own.json").read_text())["rows"]
    assert set(rows["layer 1"]) == {"chords overlap", "beats F", "ntxent ~ onsets", "ntxent, shifted"} and 0 <= rows["raw"]["beats F"]["mean"] <= 1
