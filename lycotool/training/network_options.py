"""The network: every argument of the field by its known name, with its true meaning.

An argument is an option of its own (``--conv-dim 8``), a key of the configuration file, or
``--network-arg key=value`` as in sd-scripts' and LyCORIS' ``network_args``. Whether one applies
is the registry's to say (:attr:`Training.arguments`); one that does not, or is unknown, is an
error. Booleans are read strictly.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lycotool.algorithms import ALGORITHMS
from lycotool.algorithms.base import Algorithm
from lycotool.algorithms.layer import TrainableLayer
from lycotool.algorithms.training import COMMON_ARGUMENTS, Arguments, Training
from lycotool.errors import UsageError
from lycotool.training.declare import Declared, declared, option

#: What `--algo` can be; ``locon`` is LyCORIS' other name for lora.
AlgoName = Literal["lora", "locon", "loha", "lokr", "ia3", "dylora", "full", "glora", "diag-oft", "boft"]

ForwardChoice = Literal["auto", "structured", "fused"]

#: Other names of arguments -> ours; a value may have to be turned round.
ALIASES: Mapping[str, str] = {
    "network_dim": "dim",
    "rank": "dim",
    "network_alpha": "alpha",
    "network_dropout": "dropout",
    "use_tucker": "use_conv_cp",
    "use_cp": "use_conv_cp",
    "disable_conv_cp": "use_conv_cp",
    "constrain": "constraint",
    "unit": "block_size",
    "bypass_mode": "forward",
}

#: Arguments of other trainers that say nothing here, and why.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
        "ranks of single blocks are given by a preset's name_algo_map",
    ),
    **dict.fromkeys(
        ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
        "learning rates of single blocks are not there; a preset says which layers are trained",
    ),
    **dict.fromkeys(
        ("train_t5xxl", "train_llm_adapter", "train_blocks", "split_qkv"),
        "it is for models this command does not train",
    ),
}

#: How LyCORIS spells an argument in `ss_network_args`, where it is not our name.
_IN_METADATA = {"use_conv_cp": "use_tucker"}

#: Headings in `--help`.
_NETWORK, _FORM, _DROPOUT, _PLUS = "Network", "Form of the network", "Dropout", "LoRA+"

_TRUE, _FALSE = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})


def trainable(name: str) -> tuple[Algorithm, Training]:
    """The registry's entry of that name and how it is trained.

    Raises
    ------
    UsageError
        If there is none, or it cannot be trained.
    """
    name = "lora" if name == "locon" else name
    entries = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if name not in entries:
        raise UsageError(f"no algorithm is named {name!r}", hint=_nearest(name, entries))
    training = entries[name].training
    if not isinstance(training, Training):
        raise UsageError(f"{name} cannot be trained: {training.reason}")
    return entries[name], training


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """What is trained. None is "not given": the default is the algorithm's.

    Raises
    ------
    UsageError
        If a value is out of its range, contradicts another, or would be ignored.
    """

    algo: AlgoName = option("lora", _NETWORK, "Algorithm; LyCORIS' `locon` is lora.")
    preset: str = option(
        "full",
        _NETWORK,
        "Which layers: a preset's name, or a TOML file in LyCORIS' format.",
        metavar="NAME|FILE",
    )
    dim: int | None = option(
        None, _NETWORK, "Rank; for diag-oft and boft the largest block; default 16; loha 8.", kohya="network_dim", minimum=1,
    )  # fmt: skip
    alpha: float | None = option(
        None, _NETWORK, "The change is scaled by alpha/dim; 0 is the rank; default half of dim.", kohya="network_alpha", minimum=0,
    )  # fmt: skip
    conv_dim: int | None = option(
        None, _NETWORK, "Rank of convolutions with a kernel above 1x1; 0 leaves them out; default dim.", minimum=0,
    )  # fmt: skip
    conv_alpha: float | None = option(
        None, _NETWORK, "Alpha of convolutions with a kernel above 1x1; default alpha.", minimum=0
    )
    rs_lora: bool | None = option(None, _FORM, "Scale by alpha/√dim instead; folded into the stored alpha.")
    use_conv_cp: bool | None = option(
        None, _FORM, "Give convolutions with a kernel above 1x1 a CP (Tucker) core; LyCORIS' use_tucker."
    )
    use_scalar: bool | None = option(
        None, _FORM, "Start from random factors below a trained scalar that is zero; folded into the file."
    )
    dora_wd: bool | None = option(None, _FORM, "DoRA: train the norms of the weight beside its direction.")
    wd_on_output: bool | None = option(
        None, _FORM, "DoRA's norms per output row; off: per input column; default on."
    )
    dropout: float | None = option(
        None, _DROPOUT, "Part of the change of the output that is dropped, element by element.",
        kohya="network_dropout", minimum=0, maximum=1,
    )  # fmt: skip
    rank_dropout: float | None = option(
        None, _DROPOUT, "Part of the ranks dropped in a step; rows of the change where there are no ranks.",
        minimum=0, maximum=1,
    )  # fmt: skip
    rank_dropout_scale: bool | None = option(None, _DROPOUT, "Divide what rank_dropout keeps by its share.")
    module_dropout: float | None = option(
        None, _DROPOUT, "Chance of a layer to train nothing in a step.", minimum=0, maximum=1
    )
    factor: int | None = option(
        None, _FORM, "LoKr: size of the first factor; -1 splits most evenly; default -1.", minimum=-1
    )
    decompose_both: bool | None = option(
        None, _FORM, "LoKr: make the first factor a product too, if smaller."
    )
    full_matrix: bool | None = option(None, _FORM, "LoKr: make neither factor a product.")
    unbalanced_factorization: bool | None = option(
        None, _FORM, "LoKr: give the first factor the larger part of the output."
    )
    block_size: int | None = option(None, _FORM, "DyLoRA: ranks trained at a time; default 4.", minimum=1)
    constraint: float | None = option(
        None, _FORM, "diag-oft, boft: bound of the rotation, times the layer's outputs; 0 is none; default 0.", minimum=0,
    )  # fmt: skip
    rescaled: bool | None = option(None, _FORM, "diag-oft, boft: train a scale of each output too.")
    train_on_input: bool | None = option(None, _FORM, "(IA)³: scale inputs, not outputs.")
    train_norm: bool = option(False, _NETWORK, "Also train the norms of the chosen blocks.")
    loraplus_lr_ratio: float | None = option(
        None, _PLUS, "LoRA+: how many times faster the factors on the output side are trained.", minimum=0
    )
    loraplus_unet_lr_ratio: float | None = option(
        None, _PLUS, "LoRA+ for the UNet; default loraplus_lr_ratio.", minimum=0
    )
    loraplus_text_encoder_lr_ratio: float | None = option(
        None, _PLUS, "LoRA+ for the text encoders; default loraplus_lr_ratio.", minimum=0
    )
    forward: ForwardChoice = option(
        "auto", _NETWORK, "How a layer's change is computed: from its factors, as a whole, or as is cheaper."
    )
    network_weights: str | None = option(
        None, _NETWORK, "Adapter file to start from.", kohya="network_weights", metavar="FILE"
    )
    dim_from_weights: bool = option(
        False, _NETWORK, "Take algorithm, rank, alpha and layers from that file.", kohya="dim_from_weights"
    )

    def __post_init__(self) -> None:
        for about in OPTIONS.values():
            _check_value(about, getattr(self, about.name))
        if self.factor == 0:
            raise UsageError("factor is 0, expected -1 or at least 1")
        for rate in ("dropout", "rank_dropout", "module_dropout"):
            if getattr(self, rate) == 1:
                raise UsageError(f"{rate} is 1, which drops everything", hint="give less than 1")
        pairs = [
            ("wd_on_output", self.wd_on_output is not None and not self.dora_wd, "without dora_wd"),
            ("rank_dropout_scale", bool(self.rank_dropout_scale) and not self.rank_dropout, "without rank_dropout"),
            ("decompose_both", bool(self.decompose_both and self.full_matrix), "with full_matrix"),
            ("use_conv_cp", bool(self.use_conv_cp and self.full_matrix), "with full_matrix"),
            ("use_conv_cp", bool(self.use_conv_cp) and self.conv_dim == 0, "with conv_dim 0"),
            ("conv_alpha", self.conv_alpha is not None and self.conv_dim == 0, "with conv_dim 0"),
            ("dim_from_weights", self.dim_from_weights and self.network_weights is None, "without network_weights"),
        ]  # fmt: skip
        for name, is_idle, why in pairs:
            if is_idle:
                raise UsageError(f"{name} does nothing {why}")

    # --- what was given --------------------------------------------------------------------

    @property
    def given(self) -> frozenset[str]:
        """The arguments of some algorithms only that have a value; a switch that is off is none."""
        values = {name: getattr(self, name) for name in _SELECTIVE}
        return frozenset(name for name, value in values.items() if value is not None and value is not False)

    def check(self, algos: Collection[str] = ()) -> None:
        """Refuse arguments that apply to nothing that is trained.

        Parameters
        ----------
        algos
            Algorithms that a preset's maps bring in beside `algo`.

        Raises
        ------
        UsageError
            Naming the argument and the algorithms that take it.
        """
        names = {self.algo, *algos} | ({"norm"} if self.train_norm else set())
        taken = frozenset().union(*(trainable(name)[1].arguments | COMMON_ARGUMENTS for name in names))
        for name in sorted(self.given - taken):
            raise _inapplicable(name, self.algo)

    def with_arguments(self, pairs: Iterable[str]) -> NetworkOptions:
        """With arguments given as ``key=value``.

        Raises
        ------
        UsageError
            If one is unknown, has no such value, or was given before.
        """
        values: dict[str, Any] = {}
        for pair in pairs:
            key, equals, text = pair.partition("=")
            if not equals:
                raise UsageError(f"network argument {pair!r} is not key=value")
            name, value = parse_argument(key.strip(), text.strip())
            before = values.get(name, getattr(self, name))
            if before not in (OPTIONS[name].default, value):
                raise UsageError(f"{name} is given twice: {before} and {value}")
            values[name] = value
        return replace(self, **values)

    def overridden(self, values: Mapping[str, object]) -> NetworkOptions:
        """For the layers that a preset's map gives values of their own.

        A rank or alpha given there is that of every kernel, as in LyCORIS. What was given for
        the whole network and does not apply to the layers' algorithm is left out.

        Raises
        ------
        UsageError
            If a key is unknown or does not apply to the algorithm.
        """
        if not values:
            return self
        own = dict(parse_argument(key, value) for key, value in values.items())
        for general, conv in (("dim", "conv_dim"), ("alpha", "conv_alpha")):
            if general in own:
                own.setdefault(conv, own[general])
        algo = str(own.get("algo", self.algo))
        taken = trainable(algo)[1].arguments | COMMON_ARGUMENTS
        for name in own:
            if name in _SELECTIVE and name not in taken:
                if name in ("conv_dim", "conv_alpha") and name not in map(_own_name, values):
                    continue
                raise _inapplicable(name, algo)
        left_out = dict.fromkeys(self.given - taken - own.keys())
        return replace(self, **{**left_out, **own})

    # --- what it means ---------------------------------------------------------------------

    def arguments_for(self, layer: TrainableLayer) -> Arguments | None:
        """What a layer is trained with; None where it is left out (``conv_dim`` 0)."""
        if layer.kind == "norm":
            return Arguments()
        training = trainable(self.algo)[1]
        has_dora = bool(self.dora_wd) and "dora_wd" in training.arguments
        rank = self.dim if self.dim is not None else training.rank
        alpha = self.alpha
        if any(size != 1 for size in layer.kernel):
            rank = rank if self.conv_dim is None else self.conv_dim
            alpha = alpha if self.conv_alpha is None else self.conv_alpha
        if rank == 0:
            return None
        alpha = rank / 2 if alpha is None else alpha
        return Arguments(
            rank=rank,
            alpha=float(alpha or rank),
            rs_lora=bool(self.rs_lora),
            use_conv_cp=bool(self.use_conv_cp),
            use_scalar=bool(self.use_scalar) and "use_scalar" in training.arguments,
            dora=("in" if self.wd_on_output is False else "out") if has_dora else None,
            factor=-1 if self.factor is None else self.factor,
            decompose_both=bool(self.decompose_both),
            full_matrix=bool(self.full_matrix),
            unbalanced_factorization=bool(self.unbalanced_factorization),
            block_size=4 if self.block_size is None else self.block_size,
            constraint=self.constraint or 0.0,
            rescaled=bool(self.rescaled),
            train_on_input=bool(self.train_on_input),
        )

    def lr_ratio(self, component: str) -> float | None:
        """LoRA+'s ratio for ``unet`` or a text encoder; None for none."""
        own = self.loraplus_unet_lr_ratio if component == "unet" else self.loraplus_text_encoder_lr_ratio
        return self.loraplus_lr_ratio if own is None else own

    def warnings(self, learning_rate: float | None = None) -> list[str]:
        """What the registry advises against, in words."""
        algorithm, training = trainable(self.algo)
        values: dict[str, float] = {}
        if "dim" in training.arguments:
            values["dim"] = float(training.rank if self.dim is None else self.dim)
        if "alpha" in training.arguments:
            values["alpha"] = values["dim"] / 2 if self.alpha is None else float(self.alpha or values["dim"])
        if self.factor is not None:
            values["factor"] = float(self.factor)
        if learning_rate is not None:
            values["learning_rate"] = learning_rate
        return algorithm.warnings(values)

    def network_args(self) -> dict[str, str]:
        """``ss_network_args``: what was given, as LyCORIS spells it."""
        given = {"algo": self.algo, "preset": self.preset}
        for name in OPTIONS:
            value = getattr(self, name)
            if name in _SELECTIVE and name not in ("dim", "alpha") and value is not None:
                given[_IN_METADATA.get(name, name)] = str(value)
        if self.train_norm:
            given["train_norm"] = "True"
        return given


