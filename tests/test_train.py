"""The training loop: schedule, exact resume, checkpoints that survive anything, and one line for bad input."""
import json
import os
import signal
import subprocess
import sys
import threading
from copy import deepcopy
from pathlib import Path

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


def test_schedule_is_tied_to_the_run():
    steps = 200
    lrs, decays = zip(*(train.schedule(s, steps, 1e-3) for s in range(steps)))
    assert lrs[0] == pytest.approx(1e-3 / 10) and max(lrs) == pytest.approx(1e-3) and lrs.index(max(lrs)) in (9, 10)
    assert lrs[-1] == pytest.approx(train.FINAL_LR) and all(a > b for a, b in zip(lrs[10:], lrs[11:]))
    assert decays[0] == pytest.approx(0.04) and decays[-1] == pytest.approx(0.01)


def test_only_matrices_decay():
    network = model.MT2(dim=24, depth=1, heads=2)
    decayed, rest = train.make_optimizer(network).param_groups
    kept = {id(p) for p in rest["params"]}
    assert decayed["decays"] and not rest["decays"]
    assert id(network.class_tokens) in kept and id(network.positions) in kept and id(network.norm.weight) in kept
    assert id(network.blocks[0].qkv.weight) in {id(p) for p in decayed["params"]}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("tokens, inputs", [("cpsd,ntxent", "cqt,mel"), ("cpsd", "cqt"), ("ntxent", "mel")])
def test_resume_is_bit_for_bit(tokens, inputs, store, tmp_path, monkeypatch, capsys):
    common = ("--tokens", tokens, "--inputs", inputs, "--data", store, "--batch-size", 4, "--steps", 4, "--log-every", 1)
    run(monkeypatch, *common, "--out", tmp_path / "a")
    run(monkeypatch, *common, "--out", tmp_path / "b", "--stop-at", 2)
    run(monkeypatch, "--out", tmp_path / "b", "--resume", "--log-every", 1)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert same(a, b) and a["step"] == 4
    logs = [[{k: v for k, v in json.loads(line).items() if k != "clips_per_s"} for line in open(tmp_path / name / "log.jsonl")] for name in "ab"]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    run(monkeypatch, "--out", tmp_path / "b", "--resume", "--stop-at", 2)                    # past it: nothing to do
    assert "step 4 of 4" in capsys.readouterr().out.splitlines()[-1]
    assert logs[0] == logs[1] and {"grad_norm", "lr", *tokens.split(",")} <= set(logs[0][0])


def test_seeds_differ_and_repeat(store, tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 2, "--out", tmp_path / name, "--seed", seed)
    a, b, c = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "abc")
    assert same(a, b) and not torch.equal(a["model"]["positions"], c["model"]["positions"])


