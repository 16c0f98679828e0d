"""Options: presets, explicit values, checks; and how a share of operations is placed in a tower."""

import pytest
import torch
from method_kit import BLOCKS, DIM, HEADS, N_TOKENS, WIDTH, random_clip, some_images
from torch.nn.attention import SDPBackend, sdpa_kernel
from yacs.config import CfgNode

from spotlighter_plugin.config import PLACING, PRESETS, SpotlighterConfig, extend_cfg, from_cfg
from spotlighter_plugin.method.schedule import Step, Tower, describe, lengths, operations, place, rivals, steps
from spotlighter_plugin.workbench.speed.stopwatch import operations as counted


def tree(*options):
    cfg = CfgNode({"TRAINER": {}})
    extend_cfg(cfg)
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_every_option_that_nobody_set(preset):
    config = from_cfg(tree("TRAINER.SPOTLIGHTER.PRESET", preset))
    placed = dict.fromkeys(PLACING) if config.share else {}  # SHARE places them itself
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset] | placed


def test_every_preset_sets_the_same_options():
    assert len({frozenset(preset) for preset in PRESETS.values()}) == 1


def test_an_explicit_option_wins_over_the_preset_even_where_it_equals_the_default_preset():
    k = PRESETS["default"]["top_k"] + 1
    cfg = tree("TRAINER.SPOTLIGHTER.PRESET", "paper", "TRAINER.SPOTLIGHTER.TOP_K", k)
    cfg.merge_from_list(["TRAINER.SPOTLIGHTER.SELECT_BLOCK", PRESETS["default"]["select_block"]])
    config = from_cfg(cfg)
    assert (config.top_k, config.select_block) == (k, PRESETS["default"]["select_block"])
    assert config.mapping == PRESETS["paper"]["mapping"]


def test_the_preset_that_is_gone_is_answered_with_what_to_set():
    with pytest.raises(ValueError, match="PRESET = 'fast' is gone: set PRESET default with") as error:
        SpotlighterConfig(preset="fast")
    assert "\n" not in str(error.value)


def test_the_paper_preset_has_the_papers_numbers():
    config = SpotlighterConfig(preset="paper")
    assert (config.alpha, config.beta, config.lambda1, config.lambda2, config.lambda3) == (0.2, 0.8, 0.02, 20, 0.1)


def test_a_tree_without_the_node_gives_the_default_preset():
    assert from_cfg(CfgNode({"TRAINER": {}})) == SpotlighterConfig()


def test_options_from_a_command_line_become_what_the_config_wants():
    config = from_cfg(tree("TRAINER.SPOTLIGHTER.LEVELS", "1", "TRAINER.SPOTLIGHTER.LOSSES", "gra,local"))
    assert (config.levels, config.losses) == ("1", ("gra", "local"))
    assert from_cfg(tree("TRAINER.SPOTLIGHTER.LOSSES", "gra_high,local,gra_low")).losses == ("gra", "local")
    config = from_cfg(tree("TRAINER.SPOTLIGHTER.LEVELS", "1+2", "TRAINER.SPOTLIGHTER.LOSSES", "[]"))
    assert (config.levels, config.losses) == ("1+2", ())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("preset", "best"),
        ("top_k", 1),
        ("top_k", 2.5),
        ("top_k", True),
        ("prototypes", 0),
        ("select_block", "last"),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("beta", -0.1),
        ("lambda1", -1),
        ("lambda2", "20"),
        ("mapping", "conv"),
        ("levels", "3"),
        ("activation", "gradcam"),
        ("prototypes_in", "everywhere"),
        ("losses", ("gra", "triplet")),
        ("losses", 1),
        ("lambda3", float("inf")),
        ("lambda2", 10**400),
        ("lr_multiplier", float("nan")),
        ("seed", 2**63),
        ("top_k", 2**64),
        ("prototypes", 2**63),
        ("select_block", -(2**70)),
        ("preset", ["paper"]),
        ("semantic_activation", "yes"),
        ("stages", 3),
        ("stages", (3, 64)),
        ("stages", ((3, 64, 2),)),
        ("stages", ((3, 64.0),)),
        ("stages", ((3, 0.0),)),
        ("stages", ((2, 48), (3, 64))),
        ("stages", ((3, 8),)),
        ("fuse_dropped", "no"),
    ],
)
def test_a_wrong_value_is_one_line_naming_option_and_value(option, value):
    with pytest.raises(ValueError) as error:
        SpotlighterConfig(**{option: value})
    message = str(error.value)
    shown = "triplet" if value == ("gra", "triplet") else repr(value)
    assert "\n" not in message and f"TRAINER.SPOTLIGHTER.{option.upper()}" in message and shown in message


