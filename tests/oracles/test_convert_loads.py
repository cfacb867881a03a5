"""Converted files load where they are meant to, and what other programs save converts.

diffusers' pipelines, PEFT and LyCORIS load what `convert` wrote into small models of the real
classes. What a layer then does to its input is compared with what the original tensors say, by
float64 formulas that are not lycotool's. In the other direction the three libraries save, and
the converted file has to say what their layers did.

Not tested, because the libraries read the files otherwise than they were meant, or not at all:

- diffusers 0.42: in kohya's names, attention layers with another alpha than most modules of the
  file (it looks for that alpha under a name it does not have); Flux' ``linear1`` in kohya's and
  ComfyUI's names (the published heights are written into the converter), layers outside of the
  blocks, all of SD 3 and Lumina 2, and Z-Image's fused layers.
- LyCORIS 4.1: DoRA over the input axis, CP cores with two ranks, (IA)³, LoKr with CP, and
  ``diff_b`` and sparse parts beside a LoRA.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import read, run, succeed, write
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.wrapper import create_lycoris, create_lycoris_from_weights
from makers import adapters
from makers import architectures as arch
from makers.dit import TRANSFORMERS, Denoiser
from makers.ldm_names import unet_to_ldm
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from oracles.support import assert_near, effective, effective_norm, randomise

# Tolerances, in roundings of the largest element of W'. Measured: at most a third of each.
#
# lycotool rounds a factor once at most; the libraries add at most 4 products of factors to W,
# after sums of up to 16 products inside of a factor.
SUMS = 8
# m/|V| is far below 1 here, and the libraries compute it with the roundings of 1: PEFT adds
# (m/|V| - 1)·W·x to W·x, LyCORIS adds m/|V| - 1 to 1.
DORA = 32
# Factors of other algorithms go through one float32 QR and singular value decomposition, with a
# few roundings of the largest singular value, which is above the largest element.
DECOMPOSED = 16
# A float16 factor that took up c was rounded once: half a unit of each of 4 products.
HALF = 2
EPS16 = torch.finfo(torch.float16).eps

# diffusers' own: Chroma imports this from where it used to be.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

RANKS = (1, 2, 3, 4)
ALPHAS = (0.5, 1.0, 3.0, 4.0)

UNETS = {
    "sd1": (arch.sd1_unet, diffusers.StableDiffusionPipeline),
    "sdxl": (arch.sdxl_unet, diffusers.StableDiffusionXLPipeline),
}
#: Families for which kohya's names are diffusers'.
KOHYA_AS_DIFFUSERS = ("sd1", "qwen-image", "z-image")

Tensors = dict[str, Tensor]


# --- models and what their modules are called ----------------------------------------------


@cache
def denoiser(family: str) -> Denoiser:
    """A model family's denoiser in diffusers."""
    if family not in UNETS:
        return TRANSFORMERS[family]
    build, pipeline = UNETS[family]
    unet = build()
    ldm = {path: name for name, path in unet_to_ldm({name: name for name in unet.state_dict()}).items()}
    layers = {
        ldm[f"{path}.weight"].removesuffix(".weight"): (path,)
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    return Denoiser(build, pipeline, layers)


@dataclass(frozen=True)
class Module:
    """An adapter's module: its name, diffusers' layers that have its rows, and their order."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Its rows, given those of diffusers' layers."""
        rows = torch.cat([tensors[part] for part in self.parts])
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows

    def split(self, rows: Tensor, like: Mapping[str, Tensor]) -> Tensors:
        """The rows of diffusers' layers, given its own."""
        rows = torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows
        return dict(zip(self.parts, rows.split([len(like[part]) for part in self.parts]), strict=True))


def modules(family: str, dialect: str) -> list[Module]:
    """Every layer of a family under the names of a dialect."""
    model = denoiser(family)
    unet = "unet." if family in UNETS else "transformer."
    prefix = {
        "comfyui": "diffusion_model.", "lycoris": "lycoris_", "diffusers": unet, "peft": "base_model.model.",
    }.get(dialect, "lora_unet_")  # fmt: skip
    is_kohya = dialect in ("networks.lora", "lycoris.kohya")
    if dialect == "comfyui" or (is_kohya and family not in KOHYA_AS_DIFFUSERS):
        found = [Module(native, parts, native in model.swapped) for native, parts in model.layers.items()]
    else:
        found = [Module(part, (part,)) for parts in model.layers.values() for part in parts]
    is_dotted = prefix.endswith(".")
    return [
        Module(prefix + (m.name if is_dotted else m.name.replace(".", "_")), m.parts, m.swapped)
        for m in found
    ]


# --- adapters and what they do -------------------------------------------------------------


@dataclass
class Changed:
    """Weights and biases of layers with an adapter on them, by the layers' paths."""

    weights: Tensors = field(default_factory=dict)
    biases: Tensors = field(default_factory=dict)

    def add(self, module: Module, slots: Mapping[str, Tensor], scale: float, base: Changed) -> None:
        """Add what a module makes of its layers."""
        weight = module.joined(base.weights)
        weight = weight + adapters.weight_change(slots, scale, weight).reshape(weight.shape)
        bias = module.joined(base.biases) + adapters.bias_change(slots, scale, len(weight))
        self.weights |= module.split(weight, base.weights)
        self.biases |= module.split(bias, base.weights)


@cache
def untouched(family: str) -> nn.Module:
    """The model without an adapter, for those who only read it."""
    return denoiser(family).model()


def unchanged(model: nn.Module) -> Changed:
    """The weights and biases of every layer, zeros where one has no bias."""
    found = Changed()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            weight = layer.weight.detach().double()
            found.weights[path] = weight
            found.biases[path] = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    return found


def assert_same(found: Changed, expected: Changed, roundings: float, *, eps: float | None = None) -> None:
    """The same layers, with the same weights and biases."""
    options = {} if eps is None else {"eps": eps}
    assert found.weights.keys() == expected.weights.keys()
    for path, weight in expected.weights.items():
        assert_near(found.weights[path], weight, roundings, **options)
        assert_near(found.biases[path], expected.biases[path], roundings, **options)


def visible(changed: Changed, base: nn.Module) -> Changed:
    """The same, once every weight is seen to differ from the base's."""
    weights = unchanged(base).weights
    for path, weight in changed.weights.items():
        assert path not in weights or (weight - weights[path]).norm() > 0.02 * weights[path].norm()
    return changed


def form_for(form: str, shape: tuple[int, ...]) -> str:
    """The form, without its CP core where the layer has no kernel for one."""
    return form if shape[2:].count(1) < len(shape[2:]) else form.replace(" (cp)", "")


def make(
    path: Path,
    model: nn.Module,
    named: Iterable[Module],
    form: str = "lora",
    *,
    alphas: tuple[float, ...] = ALPHAS,
    dtype: torch.dtype = torch.float32,
) -> Changed:
    """Write an adapter with a module for each layer, with different ranks and alphas.

    Parameters
    ----------
    form
        Of makers.adapters, or several with ``|`` between, which the modules have in turn.
    """
    base, expected = unchanged(model), Changed()
    forms = form.split(" | ")
    tensors: Tensors = {}
    for number, module in enumerate(named):
        shape = tuple(module.joined(base.weights).shape)
        rank, alpha = RANKS[number % len(RANKS)], alphas[number // 2 % len(alphas)]
        slots = adapters.module(
            form_for(forms[number % len(forms)], shape), shape, rank=rank, alpha=alpha, seed=module.name
        )
        slots = {slot: tensor.to(dtype) for slot, tensor in slots.items()}
        tensors |= {f"{module.name}.{slot}": tensor for slot, tensor in slots.items()}
        dims = adapters.rank_of(slots)
        expected.add(module, slots, 1.0 if dims is None else float(slots["alpha"]) / dims, base)
    write(path, tensors)
    return expected


def read_back(path: Path, model: nn.Module, family: str, dialect: str) -> Changed:
    """What a file does to the layers it names, in float64; every tensor is accounted for."""
    file, base, found = adapters.contents(path), unchanged(model), Changed()
    known = 0
    for module in modules(family, dialect):
        keys = adapters.slots_in(file, dialect, module.name)
        if keys:
            slots = {slot: file.tensors[key] for slot, key in keys.items()}
            found.add(module, slots, adapters.scale_of(file, dialect, module.name, slots), base)
            known += len(keys)
    assert known == len(file.tensors)
    return found


def convert(source: Path, to: str, *options: str) -> Path:
    """Convert beside the source; which model it is for has to be found out."""
    output = source.parent / (f"{to}-{source.stem}" if to == "peft" else f"{to}-{source.stem}.safetensors")
    succeed("convert", source, "--to", to, "-o", output, *options)
    return output


# --- diffusers -----------------------------------------------------------------------------


def pipeline_of(cls: Any, **components: nn.Module) -> Any:
    """A pipeline of these components alone."""
    needed = inspect.signature(cls.__init__).parameters
    absent = {name: None for name, p in needed.items() if name != "self" and p.default is p.empty}
    if "requires_safety_checker" in needed:
        absent["requires_safety_checker"] = False
    return cls(**(absent | components))


def in_pipeline(family: str, model: nn.Module) -> Any:
    name = "unet" if family in UNETS else "transformer"
    return pipeline_of(denoiser(family).pipeline, **{name: model})


def adapted(model: nn.Module) -> Changed:
    """The weights of the layers that PEFT put an adapter on; diffusers does so with PEFT."""
    found = Changed()
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            found.weights[path], found.biases[path] = effective(layer, layer.base_layer)
    return found


def loaded(path: Path, family: str) -> Changed:
    """What a pipeline makes of a file."""
    model = denoiser(family).model()
    in_pipeline(family, model).load_lora_weights(str(path))
    return adapted(model)


def everything(_: Module) -> bool:
    """Take every layer."""
    return True


def some_of_unet(module: Module) -> bool:
    """Take every kind of layer of a UNet, and not all of it, which would take long.

    Of SDXL's ten transformer blocks in an attention the first and the last; of SD's levels two.
    """
    path = module.parts[0]
    is_inner = any(f"transformer_blocks.{number}." in path for number in range(1, 9))
    return not is_inner and not path.startswith(("down_blocks.1", "up_blocks.0", "up_blocks.1"))


def in_sd_scripts(module: Module) -> bool:
    """Take some of what sd-scripts' networks have of a UNet."""
    outside = module.parts[0].startswith(("conv_", "time_embedding", "add_embedding"))
    return some_of_unet(module) and not outside


def with_bias(module: Module) -> bool:
    """Take some of a UNet's layers that have one."""
    return some_of_unet(module) and not module.parts[0].endswith(("to_q", "to_k", "to_v"))


def in_blocks(module: Module) -> bool:
    """Take a transformer's layers that diffusers knows in other programs' names, at any width."""
    path = module.parts[0]
    is_linear1 = path.startswith("single_") and path.endswith(("to_q", "to_k", "to_v", "proj_mlp"))
    return "blocks." in path and not is_linear1


def only_proj_out(module: Module) -> bool:
    """Take the last layer of a transformer, whose name layers of blocks have too."""
    return module.parts == ("proj_out",)


@dataclass(frozen=True)
class Case:
    """A conversion: family, dialect written, form and dialect of the input, which layers it has."""

    family: str
    to: str = "diffusers"
    form: str = "lora"
    source: str = "networks.lora"
    options: tuple[str, ...] = ()
    keep: Callable[[Module], bool] = everything

    @property
    def id(self) -> str:
        return " ".join((self.family, self.form, self.source, "to", self.to, *self.options))

    @property
    def roundings(self) -> float:
        return DECOMPOSED if "--algo" in self.options else DORA if "dora" in self.form else SUMS

    def make(self, path: Path, **options: Any) -> Changed:
        """Write the input."""
        named = modules(self.family, self.source)
        return make(
            path,
            untouched(self.family),
            [module for module in named if self.keep(module)],
            self.form,
            **options,
        )

    def convert(self, path: Path) -> Path:
        return convert(path, self.to, *self.options)


DIFFUSERS = [
    Case("sd1", keep=in_sd_scripts),
    Case("sdxl", keep=in_sd_scripts),
    Case("sd1", source="comfyui"),
    Case("sdxl", source="comfyui", keep=some_of_unet),
    *(Case(family) for family in TRANSFORMERS if family != "z-image"),
    Case("z-image", source="comfyui"),  # there q, k and v are one module, in kohya's names three
    Case("sd1", "diffusers-legacy", source="comfyui", keep=some_of_unet),
    Case("sdxl", "diffusers-legacy", source="comfyui", keep=some_of_unet),
    Case("flux1", "ai-toolkit"),
    Case("qwen-image", "ai-toolkit"),
    Case("sd1", form="lora + dora (out)", source="lycoris.kohya", keep=some_of_unet),
    *(
        Case(family, form="lora + dora (out)", source="lycoris.kohya")
        for family in ("flux1", "sd3", "wan", "lumina2")
    ),
    Case("sd1", form="lora + bias", source="lycoris.kohya", keep=with_bias),
    Case("flux1", form="lora + bias", source="lycoris.kohya"),
    Case("sd1", form="lora (cp)", source="lycoris.kohya", keep=some_of_unet),
    Case("sd1", form="loha", source="lycoris.kohya", options=("--algo", "lora")),
    Case("flux1", form="loha", source="lycoris.kohya", options=("--algo", "lora")),
    Case("flux1", form="lora | lora + bias", source="lycoris.kohya"),  # the others' become zero
]

#: Dialects of other programs, which diffusers converts itself.
FOREIGN = [
    *(
        Case(family, to, source="comfyui", keep=in_sd_scripts)
        for family in UNETS
        for to in ("networks.lora", "onetrainer")
    ),
    Case("sd1", "lycoris.kohya", source="comfyui", keep=some_of_unet),
    Case("sd1", "locon.locon_kohya", source="comfyui", keep=in_sd_scripts),
    Case("flux1", "networks.lora", source="comfyui", keep=in_blocks),
    # Fused; and in diffusers' names these could be layers of HunyuanVideo.
    Case("flux1", "networks.lora", source="diffusers", keep=in_blocks, options=("--arch", "flux1")),
    Case("flux1", "comfyui", keep=in_blocks),
    Case("wan", "networks.lora", source="comfyui", keep=in_blocks),
    Case("wan", "comfyui", keep=in_blocks),
    Case("qwen-image", "networks.lora", source="comfyui"),
    Case("qwen-image", "comfyui"),
    Case("z-image", "networks.lora", source="comfyui"),
]


@pytest.mark.parametrize("case", DIFFUSERS, ids=lambda case: case.id)
def test_pipelines_load(case: Case, tmp_path: Path) -> None:
    expected = case.make(tmp_path / "adapter.safetensors")
    output = case.convert(tmp_path / "adapter.safetensors")
    assert_same(loaded(output, case.family), expected, case.roundings)


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.id)
def test_pipelines_load_names_of_other_programs(case: Case, tmp_path: Path) -> None:
    expected = case.make(tmp_path / "adapter.safetensors", alphas=(1.5,))
    output = case.convert(tmp_path / "adapter.safetensors")
    assert_same(loaded(output, case.family), expected, case.roundings)


def test_pipelines_load_half_precision(tmp_path: Path) -> None:
    """The scale goes into factors that stay float16."""
    case = Case("flux1")
    expected = case.make(tmp_path / "adapter.safetensors", dtype=torch.float16)
    output = case.convert(tmp_path / "adapter.safetensors")
    assert {tensor.dtype for tensor in read(output).values()} == {torch.float16}
    assert_same(loaded(output, "flux1"), expected, HALF, eps=EPS16)


@pytest.mark.parametrize("form", ["lora | lora + dora (out)", "lora + dora (out)"])
def test_what_diffusers_cannot_load_is_refused(form: str, tmp_path: Path) -> None:
    case = Case("flux1", form=form, source="lycoris.kohya")
    case.make(tmp_path / "adapter.safetensors")
    tensors = read(tmp_path / "adapter.safetensors")
    if "|" not in form:
        tensors |= {
            key.replace("dora_scale", "diff_b"): tensor.flatten().clone()
            for key, tensor in tensors.items()
            if key.endswith("dora_scale")
        }
    source = write(tmp_path / "changed.safetensors", tensors)
    assert run("convert", source, "--to", "diffusers", "-o", tmp_path / "out.safetensors").exit_code == 5


def clip(family: str) -> dict[str, nn.Module]:
    """The text encoders, as pipelines have them, by their component's name."""
    if family == "sd1":
        return {"text_encoder": _unwrapped(arch.sd1_text_encoder())}
    first, second = arch.sdxl_text_encoders()
    return {"text_encoder": _unwrapped(first), "text_encoder_2": second}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The class of transformers itself, which from version 5 on has no level ``text_model``."""
    return model.text_model if isinstance(model, arch.TextEncoder) else model


@pytest.mark.parametrize("to", ["diffusers", "diffusers-legacy"])
@pytest.mark.parametrize("family", UNETS)
def test_pipelines_load_text_encoders(family: str, to: str, tmp_path: Path) -> None:
    encoders = clip(family)
    prefixes = ["lora_te_"] if family == "sd1" else ["lora_te1_", "lora_te2_"]
    tensors, expected = {}, {}
    for (component, encoder), prefix in zip(encoders.items(), prefixes, strict=True):
        named = [Module(prefix + _in_kohya(path), (path,)) for path in unchanged(encoder).weights]
        expected[component] = make(tmp_path / "part.safetensors", encoder, named)
        tensors |= read(tmp_path / "part.safetensors")
    output = convert(write(tmp_path / "adapter.safetensors", tensors), to)

    # Without a UNet the pipeline asks the text encoders' adapters for the adapter's name.
    unet = denoiser(family).model()
    pipeline_of(denoiser(family).pipeline, unet=unet, **encoders).load_lora_weights(str(output))
    for component, encoder in encoders.items():
        assert_same(adapted(encoder), expected[component], SUMS)


def _in_kohya(path: str) -> str:
    """The name inside of a CLIP text encoder, for either version of transformers."""
    inner = path.removeprefix("text_model.").replace(".", "_")
    return inner if inner == "text_projection" else f"text_model_{inner}"


# --- PEFT ----------------------------------------------------------------------------------

PEFT = [
    Case("sd1", "peft", source="comfyui"),
    Case("sd1", "peft", "lora + dora (out)", "lycoris.kohya", keep=some_of_unet),
    Case("sd1", "peft", "lora (cp)", "lycoris.kohya", keep=some_of_unet),
    Case("sd1", "peft", "loha", "lycoris.kohya", keep=some_of_unet),
    Case("sdxl", "peft", source="comfyui", keep=some_of_unet),
    *(Case(family, "peft") for family in TRANSFORMERS),
    Case("lumina2", "peft", "loha", "lycoris.kohya"),
    Case("sd3", "peft", "loha", "lycoris.kohya"),
    Case("sd3", "peft", "lora + dora (out)", "lycoris.kohya"),
    Case(
        "flux1", "peft", keep=only_proj_out, options=("--arch", "flux1")
    ),  # not the blocks' modules of that name
]


@pytest.mark.parametrize("case", PEFT, ids=lambda case: case.id)
def test_peft_loads(case: Case, tmp_path: Path) -> None:
    expected = case.make(tmp_path / "adapter.safetensors")
    folder = case.convert(tmp_path / "adapter.safetensors")
    assert_same(in_peft(folder, case.family), expected, case.roundings)


def in_peft(folder: Path, family: str) -> Changed:
    """What PEFT makes of a folder."""
    model = PeftModel.from_pretrained(denoiser(family).model(), folder)
    return adapted(model.base_model.model)


# --- LyCORIS -------------------------------------------------------------------------------

NORMS = (nn.LayerNorm, nn.GroupNorm)


def first_level() -> nn.Module:
    """The first level of SD 1's UNet, which has every kind of layer."""
    part = nn.Module()
    part.down_blocks = denoiser("sd1").model().down_blocks[:1]
    return part


def in_first_level(module: Module) -> bool:
    """Take the layers of that."""
    return module.parts[0].startswith("down_blocks.0.")


def load_kohya(path: Path, model: nn.Module) -> Any:
    """LyCORIS' network for sd-scripts, from a file."""
    network, _ = create_network_from_weights(1.0, str(path), None, None, model)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return network.eval()


def load_wrapper(path: Path, model: nn.Module) -> Any:
    """LyCORIS' network for any model, from a file."""
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    network.apply_to()
    return network.eval()


LOADERS: dict[str, Callable[[Path, nn.Module], Any]] = {
    "lycoris.kohya": load_kohya,
    "lycoris": load_wrapper,
}


def applied(network: Any, model: nn.Module) -> Changed:
    """What the layers do that a network was applied to."""
    layers = {path.replace(".", "_"): (path, layer) for path, layer in model.named_modules()}
    found = Changed()
    for module in network.loras:
        path, layer = layers[module.lora_name.removeprefix("lora_unet_").removeprefix("lycoris_")]
        reading = effective_norm if isinstance(layer, NORMS) else effective
        found.weights[path], found.biases[path] = reading(layer.forward, layer)
    return found


@pytest.mark.parametrize("to", LOADERS)
@pytest.mark.parametrize("form", ["lora", "lora + dora (out)", "loha", "loha (cp)", "full + bias", "glora"])
def test_lycoris_loads(form: str, to: str, tmp_path: Path) -> None:
    """Each module has a rank and an alpha of its own."""
    case = Case("sd1", to, form, source="comfyui", keep=in_first_level)
    expected = case.make(tmp_path / "adapter.safetensors")
    model = first_level()
    network = LOADERS[to](case.convert(tmp_path / "adapter.safetensors"), model)
    assert_same(applied(network, model), expected, case.roundings)


@pytest.mark.parametrize("form", ["lora", "lora + dora (out)", "loha"])
def test_lycoris_loads_what_was_split(form: str, tmp_path: Path) -> None:
    """SimpleTuner's names are diffusers', where Flux' fused layers are several."""
    case = Case("flux1", "lycoris", form, source="lycoris.kohya")
    expected = case.make(tmp_path / "adapter.safetensors")
    model = denoiser("flux1").model()
    network = load_wrapper(case.convert(tmp_path / "adapter.safetensors"), model)
    assert_same(applied(network, model), expected, case.roundings)


def published(base: Changed, named: Iterable[Module]) -> nn.Module:
    """A model of linear layers as they were published, by their own paths."""
    root = nn.Module()
    for module in named:
        weight, bias = module.joined(base.weights), module.joined(base.biases)
        layer = nn.Linear(*weight.shape[::-1])
        layer.weight.data, layer.bias.data = weight.float(), bias.float()
        owner, _, name = module.name.removeprefix("diffusion_model.").rpartition(".")
        _submodule(root, owner).add_module(name, layer)
    return root


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    return root


def test_lycoris_loads_what_was_fused(tmp_path: Path) -> None:
    """Trainers of Flux have the published layers, and LyCORIS looks for those."""
    case = Case("flux1", "lycoris.kohya", source="diffusers")
    changed = case.make(tmp_path / "adapter.safetensors")
    named = modules("flux1", "comfyui")
    expected = Changed()
    for module in named:
        path = module.name.removeprefix("diffusion_model.")
        expected.weights[path] = module.joined(changed.weights)
        expected.biases[path] = module.joined(changed.biases)
    model = published(unchanged(untouched("flux1")), named)
    network = load_kohya(case.convert(tmp_path / "adapter.safetensors"), model)
    assert_same(applied(network, model), expected, SUMS)


#: Arguments of LyCORIS' networks, and a size of parameters that changes weights visibly.
NETWORKS: dict[str, tuple[dict[str, Any], float]] = {
    "locon": ({"algo": "locon", "use_tucker": True}, 0.3),
    "locon + dora": ({"algo": "locon", "dora_wd": True}, 0.3),
    "loha": ({"algo": "loha", "use_tucker": True}, 0.7),
    "lokr": ({"algo": "lokr", "factor": 4}, 0.5),
    "full and norm": ({"algo": "full", "train_norm": True}, 0.1),
    "glora": ({"algo": "glora", "conv_dim": 3}, 0.3),
    "diag-oft": ({"algo": "diag-oft", "rescaled": True}, 0.3),
    "boft": ({"algo": "boft", "constraint": 0.05}, 0.3),
    "tlora": ({"algo": "tlora", "preset": "attn-mlp"}, 0.3),
}


def train_lycoris(name: str, path: Path, *, with_kohya: bool) -> Changed:
    """Save a network of LyCORIS; what it does to the layers."""
    options, std = NETWORKS[name]
    options = {"conv_dim": 8, "conv_alpha": 4, **options}
    model = first_level()
    if with_kohya:
        network = create_network(1.0, 6, 4.5, None, None, model, **options)
        network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    else:
        network = create_lycoris(model, 1.0, 6, 4.5, **options)
        network.apply_to()
    randomise(network.eval(), seed=9, std=std)
    network.save_weights(str(path), torch.float32, {})
    return visible(applied(network, model), first_level())


@pytest.mark.parametrize("to", LOADERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_lycoris_networks_survive(
    name: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of network of LyCORIS takes what the other one saved."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # T-LoRA's modules do so one by one, which takes long
    source = tmp_path / "network.safetensors"
    expected = train_lycoris(name, source, with_kohya=to == "lycoris")
    model = first_level()
    network = LOADERS[to](convert(source, to), model)
    assert_same(applied(network, model), expected, DORA if "dora" in name else SUMS)


# --- the other direction -------------------------------------------------------------------

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
#: Layers of two levels of SD 1 that sd-scripts' networks have too.
BLOCKS = (
    r"(down_blocks\.[01]|mid_block)\.(.*\.)?"
    r"(to_q|to_k|to_v|to_out\.0|proj_in|ff\.net\.0\.proj|time_emb_proj|conv1|conv_shortcut|downsamplers\.0\.conv)"
)
PATTERNS = {
    "rank_pattern": {"attn2.to_k": 2, "^down_blocks.0.attentions.0.proj_in": 1, r"resnets\.1\.conv1": 3},
    "alpha_pattern": {"to_q": 1.5, "down_blocks.1.downsamplers.0.conv": 8},
}
FLUX_PATTERNS = {
    "rank_pattern": {"to_v": 2, "^proj_out": 3},
    "alpha_pattern": {"to_q": 1.5, "norm_out.linear": 8},
}
#: q and v only, so k's rows of the fused layers stay as they are; and the layers at the end.
FLUX_LAYERS = ["to_q", "to_v", "add_k_proj", "proj_mlp", "ff.net.2", "norm_out.linear", "proj_out"]


def train(family: str, config: LoraConfig) -> nn.Module:
    """A denoiser with an adapter of diffusers' that changes something."""
    model: Any = denoiser(family).model()
    model.add_adapter(copy.deepcopy(config))  # it is completed in place
    randomise(model, seed=3, std=0.3, marks=("lora_",))
    result: nn.Module = model.eval()
    return result


def save_by_model(family: str, model: Any, folder: Path) -> Path:
    model.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def save_by_pipeline(family: str, model: Any, folder: Path, *, with_metadata: bool = True) -> Path:
    name = "unet" if family in UNETS else "transformer"
    metadata = {f"{name}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    denoiser(family).pipeline.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": get_peft_model_state_dict(model)},
        **(metadata if with_metadata else {}),
    )
    return folder / "pytorch_lora_weights.safetensors"


def save_without_metadata(family: str, model: Any, folder: Path) -> Path:
    """As all files were before diffusers 0.35; readers take the rank for alpha."""
    return save_by_pipeline(family, model, folder, with_metadata=False)


@dataclass(frozen=True)
class Saved:
    """A file of diffusers, and the dialect to convert it to."""

    family: str
    to: str
    save: Callable[[str, nn.Module, Path], Path]
    config: dict[str, Any]

    @property
    def id(self) -> str:
        switches = [name for name in self.config if name.startswith(("use_", "lora_bias", "rank_"))]
        return " ".join((self.family, self.save.__name__, "to", self.to, *switches))


SD_LORA = {"r": 4, "lora_alpha": 6, "target_modules": BLOCKS}
SDXL_LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["attn2.to_k", "proj_out", "conv_shortcut"]}
FLUX_LORA = {"r": 4, "lora_alpha": 6, "target_modules": FLUX_LAYERS}

SAVED = [
    Saved("sd1", "networks.lora", save_by_model, {**SD_LORA, **PATTERNS}),
    Saved("sd1", "networks.lora", save_by_pipeline, {**SD_LORA, **PATTERNS, "use_rslora": True}),
    Saved("sd1", "lycoris.kohya", save_by_pipeline, {**SD_LORA, "use_dora": True}),
    Saved("sd1", "comfyui", save_by_pipeline, {**SD_LORA, **PATTERNS}),
    Saved("sd1", "comfyui", save_without_metadata, SD_LORA),
    Saved("sd1", "networks.lora", save_without_metadata, {**SD_LORA, **PATTERNS}),
    Saved("sdxl", "networks.lora", save_by_pipeline, SDXL_LORA),
    Saved("flux1", "networks.lora", save_by_model, {**FLUX_LORA, **FLUX_PATTERNS}),
    Saved("flux1", "comfyui", save_by_pipeline, {**FLUX_LORA, **FLUX_PATTERNS, "use_rslora": True}),
    Saved("flux1", "networks.lora", save_without_metadata, FLUX_LORA),
    Saved("flux1", "lycoris.kohya", save_by_pipeline, {**FLUX_LORA, "lora_bias": True}),
    *(
        Saved(
            family,
            to,
            save_by_pipeline,
            {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "add_k_proj", "add_v_proj"]},
        )
        for family, to in (("wan", "networks.lora"), ("qwen-image", "comfyui"))
    ),
]


