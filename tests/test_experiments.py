"""The scripts behind README's tables."""
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablations
import curves
import data
import duplicates
import emergence
import keys
import labels
import losses
import model
import probe
import publish
import real
import reconstruction
import train


def frames_and_crops():
    frames = torch.randint(0, 256, (3, 5, 31, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[:, :, :3] = 0
    return frames, torch.tensor([[3] * 5, [3] * 5, [9] * 5])


def saved_network(**more):
    network = model.MT2(dim=24, depth=1, heads=2)
    torch.save(dict(config=network.config, model=network.state_dict(), **more), "checkpoint.pt")
    return network


@pytest.fixture
def untouched(monkeypatch):
    """What an ablation patches is as before after the test."""
    monkeypatch.setattr(data, "training_views", data.training_views)
    for name in ("__init__", "log_keys"):
        monkeypatch.setattr(losses.SKey, name, getattr(losses.SKey, name))
    for name in ("MODE", "BALANCE"):
        monkeypatch.setattr(losses.SKey, name, getattr(losses.SKey, name))
    monkeypatch.setattr(losses, "TRANSPOSED_PAIRS", [*losses.TRANSPOSED_PAIRS])
    monkeypatch.setattr(data, "PIECE", data.PIECE)
    monkeypatch.setitem(train.PRESETS, "small", dict(train.PRESETS["small"]))
    for name, task in losses.PRETEXT.items():
        monkeypatch.setitem(losses.PRETEXT, name, task)


def test_jitter_moves_each_view_alike_at_all_times_and_leaves_silence(untouched):
    frames, crops = frames_and_crops()
    frames[:, :, 3:] = 128                                                 # no clipping
    plain = data.training_views(frames, crops)
    ablations.CHANGES["jitter"]()
    cqt, mel = data.training_views(frames, crops)
    assert (cqt[:, :, :3] == 0).all() and (mel[2] == 0).all()
    change = (cqt - plain[0])[:, :, 3:]                                    # (views, batch, frames, 84)
    assert torch.equal(change, change[:, :, :1].expand_as(change)) and change.abs().max() > 0.05
    assert (change[0, 0, 0] - change[1, 0, 0]).abs().max() > 0.01          # views of one piece differ
    assert all(map(torch.equal, (cqt, mel), data.training_views(frames, crops)))


def test_mixing_adds_a_neighbour_in_the_background(untouched):
    frames, crops = frames_and_crops()
    plain = data.training_views(frames, crops)[0]
    ablations.CHANGES["mixing"]()
    cqt = data.training_views(frames, crops)[0]
    assert (cqt >= plain - 1e-6).all() and (cqt <= torch.maximum(plain, plain.roll(1, dims=1) - 6 / 80 + 1e-6)).all()
    mixed = (cqt != plain).flatten(2).any(dim=2)                           # (views, batch)
    assert mixed.any() and not mixed.all() and torch.equal(mixed[0], mixed[1])


def key_terms(name, token, shifts):
    """The CPSD term of a new task of this name."""
    torch.manual_seed(0)
    task = losses.PRETEXT[name](8)
    return task.key_loss(task.log_keys(token), dict(shifts=shifts))[1]["cpsd_term"].item(), task


def test_omega7_and_three_term_change_the_key_loss_as_they_say(untouched):
    token, shifts = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)), -frames_and_crops()[1][:, :4]
    fifths = lambda task, pairs: losses.cpsd(losses.sum_relatives(task.log_keys(token)), shifts, 7, pairs).item()
    both, _ = key_terms("skey", token, shifts)
    ablations.CHANGES["omega7"]()
    one, task = key_terms("skey", token, shifts)
    assert one == pytest.approx(fifths(task, [(0, 2), (1, 2)])) and one != pytest.approx(both)
    ablations.CHANGES["three-term"]()
    assert key_terms("skey", token, shifts)[0] == pytest.approx(fifths(task, None))


