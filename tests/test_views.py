"""From the store to training batches: crops, segments, masks, and that nothing is mixed up on the way."""
import json

import numpy as np
import pytest
import torch

import data
from conftest import drawn_batch
from data import CROP_BINS, MAX_CROP, PIECE, SEGMENT, FrameStore, InputError, Segments, crop_views, front_end_settings


def make_store(folder, lengths, number=0):
    """A store whose bytes say where they come from: column 0 the store, 1-2 the track, 3-4 the frame in the track."""
    folder.mkdir()
    rows = []
    for track, length in enumerate(lengths):
        frames, t = np.zeros((length, 224), np.uint8), np.arange(length)
        frames[:, 0], frames[:, 1], frames[:, 2], frames[:, 3], frames[:, 4] = number, track // 256, track % 256, t // 256, t % 256
        rows.append(frames)
    np.concatenate(rows).tofile(folder / "frames.bin")
    lines = [json.dumps(dict(path=f"track {i}", frames=length)) + "\n" for i, length in enumerate(lengths)]
    (folder / "index.jsonl").write_text("".join(lines))
    (folder / "store.json").write_text(json.dumps(dict(front_end_settings(), tracks=1)))
    return FrameStore(folder)


def decode(frames):
    """(..., 224) uint8 -> (...) store, track, frame."""
    x = frames[..., :5].long()
    return x[..., 0], 256 * x[..., 1] + x[..., 2], 256 * x[..., 3] + x[..., 4]


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    """40 tracks with room for two segments, at the limit (252), one frame under it, and of one segment (126)."""
    lengths = [600, 400, 252, 251, 126, 938, 1875, 3000] * 5
    return Segments([make_store(tmp_path_factory.mktemp("views") / "store", lengths)], batch_size=32), np.array(lengths)


def batch_of(segments, *args, **options):
    """frames, crops, positions and keys of a batch."""
    batch = drawn_batch(segments, *args, **options)
    return batch["frames"], batch["crops"], batch["positions"], batch["keys"]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- crops


def test_a_crop_further_up_shows_a_tone_further_down():
    wave = torch.sin(2 * np.pi * 440 * torch.arange(32000) / 16000)[None]
    frames = (data.FrontEnd()(wave)[0, 20:40] * 255).round().to(torch.uint8)
    for c in range(MAX_CROP + 1):
        cqt, mel = crop_views(frames, torch.tensor(c))
        assert (cqt.argmax(dim=-1) == 48 - c).all()            # the note A4 is row 48 of the CQT
        assert torch.equal(mel, frames[:, 96:].float() / 255)


def test_crops_agree_where_they_overlap():
    frames = torch.randint(0, 256, (13, 5, 224), dtype=torch.uint8)
    cqt, mel = crop_views(frames[:1].expand(13, 5, 224), torch.arange(13))                     # one crop an item
    assert cqt.shape == (13, 5, CROP_BINS) and mel.shape == (13, 5, 128) and cqt.dtype == torch.float32
    for c in range(13):
        assert torch.equal(cqt[c], frames[0, :, c:c + CROP_BINS].float() / 255)
        for d in range(13 - c):
            assert torch.equal(cqt[c + d, :, :CROP_BINS - d], cqt[c, :, d:])


def test_each_view_and_item_has_its_own_crop():
    frames, crops = torch.randint(0, 256, (3, 4, 5, 224), dtype=torch.uint8), torch.randint(0, 13, (3, 4))
    cqt, mel = crop_views(frames, crops)
    for v in range(3):
        for i in range(4):
            one = crop_views(frames[v, i], crops[v, i])
            assert torch.equal(cqt[v, i], one[0]) and torch.equal(mel[v, i], one[1])


# ---------------------------------------------------------------- batches


def test_a_batch_is_a_pure_function_of_seed_and_step(segments):
    segments, _ = segments
    first = batch_of(segments, 1, 5, mask=0.5)
    batch_of(segments, 1, 6, mask=0.5)
    np.random.seed(0)
    assert same(batch_of(segments, 1, 5, mask=0.5), first)
    assert not same(batch_of(segments, 1, 6, mask=0.5), first) and not same(batch_of(segments, 2, 5, mask=0.5), first)


