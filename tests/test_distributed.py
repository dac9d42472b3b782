"""Two processes train what one would: every loss and gradient, a whole run, an interrupt, a killed process."""
import json
import os
import signal
import socket
import sys
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

import data
import losses
import model
import train
from conftest import drawn_batch
from test_train import run

# Processes are copies of one that has imported torch, which takes longer than all they do.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "soundfile", "tqdm"])
PATCHES = {"three of patches": dict(tokens=["ntxent", "byol", "mae"], patch="16x16,128x2", pool="mean")}
CASES = {name: dict(tokens=[name]) for name in losses.PRETEXT} | PATCHES | {"compiled": dict(tokens=["ntxent"], depth=1)}


def one_step(case, store, share=slice(None)):
    """Losses, logs, tokens, buffers and gradients of one step of a small network that is far from its start."""
    torch.manual_seed(0)
    options = dict(dim=32, depth=2, heads=2) | CASES[case]
    network, teacher = model.MT2(**options), model.MT2(**options).requires_grad_(False)
    with torch.no_grad():
        for p in [*network.parameters(), *teacher.parameters()]:
            p.add_(0.1 * torch.randn(p.shape))
    stores = [data.FrameStore(store)]
    segments = data.Segments(stores, 8, {path: i for i, path in enumerate(stores[0].paths) if i % 3})
    batch = train.make_batch(segments, network, 0, 5, 0.5, 10, "cpu", share)
    step = torch.compile(train.training_losses, backend="eager") if case == "compiled" and dist.is_initialized() else train.training_losses
    terms, logs, seen = step(network, teacher, batch)
    sum(terms.values()).backward()
    if dist.is_initialized():
        train.average_gradients(network)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    values = {f"{kind} {name}": value.detach().float() for kind, part in (("loss", terms), ("log", logs), ("token", seen), ("gradient", gradients),
                                                                         ("buffer", dict(network.named_buffers()))) for name, value in part.items()}
    return values


def two(work, *rest):
    """Run work(rank, *rest) in two processes, and return their exit codes."""
    running = [FORKS.Process(target=work, args=(rank, *rest)) for rank in (0, 1)]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join(timeout=600)
    finally:
        for process in running:
            process.kill()
    return [process.exitcode for process in running]


def half(rank, folder, store):
    """One of two processes: its half of every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "meet"), 2), rank=rank, world_size=2)
    torch.save({case: one_step(case, store, slice(4 * rank, 4 * rank + 4)) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(frames_of_songs, tmp_path_factory):
    """What two processes made of all cases."""
    folder = tmp_path_factory.mktemp("halves")
    assert two(half, folder, frames_of_songs) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_halves_are_a_whole(case, halves, frames_of_songs):
    first, second = halves
    whole = one_step(case, frames_of_songs)
    assert whole.keys() == first[case].keys() and any(name.startswith("gradient blocks.0") for name in whole)
    for name, value in whole.items():
        assert torch.equal(first[case][name], second[case][name]), name    # or the ranks would drift apart
        torch.testing.assert_close(first[case][name], value, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert max(value.abs().max() for name, value in whole.items() if name.startswith("gradient blocks.0")) > 1e-3


def test_shares_make_the_batch(frames_of_songs):
    segments = data.Segments([data.FrameStore(frames_of_songs)], 8)
    whole, shares = drawn_batch(segments, 3, 7, 3, 0.6), [drawn_batch(segments, 3, 7, 3, 0.6, slice(i, i + 2)) for i in (0, 2, 4, 6)]
    for name in ("frames", "positions"):
        assert torch.equal(torch.cat([share[name] for share in shares], dim=1), whole[name])
    assert all(torch.equal(share[name], whole[name]) for share in shares for name in ("crops", "keys", "tracks"))


def ranks_main(rank, folder, port, at_step_2, preset, flags):
    """train.py as torchrun would start it; the second process gets a signal in its third step. Output: out0, err0, ..."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    torch.set_num_threads(1)
    training_losses, steps = train.training_losses, iter(range(99))

    def watched(*rest):
        if next(steps) == 2 and rank == 1:
            signal.raise_signal(at_step_2)
        return training_losses(*rest)

    train.training_losses, train.PRESETS["small"] = watched, preset
    sys.argv = ["train.py", "--preset", "small", "--device", "cpu", "--no-probe", *map(str, flags)]
    data.run_cli(train.main)


def two_processes(folder, at_step_2, *flags):
    """ranks_main in two processes: [(exit code, out, err)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = two(ranks_main, folder, port, at_step_2, train.PRESETS["small"], flags)
    return [(codes[rank], (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text()) for rank in (0, 1)]


def test_a_run_of_two_stops_at_one_step_and_resumes_on_one(store, tmp_path, monkeypatch):
    common = ("--data", store, "--batch-size", 8, "--steps", 6, "--log-every", 2)
    run(monkeypatch, *common, "--out", tmp_path / "a")
    first, second = two_processes(tmp_path, signal.SIGINT, *common, "--out", tmp_path / "b")
    assert first[0] == second[0] == 130, (first, second)
    assert "stopped" in first[1] and second[1] == "" and "training" in first[2] and "training" not in second[2]
    assert torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["step"] == 4      # the next log line
    run(monkeypatch, "--out", tmp_path / "b", "--resume", "--log-every", 2)
    a, b = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in "ab")
    assert [line["step"] for line in a] == [line["step"] for line in b] == [2, 4, 6]
    for one, two in zip(a, b):
        for name in ("cpsd", "ntxent", "grad_norm", "ntxent_rank"):
            assert two[name] == pytest.approx(one[name], rel=0.02), (one["step"], name)      # AdamW grows what rounding leaves


def test_a_killed_process_ends_the_run_in_one_line(store, tmp_path):
    first, second = two_processes(tmp_path, signal.SIGKILL, "--data", store, "--batch-size", 8, "--steps", 9,
                                  "--save-every", 1, "--out", tmp_path / "run")
    assert second[0] == -9 and first[0] == 2
    assert [line for line in first[2].splitlines() if line.startswith("error: ")] == [
        "error: another process of this run ended or cannot be reached; see its message, then continue with --resume"]
    assert "Traceback" not in first[2] and torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_processes_share_a_batch_evenly(tmp_path):
    args = train.parse_args(["--preset", "small", "--batch-size", "9", "--out", str(tmp_path)])
    with pytest.raises(data.InputError, match="--batch-size 9: must be a multiple of 2"):
        train.resolve_settings(args, torch.device("cpu"), 2)
