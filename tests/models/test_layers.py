"""Layers of a checkpoint: which tensors, which rows, which bias."""

import pytest

from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex, Param


def test_a_layer_is_a_weight_and_its_bias() -> None:
    index = LayerIndex({"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2,)})

    assert index.find("a") == Layer("a", Param("a.weight", (4, 3)), Param("a.bias", (4,)))
    assert index.find("b") == Layer("b", Param("b.weight", (2,)), None)


def test_a_bias_alone_is_no_layer() -> None:
    assert LayerIndex({"a.bias": (4,)}).find("a") is None


def test_a_tensor_that_is_called_no_weight_is_a_layer_of_its_own() -> None:
    index = LayerIndex({"positions": (77, 8), "positions.bias": (8,)})

    assert index.find("positions") == Layer("positions", Param("positions", (77, 8)), None)


def test_an_unknown_name_finds_nothing() -> None:
    assert LayerIndex({"a.weight": (4, 3)}).find("lora_unet_b") is None
    assert LayerIndex({}).find("lora_unet_b") is None


def test_a_name_of_another_component_finds_nothing() -> None:
    index = LayerIndex({"model.diffusion_model.a.weight": (4, 3)})

    assert index.find("lora_unet_a") is not None
    assert index.find("lora_te_a") is None


@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_attention_is_three_layers(with_bias: bool) -> None:
    start = "conditioner.embedders.1.model.transformer.resblocks.5.attn."
    shapes = {f"{start}in_proj_weight": (12, 4)}
    if with_bias:
        shapes[f"{start}in_proj_bias"] = (12,)
    index = LayerIndex(shapes)

    for position, letter in enumerate("qkv"):
        layer = index.find(f"lora_te2_text_model_encoder_layers_5_self_attn_{letter}_proj")
        rows = (4 * position, 4 * position + 4)
        assert layer is not None
        assert layer.weight == Param(f"{start}in_proj_weight", (4, 4), rows)
        assert layer.bias == (Param(f"{start}in_proj_bias", (4,), rows) if with_bias else None)


def test_two_layers_of_one_name_are_ambiguous() -> None:
    index = LayerIndex({"text_encoder.x.weight": (1,), "text_encoder_2.x.weight": (1,)})

    assert index.find("lora_te1_x") == Layer("text_encoder.x", Param("text_encoder.x.weight", (1,)), None)
    with pytest.raises(AmbiguousNameError, match=r"text_encoder\.x and text_encoder_2\.x"):
        index.find("lycoris_x")


def test_two_spellings_of_one_layer_in_a_checkpoint_are_ambiguous() -> None:
    index = LayerIndex({"model.diffusion_model.out.2.weight": (1,), "unet.conv_out.weight": (1,)})

    with pytest.raises(AmbiguousNameError, match="fits"):
        index.find("lora_unet_conv_out")


def test_places_are_all_layers_by_component_and_path() -> None:
    index = LayerIndex(
        {"text_encoder.a.b.weight": (1,), "model.diffusion_model.out.2.weight": (4, 3), "c.bias": (1,)}
    )

    assert {place: layer.path for place, layer in index.places.items()} == {
        ("te1", "a_b"): "text_encoder.a.b",
        ("unet", "conv_out"): "model.diffusion_model.out.2",
    }


def test_places_that_two_layers_share_are_refused() -> None:
    index = LayerIndex({"a.b_c.weight": (1,), "a_b.c.weight": (1,)})

    with pytest.raises(AmbiguousNameError, match=r"a_b_c is both a\.b_c and a_b\.c"):
        _ = index.places
