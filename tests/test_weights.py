"""The weights that come along: what the file holds, and that they still say what they said when they were added."""
import os
import subprocess
import sys

import pytest
import soundfile as sf
import torch

import data
import probe
from model import load_checkpoint, read_checkpoint

SONGS = range(1152, 1168)  # test songs: never trained on
KEYS = "bb a b eb e eb C bb D A a Db b Eb eb c#".split()  # what the weights made of them
TOKENS = dict(skey=[-0.49, -0.199, 0.869, 0.725, -0.428, 0.099, 0.144, 1.522], ntxent=[-0.85, -0.669, -0.124, -0.314, -0.271, -0.208, 0.894, 0.938])  # first values of the class tokens of the first window of the first song


@pytest.fixture(scope="module")
def said():
    """(keys of SONGS, as in probe.ALL_KEYS, and the class tokens of their first windows (songs, tokens, dim))."""
    network = load_checkpoint(probe.SHIPPED)
    frames = [(data.FrontEnd()(torch.from_numpy(data.render(data.compose(i)))[None])[0] * 255).round().to(torch.uint8).numpy() for i in SONGS]
    keys = [probe.ALL_KEYS[row.argmax()] for row in probe.key_probabilities(network, frames, "cpu")]
    return keys, probe.extract(network, [f[:data.SEGMENT] for f in frames], "cpu")["tokens"][:, 0].float()


def test_the_file_is_small_and_says_what_it_is():
    saved = read_checkpoint(probe.SHIPPED)
    assert probe.SHIPPED.stat().st_size < 12e6 and "optimizer" not in saved
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in saved["model"].values())
    assert saved["config"]["tokens"] == ["skey", "ntxent"] and "synthetic songs" in saved["about"] and "CC BY-SA" in saved["licence"]
    assert not any(str(part).startswith("/") for part in saved["settings"]["data"])


def test_they_say_what_they_said(said):
    """Within what another processor may change (bf16 against fp32: 0.005): no key, and no token by more than 0.03."""
    keys, tokens = said
    assert keys == KEYS
    for i, name in enumerate(("skey", "ntxent")):
        torch.testing.assert_close(tokens[0, i, :8], torch.tensor(TOKENS[name]), rtol=0, atol=0.03)


def test_they_hear_keys(said):
    """Most test songs are named right, which chance does to one in 24."""
    truth = [probe.ALL_KEYS[data.compose(i)["key"]] for i in SONGS]
    assert sum(heard == true for heard, true in zip(said[0], truth)) >= 12


@pytest.mark.parametrize("words, shown", [(["key", "song.wav"], "m"), (["embed", ".", "--out", "e.npz"], "e.npz"), (["show", "song.wav"], "key")])
def test_a_fresh_clone_hears_at_once(words, shown, tmp_path):
    sf.write(tmp_path / "song.wav", data.render(data.compose(SONGS[0])), data.SAMPLE_RATE)
    probe_py = probe.SHIPPED.parents[2] / "probe.py"
    done = subprocess.run([sys.executable, probe_py, *words], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "no run in out/: listening with" in done.stdout and shown in done.stdout, done.stderr