def test_interrupt_leaves_a_checkpoint_that_resumes(store, tmp_path, monkeypatch):
    common = ("--data", store, "--batch-size", 4, "--steps", 4)
    run(monkeypatch, *common, "--out", tmp_path / "a")
    training_losses = train.training_losses

    def interrupted(network, teacher, batch):
        if batch["progress"].item() == pytest.approx(2 / 3):               # the third of four steps
            signal.raise_signal(signal.SIGINT)                             # the step ends first
        return training_losses(network, teacher, batch)

    monkeypatch.setattr(train, "training_losses", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *common, "--out", tmp_path / "b")
    assert stop.value.code == 130
    assert torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(train, "training_losses", training_losses)
    run(monkeypatch, "--out", tmp_path / "b", "--resume")
    assert same(*(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab"))


def test_weights_belong_to_their_tokens_and_survive_a_resume(store, tmp_path, monkeypatch, capsys):
    """--weights 2,0.5: the gradient is that of 2 cpsd + 0.5 ntxent, at its first step seen through its norm."""
    norms = {}
    for name, flags in (("both", []), ("first", ["--weights", "2,1e-9"]), ("second", ["--weights", "1e-9,0.5"]), ("pair", ["--weights", "2,0.5"])):
        run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 4, "--stop-at", 1, "--out", tmp_path / name, *flags)
        norms[name] = json.loads((tmp_path / name / "log.jsonl").read_text())["grad_norm"]
    assert len(set(norms.values())) == 4

    # The same by hand, with the batch and the first weights of that run.
    torch.manual_seed(0)
    network = model.MT2(("cpsd", "ntxent"), 24, 1, 2)
    batch = train.make_batch(data.Segments(data.open_data([store]), 4), network, 0, 0, train.PRESETS["small"]["mask"], 4, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=model.pick_amp(torch.device("cpu"))[0]):
        both = train.training_losses(network, None, batch)[0]
    for name, (a, b) in dict(both=(1, 0.3), first=(2, 0), second=(0, 0.5), pair=(2, 0.5)).items():
        grads = torch.autograd.grad(a * both["cpsd"] + b * both["ntxent"], list(network.parameters()), retain_graph=True, allow_unused=True)
        assert norms[name] == pytest.approx(torch.cat([g.flatten() for g in grads if g is not None]).norm().item(), rel=1e-3)

    run(monkeypatch, "--out", tmp_path / "pair", "--resume", "--stop-at", 2)
    assert torch.load(tmp_path / "pair" / "checkpoint.pt", weights_only=True)["settings"]["weights"] == [2.0, 0.5]
    assert "--weights" in refused(monkeypatch, capsys, "--out", tmp_path / "pair", "--resume", "--weights", "1,1")
    for wrong in ("1", "1,0", "1,-1", "1,nan", "1,2,3", "inf,1"):
        assert "--weights" in refused(monkeypatch, capsys, "--data", store, "--weights", wrong, "--out", tmp_path / "wrong")


def test_a_full_disk_keeps_the_old_checkpoint(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 4, "--out", out, "--stop-at", 2)
    before = (out / "checkpoint.pt").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    def save(*rest):
        """From the first checkpoint on the disk is full."""
        patch.setattr(os, name, full_disk)
        save_checkpoint(*rest)

    save_checkpoint = train.save_checkpoint
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(train, "save_checkpoint", save)
            line = refused(patch, capsys, "--out", out, "--resume", "--stop-at", 3)
        assert "No space left" in line
        assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.part"))
    assert model.load_checkpoint(out / "checkpoint.pt").tokens == ("cpsd", "ntxent")
    run(monkeypatch, "--out", out, "--resume")


def test_one_run_a_folder(store, tmp_path, monkeypatch, capsys):
    """The second run is refused while the first lives; the lock dies with its owner, by whatever signal."""
    out, common = tmp_path / "run", ("--data", store, "--batch-size", 4, "--steps", 2)
    with data.locked(out):
        assert "another run is writing there" in refused(monkeypatch, capsys, *common, "--out", out)
        assert not (out / "checkpoint.pt").exists()
    owner = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); "
                              "print('mine', flush=True); sys.stdin.read()", out / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    owner.stdout.readline()
    assert "another run" in refused(monkeypatch, capsys, *common, "--out", out)
    owner.kill()
    owner.communicate()
    run(monkeypatch, *common, "--out", out)


def test_a_folder_that_cannot_be_written_is_one_line(store, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(monkeypatch, capsys, "--data", store, "--batch-size", 4, "--out", tmp_path / "file" / "run")
    monkeypatch.setattr(Path, "mkdir", lambda self, **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(self))))
    assert "Permission denied" in refused(monkeypatch, capsys, "--data", store, "--batch-size", 4, "--out", tmp_path / "run")


@pytest.mark.parametrize("change", [
    lambda c: c.pop("settings"), lambda c: c.pop("step"), lambda c: c.pop("optimizer"), lambda c: c.update(step="two"),
    lambda c: c["settings"].pop("seed"), lambda c: c["settings"].update(tokens="cpsd"), lambda c: c.update(model=None),
    lambda c: c["settings"].update(preset="mt2"), lambda c: c["model"].pop("norm.weight"), lambda c: c.update(settings=3),
    lambda c: c["optimizer"].pop("param_groups"), lambda c: c["optimizer"]["param_groups"].pop()])
def test_resuming_a_foreign_checkpoint_is_one_line(change, foreign, monkeypatch, capsys):
    checkpoint = torch.load(foreign / "checkpoint.pt", weights_only=True)
    change(checkpoint)
    (foreign / "other").mkdir(exist_ok=True)
    torch.save(checkpoint, foreign / "other" / "checkpoint.pt")
    refused(monkeypatch, capsys, "--out", foreign / "other", "--resume")


@pytest.fixture(scope="module")
def foreign(frames_of_songs, tmp_path_factory):
    """A run folder whose checkpoint the test above takes apart."""
    folder = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "small", dict(train.PRESETS["small"], dim=24, depth=1))
        run(patch, "--data", frames_of_songs, "--batch-size", 4, "--steps", 4, "--stop-at", 2, "--out", folder)
    return folder


