"""Block weights against the table of sd-webui-lora-block-weight (algorithms.md section 10)."""

from __future__ import annotations

import pytest

from lycotool.models.block_weights import LAYOUTS, PRESETS, BlockWeights, parse_weights

#: Modules of SD 1 and the index of their weight in a list of 26.
SD1 = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1": 0,
    "lora_unet_conv_in": 1,
    "lora_unet_down_blocks_0_attentions_0_proj_in": 2,
    "lora_unet_down_blocks_0_resnets_1_conv1": 3,
    "lora_unet_down_blocks_0_downsamplers_0_conv": 4,
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": 5,
    "lora_unet_down_blocks_3_resnets_1_conv2": 12,
    "lora_unet_mid_block_attentions_0_proj_out": 13,
    "lora_unet_mid_block_resnets_1_conv1": 13,
    "lora_unet_up_blocks_0_resnets_0_conv1": 14,
    "lora_unet_up_blocks_0_upsamplers_0_conv": 16,
    "lora_unet_up_blocks_1_attentions_2_proj_in": 19,
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2": 25,
}
SDXL = {
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": 0,
    "lora_unet_input_blocks_0_0": 1,
    "lora_unet_input_blocks_8_1_proj_in": 9,
    "lora_unet_middle_block_1_proj_in": 10,
    "lora_unet_output_blocks_0_1_proj_in": 11,
    "lora_unet_output_blocks_8_0_in_layers_2": 19,
}
FLUX = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": 0,
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": 1,
    "lora_unet_img_in": 2,
    "lora_unet_double_blocks_0_img_attn_qkv": 3,
    "transformer.transformer_blocks.18.attn.to_q": 21,
    "lora_unet_single_blocks_0_linear1": 22,
    "lora_unet_single_blocks_37_linear2": 59,
    "lora_unet_final_layer_linear": 60,
}


@pytest.mark.parametrize(
    ("family", "count", "modules"), [("sd1", 26, SD1), ("sdxl", 20, SDXL), ("flux1", 61, FLUX)]
)
def test_each_module_has_its_blocks_weight(family: str, count: int, modules: dict[str, int]) -> None:
    weights = BlockWeights(family, [index / 100 for index in range(count)])

    assert {name: weights.factor(name) for name in modules} == {n: i / 100 for n, i in modules.items()}


@pytest.mark.parametrize("name", ["lora_unet_time_embedding_linear_1", "lora_unet_conv_out", "nowhere"])
def test_outside_of_all_blocks_nothing_changes(name: str) -> None:
    assert BlockWeights("sd1", [0.0] * 26).factor(name) == 1.0


def test_a_shorter_list_leaves_the_blocks_it_does_not_name_out() -> None:
    weights = BlockWeights("sd1", [0.5] * 17)

    assert weights.factor("lora_unet_down_blocks_0_attentions_0_proj_in") == 0.5
    assert weights.factor("lora_unet_down_blocks_0_downsamplers_0_conv") == 0.0
    assert weights.factor("lora_unet_conv_in") == 0.0


def test_layouts_have_their_length_and_no_label_twice() -> None:
    for layouts in LAYOUTS.values():
        for count, labels in layouts.items():
            assert len(labels) == len(set(labels)) == count
            assert set(labels) <= set(layouts[max(layouts)])


def test_presets_are_lists_of_17() -> None:
    assert {len(parse_weights(name.lower())) for name in PRESETS} == {17}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["IN02:attn1:0.25"], (0.25, 1.0, 1.0)),
        (["IN01-IN02:attn1:0.25"], (0.25, 1.0, 1.0)),
        (["NOT IN02::0"], (1.0, 1.0, 0.0)),
        ([":NOT attn1:0"], (1.0, 0.0, 0.0)),
        (["::0.5", "IN02:ff:2"], (0.5, 2.0, 0.5)),
        (["base::3"], (1.0, 1.0, 3.0)),
    ],
    ids=str,
)
def test_rules(rules: list[str], expected: tuple[float, float, float]) -> None:
    block = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0"
    modules = (f"{block}_attn1_to_q", f"{block}_ff_net_2", "lora_te_text_model_encoder_layers_0_mlp_fc1")
    weights = BlockWeights("sd1", None, rules)

    assert tuple(weights.factor(module) for module in modules) == expected


@pytest.mark.parametrize(
    ("family", "weights", "rules", "message"),
    [
        ("sd1", [1.0] * 12, [], "12 block weights, expected 17 or 26 for sd1"),
        ("wan", [1.0] * 17, [], "no block weights for wan"),
        ("sd1", None, ["IN01:0.5"], "expected BLOCKS:LAYERS:factor"),
        ("sd1", None, ["IN99:attn:1"], "no such block: IN99"),
        ("sd1", None, ["IN01:attn:x"], "x is no number"),
    ],
)
def test_what_cannot_be_read(
    family: str, weights: list[float] | None, rules: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockWeights(family, weights, rules)


def test_text_that_is_no_list() -> None:
    with pytest.raises(ValueError, match="no list of block weights and no preset"):
        parse_weights("LOUD")
