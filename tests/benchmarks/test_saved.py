"""What training steps of the zoo save."""

import pytest

pytest.importorskip("transformers")

from benchmarks.saved import main, traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_step_saves_less_than_by_default():
    own, default = (traced("gpt2", "small", 256, own=own) for own in (True, False))
    assert 0 < own.saved.total() < 0.85 * default.saved.total()
    assert [memory.arena > 0 for memory in own.memories] == [True, True]
    rows = dict(own.rows)
    assert rows["parameters"] == own.trained == rows["states of AdamW"] // 2
    assert rows["arena of the forward, with what it saves"] > own.memories[0].arena
    # All gradients but that of the tied table, which begins before anything saved is free, lie over what was saved, and
    # half of what the backward computes.
    assert rows["(gradients over what was saved)"] > 0.6 * own.trained
    assert rows["arena of the backward, beside that of the forward"] < 0.5 * own.memories[1].arena
    assert rows["peak"] < rows["peak if forward and backward shared nothing"]


def test_a_checkpoint_saves_what_lies_between_layers(capsys):
    main(["llama", "--small", "--batch", "64", "--checkpoint"])
    lines = capsys.readouterr().out.splitlines()
    assert "       0.4 MiB in   1: add.Tensor float32[64, 24, 64]" in lines  # the sum between the two layers
    assert not any("addmm" in line or "silu" in line for line in lines)