# False alarm of PEFT's own: it takes the biases of `lora_bias` for parts of sharded factors.
@pytest.mark.filterwarnings("ignore:Adapter 'default.*invalid shape:UserWarning")
@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: saved.id)
def test_diffusers_files_convert(saved: Saved, tmp_path: Path) -> None:
    model = train(saved.family, LoraConfig(**saved.config))
    source = saved.save(saved.family, model, tmp_path)
    # A file of a model alone has no prefix that its pipeline would ask for.
    expected = adapted(model) if saved.save is save_by_model else loaded(source, saved.family)
    visible(expected, untouched(saved.family))
    output = convert(source, saved.to, "--arch", saved.family)
    assert_read(output, saved.family, saved.to, expected, DORA if "use_dora" in saved.config else SUMS)


def assert_read(path: Path, family: str, dialect: str, expected: Changed, roundings: float) -> None:
    """A file says what a library made of its own, and nothing of other layers."""
    base = unchanged(untouched(family))
    found = read_back(path, untouched(family), family, dialect)
    for side in ("weights", "biases"):
        changed, wanted = getattr(found, side), getattr(expected, side)
        assert wanted.keys() <= changed.keys()
        for part, tensor in changed.items():
            # Rows of a fused module that the library left alone.
            assert_near(tensor, wanted.get(part, getattr(base, side)[part]), roundings)


