"""The transformer: sizes, class tokens, masking, layers and checkpoints."""
import math
import pickle
import re

import pytest
import torch

import data
import model as model_file
from data import CROP_BINS, N_MELS, SEGMENT
from losses import PRETEXT, cpsd, nt_xent, sum_relatives
from model import MT2, Block, load_checkpoint, parse_patch

SMALL = dict(dim=32, depth=2, heads=2, frames=20)


def make(tokens=("cpsd", "ntxent"), seed=0, **changes):
    """A small model in eval mode, its positions, class tokens and blocks (initially the identity) large enough to matter."""
    torch.manual_seed(seed)
    model = MT2(tokens, **{**SMALL, **changes}).eval()
    with torch.no_grad():
        model.positions.normal_()
        model.class_tokens.normal_()
        for block in model.blocks:
            torch.nn.init.xavier_uniform_(block.out.weight)
            torch.nn.init.xavier_uniform_(block.mlp[-1].weight)
    return model


def views(batch=3, frames=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, CROP_BINS, generator=generator), torch.rand(batch, frames, N_MELS, generator=generator)


def assert_same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- sizes


def parameter_count(tokens, dim, depth, frames=SEGMENT, patch="1", pool="token", inputs="cqt,mel"):
    """Number of parameters by formula: what each part costs, the heads of the pretext tasks counted as they are."""
    block = 12 * dim ** 2 + 13 * dim                                       # qkv, out, two-layer MLP, two norms
    sizes = parse_patch(patch)
    bins = [{"cqt": CROP_BINS, "mel": N_MELS}[name] for name in inputs.split(",")]
    tokenisers = (sum(2 * n + n * dim + dim for n in bins) + frames * dim if sizes == [None]
                  else sum(2 * n + n * dim + 3 * dim for n in map(math.prod, sizes)))
    heads = sum(p.numel() for name in tokens for p in PRETEXT[name](dim).parameters())
    return depth * block + tokenisers + (len(tokens) * dim if pool == "token" else 0) + 2 * dim + heads


@pytest.mark.parametrize("config", [
    dict(tokens=("cpsd",), dim=32, depth=0, heads=2, frames=7), dict(tokens=("ntxent",), dim=24, depth=3, heads=3, frames=126),
    dict(tokens=("cpsd", "ntxent"), dim=64, depth=2, heads=4, frames=50), dict(tokens=("ntxent", "cpsd"), dim=128, depth=4, heads=2)])
def test_parameter_count_formula(config):
    real = sum(p.numel() for p in MT2(**config).parameters())
    assert real == parameter_count(**{k: v for k, v in config.items() if k != "heads"})


def test_paper_size():
    assert 12 * sum(p.numel() for p in Block(192, 3).parameters()) == 5_338_368
    assert 5.35e6 < parameter_count(("cpsd",), 192, 12) < 5.45e6


def test_the_sizes_of_model_and_data_agree():
    for name in ("CROP_BINS", "N_MELS", "SEGMENT"):
        assert getattr(model_file, name) == getattr(data, name)


def test_equivariant_at_initialisation():
    """Before any training, moving music up by a semitone (within an octave) rotates the profile by one class."""
    torch.manual_seed(0)
    model = MT2(("cpsd",), dim=48, depth=2, heads=2).eval()
    with torch.no_grad():
        model.class_tokens.zero_()
    cqt, mel = views()
    cqt[..., :36] = cqt[..., 47:] = 0
    profile, moved = (sum_relatives(model.tasks["cpsd"].log_keys(model(x, torch.zeros_like(mel))[0]["cpsd"])) for x in (cqt, cqt.roll(1, -1)))
    assert_same(profile.roll(1, -1), moved)
    assert profile.std() > 0.01


# ---------------------------------------------------------------- class tokens


def test_class_tokens_are_found_by_name_whatever_their_order():
    first, second = make(("cpsd", "ntxent")), make(("ntxent", "cpsd"), seed=9)
    state = first.state_dict()
    state["class_tokens"] = state["class_tokens"].flip(0)
    second.load_state_dict(state)
    a, b = first(*views())[0], second(*views())[0]
    assert set(a) == set(b) == {"cpsd", "ntxent"}
    for name in a:
        assert_same(a[name], b[name])
    assert (a["cpsd"] - a["ntxent"]).abs().max() > 0.1