def test_a_loss_that_is_not_finite_stops_before_the_weights(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 6, "--out", out, "--stop-at", 2)
    before = (out / "checkpoint.pt").read_bytes()
    real = losses.nt_xent
    monkeypatch.setattr(losses, "nt_xent", lambda z, tracks: real(z, tracks) * float("nan"))
    assert "not finite" in refused(monkeypatch, capsys, "--out", out, "--resume", "--log-every", 1)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_learns_eight_songs(store, tmp_path, monkeypatch):
    """CPSD is 1 at chance. One narrow block is enough; eight songs need a lower mask and rate than a thousand."""
    monkeypatch.setitem(train.PRESETS, "small", dict(train.PRESETS["small"], dim=64, depth=1, mask=0.75, lr=1e-3))
    run(monkeypatch, "--data", store, "--batch-size", 8, "--steps", 160, "--out", tmp_path / "run", "--log-every", 1)
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    mean = lambda name, part: sum(line[name] for line in part) / len(part)
    assert mean("ntxent", lines[-10:]) < 0.5 * mean("ntxent", lines[:10])
    assert mean("cpsd", lines[-10:]) < 0.75 * mean("cpsd", lines[:10]) < 0.75
    assert mean("mean_abs_z", lines[-10:]) > 0.5


def test_the_mel_of_the_transposed_view_is_zero():
    frames, crops = torch.full((3, 2, 5, data.COLUMNS), 200, dtype=torch.uint8), torch.tensor([[0, 3], [0, 3], [5, 12]])
    cqt, mel = data.training_views(frames, crops)
    assert cqt.min() > 0 and mel[:2].min() > 0 and mel[2].max() == 0


