"""Network arguments: names, values, what applies to what."""

from __future__ import annotations

import itertools
import json
from typing import get_args

import pytest

from lycotool.algorithms import ALGORITHMS
from lycotool.algorithms.layer import TrainableLayer
from lycotool.algorithms.training import COMMON_ARGUMENTS, Training
from lycotool.errors import UsageError
from lycotool.training.declare import declared
from lycotool.training.network_options import ALIASES, OPTIONS, AlgoName, NetworkOptions, parse_argument

LINEAR = TrainableLayer("linear", (16, 12))
KERNEL = TrainableLayer("conv", (16, 12, 3, 3))


def given(*arguments: str) -> NetworkOptions:
    options = NetworkOptions().with_arguments(arguments)
    options.check()
    return options


def test_every_trainable_algorithm_can_be_chosen() -> None:
    trainable = {a.name for a in ALGORITHMS if isinstance(a.training, Training)}
    # Norms are trained with `train_norm`.
    assert set(get_args(AlgoName)) == trainable - {"norm"} | {"locon"}


def test_every_argument_of_an_algorithm_is_an_option() -> None:
    arguments = {
        name for a in ALGORITHMS if isinstance(a.training, Training) for name in a.training.arguments
    }
    network = {
        "algo", "preset", "train_norm", "forward", "network_weights", "dim_from_weights", *COMMON_ARGUMENTS,
    }  # fmt: skip
    assert OPTIONS.keys() - network == arguments
    assert all(about.help.endswith(".") and about.panel for about in declared(NetworkOptions, "network"))


# --- names and values ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("use_tucker=True", "use_conv_cp", True),
        ("use_cp=1", "use_conv_cp", True),
        ("use_conv_cp=on", "use_conv_cp", True),
        ("disable_conv_cp=True", "use_conv_cp", False),
        ("disable_conv_cp=false", "use_conv_cp", True),
        ("dora_wd=yes", "dora_wd", True),
        ("conv_dim=8", "conv_dim", 8),
        ("conv_alpha=0.5", "conv_alpha", 0.5),
        ("network_dim=3", "dim", 3),
        ("network_alpha=3", "alpha", 3.0),
        ("unit=2", "block_size", 2),
        ("constrain=0.1", "constraint", 0.1),
        ("bypass_mode=True", "forward", "structured"),
        ("bypass_mode=False", "forward", "fused"),
        ("algo=LoCon", "algo", "lora"),
        ("preset=attn-mlp", "preset", "attn-mlp"),
        ("train_norm=True", "train_norm", True),
        ("dropout=None", "dropout", None),
    ],
)
def test_known_names_have_their_true_meaning(argument: str, name: str, value: object) -> None:
    assert getattr(NetworkOptions().with_arguments([argument]), name) == value


@pytest.mark.parametrize("text", ["0", "no", "off", "False", "false"])
def test_what_means_no_is_no(text: str) -> None:
    """In LyCORIS every text but "false" is True."""
    for name in ("decompose_both", "full_matrix", "use_scalar", "dora_wd", "rs_lora"):
        assert parse_argument(name, text) == (name, False)
    assert given("algo=lokr", f"decompose_both={text}").arguments_for(LINEAR).decompose_both is False