def test_each_class_token_starts_from_its_own_branch():
    """Without blocks nothing is mixed: cpsd depends on the CQT alone, ntxent on the mel spectrogram alone."""
    model, (cqt, mel) = make(depth=0), views()
    plain, other_cqt, other_mel = model(cqt, mel)[0], model(cqt.flip(-1), mel)[0], model(cqt, mel.flip(-1))[0]
    assert torch.equal(plain["cpsd"], other_mel["cpsd"]) and not torch.allclose(plain["cpsd"], other_cqt["cpsd"])
    assert torch.equal(plain["ntxent"], other_cqt["ntxent"]) and not torch.allclose(plain["ntxent"], other_mel["ntxent"])


@pytest.mark.parametrize("inputs, tokens", [("mel", ("ntxent", "byol")), ("cqt", ("ntxent", "cpsd"))])
def test_a_spectrogram_that_is_no_input_has_no_effect(inputs, tokens):
    """Nor parameters. Class tokens start from the one there is, and the frames are its tokens alone."""
    model, (cqt, mel) = make(tokens, inputs=inputs), views()
    plain, layers = model(cqt, mel, layers=[0])
    other = (None, mel) if inputs == "mel" else (cqt, 1 - mel)
    assert all(torch.equal(plain[name], token) for name, token in model(*other)[0].items())
    embedded = model.tokenisers[inputs](mel if inputs == "mel" else cqt)
    assert_same(layers[0][:, 2:], embedded + model.positions)
    assert_same(layers[0][:, :2], embedded.mean(dim=1, keepdim=True) + model.class_tokens)
    left_out = {"mel": 2 * CROP_BINS + CROP_BINS * 32 + 32, "cqt": 2 * N_MELS + N_MELS * 32 + 32}[inputs]
    count = lambda network: sum(p.numel() for p in network.parameters())
    assert count(make(tokens)) - count(model) == left_out


def test_inputs_that_do_not_fit_are_refused():
    for options in (dict(inputs="mel"), dict(inputs="chroma"), dict(inputs=""), dict(inputs="cqt", patch="16x16")):
        with pytest.raises(ValueError, match="inputs"):
            MT2(**SMALL, **options)


def test_with_blocks_each_class_token_depends_on_both_branches():
    model, (cqt, mel) = make(), views()
    plain = model(cqt, mel)[0]
    for changed in (model(cqt.flip(-1), mel)[0], model(cqt, mel.flip(-1))[0]):
        for name in plain:
            assert (plain[name] - changed[name]).abs().max() > 1e-3


@pytest.mark.parametrize("loss, own, other", [("cpsd", "cpsd", "ntxent"), ("ntxent", "ntxent", "cpsd")])
def test_a_loss_trains_its_own_head_and_the_trunk_only(loss, own, other):
    model = make().train()
    token = model(*views(batch=6))[0][own]
    if loss == "cpsd":
        cpsd(sum_relatives(model.tasks["cpsd"].log_keys(token)).view(2, 3, 12), torch.tensor([[1, 2, 3], [0, 0, 0]])).backward()
    else:
        nt_xent(model.tasks["ntxent"].head(token).view(2, 3, -1)).backward()
    assert all(p.grad is None for p in model.tasks[other].parameters())
    trunk = [*model.tasks[own].parameters(), *model.tokenisers.parameters(), *model.blocks.parameters(),
             model.positions, model.class_tokens]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in trunk)


def test_heads_give_a_profile_and_an_embedding():
    model = make()
    tokens, _ = model(*views())
    profile = sum_relatives(model.tasks["cpsd"].log_keys(tokens["cpsd"]))
    assert profile.shape == (3, 12) and (profile >= 0).all()
    assert_same(profile.sum(-1), torch.ones(3), 1e-6)
    assert model.tasks["ntxent"].head(tokens["ntxent"]).shape == (3, 128)


# ---------------------------------------------------------------- positions and masks


def test_without_positions_frames_are_the_first_ones_in_order():
    model, (cqt, mel) = make(), views(frames=12)
    given = model(cqt, mel, torch.arange(12).expand(3, 12))[0]
    for name, token in model(cqt, mel)[0].items():
        assert_same(token, given[name], 1e-5)