def test_batch_norm_takes_the_offset_and_scale_of_each_key_away(untouched):
    """In training by the batch, views and items together; afterwards by running statistics, which are saved."""
    ablations.CHANGES["batch-norm"]()
    torch.manual_seed(0)
    task, token = losses.PRETEXT["skey"](8), torch.randn(3, 50, 8)
    plain = task.log_keys(token)
    with torch.no_grad():
        task.head.weight.mul_(7)
        task.head.bias.add_(torch.randn(24))
    assert len(list(task.parameters())) == 2 and "norm.running_mean" in task.state_dict()
    torch.testing.assert_close(task.log_keys(token), plain, rtol=1e-3, atol=1e-3)
    for _ in range(100):
        task.log_keys(token)
    torch.testing.assert_close(task.eval().log_keys(token[0]), plain[0], rtol=1e-2, atol=2e-2)


def test_a_run_watched_in_stages_is_the_run_left_alone(store, tmp_path, monkeypatch):
    row, names = dict.fromkeys(probe.SYNTH_COLUMNS, dict(mean=0.5)), ["skey", "skey zero-shot", "ntxent", "sequence"]
    monkeypatch.setattr(probe, "synth_table", lambda *_: dict.fromkeys(names, row))
    monkeypatch.setattr(probe, "pyplot", lambda: None)
    flags = f"--tokens skey,ntxent --preset small --device cpu --data {store} --batch-size 4 --steps 4 --log-every 1 --out"
    monkeypatch.setattr(sys, "argv", f"curves.py --held {store} --at 2,4 {flags} watched".split())
    curves.main()
    train.main(f"{flags} alone --no-probe".split())
    watched, alone = (model.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("watched", "alone"))
    assert all(torch.equal(watched["model"][name], alone["model"][name]) for name in alone["model"])
    found = json.loads((tmp_path / "watched" / "curves.json").read_text())
    assert [stage["step"] for stage in found["stages"]] == [2, 4] and [s["step"] for s in found["log"]] == [1, 2, 3, 4]
    assert all(s["held_out"].keys() == {"skey", "ntxent"} and len(s["probes"]) == 5 for s in found["stages"])


