"""What we break on purpose: python tests/torture.py [fuzz] [kill] [disk] [soak]   (default: all, 15 minutes; Linux)

    fuzz   thousands of mutated files of each format: audio or one InputError, never a crash, a hang or a gigabyte
    kill   preparing, training and probing, killed (-9) twenty times each: the end equals that of an undisturbed run
    disk   a full disk and a read-only folder: one line, exit code 2, and with room again the same end
    soak   a thousand training steps: memory at step 1,000 is that of step 100

Everything happens in a temporary folder. Not part of the test suite; what it found has a test there.
"""
import argparse
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

# ---------------------------------------------------------------- fuzz

FORMATS = dict.fromkeys("wav flac ogg mp3 au aiff".split(), {}) | {"opus": dict(format="OGG", subtype="OPUS")}
FILE_SECONDS, FILE_MEMORY = 10, 2 ** 30  # a file that takes longer hangs; bytes


def originals(suffix, folder):
    """Bytes of four healthy files of 1.5 s: mono and stereo, low and high rates."""
    t = np.arange(48000 * 3 // 2)
    found = []
    for rate, channels in ((48000, 2), (16000, 1), (8000 if suffix == "opus" else 44100, 1), (24000, 2)):
        wave = 0.3 * np.sin(0.05 * t[:rate * 3 // 2]) + 0.05 * np.random.default_rng(0).standard_normal(rate * 3 // 2)
        path = Path(folder) / f"original.{suffix}"
        sf.write(path, np.stack([wave] * channels, axis=1), rate, **FORMATS[suffix])
        found.append(path.read_bytes())
    return found


def ogg_checksums(b):
    """Correct the checksum of every page of an ogg, so that the decoder behind it receives the injury."""
    table = [0] * 256
    for i in range(256):
        value = i << 24
        for _ in range(8):
            value = value << 1 ^ (0x104C11DB7 if value >> 31 else 0)
        table[i] = value
    pages = [m.start() for m in re.finditer(b"OggS", b)] + [len(b)]
    for start, end in zip(pages, pages[1:]):
        if end - start > 27:
            b[start + 22:start + 26] = bytes(4)
            crc = 0
            for byte in b[start:end]:
                crc = crc << 8 & 0xFFFFFFFF ^ table[crc >> 24 ^ byte]
            b[start + 22:start + 26] = crc.to_bytes(4, "little")


def mutate(original, rng):
    """One to four injuries: flipped bits, odd bytes and absurd integers (most in the header), holes, repeats, cuts."""
    b = bytearray(original)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not b:
            break
        at = int(rng.integers(min(len(b), rng.choice([64, 512, len(b)]))))
        size = int(2 ** rng.uniform(0, 12))
        match rng.integers(7):
            case 0:
                b[at] ^= 1 << int(rng.integers(8))
            case 1:
                b[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:  # what a field of a header may hold: largest, negative, zero
                width = int(rng.choice([2, 4, 8]))                         # bytes
                half = 2 ** (8 * width - 1)
                value = (0, 1, half - 1, half, 2 * half - 1)[rng.integers(5)]
                b[at:at + width] = value.to_bytes(width, ("little", "big")[rng.integers(2)])
            case 3:
                b[at:at + size] = bytes(min(size, len(b) - at))
            case 4:
                b[at:at] = b[at:at + size] * int(rng.integers(1, 9))
            case 5:
                b[at:at + size] = rng.bytes(size)
            case 6:
                del b[at + size if rng.random() < 0.5 else at:]
    if rng.random() < 0.5:
        ogg_checksums(b)
    return bytes(b)


def status(key, pid="self"):
    """A line of /proc/PID/status in bytes: VmRSS now, VmHWM the largest so far, VmSize the address space."""
    return int(re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def fuzz_worker(suffix, first, last, folder):
    """Read mutated files first .. last - 1 and print a line for each; ends (exit code 1) when one takes too long."""
    torch.set_num_threads(1)
    healthy = originals(suffix, folder)
    data.resample([torch.zeros(48000)], 48000, data.SAMPLE_RATE)           # warm up, then the limit
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2 * FILE_MEMORY,) * 2)
    for i in range(first, last):
        path = Path(folder) / f"{i}.{suffix}"
        rng = np.random.default_rng([i, *suffix.encode()])
        path.write_bytes(mutate(healthy[i % len(healthy)], rng))
        Path("/proc/self/clear_refs").write_text("5")                      # VmHWM starts again from here
        before, start = status("VmHWM"), time.perf_counter()
        faulthandler.dump_traceback_later(FILE_SECONDS, exit=True)
        print(f"{i} begins", flush=True)
        try:
            samples = len(data.read_audio(path))
            outcome = "audio" if samples else "NOTHING"
        except data.InputError as error:
            outcome = "refused" if str(path) in str(error) and "\n" not in str(error) else f"ODD MESSAGE {error!r}"
        except BaseException as error:
            outcome = f"FAULT {type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        memory = status("VmHWM") - before
        if memory > FILE_MEMORY:
            outcome = f"MEMORY {memory / 2 ** 20:.0f} MB"
        print(json.dumps([i, outcome, memory, time.perf_counter() - start]), flush=True)
        if outcome in ("audio", "refused"):
            path.unlink()


def fuzz(folder, files=2000):
    """`files` mutated files of each format, in a subprocess that may die; the next one begins behind that file."""
    bad = 0
    for suffix in FORMATS:
        results, first = [], 0
        while first < files:
            flags = map(str, ("--fuzz-worker", suffix, first, files, folder))
            worker = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
            lines, errors = worker.stdout.splitlines(), worker.stderr
            results += [json.loads(line) for line in lines if line.startswith("[")]
            begun = max((int(line.split()[0]) for line in lines if line.endswith("begins")), default=first)
            first = files if worker.returncode == 0 else begun + 1
            if worker.returncode:
                what = "HANG" if "Timeout" in errors else f"CRASH {worker.returncode}"
                results.append([begun, f"{what}: {errors[-300:]}", 0, 0])
        count = lambda start: sum(outcome.startswith(start) for _, outcome, _, _ in results)
        odd = [(i, outcome) for i, outcome, _, _ in results if outcome not in ("audio", "refused")]
        bad += len(odd)
        memory, taken = max(m for _, _, m, _ in results) / 2 ** 20, max(s for *_, s in results)
        print(f"fuzz {suffix:5} {len(results)} files: {count('audio')} audio, {count('refused')} refused, "
              f"{len(odd)} faults; at most {memory:.0f} MB and {taken:.2f} s a file", flush=True)
        for i, outcome in odd[:10]:
            print(f"     {folder}/{i}.{suffix}: {outcome}")
    return bad


# ---------------------------------------------------------------- jobs

TINY = "--preset small --device cpu --batch-size 8 --no-probe --log-every 1 --save-every 5".split()
ONE_CORE = dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")


def songs(folder, count, seconds=data.SONG_SECONDS):
    """Synthetic songs in two sub-folders, which are the classes of `probe.py folders`."""
    for i in range(count):
        path = folder / ("high", "low")[i % 2] / f"{i:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, data.render(data.compose(i))[:seconds * data.SAMPLE_RATE], data.SAMPLE_RATE)
    return folder


def start(work, script, *flags):
    """A program of the project as a user starts it, in the folder `work`, on one core."""
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], cwd=work, text=True, errors="replace",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | ONE_CORE)


def finish(job):
    """(exit code, stdout, the lines of stderr that are no progress bar)."""
    output, errors = job.communicate()
    return job.returncode, output, [line for line in re.split("[\r\n]+", errors) if line.strip() and "|" not in line]


def store_of(out):
    return [(out / name).read_bytes() for name in ("frames.bin", "index.jsonl", "store.json")]


def weights_of(out):
    """Step, weights and optimiser of a checkpoint, and the log without its clock."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    states = checkpoint["optimizer"]["state"].values()
    tensors = [*checkpoint["model"].values(), *(torch.as_tensor(v) for state in states for v in state.values())]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return checkpoint["step"], [t.numpy().tobytes() for t in tensors], [line | dict(clips_per_s=0) for line in log]


class Job:
    """A command that leaves a result: how to start it, to read the result, and what to remove for a fresh start."""

    def __init__(self, work, script, flags, result, leaves, resume=lambda: ()):
        self.work, self.script, self.flags, self.result, self.leaves = work, script, flags, result, leaves
        self.resume, self.name = resume, script.removesuffix(".py")

    def start(self):
        return start(self.work, self.script, *self.flags, *self.resume())

    def fresh(self):
        for name in self.leaves:
            shutil.rmtree(self.work / name, ignore_errors=True)


def jobs(work, music, steps):
    """Prepare, train and probe, in the order in which they need each other; the probe's result is its table."""
    checkpoint = work / "run" / "checkpoint.pt"

    def table():
        return json.loads(next((work / "run").glob("probe-*.json")).read_text())["rows"]

    return [Job(work, "data.py", (music, "--out", "store"), lambda: store_of(work / "store"), ["store"]),
            Job(work, "train.py", ("--data", "store", *TINY, "--steps", steps, "--out", "run"),
                lambda: weights_of(work / "run"), ["run"], lambda: ("--resume",) if checkpoint.exists() else ()),
            Job(work, "probe.py", ("folders", "--data", music, "--checkpoint", checkpoint, "--device", "cpu"), table,
                ["data"])]


# ---------------------------------------------------------------- kill


def kill(folder, kills=20):
    """Each job once undisturbed, then killed at random moments and started again; a job that ended begins anew."""
    rng, bad = random.Random(0), 0
    music = songs(folder / "music", 60)
    for job in jobs(folder, music, 60):
        began = time.perf_counter()
        code, output, errors = finish(job.start())
        whole = time.perf_counter() - began
        assert code == 0, (job.name, output[-500:], errors)
        expected, done, rounds, faults = job.result(), 0, 0, []
        job.fresh()
        while True:  # the last round is never killed: the next job needs its result
            process = job.start()
            # Most of a job this small is the loading of torch: three kills in four fall into the work behind it.
            delay = whole * rng.uniform(0 if rng.random() < 0.25 else 0.4, 1)
            try:
                process.wait(delay if done < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                continue
            code, output, errors = finish(process)
            rounds += 1
            if code or job.result() != expected:
                faults.append(f"exit code {code}, {errors[-3:]}" if code else "another result")
            if done >= kills:
                break
            job.fresh()
        paths = [path for name in job.leaves for path in (folder / name).rglob("*")]
        leftovers = sum(path.suffix == ".part" or path.suffix[1:].isdigit() for path in paths)
        print(f"kill {job.name:6} killed {done} times, ended {rounds} times: {rounds - len(faults)} equal to the "
              f"undisturbed run ({whole:.1f} s); {leftovers} leftovers", flush=True)
        for fault in faults:
            print(f"     {fault}")
        bad += len(faults)
    return bad


# ---------------------------------------------------------------- disk


def disk(folder):
    """In a private mount namespace, where a tmpfs may be made full and read-only without harm to anyone."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        print("disk: no private mount namespace here (unshare -rm): skipped")
        return 0
    return subprocess.run(["unshare", "-rm", sys.executable, __file__, "--disk-worker", str(folder)]).returncode


def disk_worker(folder):
    music, bad = songs(folder / "music", 16), 0
    plain, small = folder / "plain", folder / "small"
    plain.mkdir(), small.mkdir()
    mount = lambda *flags: subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(flags), "none", small], check=True)
    mount("size=1g")
    # Too little for the frames (2.7 MB), for a checkpoint beside the first one (two of 13 MB), for the frames again.
    for ordinary, job, size in zip(jobs(plain, music, 20), jobs(small, music, 20), (2, 18, 2)):
        finish(ordinary.start())
        room = sum(path.stat().st_blocks * 512 for path in small.rglob("*")) + (size << 20) + 8192
        for trouble, options in (("full", ("remount", "rw", f"size={room}")), ("read-only", ("remount", "ro"))):
            mount(*options)
            code, output, errors = finish(job.start())
            one_line = code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
            bad += not one_line
            print(f"disk {job.name:6} {trouble:9} exit {code}: {errors[-4:]}{'' if one_line else ' FAULT'}", flush=True)
        mount("remount", "rw", "size=1g")
        code, output, errors = finish(job.start())
        equal = code == 0 and job.result() == ordinary.result()
        bad += not equal
        outcome = "equal to the undisturbed run" if equal else f"FAULT {errors[-3:]}"
        print(f"disk {job.name:6} with room again: exit code {code}, {outcome}", flush=True)
    subprocess.run(["umount", small])
    sys.exit(min(bad, 100))


# ---------------------------------------------------------------- soak


def soak(folder, steps=1000):
    """Resident memory of a training run as its log grows."""
    music = songs(folder / "music", 16)
    prepare, train, _ = jobs(folder, music, steps)
    finish(prepare.start())
    job, log, memory = train.start(), folder / "run" / "log.jsonl", {}
    ended = ThreadPoolExecutor(1).submit(finish, job)  # reads the progress bar: a full pipe would stop the run
    while not ended.done():
        step = log.read_bytes().count(b"\n") if log.exists() else 0
        for mark in (100, steps // 2, steps - 10):
            if step >= mark and mark not in memory:
                memory[mark] = status("VmRSS", job.pid) / 2 ** 20
        time.sleep(0.02)
    code = ended.result()[0]
    growth = max(memory.values(), default=0) - memory.get(100, 0)
    bad = code != 0 or len(memory) < 3 or growth > 20
    marks = ", ".join(f"{mb:.0f} MB at step {mark}" for mark, mb in memory.items())
    print(f"soak {'FAULT ' if bad else ''}exit code {code}; resident memory {marks}")
    return int(bad)


def main():
    if sys.argv[1:2] == ["--fuzz-worker"]:
        return fuzz_worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    if sys.argv[1:2] == ["--disk-worker"]:
        return disk_worker(Path(sys.argv[2]))
    parts = dict(fuzz=fuzz, kill=kill, disk=disk, soak=soak)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(parts)} (default: all)")
    chosen = parser.parse_args().parts or ["all"]
    if unknown := set(chosen) - {*parts, "all"}:
        parser.error(f"{', '.join(unknown)}: give any of {', '.join(parts)}, all")
    bad = 0
    for name in parts if "all" in chosen else chosen:
        with tempfile.TemporaryDirectory() as folder:
            bad += parts[name](Path(folder))
    print("no faults" if not bad else f"{bad} faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