def test_order_of_frames_is_known_through_positions_alone():
    """Frames permuted together with their positions give the same tokens; permuted without them, others."""
    model, (cqt, mel) = make(), views()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    plain, moved = model(cqt, mel)[0], model(cqt[:, order], mel[:, order], order.expand(3, 20))[0]
    shuffled = model(cqt[:, order], mel[:, order])[0]
    for name in plain:
        assert_same(plain[name], moved[name])
        assert (plain[name] - shuffled[name]).abs().max() > 0.01


def test_kept_frames_keep_their_own_position():
    """Each item of the batch may keep other frames; every one, after the two class tokens, is that frame's token of the full segment."""
    model, (cqt, mel) = make(), views()
    positions = torch.tensor([[0, 3, 19], [1, 2, 3], [7, 8, 18]])
    pick = lambda x: x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
    full, kept = model(cqt, mel, layers=[0])[1][0], model(pick(cqt), pick(mel), positions, layers=[0])[1][0]
    assert kept.shape == (3, 2 + 3, 32)
    assert_same(kept[:, 2:], pick(full[:, 2:]), 1e-5)


@pytest.mark.parametrize("kept", [1, 5, 20])
def test_masked_frames_are_dropped(kept):
    model, seen = make(), []
    model.blocks[0].register_forward_hook(lambda block, args, output: seen.append(args[0].shape))
    cqt, mel = views(frames=kept)
    model(cqt, mel, torch.arange(20 - kept, 20).expand(3, kept))
    assert seen == [(3, 2 + kept, 32)]


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("tokens", [("cpsd",), ("ntxent", "cpsd")])
def test_layers_hold_the_class_tokens_then_the_frames(tokens):
    model, (cqt, mel), outputs, count = make(tokens, depth=3), views(frames=11), [], len(tokens)
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    classes, layers = model(cqt, mel, layers=range(4))
    assert sorted(layers) == [0, 1, 2, 3] and all(layers[i].shape == (3, count + 11, 32) for i in layers)
    branch = {"cpsd": model.tokenisers["cqt"](cqt), "ntxent": model.tokenisers["mel"](mel)}
    assert_same(layers[0][:, count:], branch["cpsd"] + branch["ntxent"] + model.positions[:11])
    assert_same(layers[1], outputs[0])
    assert_same(layers[2], outputs[1])
    assert_same(layers[3], model.norm(outputs[2]))
    for i, name in enumerate(tokens):
        assert_same(layers[0][:, i], branch[name].mean(dim=1) + model.class_tokens[i])
        assert torch.equal(classes[name], layers[3][:, i])


@pytest.mark.parametrize("layer", [0, 1, 2])  # 2: without it, the last block computes the class tokens alone
def test_asking_for_layers_changes_nothing_and_gives_only_these(layer):
    model = make()
    plain, nothing = model(*views())
    asked, layers = model(*views(), layers=[layer])
    assert nothing == {} and list(layers) == [layer]
    for name in plain:
        assert_same(plain[name], asked[name], 1e-5)


def test_class_tokens_do_not_reach_the_frames_of_layer_0():
    model = make()
    before = model(*views(), layers=[0])[1][0]
    with torch.no_grad():
        model.class_tokens.add_(100)
    after = model(*views(), layers=[0])[1][0]
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert_same(after[:, :2] - before[:, :2], torch.full((3, 2, 32), 100.0), 1e-3)


def test_eval_is_deterministic_and_items_are_independent():
    model, (cqt, mel) = make(), views(batch=8)
    first, again = model(cqt, mel, layers=[2]), model(cqt, mel, layers=[2])
    alone = model(cqt[5:6], mel[5:6], layers=[2])
    assert torch.equal(first[1][2], again[1][2])
    assert_same(first[1][2][5:6], alone[1][2], 1e-5)
    for name in first[0]:
        assert torch.equal(first[0][name], again[0][name])
        assert_same(first[0][name][5:6], alone[0][name], 1e-5)


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize("tokens", [(), ("chroma",), ("cpsd", "cpsd"), ("cpsd", "ntxent", "cqt"), "cpsd"])
def test_unknown_repeated_or_no_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens"):
        MT2(tokens, **SMALL)


def test_a_dim_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="heads"):
        MT2(dim=32, depth=1, heads=3)


