"""The training loop: schedule, exact resume, checkpoints that survive anything, and one line for bad input."""
import json
import os
import signal
import sys
from copy import deepcopy

import pytest
import torch

import data
import losses
import model
import train


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "small", "--device", "cpu", "--no-probe", *map(str, flags)])
    train.main()


def refused(monkeypatch, capsys, *flags):
    """Run as a command that must fail: exit code 2 and one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--no-probe", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        data.run_cli(train.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def same(a, b):
    """Two checkpoints agree bit for bit, in weights, optimiser and step."""
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for key, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][key][name]))
    return True


@pytest.fixture
def store(song_folder, tmp_path, monkeypatch):
    """A frame store of eight short songs; the working directory is a fresh one."""
    monkeypatch.chdir(tmp_path)
    return data.prepare_folders([song_folder], tmp_path / "store").folder


def test_schedule_is_tied_to_the_run():
    steps = 200
    lrs, decays = zip(*(train.schedule(s, steps, 0.1, 1e-3) for s in range(steps)))
    assert lrs[0] == pytest.approx(1e-3 / 20) and max(lrs) == pytest.approx(1e-3) and lrs.index(max(lrs)) in (19, 20)
    assert lrs[-1] == pytest.approx(train.FINAL_LR) and all(a > b for a, b in zip(lrs[20:], lrs[21:]))
    assert decays[0] == pytest.approx(0.04) and decays[-1] == pytest.approx(0.01)


def test_only_matrices_decay():
    network = model.MT2(dim=24, depth=1, heads=2)
    decayed, rest = train.make_optimizer(network).param_groups
    kept = {id(p) for p in rest["params"]}
    assert decayed["decays"] and not rest["decays"]
    assert id(network.class_tokens) in kept and id(network.positions) in kept and id(network.norm.weight) in kept
    assert id(network.blocks[0].qkv.weight) in {id(p) for p in decayed["params"]}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("tokens", ["cpsd,ntxent", "cpsd", "ntxent"])
def test_resume_is_bit_for_bit(tokens, store, tmp_path, monkeypatch):
    common = ("--tokens", tokens, "--data", store, "--batch-size", 4, "--steps", 4, "--log-every", 1)
    run(monkeypatch, *common, "--out", tmp_path / "a")
    run(monkeypatch, *common, "--out", tmp_path / "b", "--stop-at", 2)
    run(monkeypatch, "--out", tmp_path / "b", "--resume", "--log-every", 1)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert same(a, b) and a["step"] == 4
    logs = [[{k: v for k, v in json.loads(line).items() if k != "clips_per_s"} for line in open(tmp_path / name / "log.jsonl")] for name in "ab"]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    assert logs[0] == logs[1] and {"grad_norm", "lr", *tokens.split(",")} <= set(logs[0][0])


def test_seeds_differ_and_repeat(store, tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 2, "--out", tmp_path / name, "--seed", seed)
    a, b, c = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "abc")
    assert same(a, b) and not torch.equal(a["model"]["positions"], c["model"]["positions"])


def test_interrupt_leaves_a_checkpoint_that_goes_on(store, tmp_path, monkeypatch):
    common = ("--data", store, "--batch-size", 4, "--steps", 4)
    run(monkeypatch, *common, "--out", tmp_path / "a")
    batch = data.Segments.batch

    def interrupted(self, seed, step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)                             # the step ends first
        return batch(self, seed, step, *rest)

    monkeypatch.setattr(data.Segments, "batch", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *common, "--out", tmp_path / "b")
    assert stop.value.code == 130
    assert torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(data.Segments, "batch", batch)
    run(monkeypatch, "--out", tmp_path / "b", "--resume")
    assert same(*(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab"))


def test_a_kill_during_save_keeps_the_old_checkpoint(store, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 4, "--out", out, "--stop-at", 2)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError):
            run(patch, "--out", out, "--resume", "--stop-at", 3)
    assert model.load_checkpoint(out / "checkpoint.pt").tokens == ("cpsd", "ntxent")
    assert not list(out.glob("*.part"))
    run(monkeypatch, "--out", out, "--resume")


def test_a_loss_that_is_not_finite_stops_before_the_weights(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 6, "--out", out, "--stop-at", 2)
    before = (out / "checkpoint.pt").read_bytes()
    real = losses.nt_xent
    monkeypatch.setattr(losses, "nt_xent", lambda z: real(z) * float("nan"))
    assert "not finite" in refused(monkeypatch, capsys, "--out", out, "--resume", "--log-every", 1)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_learns_eight_songs(store, tmp_path, monkeypatch):
    """CPSD at 1 knows nothing. A small rate: eight items are a noisy batch."""
    run(monkeypatch, "--data", store, "--batch-size", 8, "--steps", 80, "--out", tmp_path / "run", "--log-every", 1, "--mask", 0.5, "--lr", 1e-4)
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    mean = lambda name, part: sum(line[name] for line in part) / len(part)
    assert mean("ntxent", lines[-10:]) < 0.5 * mean("ntxent", lines[:10])
    assert mean("cpsd", lines[-10:]) < 0.75 * mean("cpsd", lines[:10]) < 0.75
    assert mean("mean_abs_z", lines[-10:]) > 0.5


def test_transposed_view_hears_no_mel():
    frames, crops = torch.full((3, 2, 5, data.COLUMNS), 200, dtype=torch.uint8), torch.tensor([[0, 3], [0, 3], [5, 12]])
    cqt, mel = data.training_views(frames, crops)
    assert cqt.min() > 0 and mel[:2].min() > 0 and mel[2].max() == 0


def test_bad_input_is_one_line(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fail = lambda *flags: refused(monkeypatch, capsys, *flags)
    assert "chroma" in fail("--tokens", "cpsd,chroma", "--data", store, "--out", out)
    assert "--batch-size 8" in fail("--data", store, "--batch-size", 500, "--out", out)
    assert "nowhere" in fail("--data", tmp_path / "nowhere", "--out", out)
    assert "no such checkpoint" in fail("--out", out, "--resume")
    assert "--omega" in fail("--omega", "3", "--data", store, "--out", out)
    assert "--mask" in fail("--mask", "1", "--data", store, "--out", out)
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 2, "--out", out, "--stop-at", 1)
    assert "--resume" in fail("--data", store, "--out", out)
    assert "--lr" in fail("--out", out, "--resume", "--lr", "0.5")
    (out / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "is not a checkpoint" in fail("--out", out, "--resume")


def test_compile_is_steady(store, tmp_path, monkeypatch):
    """The step is one graph without breaks, and after the first one torch.compile has nothing left to compile."""
    counters = torch._dynamo.utils.counters
    network = model.MT2(list(losses.PRETEXT), dim=24, depth=1, heads=2)
    teacher = deepcopy(network).requires_grad_(False)
    segments = data.Segments([data.FrameStore(store)], 4)
    compiled = torch.compile(train.training_losses, backend="eager", fullgraph=True)

    def step(number):
        compiled(network, teacher, train.make_batch(segments, network, 0, number, 3, 0.75, 10, "cpu"))

    step(0)
    graphs = counters["stats"]["unique_graphs"]
    for number in range(1, 4):
        step(number)
    assert counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_one_step_on_a_gpu(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "mt2", "--data", str(store), "--batch-size", "4", "--steps", "2",
                                      "--out", str(tmp_path / "run"), "--no-probe", "--no-compile"])
    train.main()
    assert model.load_checkpoint(tmp_path / "run" / "checkpoint.pt").config["depth"] == 12
