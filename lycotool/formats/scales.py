"""Scales that stand outside the tensors: PEFT's config and diffusers' header metadata.

PEFT computes ``c = lora_alpha / r``, with ``use_rslora`` ``lora_alpha / √r``, and lets
patterns override both per module (PEFT ``utils/other.py``, ``get_pattern_key``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping

from lycotool.errors import BadInputError, IncompatibleError

#: PEFT types whose tensors the registry reads.
_READABLE = frozenset({"LORA", "LOHA", "LOKR"})


#: Options that change LoRA's formula.
_UNREADABLE_VARIANTS = ("kasa_config", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config")


class PeftScales:
    """Per-module scales of one PEFT configuration.

    Raises
    ------
    IncompatibleError
        If the configuration is of a kind lycotool cannot read.
    BadInputError
        If its numbers are not numbers.
    """

    def __init__(self, config: Mapping[str, object], path: str) -> None:
        kind = str(config.get("peft_type", "LORA")).upper()
        if kind not in _READABLE:
            raise IncompatibleError(f"PEFT adapters of type {kind} are not supported", path=path)
        for variant in _UNREADABLE_VARIANTS:
            if config.get(variant):
                raise IncompatibleError(f"{variant} adapters are not supported", path=path)
        if config.get("fan_in_fan_out"):
            raise IncompatibleError(
                "fan_in_fan_out adapters (transposed weights) are not supported", path=path
            )
        self._path = path
        self._rank = self._positive(config.get("r", 8), "r")
        alpha = config.get("lora_alpha", config.get("alpha", self._rank))
        self._alpha = self._number(alpha, "lora_alpha")
        self._ranks = self._pattern(config.get("rank_pattern"), self._positive)
        self._alphas = self._pattern(config.get("alpha_pattern"), self._number)
        self._rslora = bool(config.get("use_rslora"))
        init = config.get("init_lora_weights")
        #: Initialisations that also change the base weight, so the adapter fits only that.
        self.modifies_base = isinstance(init, str) and init.lower().startswith(
            ("pissa", "olora", "corda", "lora_ga")
        )

    def scale(self, module: str) -> float:
        """``c`` of a module, named without PEFT's ``base_model.model.``."""
        rank = self._lookup(self._ranks, module, self._rank)
        alpha = self._lookup(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._rslora else rank)

    def _lookup(self, patterns: Mapping[re.Pattern[str], float], module: str, default: float) -> float:
        for pattern, value in patterns.items():
            if pattern.fullmatch(module):
                return value
        return default

    def _pattern(
        self, value: object, number: Callable[[object, str], float]
    ) -> Mapping[re.Pattern[str], float]:
        if not isinstance(value, dict):
            return {}
        patterns = {}
        for key, entry in value.items():
            try:
                pattern = re.compile(rf"(?:.*\.)?(?:{key})")
            except re.error as error:
                raise BadInputError(f"{key} is no regular expression: {error}", path=self._path) from None
            patterns[pattern] = number(entry, str(key))
        return patterns

    def _number(self, value: object, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadInputError(f"{name} is {value!r}, expected a number", path=self._path)
        return float(value)

    def _positive(self, value: object, name: str) -> float:
        number = self._number(value, name)
        if number <= 0:
            raise BadInputError(f"{name} is {value!r}, expected a positive number", path=self._path)
        return number


def scales_from_metadata(metadata: Mapping[str, str], path: str) -> dict[str, PeftScales]:
    """Configurations in diffusers' ``lora_adapter_metadata``, by component prefix (``unet.``)."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise BadInputError("lora_adapter_metadata is not valid JSON", path=path) from None
    if not isinstance(document, dict):
        raise BadInputError("lora_adapter_metadata is not an object", path=path)
    if "peft_type" in document or "r" in document:  # saved by a model: one config, no prefix
        return {"": PeftScales(document, path)}
    parts: dict[str, dict[str, object]] = {}
    for key, value in document.items():
        component, _, option = str(key).partition(".")
        parts.setdefault(component + ".", {})[option] = value
    return {prefix: PeftScales(config, path) for prefix, config in parts.items()}