def test_conv_dim_0_leaves_kernels_out() -> None:
    """In LyCORIS the text "0" does, and the number means dim."""
    for options in (given("conv_dim=0"), NetworkOptions(conv_dim=0)):
        assert options.arguments_for(KERNEL) is None
        assert options.arguments_for(LINEAR) is not None


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ("facter=8", "no network argument is named 'facter'", "did you mean factor?"),
        ("dim", "'dim' is not key=value", None),
        ("dim=x", "dim is 'x', expected a whole number", None),
        ("dim=1.5", "dim is '1.5', expected a whole number", None),
        ("dim=0", "dim is 0, expected at least 1", None),
        ("alpha=-1", "alpha is -1.0, expected at least 0", None),
        ("alpha=nan", "alpha is nan, expected at least 0", None),
        ("dropout=1", "dropout is 1, which drops everything", "give less than 1"),
        ("rank_dropout=1.5", "rank_dropout is 1.5, expected 0 to 1", None),
        ("use_scalar=maybe", "use_scalar is 'maybe', expected true or false", None),
        ("bypass_mode=", "bypass_mode is '', expected true or false", None),
        ("algo=lore", "no algorithm is named 'lore'", "did you mean lora?"),
        ("algo=tlora", "tlora cannot be trained: its file", None),
        ("forward=fast", "forward is 'fast', expected one of auto, structured, fused", None),
        ("factor=0", "factor is 0, expected -1 or at least 1", None),
        ("block_dims=2,4", "network argument block_dims is not supported: ranks of single blocks", None),
        ("wd_on_output=False", "wd_on_output does nothing without dora_wd", None),
        ("rank_dropout_scale=True", "rank_dropout_scale does nothing without rank_dropout", None),
        ("dim_from_weights=True", "dim_from_weights does nothing without network_weights", None),
    ],
)
def test_bad_arguments(argument: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        given(argument)
    assert message in caught.value.message
    assert caught.value.hint == hint


def test_given_twice() -> None:
    assert given("dim=4", "dim=4").dim == 4
    with pytest.raises(UsageError, match="use_conv_cp is given twice: True and False"):
        given("use_tucker=True", "disable_conv_cp=True")
    with pytest.raises(UsageError, match="dim is given twice: 8 and 4"):
        NetworkOptions(dim=8).with_arguments(["dim=4"])


# --- what applies --------------------------------------------------------------------------

ARGUMENTS = {
    "dim": "4", "alpha": "2", "conv_dim": "4", "conv_alpha": "1", "rs_lora": "1", "use_conv_cp": "1",
    "use_scalar": "1", "dora_wd": "1", "factor": "4", "decompose_both": "1", "full_matrix": "1",
    "unbalanced_factorization": "1", "block_size": "2", "constraint": "0.1", "rescaled": "1",
    "train_on_input": "1", "loraplus_lr_ratio": "4",
}  # fmt: skip


@pytest.mark.parametrize(("algo", "name"), [*itertools.product(sorted(get_args(AlgoName)), ARGUMENTS)])
def test_an_argument_applies_or_is_refused_with_those_that_take_it(algo: str, name: str) -> None:
    known = {a.name: a.training for a in ALGORITHMS if isinstance(a.training, Training)}
    options = NetworkOptions().with_arguments([f"algo={algo}", f"{name}={ARGUMENTS[name]}"])
    algo = algo.replace("locon", "lora")
    if name in known[algo].arguments:
        options.check()
        return
    with pytest.raises(UsageError, match=f"{name} does not apply to {algo}") as caught:
        options.check()
    takers = [a for a, training in known.items() if name in training.arguments]
    assert caught.value.hint == f"it is for {', '.join(takers)}"


def test_a_switch_that_is_off_applies_to_everything() -> None:
    assert given("algo=full", "use_tucker=False", "dora_wd=False").algo == "full"


def test_an_argument_may_be_for_what_a_preset_brings_in() -> None:
    options = NetworkOptions().with_arguments(["factor=4"])
    options.check({"lokr"})
    with pytest.raises(UsageError, match="factor does not apply to lora"):
        options.check({"loha"})


def test_combinations_that_ignore_an_argument() -> None:
    for arguments in (
        ("algo=lokr", "full_matrix=1", "decompose_both=1"),
        ("algo=lokr", "full_matrix=1", "use_tucker=1"),
        ("conv_dim=0", "use_tucker=1"),
        ("conv_dim=0", "conv_alpha=1"),
    ):
        with pytest.raises(UsageError, match="does nothing with"):
            given(*arguments)


# --- advice and metadata -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "rate", "warning"),
    [
        (("dim=128", "alpha=1"), None, "lora: dim at most 64"),
        (("dim=16", "alpha=16"), None, "lora: alpha at most dim/2"),
        (("dim=16", "alpha=0"), None, "lora: alpha at most dim/2"),
        (("algo=loha", "dim=64"), None, "loha: dim at most 32"),
        (("algo=lokr", "factor=16"), None, "lokr: factor 1 to 8"),
        (("algo=ia3",), 2e-4, "ia3: a learning rate of 5e-3"),
        (("algo=full",), 2e-4, "full: a learning rate near 5e-6"),
    ],
)
def test_recommended_ranges_are_warnings(
    arguments: tuple[str, ...], rate: float | None, warning: str
) -> None:
    (found,) = given(*arguments).warnings(rate)
    assert found.startswith(warning)


@pytest.mark.parametrize("algo", sorted(get_args(AlgoName)))
def test_defaults_follow_the_advice(algo: str) -> None:
    options = given(f"algo={algo}")
    training = next(a.training for a in ALGORITHMS if a.name == algo.replace("locon", "lora"))
    assert isinstance(training, Training)
    assert not options.warnings(training.learning_rate)


def test_what_was_given_is_metadata_as_lycoris_spells_it() -> None:
    options = given("algo=lokr", "dim=4", "factor=8", "use_tucker=True", "conv_dim=4", "train_norm=True")
    assert options.network_args() == {
        "algo": "lokr", "preset": "full", "conv_dim": "4", "use_tucker": "True", "factor": "8", "train_norm": "True",
    }  # fmt: skip
    # What is written can be given again.
    again = NetworkOptions(dim=4).with_arguments(f"{k}={v}" for k, v in options.network_args().items())
    assert again == options
    assert json.dumps(options.network_args())


def test_aliases_are_not_names() -> None:
    assert not ALIASES.keys() & OPTIONS.keys()
    assert set(ALIASES.values()) <= OPTIONS.keys()


@pytest.mark.parametrize(
    ("arguments", "unet", "text"),
    [
        (("loraplus_lr_ratio=4",), 4, 4),
        (("loraplus_unet_lr_ratio=4",), 4, None),
        (("loraplus_lr_ratio=4", "loraplus_text_encoder_lr_ratio=2"), 4, 2),
    ],
)
def test_lora_plus_ratios(arguments: tuple[str, ...], unet: float | None, text: float | None) -> None:
    options = given(*arguments)
    assert (options.lr_ratio("unet"), options.lr_ratio("te1"), options.lr_ratio("te2")) == (unet, text, text)
