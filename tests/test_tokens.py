"""Every pretext task: closed cases of its loss, what its class adds, and two steps of training, alone and with CPSD."""
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import losses
import model
import train
from conftest import drawn_batch
from test_model import parameter_count
from test_train import run, same


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- losses: closed cases and slow references


def test_byol_crosses_the_views():
    a, b = noise(5, 7), noise(5, 7, seed=1)
    assert losses.byol(torch.stack([a, b]), torch.stack([b, a]) * 3).item() == pytest.approx(0, abs=1e-5)
    assert losses.byol(torch.stack([a, b]), -torch.stack([b, a])).item() == pytest.approx(8, abs=1e-5)
    x, y = torch.zeros(2, 4, 6), torch.zeros(2, 4, 6)
    x[..., 0], y[..., 1] = 1, 2
    assert losses.byol(x, y).item() == pytest.approx(4)
    slow = sum((2 - 2 * F.cosine_similarity(p, t, dim=0)) / 5 for p, t in [*zip(a, b), *zip(b, a)])
    assert losses.byol(torch.stack([a, b]), torch.stack([a, b])).item() == pytest.approx(slow.item(), rel=1e-5)


def test_no_gradient_reaches_a_teacher_or_the_centre():
    student, teacher, centre = (noise(2, 3, 8, seed=s).requires_grad_() for s in range(3))
    losses.byol(student, teacher).backward()
    losses.cluster(student, teacher, centre[0, 0], 0.04).backward()
    assert teacher.grad is None and centre.grad is None and student.grad.abs().max() > 0


def test_cluster_equals_a_slow_loop():
    student, teacher, centre = noise(2, 3, 8), noise(2, 3, 8, seed=1), noise(8, seed=2)
    slow = 0.0
    for view, other in ((0, 1), (1, 0)):
        for i in range(3):
            wanted = ((teacher[other, i] - centre) / 0.04).softmax(0)
            slow -= (wanted * (student[view, i] / 0.1).log_softmax(0)).sum() / 6
    assert losses.cluster(student, teacher, centre, 0.04).item() == pytest.approx(slow.item(), rel=1e-5)
    zero = torch.zeros(2, 3, 8)
    assert losses.cluster(zero, zero, torch.zeros(8), 0.04).item() == pytest.approx(torch.tensor(8.0).log().item())


def test_barlow_closed_cases_and_slow_loop():
    orthogonal = torch.linalg.qr(noise(16, 5) - noise(16, 5).mean(0))[0]
    orthogonal = torch.linalg.qr(torch.cat([torch.ones(16, 1), orthogonal], dim=1))[0][:, 1:]  # centred, decorrelated
    assert losses.barlow(orthogonal, 3 * orthogonal).item() == pytest.approx(0, abs=1e-3)
    assert losses.barlow(orthogonal, -orthogonal).item() == pytest.approx(4 * 5, rel=1e-3)
    constant = torch.ones(16, 5)
    assert losses.barlow(constant, constant).item() == pytest.approx(5)
    a, b = noise(9, 4), noise(9, 4, seed=1)
    slow = 0.0
    for i in range(4):
        for j in range(4):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            c = (x * y).mean() / ((x ** 2).mean() * (y ** 2).mean()).sqrt()
            slow += (1 - c) ** 2 if i == j else 0.005 * c ** 2
    assert losses.barlow(a, b).item() == pytest.approx(slow.item(), rel=1e-3)


