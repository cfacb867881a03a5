"""From an adapter file's keys to modules, in the spelling of every program."""

import pytest
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.algorithms import ALGORITHMS, SLOT_NAMES
from lycotool.formats.keys import ALIASES, SPELLED, AdapterKeys, dialects, parse_keys


def parse(*keys: str) -> AdapterKeys:
    return parse_keys(keys, SLOT_NAMES)


def slots(*keys: str) -> dict[str, dict[str, str]]:
    """Module -> slot -> key, where nothing may be left over."""
    found = parse(*keys)
    assert [*found.unknown, *found.orphans, *found.clashes, *found.embeddings] == []
    return {name: dict(module.slots) for name, module in found.modules.items()}


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("module", [KOHYA, DOTTED, "lycoris_a_b", "base_model.model.a.0.b", "x"])
@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [(algorithm, layout) for algorithm in ALGORITHMS for layout in algorithm.layouts],
    ids=lambda value: value.name.replace(" ", "_"),
)
def test_every_slot_of_the_registry_is_found(module: str, algorithm: object, layout: object) -> None:
    keys = {slot.name: f"{module}.{slot.name}" for slot in layout.slots}

    assert slots(*keys.values()) == {module: keys}


@pytest.mark.parametrize(
    ("keys", "spelling"),
    [
        (("lora_down.weight", "lora_up.weight"), "kohya"),
        (("lora_A.weight", "lora_B.weight"), "peft"),
        (("lora_A.default.weight", "lora_B.default.weight"), "peft"),
        (("lora_A", "lora_B"), "peft"),
        (("lora.down.weight", "lora.up.weight"), "diffusers legacy"),
        (("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), "diffusers legacy"),
    ],
)
def test_the_factors_in_every_spelling(keys: tuple[str, str], spelling: str) -> None:
    down, up = (f"{DOTTED}.{key}" for key in keys)
    found = parse(down, up)

    assert dict(found.modules[DOTTED].slots) == {"lora_down.weight": down, "lora_up.weight": up}
    assert found.spelling == spelling
    assert set(found.spellings) == {spelling}


@pytest.mark.parametrize(
    ("suffix", "slot"),
    [
        ("lora_B.bias", "lora_up.bias"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
        ("magnitude", "dora_scale"),
        ("dora_scale", "dora_scale"),
        ("diff_b", "diff_b"),
        ("alpha", "alpha"),
    ],
)
def test_what_stands_beside_the_factors(suffix: str, slot: str) -> None:
    factors = f"{DOTTED}.lora_A.weight", f"{DOTTED}.lora_B.weight"

    assert slots(*factors, f"{DOTTED}.{suffix}")[DOTTED][slot] == f"{DOTTED}.{suffix}"


def test_aliases_lead_to_slots_of_the_registry() -> None:
    assert {slot for slot, _ in ALIASES.values()} <= SLOT_NAMES
    assert not ALIASES.keys() & SLOT_NAMES


@pytest.mark.parametrize("spelling", SPELLED)
def test_what_is_written_in_a_spelling_is_read_back(spelling: str) -> None:
    for slot, suffix in SPELLED[spelling].items():
        assert ALIASES[suffix] == (slot, spelling)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("a.attn1.processor.to_q_lora.down.weight", "a.attn1.to_q"),
        ("a.attn1.processor.to_out_lora.down.weight", "a.attn1.to_out.0"),
        ("unet.a.attn2.processor.to_k_lora.down.weight", "unet.a.attn2.to_k"),
        ("a.attn1.to_v_lora.down.weight", "a.attn1.to_v"),
        ("text_encoder.x.self_attn.to_q_lora.down.weight", "text_encoder.x.self_attn.q_proj"),
        ("text_encoder.x.self_attn.to_out_lora.down.weight", "text_encoder.x.self_attn.out_proj"),
    ],
)
def test_attention_processors_of_old_diffusers(key: str, module: str) -> None:
    up = key.replace("down", "up")
    found = parse(key, up)

    assert dict(found.modules[module].slots) == {"lora_down.weight": key, "lora_up.weight": up}
    assert found.spelling == "diffusers legacy"


def test_modules_keep_the_files_order() -> None:
    names = ["c", "a", "b"]

    assert list(slots(*(f"{name}.diff" for name in names))) == names


def test_an_alpha_alone_is_an_orphan() -> None:
    found = parse("x.alpha", "y.alpha", "y.diff")

    assert found.orphans == ("x.alpha",)
    assert list(found.modules) == ["y"]


def test_other_keys_are_unknown() -> None:
    keys = ("mystery.tensor", "conv.weight", "conv.bias", "alpha", "diff", "lora_up.weight")

    assert parse(*keys).unknown == keys
    assert not parse(*keys).modules


def test_a_bare_weight_is_a_slot_only_beside_its_switch() -> None:
    """(IA)³ calls its vector what every checkpoint calls its weights."""
    assert slots("x.weight", "x.on_input") == {"x": {"weight": "x.weight", "on_input": "x.on_input"}}
    assert parse("x.weight", "y.on_input").unknown == ("x.weight",)


def test_packed_embeddings_are_no_modules() -> None:
    found = parse("bundle_emb.name.string_to_param.*", "x.diff")

    assert found.embeddings == ("bundle_emb.name.string_to_param.*",)
    assert list(found.modules) == ["x"]


def test_one_slot_in_two_spellings_is_a_clash() -> None:
    first, second = "x.lora_down.weight", "x.lora_A.weight"

    assert parse(first, second).clashes == ((first, second),)


def test_the_commonest_spelling_is_the_files() -> None:
    kohya = ["a.lora_up.weight"]
    peft = ["b.lora_A.weight", "b.lora_B.weight"]

    found = parse(*kohya, *peft)

    assert found.spelling == "peft"
    assert set(found.spellings) == {"kohya", "peft"}


def test_a_file_without_factors_counts_as_kohyas() -> None:
    assert parse("x.hada_w1_a").spelling == "kohya"
    assert parse().spelling == "kohya"


@many
@given(keys=st.lists(st.text(st.sampled_from("ab.loraAB_up"), max_size=20), unique=True, max_size=12))
def test_every_key_is_accounted_for_once(keys: list[str]) -> None:
    extended = [*keys, *(f"{key}.lora_up.weight" for key in keys), *(f"{key}.alpha" for key in keys)]
    extended = list(dict.fromkeys(extended))
    found = parse(*extended)

    in_modules = [key for module in found.modules.values() for key in module.slots.values()]
    clashing = [second for _, second in found.clashes]
    everything = [*in_modules, *found.orphans, *found.unknown, *found.embeddings, *clashing]
    assert sorted(everything) == sorted(extended)


@pytest.mark.parametrize(
    ("module", "dialect"),
    [
        ("lora_unet_x", "kohya"),
        ("lora_te_x", "kohya"),
        ("lora_te2_x", "kohya"),
        ("oft_unet_x", "kohya OFT"),
        ("lora_transformer_x", "OneTrainer"),
        ("lycoris_x", "LyCORIS wrapper"),
        ("base_model.model.x.y", "PEFT"),
        ("diffusion_model.x.y", "ComfyUI"),
        ("text_encoders.clip_l.transformer.x", "ComfyUI"),
        ("model.diffusion_model.x", "ComfyUI"),
        ("unet.x", "diffusers"),
        ("transformer.x", "diffusers"),
        ("text_encoder.x", "diffusers"),
        ("text_encoder_2.x", "diffusers"),
        ("blocks.0.x", "bare paths"),
    ],
)
def test_the_dialect_of_a_module_name(module: str, dialect: str) -> None:
    assert dialects(parse(f"{module}.hada_w1_a")) == [dialect]


def test_old_diffusers_files_are_called_so() -> None:
    assert dialects(parse("unet.x.lora.down.weight", "unet.x.lora.up.weight")) == ["diffusers legacy"]


def test_the_commonest_dialect_comes_first() -> None:
    keys = parse("lora_unet_x.diff", "unet.y.diff", "unet.z.diff", "blocks.diff")

    assert dialects(keys) == ["diffusers", "bare paths", "kohya"]