def test_too_many_frames_are_refused():
    with pytest.raises(ValueError, match="21 frames"):
        make()(*views(frames=21))


@pytest.mark.parametrize("cqt, mel", [((2, 9, 96), (2, 9, 128)), ((2, 9, 84), (2, 9, 64)), ((2, 9, 84), (2, 8, 128)),
                                      ((2, 9, 84), (3, 9, 128)), ((2, 84, 9), (2, 128, 9)), ((9, 84), (9, 128))])
def test_shapes_that_do_not_fit_are_refused(cqt, mel):
    with pytest.raises(ValueError):
        make()(torch.zeros(cqt), torch.zeros(mel))


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_gpu_only_where_it_is_native(native, monkeypatch):
    """A T4 emulates bf16, slower than fp32."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or native)
    assert model_file.pick_amp(torch.device("cuda"))[0] == native and asked == [False]


@pytest.mark.parametrize("shape", [(2, 8), (2, 1), (1, 9, 1)])
def test_positions_that_do_not_fit_the_frames_are_refused(shape):
    with pytest.raises(ValueError):
        make()(*views(batch=2, frames=9), torch.zeros(shape, dtype=torch.int64))


# ---------------------------------------------------------------- checkpoints


class Code:
    """When unpickled carelessly, leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refuse(path):
    """The checkpoint must be refused with one line that names it."""
    with pytest.raises(ValueError, match=re.escape(path.name)) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_checkpoint_round_trip(tmp_path):
    model = make(("ntxent", "cpsd"))
    torch.save({"config": model.config, "model": model.state_dict(), "step": 3}, tmp_path / "checkpoint.pt")
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    assert not loaded.training and loaded.config == model.config
    expected, result = model(*views())[0], loaded(*views())[0]
    assert all(torch.equal(expected[name], result[name]) for name in ("cpsd", "ntxent"))


def test_a_configuration_from_before_inputs_has_both(tmp_path):
    model = make()
    config = {name: value for name, value in model.config.items() if name != "inputs"}
    torch.save({"config": config, "model": model.state_dict()}, tmp_path / "checkpoint.pt")
    assert load_checkpoint(tmp_path / "checkpoint.pt").inputs == ["cqt", "mel"]


def test_half_precision_weights_load(tmp_path):
    model = make()
    half = {name: weight.half() for name, weight in model.state_dict().items()}
    torch.save({"config": model.config, "model": half}, tmp_path / "checkpoint.pt")
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    assert loaded.positions.dtype == torch.float32
    assert_same(loaded.positions, model.positions, 1e-2)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    refuse(path)                                               # missing
    path.write_bytes(b"")
    refuse(path)
    path.write_text("this is a shopping list\n")
    refuse(path)
    model = make()
    torch.save({"config": model.config, "model": model.state_dict()}, path)
    whole = path.read_bytes()
    for share in (0.01, 0.5, 0.99):
        path.write_bytes(whole[:int(len(whole) * share)])
        refuse(path)
    refuse(tmp_path)                                           # a folder


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    model = make()
    torch.save({"config": model.config, "model": model.state_dict(), "extra": Code(trace)}, path)
    refuse(path)
    path.write_bytes(pickle.dumps(Code(trace), protocol=2))
    refuse(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes()).close()                    # the trap itself works
    assert trace.exists()


def test_dictionaries_of_another_shape_are_refused(tmp_path):
    model, path = make(), tmp_path / "checkpoint.pt"
    config, state = model.config, model.state_dict()
    for content in ([1, 2], {}, {"model": state}, {"config": config}, state, {"config": [1], "model": state},
                    {"config": {**config, "colour": 3}, "model": state}, {"config": {**config, "tokens": ["byol"]}, "model": state},
                    {"config": config, "model": [1]}, {"config": config, "model": {"norm.weight": 3}}):
        torch.save(content, path)
        refuse(path)


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path):
    model, path = make(), tmp_path / "checkpoint.pt"
    for changes in (dict(dim=64), dict(depth=3), dict(frames=21), dict(tokens=["cpsd"]), dict(heads=5)):
        torch.save({"config": {**model.config, **changes}, "model": model.state_dict()}, path)
        refuse(path)
    missing = {k: v for k, v in model.state_dict().items() if k != "norm.bias"}
    torch.save({"config": model.config, "model": missing}, path)
    refuse(path)