#: Every option by its name.
OPTIONS: Mapping[str, Declared] = {about.name: about for about in declared(NetworkOptions, "network")}

#: Those that only some algorithms take.
_SELECTIVE = tuple(
    name for name, about in OPTIONS.items() if about.default is None and name != "network_weights"
)


def parse_argument(key: str, value: object) -> tuple[str, Any]:
    """An argument by any of its names, and its value: text, or what a TOML file has.

    Raises
    ------
    UsageError
        If there is no such argument or no such value.
    """
    if key in REFUSED:
        raise UsageError(f"network argument {key} is not supported: {REFUSED[key]}")
    name = _own_name(key)
    if name not in OPTIONS:
        raise UsageError(f"no network argument is named {key!r}", hint=_nearest(key, {*OPTIONS, *ALIASES}))
    if key == "bypass_mode":
        return name, "structured" if _boolean(key, value) else "fused"
    if key == "disable_conv_cp":
        return name, not _boolean(key, value)
    about = OPTIONS[name]
    parsed = _value(about, key, value)
    if name == "algo":
        parsed = {"locon": "lora"}.get(str(parsed).lower(), str(parsed).lower())
        trainable(parsed)
    _check_value(about, parsed)
    return name, parsed


def _own_name(key: str) -> str:
    return ALIASES.get(key, key)


