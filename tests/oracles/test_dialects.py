"""One adapter under the module names of several programs gives one and the same file.

The expected file comes from the other direction: the change is added to the weights of
diffusers' and transformers' models in float64, which are then renamed to a single file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from makers import architectures as arch
from makers.ldm_names import StateDict, clip_to_ldm, clip_to_openclip, unet_to_ldm, with_prefix
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oracles.support import bake, half_steps

RANK = 2
ALPHA = 1.5

# Float32 against float64, both rounded to float16: see test_sample_files.py.
OTHER_NEIGHBOUR = 0.002


# --- models and their single files ---------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The models of one checkpoint, how its file names their tensors, and its text encoders."""

    single_file: Callable[[], StateDict]
    models: Callable[[], dict[str, nn.Module]]
    renamed: Mapping[str, Callable[[StateDict], StateDict]]
    changed: int  # tensors; q, k and v of OpenCLIP are one
    sd_scripts: Mapping[str, str]
    comfy: Mapping[str, str]


def _unet(state: StateDict) -> StateDict:
    return with_prefix(arch.UNET_PREFIX, unet_to_ldm(state))


def _sdxl_models() -> dict[str, nn.Module]:
    first, second = arch.sdxl_text_encoders()
    return {"unet": arch.sdxl_unet(), "te1": first, "te2": second}


# Transformer layers and the projections around them; resnets and their shortcuts;
# resampling; conv_in, conv_out and the embeddings.
UNET = 16 * 10 + 16 * 2 + 22 * 3 + 14 + 6 + 4
SDXL_UNET = 70 * 10 + 11 * 2 + 17 * 3 + 11 + 4 + 6

FAMILIES = {
    "SD1": Family(
        arch.sd1_single_file,
        lambda: {"unet": arch.sd1_unet(), "te1": arch.sd1_text_encoder()},
        {"unet": _unet, "te1": lambda state: with_prefix(arch.SD1_CLIP_PREFIX, clip_to_ldm(state))},
        UNET + 12 * 6,
        {"te1": "lora_te_"},
        {"te1": "clip_l"},
    ),
    "SD2": Family(
        arch.sd2_single_file,
        lambda: {"unet": arch.sd2_unet(), "te1": arch.sd2_text_encoder()},
        {"unet": _unet, "te1": lambda state: with_prefix(arch.SD2_CLIP_PREFIX, clip_to_openclip(state))},
        UNET + 23 * 4,
        {"te1": "lora_te_"},
        {"te1": "clip_h"},
    ),
    "SDXL": Family(
        arch.sdxl_single_file,
        _sdxl_models,
        {
            "unet": _unet,
            "te1": lambda state: with_prefix(arch.SDXL_CLIP_PREFIXES[0], clip_to_ldm(state)),
            "te2": lambda state: with_prefix(arch.SDXL_CLIP_PREFIXES[1], clip_to_openclip(state)),
        },
        SDXL_UNET + 12 * 6 + 32 * 4,
        {"te1": "lora_te1_", "te2": "lora_te2_"},
        {"te1": "clip_l", "te2": "clip_g"},
    ),
}


# --- names ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer by its path in diffusers' or transformers' model, and its LDM path."""

    component: str
    path: str
    ldm: str
    shape: torch.Size

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``up`` and ``down``, in float16 as most files are."""
        out, width, *kernel = self.shape
        name = f"{self.component}.{self.path}"
        up = arch.random_values(f"{name}.up", (out, RANK, *[1] * len(kernel)), 0.2, seed=8)
        down = arch.random_values(f"{name}.down", (RANK, width, *kernel), 0.2, seed=8)
        return up.half(), down.half()

    @property
    def change(self) -> Tensor:
        """c·ΔW in float64."""
        up, down = (factor.double().flatten(1) for factor in self.factors)
        return (ALPHA / RANK) * (up @ down).reshape(self.shape)


def layers(models: Mapping[str, nn.Module]) -> list[Layer]:
    """Every linear layer and convolution that trainers adapt."""
    found = []
    for component, model in models.items():
        names = {name: name for name in model.state_dict()}
        ldm = {name: new for new, name in unet_to_ldm(names).items()} if component == "unet" else names
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and path != "text_projection":
                key = ldm[f"{path}.weight"].removesuffix(".weight")
                found.append(Layer(component, path, key, module.weight.shape))
    return found


Naming = Callable[[Family, Layer], str]


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _sd_scripts(family: Family, layer: Layer) -> str:
    return family.sd_scripts.get(layer.component, "lora_unet_") + _flat(layer.ldm)


def _sd_scripts_diffusers_blocks(family: Family, layer: Layer) -> str:
    return family.sd_scripts.get(layer.component, "lora_unet_") + _flat(layer.path)


def _diffusers(family: Family, layer: Layer) -> str:
    prefixes = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}
    return prefixes[layer.component] + layer.path


def _diffusers_transformers_5(family: Family, layer: Layer) -> str:
    """Transformers 5 took a level out of its paths; diffusers saves the paths it finds."""
    return _diffusers(family, layer).replace(".text_model.", ".")


def _comfy(family: Family, layer: Layer) -> str:
    if layer.component == "unet":
        return f"diffusion_model.{layer.ldm}"
    return f"text_encoders.{family.comfy[layer.component]}.transformer.{layer.path}"


SD_SCRIPTS = ("lora_up.weight", "lora_down.weight")
PEFT = ("lora_B.weight", "lora_A.weight")

#: Names of modules, and of their two factors.
DIALECTS: dict[str, tuple[Naming, tuple[str, str]]] = {
    "sd-scripts": (_sd_scripts, SD_SCRIPTS),
    "sd-scripts, diffusers blocks": (_sd_scripts_diffusers_blocks, SD_SCRIPTS),
    "diffusers": (_diffusers, PEFT),
    "diffusers with transformers 5": (_diffusers_transformers_5, PEFT),
    "diffusers legacy": (_diffusers, ("lora.up.weight", "lora.down.weight")),
    "ComfyUI": (_comfy, SD_SCRIPTS),
}


def write_adapter(path: Path, family: Family, chosen: list[Layer], dialect: str) -> Path:
    naming, (up, down) = DIALECTS[dialect]
    tensors = {}
    for layer in chosen:
        module = naming(family, layer)
        tensors[f"{module}.{up}"], tensors[f"{module}.{down}"] = layer.factors
        tensors[f"{module}.alpha"] = torch.tensor(ALPHA).half()
    assert len(tensors) == 3 * len(chosen)
    # The recipe in the result's metadata has the adapter's file name.
    path.mkdir()
    save_file(tensors, path / "adapter.safetensors")
    return path / "adapter.safetensors"


# --- tests ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baked:
    """A family's checkpoint, and what sd-scripts' names make of it."""

    family: Family
    checkpoint: Path
    layers: list[Layer]
    result: Path


@pytest.fixture(scope="module", params=FAMILIES)
def baked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Baked:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("dialects")
    save_file(family.single_file(), folder / "base.safetensors")
    chosen = layers(family.models())
    adapter = write_adapter(folder / "adapter", family, chosen, "sd-scripts")
    result = bake(folder / "base.safetensors", adapter, folder / "baked.safetensors")
    assert result.changed == family.changed
    return Baked(family, folder / "base.safetensors", chosen, folder / "baked.safetensors")


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "sd-scripts"])
def test_same_file(baked: Baked, dialect: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", baked.family, baked.layers, dialect)
    bake(baked.checkpoint, adapter, tmp_path / "baked.safetensors")
    assert data_of(tmp_path / "baked.safetensors") == data_of(baked.result)


def data_of(path: Path) -> tuple[dict[str, object], bytes]:
    """Where the tensors are, and their bytes; the metadata names the adapter with its hash."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    return header, content[start:]