IDLE_UNDER_DEFAULT = {
    "alpha": 0.3,
    "lambda1": 0.5,
    "prototypes_in": "sequence",
    "recalculate": True,
    "seed": 3,
    "lr_multiplier": 2.0,
    "prototypes": 3,
    "beta": 0.5,
    "lambda3": 0.5,
}


def test_options_that_change_nothing_beside_the_others_are_named():
    named = [f"TRAINER.SPOTLIGHTER.{name.upper()}" for name in IDLE_UNDER_DEFAULT]
    assert sorted(SpotlighterConfig(**IDLE_UNDER_DEFAULT).idle()) == sorted(named)
    with_loss = SpotlighterConfig(**IDLE_UNDER_DEFAULT, losses=("kl_visual",))
    assert sorted(with_loss.idle({"kl_visual"})) == sorted(named)  # where the tower is frozen
    assert sorted(with_loss.idle()) == sorted(named[:-1])  # where it is trained
    everything = {**IDLE_UNDER_DEFAULT, "activation": "random", "recalculate": False, "semantic_activation": True}
    assert SpotlighterConfig(preset="paper", **everything).idle() == []
    assert SpotlighterConfig().idle() == SpotlighterConfig(preset="paper").idle() == []


@pytest.mark.parametrize(("block", "index"), [(-1, 11), (-12, 0), (0, 0), (11, 11)])
def test_the_block_is_counted_from_either_end(block, index):
    assert SpotlighterConfig(select_block=block).cuts(196, 12) == [(index, 48)]


def test_stages_are_counted_from_either_end_like_the_block_and_may_come_as_lists():
    config = SpotlighterConfig(stages=[[3, 64], (-4, 48)], select_block=-1, top_k=16)
    assert config.cuts(196, 12) == [(3, 64), (8, 48), (11, 16)] and config.stages == ((3, 64), (-4, 48))
    cfg = tree("TRAINER.SPOTLIGHTER.STAGES", "((3, 64),)", "TRAINER.SPOTLIGHTER.FUSE_DROPPED", "True")
    assert (from_cfg(cfg).stages, from_cfg(cfg).fuse_dropped) == (((3, 64),), True)


def test_a_share_is_of_the_towers_tokens_and_keeps_no_fewer_than_the_next_cut():
    config = SpotlighterConfig(stages=((3, 0.5), (5, 0.25)), top_k=32)
    assert config.cuts(196, 12) == [(3, 98), (5, 49), (11, 32)]
    assert config.cuts(49, 12) == [(3, 32), (5, 32), (11, 32)]


def test_a_presets_share_gives_way_to_a_cut_of_ones_own():
    assert SpotlighterConfig().share == 0.7
    assert SpotlighterConfig(top_k=140).share == 0 and SpotlighterConfig(top_k=140).cuts(144, 6) == [(5, 140)]
    assert SpotlighterConfig(select_block=3).cuts(144, 6) == [(3, 48)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 197}, ("TOP_K = 197", "196")),
        ({"select_block": 12}, ("SELECT_BLOCK = 12", "-12 to 11")),
        ({"select_block": -13}, ("SELECT_BLOCK = -13", "-12 to 11")),
        ({"stages": ((3, 197),)}, ("STAGES = ((3, 197),)", "196")),
        ({"stages": ((2, 0.5), (3, 197))}, ("STAGES = ((2, 0.5), (3, 197))", "196")),
        ({"stages": ((-13, 64),)}, ("STAGES = ((-13, 64),)", "-12 to 11")),
        ({"stages": ((3, 64),), "select_block": 3}, ("STAGES = ((3, 64),)", "SELECT_BLOCK 3", "3, 3")),
        ({"stages": ((3, 64), (5, 0.5)), "top_k": 16}, ("STAGES = ((3, 64), (5, 0.5))", "TOP_K 16")),
        ({"stages": ((3, 64), (-10, 48))}, ("STAGES = ((3, 64), (-10, 48))", "3, 2, 11")),
    ],
)
def test_what_the_tower_has_not_is_one_line_naming_value_and_limit(options, words):
    with pytest.raises(ValueError) as error:
        SpotlighterConfig(**options).cuts(196, 12)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- how a share of operations is placed


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


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_share_leaves_the_last_block_a_cut_that_drops_a_third(share):
    ((_, kept),), merge = place(share, B16, fuses=True)
    left = steps(B16, [(11, 196)], merge)[-1].tokens
    assert left / 2 <= kept <= left * 2 / 3


def test_most_is_merged_early():
    _, (before_the_first, *merge) = place(0.5, B16)
    assert before_the_first == 0 and merge == sorted(merge, reverse=True) and merge[0] > 4 * merge[-1] > 0


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
        "196 tokens; merged to 46 before blocks 1-10; cut to 27 before block 11; 0.500 of the host's operations"
    )