def _value(about: Declared, key: str, value: object) -> object:
    if about.kind is bool:
        return _boolean(key, value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{key} is {value!r}, expected {_expected(about)}")
    if isinstance(value, str) and value.lower() == "none" and about.optional:
        return None
    try:
        if about.kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return about.kind(value)
    except ValueError:
        raise UsageError(f"{key} is {value!r}, expected {_expected(about)}") from None


def _boolean(key: str, value: object) -> bool:
    text = str(value).lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise UsageError(f"{key} is {value!r}, expected true or false")


def _expected(about: Declared) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[about.kind]


def _check_value(about: Declared, value: object) -> None:
    if about.choices and value not in about.choices:
        raise UsageError(f"{about.name} is {value!r}, expected one of {', '.join(about.choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = about.minimum, about.maximum
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        between = f"{low:g} to {high:g}" if low is not None and high is not None else f"at least {low:g}"
        raise UsageError(f"{about.name} is {value}, expected {between}")


def _inapplicable(name: str, algo: str) -> UsageError:
    takers = [
        algorithm.name
        for algorithm in ALGORITHMS
        if isinstance(algorithm.training, Training) and name in algorithm.training.arguments
    ]
    return UsageError(f"{name} does not apply to {algo}", hint=f"it is for {', '.join(takers)}")


def _nearest(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(names), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(names))}"
