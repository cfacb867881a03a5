"""The one trainable module: any algorithm of the registry over any layer it can train.

``y = op(x, W) + op(x, ΔW)`` with ΔW from the registry's own formula, or the structured form of
the same where that is cheaper (:class:`Structured`). Parameters are float32; they, or what is
made of them, are cast once to the input's dtype, and the forward pass never rounds ``W + ΔW``
to half precision.

Nothing here branches on the value of a tensor: dropouts and DyLoRA's ranks are masks that
:meth:`Network.draw` fills outside the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from lycotool.algorithms import dora
from lycotool.algorithms.base import DEFAULT_READING, Bound
from lycotool.algorithms.detection import Detected, bias_change, weight_change
from lycotool.algorithms.layer import TrainableLayer
from lycotool.algorithms.training import (
    FACTORS,
    Arguments,
    Operands,
    Start,
    Structured,
    Training,
    low_rank_of,
)
from lycotool.training.fused import product_with_sum
from lycotool.training.kronecker import product_with_kronecker, product_with_thin_kronecker
from lycotool.training.low_rank import product_with_low_rank
from lycotool.training.masks import Dropouts, MaskSpec, element_mask
from lycotool.training.scaled import scaled

if TYPE_CHECKING:
    from lycotool.algorithms.base import Algorithm, Shape

Forward = Literal["auto", "structured", "fused"]

#: The name of the trained factor on ΔW, beside the slots.
SCALAR = "scalar"


class AdapterLayer(nn.Module):
    """An algorithm over a layer, its parameters and its forward.

    Parameters
    ----------
    original
        The layer, which is not made a submodule.
    start
        Where training starts; see :class:`Start`.
    arguments
        What `start` was made with.
    forward
        Whether to compute the change from the factors, as a whole, or as is cheaper.
    dtype
        Of the parameters; float64 in tests.
    salt
        Tells this layer's element dropout from others'.
    """

    def __init__(
        self,
        original: nn.Module,
        layer: TrainableLayer,
        algorithm: Algorithm,
        start: Start,
        arguments: Arguments,
        *,
        forward: Forward = "auto",
        dropouts: Dropouts | None = None,
        dtype: torch.dtype = torch.float32,
        salt: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(algorithm.training, Training):
            raise TypeError(algorithm.name)
        self.algorithm, self.layer, self.arguments = algorithm, layer, arguments
        self.training_of: Training = algorithm.training
        self.dropouts = dropouts or Dropouts()
        self._original = (original,)  # in a tuple, so that it is not registered
        self._original_forward = original.forward
        weight = self.base_weight
        trained = dict(start.trained)
        shapes = {slot: tuple(t.shape) for slot, t in (trained | dict(start.fixed)).items()}
        sizes = start.layout.bind(
            {slot: shape for slot, shape in shapes.items() if slot in start.layout.names}
        )
        self.detected = Detected(
            algorithm,
            start.layout,
            sizes,
            None if arguments.dora is None else dora.DORA_SCALE.name,
            arguments.dora,
        )
        #: What a file must store for the trained scale to be read: rounded before it is used.
        self.alpha = (
            None if start.alpha is None else torch.tensor(start.alpha, dtype=dtype, device="cpu").item()
        )
        self.dims = algorithm.dims(start.layout, sizes, self.alpha, DEFAULT_READING)
        self._squares: Tensor | None
        self.register_buffer("_squares", None, persistent=False)
        if arguments.dora is not None:
            self._squares = dora.squared_norms(weight.to(dtype), arguments.dora)
            initial = dora.initial(self._squares, arguments.dora, layer.shape)
            trained.setdefault(dora.DORA_SCALE.name, initial)
        self._slots = tuple(trained)
        for slot, tensor in trained.items():
            value = tensor.detach().to(device=weight.device, dtype=dtype).clone()
            self.register_parameter(_attribute(slot), nn.Parameter(value))
        self.scalar = nn.Parameter(value.new_zeros(())) if arguments.use_scalar else None
        self.fixed = dict(start.fixed)
        self.switches = {slot: bool(tensor.item()) for slot, tensor in self.fixed.items()}
        self.structured = self._choose(forward)
        self._may_choose = forward == "auto" and not isinstance(layer.padding, str) and not self._drops_output
        #: Whether the structured form is the one that a GPU is faster with, which gives W' whole.
        self.as_on_gpu = False
        self.compute_on(weight.device)
        self.prepared: Operands | None = None  # what a step made beforehand
        self.uses_kernels = False  # Triton's
        self.masks: Mapping[str, Tensor] = {}
        self.mask_specs = tuple(self._mask_specs())
        self.seed: Tensor | None = None  # of the step's element dropout
        self.salt = salt

    # --- what it is made of ----------------------------------------------------------------

    @property
    def original(self) -> nn.Module:
        """The layer underneath."""
        return self._original[0]

    @property
    def base_weight(self) -> Tensor:
        """W, which is not trained."""
        return cast("Tensor", self.original.weight).detach()

    @property
    def squares(self) -> Tensor:
        """‖W‖² along DoRA's axis."""
        if self._squares is None:
            raise TypeError(f"{self.detected.label} keeps no norms")
        return self._squares

    def parameter(self, slot: str) -> nn.Parameter:
        """The trained tensor of a slot."""
        return self.get_parameter(_attribute(slot))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained slot, and ``scalar`` where there is one: the raw state."""
        for slot in self._slots:
            yield slot, self.parameter(slot)
        if self.scalar is not None:
            yield SCALAR, self.scalar

    def slots(self) -> dict[str, Tensor]:
        """What a file stores besides alpha: trained slots with the scalar folded in, and fixed ones."""
        return {**self._folded(), **self.fixed}

    def _folded(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The trained slots, the scalar folded in."""
        tensors: dict[str, Tensor] = dict(self.trained() if trained is None else trained)
        scalar = tensors.pop(SCALAR, None)
        if scalar is not None:
            for slot in self.detected.layout.linear_in:
                if slot in tensors:
                    tensors[slot] = tensors[slot] * scalar
        return tensors

    def _bound(self, tensors: Mapping[str, Tensor]) -> Bound:
        return Bound(
            tensors, self.detected.layout, self.detected.sizes, self.dims, DEFAULT_READING, self.switches
        )

    def module(self) -> Bound:
        """The module as a formula gets it, with the step's masks while training."""
        tensors = self._folded()
        if self.training and self.mask_specs:
            if not self.masks:
                raise RuntimeError("masks need Network.draw before each step")
            if "live" in self.masks:
                for slot, axis in self.training_of.nested_axes:
                    live, held = (_along(self.masks[name], axis, tensors[slot]) for name in ("live", "held"))
                    tensors[slot] = live * tensors[slot] + held * tensors[slot].detach()
            for slot, axis in self.training_of.rank_axes:
                if f"rank {slot}" in self.masks:
                    tensors[slot] = tensors[slot] * _along(self.masks[f"rank {slot}"], axis, tensors[slot])
        return self._bound(tensors | self.fixed)

    def weight_change(self, module: Bound | None = None) -> Tensor:
        """ΔW by the registry's formula, in the parameters' dtype."""
        module = self.module() if module is None else module
        base = self.base_weight.to(next(self.parameters()).dtype) if self.detected.needs_base else None
        rows = self.masks.get("rows") if self.training and self.detected.dora_slot is not None else None
        return weight_change(self.detected, module, self.layer.shape, base, strength=1.0, rows=rows)

    def change_with(self, slots: Mapping[str, Tensor]) -> Tensor:
        """ΔW of a file's tensors in place of :meth:`slots`, without what dropouts take."""
        was_training = self.training
        self.eval()
        change = self.weight_change(self._bound(slots))
        self.train(was_training)
        return change

    def inner_change(self, module: Bound | None = None) -> Tensor:
        """The algorithm's own change, below DoRA."""
        module = self.module() if module is None else module
        base = self.base_weight.to(next(self.parameters()).dtype) if self.algorithm.needs_base else None
        return self.algorithm.delta(module, self.layer.shape, base)

    # --- the forward pass ------------------------------------------------------------------

    def compute_on(self, device: torch.device) -> None:
        """Take the form that a device is faster with, wherever the weight is now."""
        self.as_on_gpu = self._may_choose and device.type == "cuda"

    def forward(self, x: Tensor) -> Tensor:
        """``op(x, W') + b'``."""
        structured = self.structured
        if self.training and self._drops_output:
            return cast("Tensor", self._original_forward(x)) + self._drop(self.change(x))
        bias = cast("Tensor | None", self.original.bias)
        if structured is None:
            module = self.module()
            y = product_with_sum(self.layer, x, self.base_weight, self.weight_change(module), bias)
            added = bias_change(self.detected, module, strength=1.0)
            return y if added is None else y + self.layer.channels(added, y)
        operands = self.operands()
        if operands.keys() <= FACTORS:
            return product_with_low_rank(self.layer, x, self.base_weight, low_rank_of(operands), bias)
        if structured.is_low_rank and self.detected.dora_axis == "out" and not torch.compiler.is_compiling():
            direction = product_with_low_rank(self.layer, x, self.base_weight, low_rank_of(operands), None)
            return scaled(direction, operands["gain"], bias, self.layer, kernels=self.uses_kernels)
        if "mixing" in operands:
            low, mixing = low_rank_of(operands), operands["mixing"]
            return product_with_thin_kronecker(self.layer, x, low, mixing, self.base_weight, bias)
        if self.as_on_gpu and "second" in operands:
            factors = operands["first"], operands["second"]
            return product_with_kronecker(self.layer, x, *factors, self.base_weight, bias)
        output = self._output(structured, operands, x)
        if output is None:
            return cast("Tensor", self._original_forward(x)) + self._change(structured, operands, x)
        return output if bias is None else output + self.layer.channels(bias, output)

    def operands(self) -> Operands:
        """What the structured form computes with: those a step made for all layers, or made now."""
        return self._own_operands(self.module()) if self.prepared is None else self.prepared

    def operands_of(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operands from values of :meth:`trained`, without DoRA's gain."""
        return self._operands(self._bound(self._folded(trained) | self.fixed))

    def _operands(self, module: Bound) -> dict[str, Tensor]:
        if self.structured is None:
            raise RuntimeError(f"{self.detected.label} has no structured form")
        operands = dict(self.structured.operands(module))
        if self.as_on_gpu and self.structured.on_gpu is not None:
            return dict(self.structured.on_gpu(operands, self.layer)) or operands
        return operands

    def _own_operands(self, module: Bound) -> Operands:
        """The operands; with DoRA's gain beside its factors."""
        operands = self._operands(module)
        slot, axis = self.detected.dora_slot, self.detected.dora_axis
        if slot is None or axis is None:
            return operands
        low = low_rank_of(operands)
        product = dora.product_with_base(self.base_weight, low, axis)
        return {**operands, "gain": dora.gain(module[slot], self.squares, low, product, axis)}

    @property
    def _drops_output(self) -> bool:
        """Whether training drops parts of the change itself, rather than of its factors."""
        drops = self.dropouts
        return bool(drops.modules or drops.elements or (drops.ranks and not self.training_of.rank_axes))

    def _base(self, x: Tensor) -> Tensor:
        return self.layer.apply(x, self.base_weight)

    def _output(self, structured: Structured, operands: Operands, x: Tensor) -> Tensor | None:
        """``op(x, W')`` where that is not a sum; None where it is."""
        if structured.output is not None:
            return structured.output(operands, self.layer, x, self._base)
        axis = self.detected.dora_axis
        if axis is None:
            return None
        low = low_rank_of(operands)

        def direction(x: Tensor) -> Tensor:
            return product_with_low_rank(self.layer, x, self.base_weight, low, None)

        return dora.output(operands["gain"], axis, self.layer, x, direction)

    def _change(self, structured: Structured, operands: Operands, x: Tensor) -> Tensor:
        if structured.change is not None:
            return structured.change(operands, self.layer, x)
        return self.layer.low_rank(x, low_rank_of(operands))

    def change(self, x: Tensor) -> Tensor:
        """``op(x, ΔW)``, and the change of the bias."""
        if self.structured is None:
            module = self.module()
            bias = bias_change(self.detected, module, strength=1.0)
            return self.layer.apply(x, self.weight_change(module), bias)
        operands = self.operands()
        multiplied = self._output(self.structured, operands, x)
        return (
            self._change(self.structured, operands, x) if multiplied is None else multiplied - self._base(x)
        )

    def _drop(self, change: Tensor) -> Tensor:
        if "rows" in self.masks and self.detected.dora_slot is None:
            change = change * self.layer.channels(self.masks["rows"], change)
        if "module" in self.masks:
            change = change * self.masks["module"].to(change.dtype)
        if self.dropouts.elements:
            if self.seed is None:
                raise RuntimeError("dropout needs Network.draw before each step")
            change = change * element_mask(change, self.dropouts.elements, self.seed, self.salt)
        return change

    # --- choices made once -----------------------------------------------------------------

    def _choose(self, forward: Forward) -> Structured | None:
        """The structured form, where there is one and it is asked for or cheaper.

        The structured form costs three times its multiply-adds in a step: forward, and backward
        to the input and to the parameters. ΔW costs the product of its own gradient, and one
        forward where it may not be added to W (:func:`product_with_sum`).
        """
        structured = self.training_of.structured
        if structured is None or forward == "fused" or self.layer.groups != 1:
            return None
        if self.detected.dora_slot is not None:
            drops_rows = bool(self.dropouts.ranks) and not self.training_of.rank_axes
            if not structured.is_low_rank or drops_rows:
                return None
        if forward == "structured":
            return structured
        products = 1 if self.base_weight.dtype == next(self.parameters()).dtype else 2
        cost = structured.cost(self.detected.sizes, self.layer)
        return structured if 3 * cost < products * self.layer.numel else None

    def _mask_specs(self) -> Iterator[MaskSpec]:
        rank, drops = self.arguments.rank, self.dropouts
        if self.training_of.nested_axes:
            yield MaskSpec("live", rank, block=self.arguments.block_size)
            yield MaskSpec("held", rank, block=self.arguments.block_size)
        if drops.ranks:
            for slot, axis in self.training_of.rank_axes:
                size = self.parameter(slot).shape[axis]
                yield MaskSpec(f"rank {slot}", size, drops.ranks, is_scaled=drops.scale_ranks)
            if not self.training_of.rank_axes:
                yield MaskSpec("rows", self.layer.out, drops.ranks, is_scaled=drops.scale_ranks)
        if drops.modules:
            yield MaskSpec("module", 1, drops.modules)

    # --- attaching -------------------------------------------------------------------------

    def attach(self) -> None:
        """Put this forward in the place of the layer's."""
        self.original.forward = self.forward

    def detach(self) -> None:
        """Give the layer its own forward back."""
        del self.original.forward

    def extra_repr(self) -> str:
        """The algorithm, the rank and how it is computed."""
        form = "fused" if self.structured is None else "structured"
        return f"{self.detected.label}, rank={self.dims.rank}, {form}"


def _attribute(slot: str) -> str:
    """A slot as the name of a parameter, which may have no dots."""
    return slot.replace(".", "_")


def _along(mask: Tensor, axis: int, tensor: Tensor) -> Tensor:
    """A mask shaped to lie along an axis of a tensor."""
    shape: Shape = tuple(-1 if dim == axis else 1 for dim in range(tensor.ndim))
    return mask.to(tensor.dtype).reshape(shape)