def expected_file(family: Family, chosen: list[Layer]) -> StateDict:
    """The checkpoint's tensors from changed models; no VAE and no buffers."""
    changes = {(layer.component, f"{layer.path}.weight"): layer.change for layer in chosen}
    expected: StateDict = {}
    for component, model in family.models().items():
        state = {name: tensor.half().double() for name, tensor in model.state_dict().items()}
        for name in state:
            if (component, name) in changes:
                state[name] += changes.pop((component, name))
        renamed = family.renamed[component](state)
        expected |= {key: t.half() if t.is_floating_point() else t for key, t in renamed.items()}
    assert not changes
    return expected


def assert_as_expected(result: Path, checkpoint: Path, expected: StateDict) -> None:
    before, after = load_file(checkpoint), load_file(result)
    assert before.keys() == after.keys()
    assert expected.keys() <= after.keys()
    steps = []
    for key, tensor in after.items():
        if key in expected and not torch.equal(expected[key], before[key]):
            steps.append(half_steps(tensor, expected[key]).flatten())
            assert steps[-1].max() <= 1, key
        else:
            assert torch.equal(tensor, before[key]), key
    assert (torch.cat(steps) > 0).double().mean() < OTHER_NEIGHBOUR


def test_right_rows_of_the_right_tensors(baked: Baked) -> None:
    assert_as_expected(baked.result, baked.checkpoint, expected_file(baked.family, baked.layers))


@pytest.mark.parametrize("dialect", ["sd-scripts", "diffusers"])
def test_text_projection(dialect: str, tmp_path: Path) -> None:
    """OneTrainer adapts SDXL's text projection, which OpenCLIP stores transposed."""
    family = FAMILIES["SDXL"]
    before = family.single_file()
    save_file(before, tmp_path / "base.safetensors")
    shape = torch.Size((arch.CLIP_G_WIDTH, arch.CLIP_G_WIDTH))
    chosen = [Layer("te2", "text_projection", "text_projection", shape)]
    adapter = write_adapter(tmp_path / "adapter", family, chosen, dialect)
    bake(tmp_path / "base.safetensors", adapter, tmp_path / "baked.safetensors")

    key = "conditioner.embedders.1.model.text_projection"
    expected = before[key].double() + chosen[0].change.T
    found = load_file(tmp_path / "baked.safetensors")[key]
    # One rounding to the file's half precision.
    assert (found.double() - expected).abs().max() <= torch.finfo(found.dtype).eps * expected.abs().max()


@pytest.mark.parametrize("family", ["SD1", "SDXL"])
def test_attention_processors(family: str, tmp_path: Path) -> None:
    """Diffusers before 0.22 named the processor that held an attention's adapters."""
    models = FAMILIES[family].models()
    save_file(FAMILIES[family].single_file(), tmp_path / "base.safetensors")
    chosen = [
        layer
        for layer in layers({"unet": models["unet"]})
        if layer.path.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    tensors = {}
    for layer in chosen:
        owner, _, projection = layer.path.removesuffix(".0").rpartition(".")
        name = f"unet.{owner}.processor.{projection}_lora"
        tensors[f"{name}.up.weight"], tensors[f"{name}.down.weight"] = layer.factors
    save_file(tensors, tmp_path / "adapter.safetensors")
    # These files have no alpha, so the strength brings the scale.
    bake(
        tmp_path / "base.safetensors",
        tmp_path / "adapter.safetensors",
        tmp_path / "baked.safetensors",
        strength=ALPHA / RANK,
    )
    expected = expected_file(FAMILIES[family], chosen)
    assert_as_expected(tmp_path / "baked.safetensors", tmp_path / "base.safetensors", expected)
