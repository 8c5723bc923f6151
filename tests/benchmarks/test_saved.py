"""What training steps of the zoo save."""

import pytest

pytest.importorskip("transformers")

from benchmarks.saved import main, traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_step_saves_less_than_by_default():
    own, default = (traced("gpt2", "small", 256, own=own) for own in (True, False))
    assert 0 < own.saved.total() < 0.8 * default.saved.total()
    assert [memory.arena > 0 for memory in own.memories] == [True, True]


def test_a_checkpoint_saves_what_lies_between_layers(capsys):
    main(["llama", "--small", "--batch", "64", "--checkpoint"])
    lines = capsys.readouterr().out.splitlines()
    assert "       0.4 MiB in   1: add.Tensor float32[64, 24, 64]" in lines  # the sum between the two layers
    assert not any("addmm" in line or "silu" in line for line in lines)