def test_likeness_is_the_mean_best_cosine_both_ways():
    """Against two loops; a track that is an excerpt of another is nearer to it than to any other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    x[9:] = x[2:5]                                                         # track 3 is a part of track 1
    owner = np.repeat([0, 1, 2, 3], [2, 4, 3, 3])
    found = duplicates.likeness(x, owner)
    one_way = lambda a, b: np.mean([(x[owner == b] @ u).max() for u in x[owner == a]])
    for i, j in np.ndindex(4, 4):
        assert found[i, j] == pytest.approx((one_way(i, j) + one_way(j, i)) / 2, abs=1e-5)
    assert found[3].argsort()[-2] == 1


def test_duplicates_prints_the_pairs_of_all_folders(store, monkeypatch, capsys):
    paths = data.FrameStore(store).paths
    shutil.copytree(store, "again")
    saved_network()
    monkeypatch.setattr(sys, "argv", f"duplicates.py {store} again --checkpoint checkpoint.pt --top 8".split())
    duplicates.main()
    pairs = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-8:]]
    assert sorted(first for alike, first, second in pairs if first == second and float(alike) > 0.999) == sorted(paths)


def test_published_weights_are_the_network_rounded_to_half(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = saved_network(optimizer={}, step=7, settings={})
    monkeypatch.setattr(sys, "argv", "publish.py checkpoint.pt --about us --licence free --out weights/mt2.pt".split())
    publish.main()
    saved = torch.load("weights/mt2.pt", weights_only=True)
    assert saved.keys() == {"config", "model", "step", "settings", "about", "licence"} and saved["step"] == 7
    loaded = model.load_checkpoint("weights/mt2.pt").state_dict()
    for name, weight in network.state_dict().items():
        assert saved["model"][name].dtype == torch.float16 and loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], weight, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(publish, "LARGEST", 1e-3)
    with pytest.raises(data.InputError, match="pass it on elsewhere"):
        publish.main()


def test_a_chord_change_marks_its_frames_and_correlates_with_itself_alone():
    """The second boundary changes no chord. Given the onsets, nothing is left of what follows them."""
    changes = emergence.change_windows([(0, 2, 3), (2, 3, 15), (3, 8, 15)], 252)
    assert changes.shape == (2, 126) and changes.flatten().nonzero().flatten().tolist() == [61, 62, 63, 64]
    generator = torch.Generator().manual_seed(0)
    changes = (torch.rand(8, 126, generator=generator) < 0.1).float()
    changes[7] = 0                                                         # a window without a change
    noise = torch.randn(2, 8, 126, generator=generator)
    onsets, owner = changes + 0.3 * noise[0], np.arange(8) // 2
    itself = emergence.attention_row(changes, onsets, changes, owner)
    assert itself["changes"]["mean"] == pytest.approx(1) and itself["changes | onsets"]["mean"] == pytest.approx(1)
    follower = emergence.attention_row(onsets + 0.3 * noise[1], onsets, changes, owner)
    assert follower["changes"]["mean"] > 0.4 > 0.1 > abs(follower["changes | onsets"]["mean"])
    assert len(follower["onsets"]["scores"]) == 4


def test_chordal_distance_is_0_for_a_folded_cqt_and_root_2_for_noise(monkeypatch):
    monkeypatch.setattr(emergence, "STEPS", 75)
    monkeypatch.setattr(emergence, "RATE", 0.1)
    generator = torch.Generator().manual_seed(0)
    cqt = torch.rand(200, 96, generator=generator) * torch.eye(12)[torch.arange(200) % 12].repeat(1, 8)
    folded = torch.stack([cqt[:, crop:crop + 84].unflatten(1, (7, 12)).mean(dim=1) for crop in range(13)], dim=1)
    parts = torch.arange(200).split((100, 50, 50))
    assert emergence.held_out_distance(folded, *parts).max() < 0.1
    noise = torch.randn(200, 13, 12, generator=generator)
    assert emergence.held_out_distance(noise, *parts).numpy() == pytest.approx(2 ** 0.5, abs=0.06)
    assert emergence.chordal_distance(torch.eye(12)[[0]].expand(5, 13, 1, 12)).item() == pytest.approx((28 / 13) ** 0.5)


def test_no_mode_leaves_the_key_loss_alone_and_piece_makes_longer_pieces(untouched):
    batch = dict(shifts=torch.tensor([[3] * 4, [3] * 4, [9] * 4]), cqt=torch.rand(2, 4, 8, 84))
    task, token = losses.SKey(16), torch.randn(3, 4, 16)
    loss, logs = task(token, batch)
    ablations.CHANGES["no-mode"]()
    assert task(token, batch)[0].item() == pytest.approx(logs["cpsd_term"].item()) != loss.item()
    ablations.CHANGES["piece"]("90")
    assert data.PIECE * data.FRAME_SECONDS == pytest.approx(90, abs=0.1)


def test_a_wider_and_deeper_network_keeps_heads_of_64(untouched):
    ablations.CHANGES["dim"]("192")
    ablations.CHANGES["depth"]("8")
    small = train.PRESETS["small"]
    assert (small["dim"], small["depth"], small["heads"], small["mask"]) == (192, 8, 3, 0.88)


def test_template_variants_hold_the_template_itself_and_differ():
    cqt = torch.rand(1, 40, 96, generator=torch.Generator().manual_seed(0))
    expected = losses.template_keys(cqt)
    assert torch.allclose(keys.template(cqt), expected, atol=1e-5)
    for title, options in list(keys.VARIANTS.items())[1:]:
        assert not torch.allclose(keys.template(cqt, **options), expected, atol=1e-3), title
    frames = torch.zeros(1, 9, 96)
    frames[..., [39, 43, 46]] = 1                                          # bin 39: C, as bin 0 is an A
    for pair in keys.PROFILES.values():                                    # a tonic triad is the key of its root
        assert keys.template(frames, profiles=pair).argmax() == 0


def test_measured_profiles_are_the_chroma_of_each_mode_turned_to_c():
    tracks = np.zeros((24, 9, 224), np.uint8)                              # a triad on every root, major then minor
    for key, track in enumerate(tracks):
        track[:, [39 + key % 12 + interval for interval in (0, 3 if key >= 12 else 4, 7)]] = 255
    major, minor = keys.measured_profiles(tracks, np.sqrt(keys.ALBRECHT))
    assert major.sum() == pytest.approx(1) and minor.sum() == pytest.approx(1)
    assert sorted(major.topk(3).indices.tolist()) == [0, 4, 7] and sorted(minor.topk(3).indices.tolist()) == [0, 3, 7]


@pytest.mark.parametrize("sign, share", [(-1, 100), (1, 0)])
def test_an_output_turns_when_it_is_lower_by_the_crop(monkeypatch, sign, share):
    class Network:
        tasks = {"cpsd": SimpleNamespace(log_keys=lambda token: token)}
        key_token = staticmethod(lambda: "cpsd")

        def __call__(self, crop, n):
            return {"cpsd": torch.eye(12)[[(5 + sign * crop) % 12]].log().expand(n, 12)}, {}
    monkeypatch.setattr(probe, "views_of", lambda batch, device, crop: (crop, len(batch)))
    tracks = [np.zeros((300, 224), np.uint8)]
    assert keys.turning(Network(), tracks) == f"turns {share} %, one output 100 %, |z| 1.00"


def test_keys_prints_scores_offsets_and_turns_of_a_network(song_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved_network()
    monkeypatch.setattr(probe, "calibrate", lambda model, device: 0)
    names = sorted(path.name for path in song_folder.iterdir() if path.suffix == ".wav")
    rows = "".join(f"{song_folder.name}/{name},C major\n" for name in names)
    (tmp_path / "keys.csv").write_text("file,key\n" + rows)
    monkeypatch.setattr(sys, "argv", ["keys.py", str(song_folder), "keys.csv", "--checkpoint", "checkpoint.pt"])
    keys.main()
    printed = capsys.readouterr().out
    assert "checkpoint.pt, 13 crops" in printed and "turns " in printed
    offsets = next(line for line in printed.splitlines() if "offsets" in line).split("offsets")[1]
    assert sum(map(int, offsets.split())) == len(names)
    network = model.MT2(("ntxent",), dim=24, depth=1, heads=2)
    torch.save(dict(config=network.config, model=network.state_dict()), "checkpoint.pt")
    with pytest.raises(data.InputError, match="no key token"):
        keys.main()
    monkeypatch.setattr(sys, "argv", sys.argv[:2])
    with pytest.raises(data.InputError, match="pairs"):
        keys.main()


@pytest.mark.parametrize("tokens", [("cpsd", "ntxent"), ("ntxent",)])
def test_real_prints_rows_with_and_without_a_key_token(song_folder, tmp_path, monkeypatch, capsys, tokens):
    monkeypatch.chdir(tmp_path)
    network = model.MT2(tokens, dim=24, depth=1, heads=2)
    torch.save(dict(config=network.config, model=network.state_dict()), "checkpoint.pt")
    monkeypatch.setattr(probe, "calibrate", lambda model, device: 0)
    music = tmp_path / "excerpts"
    music.mkdir()
    for i, path in enumerate(sorted(song_folder.glob("*.*"))[:4]):
        shutil.copy(path, music / f"track{i // 2}_{'ab'[i % 2]}{path.suffix}")
    rows = "".join(f"excerpts/{path.name},{key}\n" for path, key in zip(sorted(music.iterdir()), ("C major", "a") * 2))
    (tmp_path / "keys.csv").write_text("file,key\n" + rows)
    plain, seeds = probe.untrained, []
    monkeypatch.setattr(probe, "untrained", lambda *args, seed: seeds.append(seed) or plain(*args, seed=seed))
    command = "real.py excerpts --keys keys.csv --checkpoint checkpoint.pt checkpoint.pt --tuning 444"
    monkeypatch.setattr(sys, "argv", command.split())
    real.main()
    printed = capsys.readouterr().out
    assert seeds == [0, 1] and "2 networks; retrieval among 2 tracks" in printed and "key template, A = 444 Hz" in printed
    assert ("cpsd zero-shot" in printed and "cpsd, A = 444 Hz" in printed) == ("cpsd" in tokens)


def test_emergence_has_rows_for_each_token_and_layer(song_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emergence, "STEPS", 2)
    shutil.copytree(song_folder, "music")
    for song in [path for path in data.walk("music") if path.suffix.lower() in data.AUDIO_SUFFIXES]:
        song.with_suffix(".lab").write_text("0 3 C:maj\n3 6 A:min\n6 10 F:maj\n")
    saved_network()
    tables = []
    monkeypatch.setattr(probe, "print_table", lambda title, table: tables.append(table))
    monkeypatch.setattr(sys, "argv", "emergence.py --data music --checkpoint checkpoint.pt".split())
    emergence.main()
    attention, distance = tables
    names = [f"{prefix}{name}" for prefix in ("", "untrained ") for name in ("cpsd", "ntxent", "sequence")]
    assert list(attention) == ["onset envelope", *(f"{name} L1" for name in names)]
    assert all(list(row) == ["onsets", "changes", "changes | onsets"] for row in attention.values())
    assert attention["onset envelope"]["onsets"]["mean"] == pytest.approx(1)
    assert len(distance) == 1 + 6 * 2 and {"raw CQT mean", "cpsd L0", "untrained sequence mean L1"} <= distance.keys()
    assert all(0 < row["d"]["mean"] < 2 and len(row["d"]["scores"]) == emergence.HEADS for row in distance.values())
    assert not emergence.read_music(song_folder)[1]


@pytest.mark.parametrize("patch", ["1", "16x16"])
def test_a_reconstruction_keeps_what_was_kept_and_predicts_the_rest(patch):
    """A decoder that predicts 0 gives each frame or patch its own mean; the whole patches of the mel come back in place."""
    net = model.MT2(["mae"], dim=24, depth=1, heads=2, patch=patch).eval()
    torch.nn.init.zeros_(net.tasks["mae"].heads[0].weight)
    frames = torch.randint(0, 256, (126, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, kept, predicted = reconstruction.reconstruct(net, frames, 0.75)
    n = 126 if patch == "1" else 112                                       # seven whole patches
    assert torch.allclose(whole, frames[:n, data.N_BINS:].float() / 255)
    seen = ~kept.isnan()
    assert torch.equal(kept[seen], whole[seen]) and torch.equal(predicted[seen], whole[seen])
    assert seen.float().mean().item() == pytest.approx(0.25, abs=0.01)
    cells = (n // (1 if patch == "1" else 16), -1) if patch == "1" else (7, 16, 8, 16)
    means = lambda x: x.reshape(cells).mean(dim=-1 if patch == "1" else (1, 3))
    assert torch.allclose(means(predicted), means(whole), atol=1e-5)


def test_label_curves_are_the_first_metric_by_share():
    row = {"accuracy": 4, "class mean": 9, "accuracy @10 %": 2, "accuracy @2 %": 1, "class mean @10 %": 9}
    assert labels.curve(row) == [(2.0, 1), (10.0, 2), (100.0, 4)]
