"""What an adapter adds to a layer's arithmetic, counted on the meta device.

In units of the frozen layer's forward pass; a frozen layer in training takes 2 (forward, and
backward to its input). LyCORIS 4.1.3 takes 5 for every algorithm but full.
"""

from __future__ import annotations

import pytest
import torch
from makers.layers import build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LINEAR, CONV = "linear 1280", "conv 640"


def cost(
    layer_name: str, arguments: dict[str, object], dtype: torch.dtype = torch.bfloat16
) -> tuple[float, bool]:
    """Forward and backward in units of the plain forward, and whether the form is structured."""
    with torch.device("meta"):
        if layer_name == LINEAR:
            layer, x = nn.Linear(1280, 1280), torch.empty(1, 2048, 1280)
        else:
            layer, x = nn.Conv2d(640, 640, 3, padding=1), torch.empty(2, 640, 32, 32)
    layer.requires_grad_(False).to(dtype)
    x = x.to(dtype)
    with FlopCounterMode(display=False) as plain:
        layer(x)
    network, adapter = build(layer, arguments, dtype=torch.float32)
    network.draw(0)
    with FlopCounterMode(display=False) as trained:
        layer(x.requires_grad_(True)).sum().backward()
    return trained.get_total_flops() / plain.get_total_flops(), adapter.structured is not None


#: Algorithm and arguments -> at most so many units, on the linear layer and on the convolution:
#: what their products add up to, rounded up.
LIMITS: list[tuple[dict[str, object], float, float]] = [
    ({"algo": "lora", "dim": 16}, 2.08, 2.09),
    ({"algo": "lora", "dim": 16, "use_conv_cp": True}, 2.08, 2.02),
    ({"algo": "lora", "dim": 16, "dora_wd": True}, 2.10, 2.10),
    ({"algo": "lora", "dim": 16, "dora_wd": True, "wd_on_output": False}, 2.10, 2.10),
    ({"algo": "loha", "dim": 4}, 2.08, 2.09),
    ({"algo": "loha", "dim": 8}, 2.30, 2.34),
    ({"algo": "lokr", "factor": 8, "full_matrix": True}, 2.40, 2.38),
    ({"algo": "lokr", "dim": 16}, 2.15, 2.17),
    ({"algo": "glora", "dim": 16}, 2.15, 2.10),
    ({"algo": "diag-oft", "dim": 32}, 2.08, 2.02),
    ({"algo": "boft", "dim": 32}, 2.58, 2.09),
    ({"algo": "ia3"}, 2.0, 2.0),
    ({"algo": "dylora", "dim": 16}, 2.08, 2.09),
    # Two products forward, one to the input, one to the difference.
    ({"algo": "full"}, 4.0, 4.0),
]


@pytest.mark.parametrize("layer", [LINEAR, CONV])
@pytest.mark.parametrize(("arguments", "linear", "conv"), LIMITS, ids=str)
def test_cost(arguments: dict[str, object], linear: float, conv: float, layer: str) -> None:
    found, is_structured = cost(layer, arguments)
    assert 2 <= found <= (linear if layer == LINEAR else conv)
    assert is_structured == (arguments["algo"] != "full")


@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_full_in_float32_is_one_product(layer: str) -> None:
    assert cost(layer, {"algo": "full"}, torch.float32) == (3.0, False)


@pytest.mark.parametrize(
    ("algo", "dim", "dtype", "is_structured"),
    [
        ("loha", 8, torch.bfloat16, True),
        ("loha", 12, torch.bfloat16, False),
        ("loha", 16, torch.bfloat16, False),
        ("lora", 64, torch.bfloat16, True),
        ("lora", 128, torch.bfloat16, False),
        ("lora", 48, torch.float32, True),
        ("loha", 8, torch.float32, False),
    ],
)
def test_the_cheaper_form_is_chosen(algo: str, dim: int, dtype: torch.dtype, is_structured: bool) -> None:
    """On 320 to 320 a rank of 107 costs as much as the whole change, of 54 in float32."""
    layer = nn.Linear(320, 320, device="meta", dtype=dtype).requires_grad_(False)
    _, adapter = build(layer, {"algo": algo, "dim": dim}, dtype=torch.float32)
    assert (adapter.structured is not None) == is_structured
    for form, expected in (("structured", True), ("fused", False)):
        _, adapter = build(layer, {"algo": algo, "dim": dim, "forward": form}, dtype=torch.float32)
        assert (adapter.structured is not None) == expected