def test_vicreg_closed_cases_and_slow_loop():
    constant = torch.full((6, 3), 2.0)
    assert losses.vicreg(constant, constant).item() == pytest.approx(25 * 0.99, rel=1e-5)
    assert losses.vicreg(constant, constant + 2).item() == pytest.approx(25 * 4 + 25 * 0.99, rel=1e-5)
    wide = 50 * torch.linalg.qr(torch.cat([torch.ones(16, 1), noise(16, 3)], dim=1))[0][:, 1:]   # centred, orthogonal, spread
    assert losses.vicreg(wide, wide).item() == pytest.approx(0, abs=1e-2)
    a, b = noise(9, 4), noise(9, 4, seed=1)
    slow = 25 * ((a - b) ** 2).mean()
    for x in (a, b):
        c = torch.cov(x.T)
        slow += 25 * F.relu(1 - (torch.diagonal(c) + 1e-4).sqrt()).mean() / 2
        slow += sum(c[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    assert losses.vicreg(a, b).item() == pytest.approx(slow.item(), rel=1e-4)


def test_the_masked_error_is_that_of_what_was_dropped():
    target, positions = noise(2, 3, 5, 8), torch.tensor([[[0, 2], [1, 4], [3, 4]]] * 2)
    normalised = (target - target.mean(-1, keepdim=True)) / target.std(-1, keepdim=True)
    assert losses.masked_error(normalised, 3 * target + 5, positions).item() == pytest.approx(0, abs=1e-6)
    for index, error in ((0, 0), (1, 4 / 18)):                              # item 0 of view 0 keeps 0; 3 of 5 are dropped, 6 items
        wrong = normalised.clone()
        wrong[0, 0, index] += 2
        assert losses.masked_error(wrong, target, positions).item() == pytest.approx(error, abs=1e-6)
    assert losses.masked_error(torch.zeros_like(target), torch.ones_like(target), positions).item() == 0    # silence


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(torch.cat([torch.ones(20, 1), noise(20, 6)], dim=1))[0][:, 1:]
    assert losses.effective_rank(basis) == pytest.approx(6, rel=1e-3)
    assert losses.effective_rank(basis[:, :1] @ noise(1, 6)) == pytest.approx(1, rel=1e-2)
    assert losses.effective_rank(torch.full((20, 6), 3.3)) == 0


# ---------------------------------------------------------------- key with modes


def tonal_batch(tonic, minor=False, shifts=(0, 0, -3)):
    """A batch, one item an entry of `tonic`: the scale of its key note by note, the tonic triad louder; two views."""
    scale, triad = ((0, 2, 3, 5, 7, 8, 10), (0, 3, 7)) if minor else ((0, 2, 4, 5, 7, 9, 11), (0, 4, 7))
    notes = [*((d, 0.5) for d in scale), *((d, 0.8) for d in triad), (0, 1.0)]
    cqt = torch.zeros(2, len(tonic), len(notes), data.CROP_BINS)
    for view, shift in enumerate(shifts[:2]):
        for i, t in enumerate(tonic):
            for octave in range(7):
                for frame, (degree, level) in enumerate(notes):
                    cqt[view, i, frame, 12 * octave + (t + degree + shift) % 12] = level
    return dict(cqt=cqt, shifts=torch.tensor(shifts)[:, None].expand(3, len(tonic)), keys=torch.full((len(tonic),), -1))


def exact_keys(signature, shifts, rotation, share=0.5):
    """Log probabilities (3, batch, 24) of the true signature, up to a rotation, with this share for major."""
    place = (torch.tensor(signature)[None] + torch.tensor(shifts)[:, None] + rotation) % 12
    one_hot = F.one_hot(place, 12).float()
    return torch.cat([share * one_hot, (1 - share) * one_hot], dim=-1).clamp(min=1e-6).log()


@pytest.mark.parametrize("minor", [False, True])
def test_skey_labels_major_and_minor(minor):
    task = losses.SKey(8)
    posterior = task.template_posterior(tonal_batch([0, 1, 4, 7, 10], minor))
    assert task.mode_label(posterior).tolist() == [float(not minor)] * 5


def test_skey_terms_have_their_closed_values(monkeypatch):
    task, batch = losses.SKey(8), tonal_batch([0, 1, 4])
    for share, balance in ((0.5, 0.0), (1.0, 0.25), (0.0, 0.25)):
        monkeypatch.setattr(task, "log_keys", lambda token: exact_keys([0, 1, 4], (0, 0, -3), 0, share))
        loss, logs = task(None, batch)
        assert logs["cpsd_term"].item() == pytest.approx(0, abs=1e-5) and logs["balance_term"].item() == pytest.approx(balance, abs=1e-4)
        if share == 0.5:
            assert logs["mode_term"].item() == pytest.approx(3 * 0.6931, rel=1e-3)
        assert loss.item() == pytest.approx((logs["cpsd_term"] + (1.5 * logs["mode_term"] + 20 * logs["balance_term"]) / 3).item())


@pytest.mark.parametrize("minor", [False, True])
def test_the_template_names_the_key_at_every_transposition(minor):
    tonic = torch.arange(12)
    cqt = tonal_batch(tonic.tolist(), minor)["cqt"][0]                      # from a C; the template's first bin is an A
    assert losses.template_keys(cqt.roll(3, dims=-1)).argmax(dim=-1).tolist() == (tonic + 12 * minor).tolist()
    assert losses.template_keys(torch.zeros(1, 5, 96)).tolist() == [[0.0] * 24]


def test_the_template_label_follows_the_crop_of_each_view():
    """The label of view 2 is what the template finds in view 2 itself, had it been given that."""
    task, batch = losses.SKey(8), tonal_batch([0, 1, 4, 9], minor=True, shifts=(-5, -5, -12))
    label = task.template_posterior(batch)                                        # (3, 4, 24)
    own = task.template_posterior(tonal_batch([0, 1, 4, 9], minor=True, shifts=(-12, -12, -12)))
    torch.testing.assert_close(label.sum(dim=-1), torch.ones(3, 4))
    assert torch.equal(label[2].argmax(dim=-1), own[0].argmax(dim=-1)) and torch.equal(label[0], label[1])


@pytest.mark.parametrize("outputs", [12, 24])
def test_the_pseudo_label_is_a_weighted_cross_entropy(outputs, monkeypatch):
    """Outputs equal to the label: the cross entropy is the label's entropy, and the loss is lower than a rotation off."""
    task, batch = (losses.CPSD if outputs == 12 else losses.SKey)(8), tonal_batch([0, 1, 4])
    label, found = task.template_posterior(batch), []
    if outputs == 12:
        label = label.unflatten(-1, (2, 12)).sum(-2)
    for weight, steps in ((0, 0), (1, 0), (2, 0), (1, 1), (1, 7)):
        task.pseudo_label = weight
        monkeypatch.setattr(task, "log_keys", lambda _: label.unflatten(-1, (-1, 12)).roll(steps, -1).flatten(-2).log())
        found.append(task(None, batch))
    entropy = torch.special.entr(label).sum(-1).mean().item()
    loss = [value.item() for value, _ in found]
    assert loss[1] - loss[0] == pytest.approx(entropy, rel=1e-4) and loss[2] - loss[0] == pytest.approx(2 * entropy, rel=1e-4)
    assert loss[1] < min(loss[3:]) and "label_term" not in found[0][1]
    assert found[1][1]["cpsd_term"].item() == pytest.approx(found[3][1]["cpsd_term"].item(), abs=1e-5)


def test_the_paper_s_cpsd_needs_no_spectrogram_and_the_pseudo_label_does(store, monkeypatch, tmp_path):
    """The flag reaches the task, is kept in the checkpoint, and its term in the log."""
    assert not losses.CPSD(8).needs_spectrogram
    flags = ["--data", str(store), "--batch-size", "4", "--steps", "2", "--log-every", "1", "--pseudo-label", "0.5"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "small", "--device", "cpu", "--no-probe", *flags,
                                      "--out", str(tmp_path / "run")])
    train.main()
    assert all(json.loads(line)["label_term"] > 0 for line in open(tmp_path / "run" / "log.jsonl"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["settings"]["pseudo_label"] == 0.5


def test_tone_learns_the_label_transposed_with_each_view(monkeypatch):
    task, batch = losses.Tone(8), tonal_batch([0, 1, 4])
    batch["keys"] = torch.tensor([0, -1, 4])                                # C major, unknown, E major
    monkeypatch.setattr(task, "log_keys", lambda token: exact_keys([0, 1, 4], (0, 0, -3), 0, 1.0))
    right = task(None, batch)[1]
    assert right["supervised_term"].item() == pytest.approx(0, abs=1e-4) and right["labelled_share"].item() == pytest.approx(2 / 3)
    batch["keys"] = torch.tensor([9 + 12, -1, 1 + 12])                      # the relative minors: same profile, other half
    assert task(None, batch)[1]["supervised_term"].item() > 5
    batch["keys"] = torch.tensor([0, -1, 5])                                # a semitone off
    assert task(None, batch)[1]["supervised_term"].item() > 5
    batch["keys"] = torch.full((3,), -1)
    assert task(None, batch)[1]["supervised_term"].item() == 0


def outputs_of(task, key, logit=20.0):
    """Make the head put this logit on `key` for every token, through its bias alone."""
    torch.nn.init.zeros_(task.head.weight)
    task.head.bias = nn.Parameter(logit * losses.PROFILE_TEMPERATURE * F.one_hot(torch.tensor(key), 24).float())


def test_tone_has_a_gradient_from_labels_on_confidently_wrong_outputs():
    """With the softmax saturated at a wrong key, the cross entropy pulls the labelled logit up by its weight."""
    task, batch = losses.Tone(8), tonal_batch([0, 1, 4], shifts=(0, 0, 0))
    batch["keys"] = torch.tensor([7, 7, 7])                                 # G major, every view
    outputs_of(task, 0)
    loss, logs = task(noise(3, 3, 8), batch)
    loss.backward()
    assert logs["supervised_term"].item() == pytest.approx(20, abs=1e-3)
    assert task.head.bias.grad[7].item() == pytest.approx(-1 / losses.PROFILE_TEMPERATURE, rel=1e-3)


def test_mode_terms_have_a_gradient_on_confidently_wrong_outputs():
    """Views that are minor with certainty are pulled back by a pseudo-label for major, or by a view that is major."""
    for name, first_view in (("skey", 0.0), ("tone", 120.0)):
        task, batch = losses.PRETEXT[name](8), tonal_batch([0, 0], shifts=(0, 0, 0))
        outputs_of(task, 12, 60.0)                                          # A minor, the relative of C major
        token = torch.zeros(3, 2, 8)
        token[0, :, 0] = first_view * losses.PROFILE_TEMPERATURE            # its logit of C major
        token.requires_grad_()
        with torch.no_grad():
            task.head.weight[0, 0] = 1.0
        task(token, batch)[0].backward()
        assert token.grad[2, :, 0].max() < -0.01, name


# ---------------------------------------------------------------- the masked autoencoder


def test_mae_trains_its_decoder_and_the_trunk_on_dropped_patches_alone():
    torch.manual_seed(0)
    task, positions = losses.MAE(8, pixels=(6, 10)), torch.tensor([[[0, 2], [1, 4], [3, 4]]] * 2)
    sequence, target = noise(2, 3, 2, 8).requires_grad_(), noise(2, 3, 5, 10, seed=1).requires_grad_()
    batch = dict(sequence=sequence, positions=positions, places=noise(5, 8), target=target, patch=1)
    assert task.predict(batch).shape == target.shape
    task(None, batch)[0].backward()
    kept = torch.zeros(2, 3, 5, dtype=torch.bool).scatter(-1, positions, True)
    assert target.grad[kept].abs().max() == 0 and target.grad[~kept].abs().amax(dim=-1).min() > 0
    unused = {name for name, p in task.named_parameters() if p.grad is None}
    assert unused == {"heads.0.weight", "heads.0.bias"} and sequence.grad.abs().amax(dim=-1).min() > 0


def test_mae_predicts_from_the_order_of_the_visible_patches_not_of_the_list():
    """Sequence tokens permuted together with their positions give the same predictions; permuted alone, others."""
    task, positions = losses.MAE(8), torch.tensor([[[0, 2, 3]]])
    batch = dict(sequence=noise(1, 1, 3, 8), positions=positions, places=noise(5, 8), patch=0)
    moved = dict(batch, sequence=batch["sequence"].flip(2), positions=positions.flip(2))
    torch.testing.assert_close(task.predict(batch), task.predict(moved))
    assert (task.predict(batch) - task.predict(dict(batch, sequence=moved["sequence"]))).abs().max() > 0.01


@pytest.mark.parametrize("patch", ["1", "16x16,128x2"])
def test_what_mae_predicts_is_what_the_trunk_would_have_been_given(patch, store):  # noqa: F811
    """At the kept positions the target is the input; so at the others it is what was dropped there."""
    network = model.MT2(("mae",), dim=24, depth=1, heads=2, patch=patch)
    segments = data.Segments(data.open_data([store]), 4)
    batch = train.make_batch(segments, network, 0, 3, 0.75, 10, "cpu", slice(1, 3))
    for (_, mel, kept), size in zip(batch["inputs"], network.patches):
        whole = model.cut_patches(batch["whole_mel"], size or (128, 1))
        assert len(network.places(size)) == whole.shape[2] > kept.shape[2]
        assert torch.equal(mel, whole.gather(2, kept[..., None].expand_as(mel)))


def test_mae_learns_more_than_the_mean(store, tmp_path, monkeypatch):
    """A prediction of 0 has a loss of 1."""
    run(monkeypatch, "--tokens", "mae", "--data", store, "--batch-size", 4, "--steps", 40, "--lr", 0.01, "--log-every", 1, "--out", tmp_path / "run")
    found = [json.loads(line)["mae"] for line in open(tmp_path / "run" / "log.jsonl")]
    assert found[0] > 1 and max(found[-3:]) < 0.8


# ---------------------------------------------------------------- training with any of them


@pytest.mark.parametrize("tokens", [*losses.PRETEXT, ",".join(losses.PRETEXT)])
def test_every_token_alone_and_all_together_resume_bit_for_bit(tokens, store, tmp_path, monkeypatch):
    common = ("--tokens", tokens, "--data", store, "--batch-size", 4, "--steps", 2, "--log-every", 1)
    run(monkeypatch, *common, "--out", tmp_path / "a")
    run(monkeypatch, *common, "--out", tmp_path / "b", "--stop-at", 1)
    run(monkeypatch, "--out", tmp_path / "b", "--resume", "--log-every", 1)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert same(a, b) and ("teacher" in a) == bool({"byol", "cluster"} & set(tokens.split(",")))
    for name, value in a.get("teacher", {}).items():
        assert torch.equal(value, b["teacher"][name])
    last = json.loads(open(tmp_path / "a" / "log.jsonl").readlines()[-1])
    assert {*tokens.split(","), *(f"{t}_rank" for t in tokens.split(",")), *(f"{t}_deviation" for t in tokens.split(","))} <= set(last)
    assert model.load_checkpoint(tmp_path / "a" / "checkpoint.pt").tokens == tuple(tokens.split(","))


def test_teacher_is_a_moving_average_and_stops_at_the_end():
    student = model.MT2(("byol",), dim=24, depth=1, heads=2)
    teacher = model.MT2(("byol",), dim=24, depth=1, heads=2)
    before, goal = teacher.positions.detach().clone(), student.positions.detach()
    train.update_teacher(teacher, student, 0.0)
    torch.testing.assert_close(teacher.positions.detach(), before + 0.004 * (goal - before))
    now = teacher.positions.detach().clone()
    train.update_teacher(teacher, student, 1.0)
    assert torch.equal(now, teacher.positions)


def test_labels_from_a_csv(store, tmp_path, monkeypatch, capsys):
    paths = data.FrameStore(store).paths
    for share in (1, len(paths)):
        out = tmp_path / f"run{share}"
        rows = "\n".join(f"{p},{key}" for p, key in zip(paths[:share], ["A minor", "C major"] * 9))
        (tmp_path / "keys.csv").write_text(f"file,key\n{rows}\nlost.wav,X\n", encoding="utf-8")
        run(monkeypatch, "--tokens", "tone", "--labels-csv", tmp_path / "keys.csv", "--data", store, "--batch-size", len(paths), "--steps", 2,
            "--log-every", 1, "--out", out)
        line = json.loads(open(out / "log.jsonl").readline())
        assert line["labelled_share"] == pytest.approx(share / len(paths), rel=1e-4) and line["supervised_term"] > 0
    with pytest.raises(data.InputError, match="only the token tone"):
        run(monkeypatch, "--tokens", "cpsd", "--labels-csv", tmp_path / "keys.csv", "--data", store, "--out", tmp_path / "c")
    (tmp_path / "keys.csv").write_text("file,key\nelsewhere.wav,C major\n")
    with pytest.raises(data.InputError, match="keys.csv"):
        run(monkeypatch, "--tokens", "tone", "--labels-csv", tmp_path / "keys.csv", "--data", store, "--batch-size", 4, "--out", tmp_path / "d")


def test_a_collapse_is_flagged(store, tmp_path, monkeypatch, capsys):
    """A token that is equal for all tracks: the log shows it, and a line warns once."""
    healthy = dict(a=noise(16, 24), b=noise(16, 24, seed=1))
    report, collapsed = train.collapse_report(healthy | dict(flat=torch.ones(16, 24), line=noise(16, 1) @ noise(1, 24)))
    assert collapsed == ["flat", "line"] and report["a_rank"] > 10 and report["flat_deviation"] == 0
    forward = model.MT2.forward

    def constant(self, *args, **options):
        tokens, inside = forward(self, *args, **options)
        return {name: token * 0 + 1 for name, token in tokens.items()}, inside
    monkeypatch.setattr(model.MT2, "forward", constant)
    run(monkeypatch, "--tokens", "ntxent", "--data", store, "--batch-size", 4, "--steps", 2, "--log-every", 1, "--out", tmp_path / "run")
    assert "".join(capsys.readouterr()).count("the ntxent token has collapsed") == 1


def test_a_pretext_task_of_your_own(store, tmp_path, monkeypatch):
    """The exercise of the laboratory book, as printed there: one class and one line register a task."""
    book = (Path(__file__).parent / "README.md").read_text()
    code = textwrap.dedent(re.search(r"^    class Loudness.*?(?=^A probe)", book, flags=re.S | re.M)[0])
    own = vars(losses) | dict(PRETEXT={})
    exec(code, own)
    monkeypatch.setitem(losses.PRETEXT, "loudness", own["PRETEXT"]["loudness"])

    for name, flags in (("frames", ["--tokens", "cpsd,loudness"]), ("patches", ["--tokens", "loudness", "--patch", "16x16"])):
        run(monkeypatch, *flags, "--data", store, "--batch-size", 4, "--steps", 2, "--log-every", 1, "--out", tmp_path / name)
        assert 0.1 < json.loads(open(tmp_path / name / "log.jsonl").readline())["loudness"] < 5


# ---------------------------------------------------------------- patches, pooling, presets


@pytest.mark.parametrize("patch, tokens", [("16x16", [56]), ("128x2", [63]), ("16x16,128x2", [56, 63])])
def test_patches_train_masked_and_pooled(patch, tokens, store, tmp_path, monkeypatch):
    seen = []
    forward = model.Block.forward
    monkeypatch.setattr(model.Block, "forward", lambda self, x, *rest: seen.append(x.shape[1]) or forward(self, x, *rest))
    run(monkeypatch, "--tokens", "ntxent", "--patch", patch, "--pool", "mean", "--mask", 0.9, "--data", store, "--batch-size", 4, "--steps", 1,
        "--out", tmp_path / "run")
    assert seen == [round(0.1 * n) for n in tokens]
    network = model.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert [model.cut_patches(torch.zeros(1, data.SEGMENT, 128), size).shape[1] for size in network.patches] == tokens and network.class_token_count == 0


def test_kept_patches_equal_those_of_the_whole_segment():
    """Cut, kept and embedded at their positions, patches give the tokens that the whole segment has there."""
    network = model.MT2(("ntxent",), dim=24, depth=0, heads=2, patch="16x16", pool="mean").eval()
    cqt, mel = torch.zeros(2, 126, data.CROP_BINS), noise(2, 126, data.N_MELS).sigmoid()
    every = network(cqt, mel, layers=(0,))[1][0]                            # (2, 56, dim) after the norm of depth 0
    kept = torch.tensor([[3, 20, 55], [0, 9, 41]])
    patches = model.cut_patches(mel, (16, 16))                              # (2, 56, 256)
    patches = patches.gather(1, kept[..., None].expand(-1, -1, 256))
    some = network(None, patches, kept, layers=(0,))[1][0]
    torch.testing.assert_close(some, every.gather(1, kept[..., None].expand(-1, -1, 24)))
    changed = mel.clone()
    changed[:, 16:32, 32:48] = 0                                            # second column, third row of patches
    different = (network(cqt, changed, layers=(0,))[1][0] - every).abs().amax(dim=(0, 2)) > 1e-6
    assert different.nonzero().flatten().tolist() == [1 * 8 + 2]


@pytest.mark.parametrize("size", [(16, 16), (128, 2), (8, 100)])
def test_patches_of_bytes_equal_patches_of_floats(size):
    mel = torch.randint(256, (2, 3, 126, data.N_MELS), dtype=torch.uint8)
    torch.testing.assert_close(model.cut_patches(mel, size).float() / 255, model.cut_patches(mel.float() / 255, size))


def test_only_kept_patches_of_the_mel_travel_to_the_device(store):
    """The input of the trunk has no CQT, and of the mel a tenth of the patches, in the order of their positions."""
    network = model.MT2(("ntxent",), dim=24, depth=1, heads=2, patch="16x16,128x2", pool="mean")
    segments = data.Segments(data.open_data([store]), 4)
    batch = train.make_batch(segments, network, 0, 3, 0.9, 10, "cpu")
    assert "cqt" not in batch and "mel" not in batch
    frames = drawn_batch(segments, 0, 3, 2)["frames"]
    for (cqt, mel, kept), size in zip(batch["inputs"], network.patches):
        whole = model.cut_patches(frames[..., data.N_BINS:].float() / 255, size)
        assert cqt is None and mel.shape[:3] == (2, 4, round(0.1 * whole.shape[2]))
        torch.testing.assert_close(mel, whole.gather(2, kept[..., None].expand(-1, -1, -1, whole.shape[3])))


def test_mean_pooling_is_the_mean_and_short_input_is_zero_padded():
    network = model.MT2(("ntxent",), dim=24, depth=2, heads=2, patch="128x2", pool="mean").eval()
    cqt, mel = torch.zeros(3, 9, data.CROP_BINS), noise(3, 9, data.N_MELS).sigmoid()
    tokens, layers = network(cqt, mel, layers=(2,))
    assert layers[2].shape == (3, 4, 24)
    torch.testing.assert_close(tokens["ntxent"], layers[2].mean(dim=1))
    assert network(cqt[:, :1], mel[:, :1], layers=(2,))[1][2].shape == (3, 1, 24)


def test_what_does_not_fit_is_refused():
    for options, word in ((dict(patch="7x2"), "patch"), (dict(patch="16x16,16x16"), "patch"), (dict(patch="x"), "patch"),
                          (dict(patch="1x" + "9" * 5000), "patch"), (dict(pool="max"), "pool"),
                          (dict(tokens=("cpsd",), patch="16x16"), "CQT"), (dict(tokens=("chroma",)), "chroma")):
        with pytest.raises(ValueError, match=word):
            model.MT2(**({"tokens": ("ntxent",), "dim": 24, "depth": 1, "heads": 2} | options))


@pytest.mark.parametrize("preset, millions", [("mt2", 5.4), ("demo", 5.4), ("vit1d", 5.4), ("stone", 5.4), ("skey", 5.4),
                                              ("myna-base", 21.5), ("myna-vertical", 21.5), ("myna-hybrid", 21.6), ("small", 0.85)])
def test_presets_have_the_size_of_their_papers(preset, millions):
    """Without the projector, which only training needs: 5.4 M (MT2), 22 M (Myna)."""
    p = train.PRESETS[preset]
    tokens = p["tokens"].split(",")
    shape = {name: p[name] for name in ("patch", "pool", "inputs")}
    network = model.MT2(tokens, p["dim"], p["depth"], p["heads"], **shape)
    total = sum(x.numel() for x in network.parameters())
    assert total == parameter_count(tokens, p["dim"], p["depth"], **shape)
    projectors = sum(x.numel() for name, head in network.tasks.items() if head.branch == "mel" for x in head.parameters())
    assert (total - projectors) / 1e6 == pytest.approx(millions, rel=0.02)


def test_presets_reach_the_checkpoint(store, tmp_path, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "skey", dict(train.PRESETS["skey"], dim=24, depth=1))
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "skey", "--device", "cpu", "--no-probe", "--data", str(store), "--batch-size", "4",
                                      "--steps", "1", "--out", str(tmp_path / "run")])
    train.main()
    settings = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["settings"]
    assert settings["preset"] == "skey" and settings["tokens"] == "skey" and settings["lr"] == 1e-3 and settings["mask"] == 0.0 and settings["patch"] == "1"
    assert settings["inputs"] == "cqt" and model.load_checkpoint(tmp_path / "run" / "checkpoint.pt").inputs == ["cqt"]
