"""The network of one run: an adapter on every target, its parameters, state and file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lycotool.algorithms.alpha import alpha_tensor
from lycotool.algorithms.training import CannotTrainError
from lycotool.errors import IncompatibleError, NumericError, UsageError
from lycotool.linalg.finite import extremes, is_finite
from lycotool.linalg.underflow import Underflow
from lycotool.training.adapter import AdapterLayer
from lycotool.training.geometry import describe_layer
from lycotool.training.masks import ELEMENTS, Dropouts, MaskSpec, draw_masks
from lycotool.training.network_options import NetworkOptions, trainable
from lycotool.training.norms import ShrunkNorms, shrink
from lycotool.training.operands import OperandMaker
from lycotool.training.randomness import seed_of, torch_generator
from lycotool.training.targets import TableRow, Target, module_table
from lycotool.training.weights import Loaded, adopt, continued

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer

#: Purpose of the initial values' draws; the layer's name follows.
_INIT = "network init"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes
    ----------
    lr_ratio
        What the component's learning rate is multiplied by (LoRA+); 1 for most.
    """

    component: str
    lr_ratio: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


class Network(nn.Module):
    """Adapters on a model's layers. :meth:`build` makes and attaches one.

    In training mode (`train`) dropouts and DyLoRA's blocks are at work and :meth:`draw` is
    called before each step; in evaluation mode the whole network is.
    """

    def __init__(self, layers: Mapping[str, tuple[str, AdapterLayer]], *, seed: int) -> None:
        super().__init__()
        self.names = tuple(layers)
        self.components = tuple(component for component, _ in layers.values())
        self.layers = nn.ModuleList(layer for _, layer in layers.values())
        self._seed = seed
        #: Which process: each drops other elements of its samples, and the same ranks and layers.
        self.part = 0
        self._lr_ratios: dict[str, float] = {}
        self._masks: Tensor | None = None
        self._step_seed: Tensor | None = None
        self._operands: OperandMaker | None = None
        self._specs: tuple[MaskSpec, ...] = tuple(
            spec for layer in self.adapters for spec in layer.mask_specs
        )

    @classmethod
    def build(
        cls,
        targets: Sequence[Target],
        options: NetworkOptions,
        *,
        seed: int,
        weights: Mapping[str, Loaded] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Network:
        """Make an adapter for every target and attach it.

        Parameters
        ----------
        seed
            Of initial values and dropouts.
        weights
            Modules of the file to start from (``network_weights``), by the targets' names.
        dtype
            Of the parameters.

        Raises
        ------
        UsageError
            If an argument applies to nothing.
        IncompatibleError
            If a layer cannot be trained so, or `weights` do not fit.
        """
        options.check({str(target.overrides["algo"]) for target in targets if "algo" in target.overrides})
        layers: dict[str, tuple[str, AdapterLayer]] = {}
        weights = weights or {}
        for target in targets:
            if target.name in layers:
                raise IncompatibleError("is a target twice", key=target.name)
            layer = describe_layer(target.module)
            if layer is None:
                raise IncompatibleError(
                    f"{type(target.module).__name__} is no layer an adapter can be on", key=target.name
                )
            made = _make(target, layer, options.overridden(target.overrides), seed, weights, dtype)
            if made is not None:
                layers[target.name] = target.component, made
        foreign = sorted(weights.keys() - layers.keys())
        if foreign:
            raise IncompatibleError(
                f"{len(foreign)} modules of the file are on no trained layer",
                path=options.network_weights,
                details=foreign,
                hint="a wider preset trains more layers; `lycotool convert --to lycoris.kohya` gives other "
                "programs' files the names of these",
            )
        if not layers:
            raise IncompatibleError("no layer is left to train", hint="conv_dim 0 leaves convolutions out")
        network = cls(layers, seed=seed)
        network._set_lr_ratios(options)
        for made in network.adapters:
            made.attach()
        return network

    @property
    def adapters(self) -> Iterator[AdapterLayer]:
        """The layers, in order."""
        for layer in self.layers:
            if isinstance(layer, AdapterLayer):
                yield layer

    def named(self) -> Iterator[tuple[str, str, AdapterLayer]]:
        """Name, component and layer of each."""
        yield from zip(self.names, self.components, self.adapters, strict=True)

    # --- parameters ------------------------------------------------------------------------

    def parameters_of(self, component: str) -> list[nn.Parameter]:
        """Everything trained in ``unet``, ``te``, ``te1`` or ``te2``."""
        return [p for _, owner, layer in self.named() if owner == component for _, p in layer.trained()]

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """The parameters of each component, those that LoRA+ trains faster by themselves."""
        found: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = {}
        for name, component, layer in self.named():
            for slot, parameter in layer.trained():
                is_up = slot in layer.training_of.up
                ratio = self._lr_ratios.get(component, 1.0) if is_up else 1.0
                found.setdefault((component, ratio), []).append((f"{name}.{slot}", parameter))
        return tuple(
            ParameterGroup(component, ratio, *(tuple(column) for column in zip(*rows, strict=True)))
            for (component, ratio), rows in found.items()
        )

    def _set_lr_ratios(self, options: NetworkOptions) -> None:
        for component in dict.fromkeys(self.components):
            ratio = options.lr_ratio(component)
            if ratio is not None and ratio != 1:
                self._lr_ratios[component] = ratio
        has_up = {
            component
            for _, component, layer in self.named()
            if any(slot in layer.training_of.up for slot, _ in layer.trained())
        }
        idle = sorted(self._lr_ratios.keys() - has_up)
        if idle:
            raise UsageError(
                f"LoRA+ does nothing for {', '.join(idle)}: no factor there has a rank as its input"
            )

    def table(self) -> tuple[TableRow, ...]:
        """The module type table: modules and parameters by component and type."""
        return module_table(
            (component, layer.detected.label, sum(parameter.numel() for _, parameter in layer.trained()))
            for _, component, layer in self.named()
        )

    # --- a step ----------------------------------------------------------------------------

    def draw(self, step: int) -> None:
        """Choose what a step drops and which ranks of a DyLoRA it trains."""
        device = next(self.parameters()).device
        if self._specs:
            drawn = torch.from_numpy(draw_masks(self._specs, self._seed, step))
            if self._masks is None or self._masks.device != device:
                self._masks = torch.empty_like(drawn, device=device)
                self._hand_out(self._masks)
            self._masks.copy_(drawn)
        if any(layer.dropouts.elements for layer in self.adapters):
            if self._step_seed is None or self._step_seed.device != device:
                self._step_seed = torch.zeros((), dtype=torch.int64, device=device)
                for layer in self.adapters:
                    layer.seed = self._step_seed
            self._step_seed.fill_(seed_of(self._seed, ELEMENTS, step, self.part))

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Make what the layers compute with for all of them at once; see :class:`OperandMaker`.

        For one forward and backward pass.
        """
        if self._operands is None:
            self._operands = OperandMaker(list(self.adapters))
        with self._operands.prepared():
            yield

    def compute_on(self, device: torch.device) -> None:
        """Take the forms that a device is faster with, wherever the base's weights are now."""
        for layer in self.adapters:
            layer.compute_on(device)

    def use_kernels(self) -> None:
        """Let the layers use the Triton kernels, which work here."""
        for layer in self.adapters:
            layer.uses_kernels = True

    def _hand_out(self, masks: Tensor) -> None:
        start = 0
        for layer in self.adapters:
            views: dict[str, Tensor] = {}
            for spec in layer.mask_specs:
                views[spec.name] = masks[start : start + spec.size]
                start += spec.size
            layer.masks = views

    def max_norm(self, value: float) -> ShrunkNorms:
        """Shrink every change whose norm is above `value`: ``scale_weight_norms``."""
        return shrink(list(self.adapters), value)

    # --- state and file --------------------------------------------------------------------

    def raw_state(self) -> dict[str, Tensor]:
        """Every trained tensor as it is, by ``name.slot``: what a run goes on from."""
        return {
            f"{name}.{slot}": parameter.detach()
            for name, _, layer in self.named()
            for slot, parameter in layer.trained()
        }

    @torch.no_grad()
    def load_raw_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of :meth:`raw_state`.

        Raises
        ------
        IncompatibleError
            If it is another network's.
        """
        own = self.raw_state()
        faults = [f"{key}: missing" for key in own.keys() - state.keys()]
        faults += [f"{key}: not of this network" for key in state.keys() - own.keys()]
        faults += [
            f"{key}: has shape {list(state[key].shape)}, expected {list(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ]
        if faults:
            raise IncompatibleError("the saved state is another network's", details=sorted(faults))
        for key, tensor in own.items():
            tensor.copy_(state[key])

    @torch.no_grad()
    def export(
        self, dtype: torch.dtype | None = None, underflow: Underflow | None = None
    ) -> dict[str, Tensor]:
        """The adapter file's tensors, on the CPU, by the keys sd-scripts and LyCORIS write.

        Parameters
        ----------
        dtype
            To save in; None keeps the parameters'.
        underflow
            Told what becomes zero.

        Raises
        ------
        NumericError
            If a value is not finite, or is not any more in `dtype`.
        """
        tensors: dict[str, Tensor] = {}
        for name, _, layer in self.named():
            slots: dict[str, Tensor] = {}
            for slot, tensor in layer.slots().items():
                saved = tensor.detach().to("cpu", copy=True)
                if saved.is_floating_point():
                    if not is_finite(saved):
                        raise NumericError("has NaN or infinite values", key=f"{name}.{slot}")
                    exact, saved = saved, saved if dtype is None else saved.to(dtype)
                    if underflow is not None and exact.numel():
                        underflow.look(exact, saved, max(map(abs, extremes(exact))), f"{name}.{slot}")
                    if not is_finite(saved):
                        raise NumericError(
                            f"overflows {str(dtype).removeprefix('torch.')}", key=f"{name}.{slot}"
                        )
                slots[slot] = saved.contiguous()
            if layer.alpha is not None:
                slots["alpha"] = alpha_tensor(layer.alpha, slots)
            tensors |= {f"{name}.{slot}": tensor for slot, tensor in slots.items()}
        return tensors

    def detach(self) -> None:
        """Give the model its own layers back."""
        for layer in self.adapters:
            layer.detach()


def _make(
    target: Target,
    layer: TrainableLayer,
    options: NetworkOptions,
    seed: int,
    weights: Mapping[str, Loaded],
    dtype: torch.dtype,
) -> AdapterLayer | None:
    """The adapter of one target; None where the options leave the layer out."""
    dropouts = Dropouts(
        elements=options.dropout or 0.0,
        ranks=options.rank_dropout or 0.0,
        scale_ranks=bool(options.rank_dropout_scale),
        modules=options.module_dropout or 0.0,
    )
    loaded = weights.get(target.name)
    algorithm, training = trainable("norm" if layer.kind == "norm" else options.algo)
    try:
        if options.dim_from_weights:
            if loaded is None:
                return None
            algorithm, start, arguments = continued(loaded, options)
        else:
            arguments_or_none = options.arguments_for(layer)
            if arguments_or_none is None:
                return None
            if layer.kind not in training.kinds:
                raise CannotTrainError(f"{algorithm.name} does not train a {layer.kind} layer")
            arguments = arguments_or_none
            start = training.init(layer, arguments, torch_generator(seed, f"{_INIT} {target.name}"))
    except CannotTrainError as error:
        raise IncompatibleError(str(error), key=target.name) from None
    made = AdapterLayer(
        target.module,
        layer,
        algorithm,
        start,
        arguments,
        forward=options.forward,
        dropouts=dropouts,
        dtype=dtype,
        salt=seed_of(0, ELEMENTS + " " + target.name) >> 32,
    )
    if loaded is not None:
        try:
            adopt(made, loaded)
        except CannotTrainError as error:
            raise IncompatibleError(
                str(error),
                path=options.network_weights,
                key=target.name,
                hint="dim_from_weights takes algorithm and rank from the file",
            ) from None
    return made
