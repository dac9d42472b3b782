"""The shipped weights: what the file holds, and that their outputs stay."""
import sys

import pytest
import soundfile as sf
import torch

import data
import probe
from model import load_checkpoint, read_checkpoint

SONGS = [1152, 1156, 1200]  # test songs: never trained on
KEYS = "bb e b".split()  # outputs of the weights
# First values of the class tokens of the first window of the first song.
TOKENS = {"skey": [0.279, -0.500, 0.817, 0.294, -0.506, 0.076, -0.600, 1.976],
          "ntxent": [0.711, -0.625, -0.228, 1.056, -0.894, 0.848, 0.015, 1.286]}


@pytest.fixture(scope="module")
def found():
    """(Keys of SONGS, as in probe.ALL_KEYS, {row: (songs, dim)} of their first windows)."""
    network, songs = load_checkpoint(probe.SHIPPED), [torch.from_numpy(data.render(data.compose(i))) for i in SONGS]
    frames = [data.audio_to_frames(wave, data.FrontEnd()) for wave in songs]
    keys = [probe.ALL_KEYS[row.argmax()] for row in probe.key_probabilities(network, frames, "cpu")]
    return keys, probe.extract(network, [f[:data.SEGMENT] for f in frames], "cpu").rows


def test_the_file_is_small_and_complete():
    saved = read_checkpoint(probe.SHIPPED)
    assert probe.SHIPPED.stat().st_size < 12e6 and "optimizer" not in saved
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in saved["model"].values())
    assert saved["config"]["tokens"] == ["skey", "ntxent"] and "CC BY-SA" in saved["licence"]
    assert "synthetic songs" in saved["about"] and "/" not in {str(part)[0] for part in saved["settings"]["data"]}


def test_outputs_stay(found):
    """Within what another processor may change (bf16 against fp32: 0.005): no key, and no token by more than 0.03."""
    keys, rows = found
    assert keys == KEYS == [probe.ALL_KEYS[data.compose(i)["key"]] for i in SONGS]
    for name, values in TOKENS.items():
        torch.testing.assert_close(rows[name][0, :8].float(), torch.tensor(values), rtol=0, atol=0.03)


def test_a_fresh_clone_works_at_once(tmp_path, monkeypatch, capsys):
    """The same key from a file as from frames, in another folder."""
    monkeypatch.chdir(tmp_path)
    sf.write("song.wav", data.render(data.compose(SONGS[2])), data.SAMPLE_RATE)
    monkeypatch.setattr(sys, "argv", "probe.py key song.wav --device cpu".split())
    probe.main()
    out = capsys.readouterr().out
    assert "using the shipped weights" in out and "song.wav: B minor" in out