FOLDERS: dict[str, tuple[Any, str]] = {
    "lora": (LoraConfig(**SD_LORA, **PATTERNS), "networks.lora"),
    "rslora": (LoraConfig(**SD_LORA, **PATTERNS, use_rslora=True), "comfyui"),
    "dora": (LoraConfig(**SD_LORA, use_dora=True), "lycoris.kohya"),
    "loha": (LoHaConfig(r=3, alpha=5, target_modules=BLOCKS, **PATTERNS), "lycoris.kohya"),
    "loha cp": (LoHaConfig(r=3, alpha=5, target_modules=BLOCKS, use_effective_conv2d=True), "comfyui"),
    "lokr": (LoKrConfig(r=1, alpha=5, target_modules=BLOCKS), "lycoris.kohya"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_peft_folders_convert(name: str, tmp_path: Path) -> None:
    config, to = FOLDERS[name]
    expected = save_folder(copy.deepcopy(config), tmp_path / "adapter")
    output = convert(tmp_path / "adapter", to)
    assert_read(output, "sd1", to, expected, DORA if name == "dora" else SUMS)


def save_folder(config: Any, folder: Path) -> Changed:
    """Save an adapter of PEFT for SD 1's UNet; what it does to the layers."""
    model = get_peft_model(denoiser("sd1").model(), config)
    randomise(model, seed=6, std=0.3, marks=("lora_",))
    randomise(model, seed=6, std=0.7, marks=("hada_", "lokr_"))
    model.eval().save_pretrained(folder)
    return visible(adapted(model.base_model.model), untouched("sd1"))


@pytest.mark.parametrize("name", ["locon", "loha", "lokr", "locon + dora"])
@pytest.mark.parametrize("with_kohya", [True, False], ids=["kohya", "wrapper"])
def test_lycoris_files_convert(name: str, with_kohya: bool, tmp_path: Path) -> None:
    expected = train_lycoris(name, tmp_path / "network.safetensors", with_kohya=with_kohya)
    output = convert(tmp_path / "network.safetensors", "comfyui")
    assert_read(output, "sd1", "comfyui", expected, DORA if "dora" in name else SUMS)


@pytest.mark.parametrize("name", ["locon", "loha", "lokr"])
def test_lycoris_files_become_loras(name: str, tmp_path: Path) -> None:
    expected = train_lycoris(name, tmp_path / "network.safetensors", with_kohya=True)
    output = convert(tmp_path / "network.safetensors", "networks.lora", "--algo", "lora")
    assert_read(output, "sd1", "networks.lora", expected, DECOMPOSED)
