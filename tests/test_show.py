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