def test_shapes_and_types(segments):
    frames, crops, positions, _ = batch_of(segments[0], 0, 0, mask=0.75)
    kept = round(SEGMENT * 0.25)
    assert frames.shape == (3, 32, kept, 224) and frames.dtype == torch.uint8
    assert crops.shape == (3, 32) and positions.shape == (3, 32, kept)
    assert crops.dtype == positions.dtype == torch.int64
    frames, crops, positions, _ = batch_of(segments[0], 0, 0, views=2)
    assert frames.shape == (2, 32, SEGMENT, 224) and crops.shape == (2, 32) and positions.shape == (2, 32, SEGMENT)


def test_views_0_and_1_share_their_crop_and_view_2_never_does(segments):
    crops = torch.cat([batch_of(segments[0], 0, step)[1] for step in range(150)], dim=1)           # (3, 4800)
    assert torch.equal(crops[0], crops[1]) and (crops[0] != crops[2]).all()
    one_a_step = crops.unflatten(1, (150, 32))                             # NT-Xent must not find partners by their crop
    assert (one_a_step[0] == one_a_step[0, :, :1]).all() and (one_a_step[2] != one_a_step[2, :, :1]).any()
    for view in (0, 2):
        share = torch.bincount(crops[view], minlength=13) / crops.shape[1]
        assert len(share) == 13 and share.min() > 0.5 / 13 and share.max() < 1.5 / 13
    differences = torch.bincount((crops[2] - crops[0]) % 13, minlength=13)
    assert differences[0] == 0 and differences[1:].min() > 200


@pytest.mark.parametrize("mask, kept", [(0.0, 126), (0.5, 63), (0.75, 32), (0.999, 1), (1.0, 1)])
def test_a_mask_keeps_the_right_number_of_frames(segments, mask, kept):
    positions = torch.cat([batch_of(segments[0], 0, step, mask=mask)[2] for step in range(20)], dim=1)
    assert positions.shape == (3, 640, kept)
    assert positions.min() >= 0 and positions.max() <= SEGMENT - 1
    assert (positions.diff(dim=-1) > 0).all()                  # sorted, none twice
    assert len(positions.unique()) == SEGMENT                  # each frame is kept at times
    assert kept == SEGMENT or not torch.equal(positions[0], positions[2])                      # each view keeps its own


def located(segments, steps, mask=0.5):
    """Track and first frame of every segment, both (3, items), after checking that all frames of one belong together."""
    tracks, starts = [], []
    for step in range(steps):
        frames, _, positions, _ = batch_of(segments, 3, step, mask=mask)
        _, track, frame = decode(frames)
        start = frame - positions
        assert (track == track[..., :1]).all() and (start == start[..., :1]).all()
        tracks.append(track[..., 0])
        starts.append(start[..., 0])
    return torch.cat(tracks, dim=1).numpy(), torch.cat(starts, dim=1).numpy()


@pytest.fixture(scope="module")
def drawn(segments):
    """Lengths of the tracks, and track and first frame of the segments of 100 batches."""
    return segments[1], *located(segments[0], steps=100)


