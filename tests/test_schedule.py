"""Schedules: operations as PyTorch counts them, and one number that any tower's merges and cuts keep to."""

import pytest
import torch
from method_kit import BLOCKS, DIM, HEADS, N_TOKENS, WIDTH, some_images
from random_clips import random_clip
from torch.nn.attention import SDPBackend, sdpa_kernel

from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method.schedule import Step, Tower, describe, lengths, operations, place, rivals, steps
from spotlighter_plugin.workbench.speed.stopwatch import operations as counted

B16 = Tower(196, 12, 768, 12, 512, 16)
TOWERS = (B16, Tower(257, 24, 1024, 16, 768, 14), Tower(196, 12, 192, 3, 128, 8), Tower(144, 6, 192, 3, 128, 8, 4))


def test_the_hosts_operations_are_those_that_pytorch_counts():
    vision = random_clip().visual
    tower = Tower(N_TOKENS, BLOCKS, WIDTH, HEADS, DIM, vision.conv1.kernel_size[0])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on a CPU
        assert counted(lambda: vision(some_images(1))) == operations(tower)


def test_merges_go_before_every_block_up_to_the_cut_and_leave_the_fused_token_alone():
    assert steps(B16, [(3, 100), (5, 40)], 10, fuses=True) == [
        Step(1, 196, 186, 186, True),
        Step(2, 186, 176, 176, True),
        Step(3, 176, 100, 101, False),
        Step(4, 101, 90, 91, True),
        Step(5, 91, 40, 41, False),
    ]
    assert lengths(B16, steps(B16, [(3, 100), (5, 40)], 10, True)) == [197, 187, 177, 102, 92] + [42] * 7


def test_a_cut_that_keeps_all_that_merging_left_is_none():
    way = steps(B16, [(11, 196)], 10, fuses=True)
    assert lengths(B16, way) == [197 - 10 * block for block in range(11)] + [97]
    assert lengths(B16, steps(B16, [(11, 196)])) == lengths(B16) == [197] * 12


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: f"{tower.blocks} blocks, {tower.tokens} tokens")
@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_one_number_places_merges_and_a_cut_that_spend_it(tower, share):
    cuts, merge = place(share, tower, fuses=True)
    way = steps(tower, cuts, merge, fuses=True)
    assert abs(operations(tower, way) / operations(tower) - share) <= 0.02
    assert merge and cuts[0][0] == tower.blocks - 1  # merged on the way, selected before the last block


def test_at_most_half_of_what_is_left_is_merged():
    assert lengths(B16, steps(B16, [(5, 196)], 80)) == [197, 117, 59, 30, 16] + [16] * 7


def test_rivals_spend_the_same_share():
    for share in (0.4, 0.5, 0.8):
        for options in rivals(share, B16).values():
            assert abs(operations(B16, SpotlighterConfig(**options).steps(B16)) / operations(B16) - share) < 0.02


def test_a_share_that_a_tower_cannot_spend_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"SHARE = 0.05: with 12 blocks and 196 tokens .* 0.\d\d to \d.\d\d") as error:
        place(0.05, B16)
    assert "\n" not in str(error.value)


def test_a_schedule_can_be_read():
    cuts, merge = place(0.5, B16, fuses=True)
    assert describe(B16, steps(B16, cuts, merge, fuses=True)) == (
        "196 tokens; merged to 17 before blocks 1-10; cut to 10 before block 11; 0.503 of the host's operations"
    )