def test_bad_input_is_one_line(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fail = lambda *flags: refused(monkeypatch, capsys, *flags)
    assert "chroma" in fail("--tokens", "cpsd,chroma", "--data", store, "--out", out)
    assert "smaller --batch-size" in fail("--data", store, "--batch-size", 500, "--out", out)
    assert "nowhere" in fail("--data", tmp_path / "nowhere", "--out", out)
    assert "no such checkpoint" in fail("--out", out, "--resume")
    assert "--mask" in fail("--mask", "1", "--data", store, "--out", out)
    assert "inputs with cqt" in fail("--inputs", "mel", "--data", store, "--out", out)
    assert "mae: needs --mask above 0" in fail("--tokens", "ntxent,mae", "--mask", "0", "--data", store, "--out", out)
    assert "--log-every 0" in fail("--log-every", "0", "--data", store, "--out", out)
    assert "--save-every -1" in fail("--save-every", "-1", "--data", store, "--out", out)
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 2, "--out", out, "--stop-at", 1)
    assert "--resume" in fail("--data", store, "--out", out)
    assert "--lr" in fail("--out", out, "--resume", "--lr", "0.5")
    assert "--inputs" in fail("--out", out, "--resume", "--inputs", "cqt")
    (out / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "is not a checkpoint" in fail("--out", out, "--resume")


# ---------------------------------------------------------------- what keeps a GPU busy


def test_the_next_batch_is_made_while_this_one_is_used():
    made = {step: threading.Event() for step in range(3)}
    make = lambda step: made[step].set() or 10 * step
    results = []
    for step, batch in train.prefetch(make, range(3)):
        assert step == 2 or made[step + 1].wait(timeout=10)
        results.append((step, batch))
    assert results == [(0, 0), (1, 10), (2, 20)] and list(train.prefetch(make, range(4, 4))) == []


def test_an_error_while_a_batch_is_made_ends_the_run(store, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise data.InputError("frames.bin: is cut off")

    monkeypatch.setattr(data.Segments, "gather", fail)
    assert "frames.bin" in refused(monkeypatch, capsys, "--data", store, "--batch-size", 4, "--out", tmp_path / "run")


@pytest.mark.parametrize("flags", [["--tokens", "skey,byol"], ["--tokens", "ntxent", "--patch", "16x16"]])
def test_the_host_waits_for_the_device_at_log_lines_only(flags, store, tmp_path, monkeypatch):
    """Between the lines, no file of the project copies a tensor in a blocking way or reads one."""
    waits, steps = [], [0]
    training_losses = train.training_losses

    def count_step(*rest):
        steps[0] += 1
        return training_losses(*rest)

    def watch(name):
        method = getattr(torch.Tensor, name)

        def watched(self, *rest, **options):
            caller = Path(sys._getframe(1).f_code.co_filename).name
            if caller in ("train.py", "losses.py", "model.py") and not options.get("non_blocking"):
                waits.append((steps[0], name))
            return method(self, *rest, **options)
        monkeypatch.setattr(torch.Tensor, name, watched)

    monkeypatch.setattr(train, "training_losses", count_step)
    for name in ("to", "cpu", "cuda", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        watch(name)
    run(monkeypatch, *flags, "--data", store, "--batch-size", 4, "--steps", 6, "--log-every", 3, "--out", tmp_path / "run")
    assert {step for step, _ in waits if step > 0} == {3, 6}


def test_frames_on_the_device_give_the_same_batches(store):
    """Moved there (here to the CPU as a tensor), only row numbers travel; every value is the same."""
    for options in (dict(tokens=("skey", "ntxent", "mae")), dict(tokens=("ntxent",), patch="16x16,128x2")):
        network = model.MT2(**options, dim=24, depth=1, heads=2)
        on_disk, on_device = (data.Segments(data.open_data([store, store]), 4) for _ in range(2))
        on_device.to("cpu")
        for step in range(3):
            a, b = (train.make_batch(segments, network, 0, step, 0.5, 10, "cpu", slice(1, 3)) for segments in (on_disk, on_device))
            assert a.keys() == b.keys()
            for name in a.keys() - {"inputs"}:
                assert torch.equal(a[name], b[name]), name
            for one, two in zip(a["inputs"], b["inputs"], strict=True):
                assert all(x is None if y is None else torch.equal(x, y) for x, y in zip(one, two, strict=True))


def resolved(tmp_path, device, *flags):
    args = train.parse_args(["--out", str(tmp_path), *flags])
    train.resolve_settings(args, torch.device(device), 1)
    return args


def test_a_gpu_gets_the_papers_model_for_the_length_of_a_demo(tmp_path):
    demo, paper, small = resolved(tmp_path, "cuda"), resolved(tmp_path, "cuda", "--preset", "mt2"), resolved(tmp_path, "cpu")
    assert (demo.dim, demo.depth, demo.heads) == (paper.dim, paper.depth, paper.heads) == (192, 12, 3)
    assert demo.steps < 10_000 and paper.steps == 511_488 and demo.compile and not small.compile
    assert (small.preset, small.dim, small.depth, small.steps) == ("small", 128, 4, 500)


def test_checkpoints_are_apart_in_time_unless_asked_for(store, tmp_path, monkeypatch):
    """By default 250 steps and 30 s, so that a fast GPU does not write all the time; --save-every N is every N steps."""
    default, chosen = resolved(tmp_path, "cpu"), resolved(tmp_path, "cpu", "--save-every", "2")
    assert (default.save_every, default.save_seconds) == (250, 30) and (chosen.save_every, chosen.save_seconds) == (2, 0)
    saved, save_checkpoint = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *rest: saved.append(rest[4]) or save_checkpoint(*rest))
    common = ("--data", store, "--batch-size", 4, "--steps", 5)
    run(monkeypatch, *common, "--out", tmp_path / "a", "--save-every", 2)
    assert saved == [2, 4, 5]
    monkeypatch.setattr(train.time, "monotonic", lambda clock=iter(range(0, 999, 16)): next(clock))    # 16 s at each look
    resolve_settings = train.resolve_settings

    def every_step(args, *rest):
        checkpoint = resolve_settings(args, *rest)
        args.save_every = 1
        return checkpoint

    monkeypatch.setattr(train, "resolve_settings", every_step)
    run(monkeypatch, *common, "--out", tmp_path / "b")
    assert saved[3:] == [2, 4, 5]


def test_losses_keep_the_full_precision_of_float32(store, tmp_path, monkeypatch):
    run(monkeypatch, "--data", store, "--batch-size", 4, "--steps", 1, "--out", tmp_path / "run")
    assert torch.get_float32_matmul_precision() == "highest"


def test_help_states_every_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        train.main()
    groups = capsys.readouterr().out.split("\n\n")
    assert len(groups) > 4 and not any("None" in group for group in groups)
    for group in groups[3:]:
        for entry in group.split("\n  --")[1:]:
            assert "default" in group.splitlines()[0] + entry or entry.startswith("resume"), entry


@pytest.mark.parametrize("kind", [dict(tokens=list(losses.PRETEXT)), dict(tokens=["ntxent", "byol", "mae"], patch="16x16,128x2", pool="mean")])
def test_compile_is_one_graph(kind, store, monkeypatch):
    """The step is one graph without breaks, and after the first one nothing is compiled again."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    network = model.MT2(**kind, dim=24, depth=1, heads=2)
    teacher = deepcopy(network).requires_grad_(False)
    segments, optimizer = data.Segments([data.FrameStore(store)], 4), train.make_optimizer(network)
    compiled = torch.compile(train.training_losses, backend="eager", fullgraph=True)

    def step(number):
        terms, _, _ = compiled(network, teacher, train.make_batch(segments, network, 0, number, 0.75, 10, "cpu"))
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        optimizer.step()
        train.update_teacher(teacher, network, number / 9)

    step(0)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(1, 4):
            step(number)
    assert counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_one_step_on_a_gpu(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "mt2", "--data", str(store), "--batch-size", "4", "--steps", "2",
                                      "--out", str(tmp_path / "run"), "--no-probe", "--no-compile"])
    train.main()
    assert model.load_checkpoint(tmp_path / "run" / "checkpoint.pt").config["depth"] == 12