def test_views_come_from_the_right_frames_of_one_piece(drawn):
    lengths, track, start = drawn
    assert (track[0] == track[1]).all() and (track[0] == track[2]).all()
    assert (start[0] == start[2]).all()                        # views 0 and 2 are the same segment
    counts = np.maximum(1, lengths // PIECE)
    piece = start // (lengths // counts)[track]
    assert (start >= 0).all() and (start + SEGMENT <= lengths[track]).all()
    assert (piece[0] == piece[1]).all() and (piece[0] == (start[0] + SEGMENT - 1) // (lengths // counts)[track[0]]).all()
    assert {(t, p) for t, p in zip(track[0], piece[0])} == {(t, p) for t in range(40) for p in range(counts[t])}


def test_the_two_segments_do_not_overlap_where_there_is_room(drawn):
    lengths, track, start = drawn
    distance = np.abs(start[0] - start[1])
    room = lengths[track[0]] >= 2 * SEGMENT
    assert (distance[room] >= SEGMENT).all() and room.any() and not room.all()
    assert (distance[lengths[track[0]] == 252] == SEGMENT).all()
    order = (start[0] < start[1])[room].mean()
    assert 0.45 < order < 0.55                                 # which of them is view 0 is a coin toss
    long = lengths[track[0]] == 600
    assert start[0][long].min() < 20 and start[0][long].max() > 600 - SEGMENT - 20             # the whole piece is used


def test_no_piece_is_twice_in_a_batch_and_all_are_drawn(tmp_path):
    segments = Segments([make_store(tmp_path / "store", [300] * 12)], batch_size=12)
    for step in range(5):
        _, track, _ = decode(batch_of(segments, 0, step)[0])
        assert sorted(track[0, :, 0].tolist()) == list(range(12))


def test_several_stores_are_not_mixed_up(tmp_path):
    lengths = [[300, 200, 1000], [400], [150, 50, 500, 900]]
    stores = [make_store(tmp_path / str(n), sizes, n) for n, sizes in enumerate(lengths)]
    segments, seen = Segments(stores, batch_size=5), set()
    for step in range(60):
        frames, _, positions, _ = batch_of(segments, 0, step, mask=0.9)
        store, track, frame = decode(frames)
        start = frame - positions
        for x in (store, track):
            assert (x == x[:1, :, :1]).all()
        assert (start == start[..., :1]).all()
        for s, t, first in zip(store[0, :, 0].tolist(), track[0, :, 0].tolist(), start.amin(dim=(0, 2)).tolist()):
            seen.add((s, t))
            assert 0 <= first <= lengths[s][t] - SEGMENT
    assert seen == {(s, t) for s in range(3) for t in range(len(lengths[s])) if lengths[s][t] >= SEGMENT}


def test_mix_says_how_often_each_store_is_drawn_from(tmp_path):
    stores = [make_store(tmp_path / "a", [400] * 90, 0), make_store(tmp_path / "b", [400] * 30, 1)]
    share = lambda mix: np.mean([decode(batch_of(Segments(stores, 4, mix=mix), 0, step, 2)[0])[0].float().mean() for step in range(100)])
    assert share(None) == pytest.approx(0.25, abs=0.06) and share([1, 3]) == pytest.approx(0.75, abs=0.06)
    full = Segments(stores, 60, mix=[1, 3]).draw(0, 0)["tracks"].tolist()  # asks 45 of the 30 pieces of b
    assert len(set(full)) == 60 and 24 <= sum(track >= 90 for track in full) <= 30
    for mix in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="--mix"):
            Segments(stores, 4, mix=mix)


def test_short_tracks_are_left_out_and_reported(tmp_path):
    segments = Segments([make_store(tmp_path / "store", [125, 300, 10, 126])], batch_size=2)
    assert "2 tracks shorter" in segments.summary
    track, _ = located(segments, steps=10)
    assert set(track.flatten()) == {1, 3}


def test_too_little_music_is_refused(tmp_path):
    few, short = make_store(tmp_path / "few", [300, 300, 2000]), make_store(tmp_path / "short", [125, 1])
    Segments([few], batch_size=4)                              # the long track counts as two pieces
    with pytest.raises(InputError, match="batch.*4"):
        Segments([few, short], batch_size=5)
    with pytest.raises(InputError, match="shorter"):
        Segments([short], batch_size=1)


def test_validation_and_test_songs_stay_out_of_training(tmp_path, monkeypatch):
    store = make_store(tmp_path / "synth", [SEGMENT] * 4)
    store.paths = [f"synth/{i:05d}" for i in range(4)]
    monkeypatch.setattr(data, "SYNTH_SPLITS", dict(train=range(0, 2), valid=range(2, 3), test=range(3, 4)))
    monkeypatch.setattr(data, "prepare_synth", lambda: store)
    stores = data.open_data(["synth"])
    assert len(Segments(stores, 1).pieces) == 2
    assert set(located(Segments(stores, 2), steps=5)[0].flatten()) == {0, 1}


def test_open_data_takes_stores_folders_and_songs(tmp_path, song_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ready = make_store(tmp_path / "ready", [SEGMENT])
    first, second = data.open_data([str(ready.folder), str(song_folder)])
    assert first.paths == ["track 0"] and len(second.paths) == 8
    assert second.folder.parts[0] == "data"                    # prepared under data/, beside the code
    with pytest.raises(InputError, match="nowhere"):
        data.open_data(["nowhere"])
