"""One flat vector, the known optimizers, their arguments, clipping and state."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lycotool.errors import UsageError
from lycotool.training.optimizers.stepper import Group, Stepper

SHAPES = [(5, 3), (7,), (2, 3, 1, 1), ()]
ELEMENTWISE = ["adamw", "lion", "prodigy", "sgd", "sgdnesterov"]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def descend(stepper: Stepper, steps: int, start: int = 0) -> None:
    """Towards targets that move, so that gradients differ from step to step."""
    for step in range(start, start + steps):
        stepper.zero_grad()
        for group in stepper.groups:
            for index, parameter in enumerate(group.parameters):
                (0.5 * (parameter - 0.1 * step - index).square().sum()).backward()
        stepper.step([1.0] * len(stepper.groups))


def reference(cls: type, values: dict[str, object], lrs: list[float], steps: int) -> list[torch.Tensor]:
    groups = [parameters(0), parameters(1)][: len(lrs)]
    optimizer = cls([{"params": p, "lr": lr} for p, lr in zip(groups, lrs, strict=True)], **values)
    for step in range(steps):
        optimizer.zero_grad()
        for group in groups:
            for index, parameter in enumerate(group):
                (0.5 * (parameter - 0.1 * step - index).square().sum()).backward()
        optimizer.step()
    return [parameter.detach() for group in groups for parameter in group]


@pytest.mark.parametrize(
    ("name", "cls", "arguments", "values"),
    [
        ("adamw", torch.optim.AdamW, ["weight_decay=0.1", "betas=0.9,0.99"],
         {"weight_decay": 0.1, "betas": (0.9, 0.99)}),
        ("SGDNesterov", torch.optim.SGD, [], {"momentum": 0.9, "nesterov": True}),
        ("torch.optim.RAdam", torch.optim.RAdam, ["eps=1e-6"], {"eps": 1e-6}),
    ],
)  # fmt: skip
def test_flat_is_the_same_as_parts(
    name: str, cls: type, arguments: list[str], values: dict[str, object]
) -> None:
    groups = [Group("unet", 1e-2, tuple(parameters(0))), Group("te1", 3e-3, tuple(parameters(1)))]
    descend(Stepper(groups, name, arguments), 5)
    found = [parameter.detach() for group in groups for parameter in group.parameters]
    for mine, theirs in zip(found, reference(cls, values, [1e-2, 3e-3], 5), strict=True):
        # The fused kernel rounds in another order.
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_lion_by_its_definition() -> None:
    mine = [parameters()]
    descend(Stepper([Group("unet", 1e-2, tuple(mine[0]))], "lion", ["weight_decay=0.3"]), 6)
    for index, (found, start) in enumerate(zip(mine[0], parameters(), strict=True)):
        w, m = start.detach().double(), torch.zeros_like(start, dtype=torch.float64)
        for step in range(6):
            g = w - 0.1 * step - index
            w = w * (1 - 1e-2 * 0.3) - 1e-2 * torch.sign(0.9 * m + 0.1 * g)
            m = 0.99 * m + 0.01 * g
        assert torch.allclose(found.detach().double(), w, atol=1e-6)


@pytest.mark.parametrize("arguments", [[], ["weight_decay=0.1"], ["use_bias_correction=true", "d_coef=2.0"],
                                       ["safeguard_warmup=true"], ["decouple=false", "weight_decay=0.1"],
                                       ["growth_rate=1.5"]])  # fmt: skip
def test_prodigy_by_its_definition(arguments: list[str]) -> None:
    group = Group("unet", 1.0, tuple(torch.nn.Parameter(p.detach().double()) for p in parameters()))
    descend(Stepper([group], "prodigy", arguments), 12)
    options = dict(argument.split("=") for argument in arguments)
    decay, coefficient = float(options.get("weight_decay", 0)), float(options.get("d_coef", 1))
    growth = float(options.get("growth_rate", "inf"))
    w = [p.detach().double() for p in parameters()]
    w0 = [x.clone() for x in w]
    m, v, s = ([torch.zeros_like(x) for x in w] for _ in range(3))
    d = d0 = d_max = 1e-6
    r = 0.0
    b1, b2 = 0.9, 0.999
    b3 = b2**0.5
    for k in range(12):
        g = [x - 0.1 * k - index for index, x in enumerate(w)]
        if options.get("decouple") == "false":
            g = [x + decay * y for x, y in zip(g, w, strict=True)]
        rate = d * (((1 - b2 ** (k + 1)) ** 0.5 / (1 - b1 ** (k + 1)))
                    if "use_bias_correction" in options else 1)  # fmt: skip
        r = b3 * r + (d / d0) * rate * sum(
            (x * (y - z)).sum().item() for x, y, z in zip(g, w0, w, strict=True)
        )
        m = [b1 * a + d * (1 - b1) * x for a, x in zip(m, g, strict=True)]
        v = [b2 * a + d * d * (1 - b2) * x * x for a, x in zip(v, g, strict=True)]
        s = [
            b3 * a + (d / d0) * (d if "safeguard_warmup" in options else rate) * x
            for a, x in zip(s, g, strict=True)
        ]
        found = coefficient * r / sum(a.abs().sum().item() for a in s)
        if d == d0:
            d = max(d, found)
        d_max = max(d_max, found)
        d = min(d_max, d * growth)
        if options.get("decouple") != "false":
            w = [x * (1 - decay * rate) for x in w]
        w = [x - rate * a / (b.sqrt() + d * 1e-8) for x, a, b in zip(w, m, v, strict=True)]
    assert d > d0
    for mine, expected in zip(group.parameters, w, strict=True):
        assert torch.allclose(mine.detach(), expected, rtol=1e-9)


def test_adafactor_keeps_the_learning_rate() -> None:
    from transformers.optimization import Adafactor

    group = Group("unet", 1e-2, tuple(parameters()))
    descend(Stepper([group], "Adafactor"), 4)
    values = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    for mine, theirs in zip(group.parameters, reference(Adafactor, values, [1e-2], 4), strict=True):
        assert torch.equal(mine.detach(), theirs)


@pytest.mark.parametrize("name", [*ELEMENTWISE, "adafactor", "torch.optim.RAdam"])
def test_state_continues_exactly(name: str) -> None:
    def fresh() -> Stepper:
        lr = 1.0 if name == "prodigy" else 1e-2
        return Stepper([Group("a", lr, tuple(parameters(0))), Group("b", lr, tuple(parameters(1)))], name)

    straight, stopped, resumed = fresh(), fresh(), fresh()
    descend(straight, 8)
    descend(stopped, 3)
    tensors, rest = stopped.state()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    rest = json.loads(json.dumps(rest))
    for mine, theirs in zip(resumed.groups, stopped.groups, strict=True):
        for a, b in zip(mine.parameters, theirs.parameters, strict=True):
            a.data.copy_(b.data)
    resumed.load_state(tensors, rest)
    descend(resumed, 5, start=3)
    for mine, theirs in zip(resumed.groups, straight.groups, strict=True):
        for a, b in zip(mine.parameters, theirs.parameters, strict=True):
            assert torch.equal(a, b)


def test_clipping_is_torchs() -> None:
    mine, theirs = parameters(), copy.deepcopy(parameters())
    stepper = Stepper([Group("unet", 1e-2, tuple(mine))], "adamw")
    for group in (mine, theirs):
        sum((index + 1) * p.square().sum() for index, p in enumerate(group)).backward()
    norm = stepper.norm()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    stepper.clip(norm, 0.5)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5)


def test_a_nan_gradient_moves_nothing_to_nan() -> None:
    group = Group("unet", 1e-2, tuple(parameters()))
    stepper = Stepper([group], "adamw")
    group.parameters[0].grad[0, 0] = float("nan")
    norm = stepper.norm()
    assert not norm.isfinite()
    stepper.clip(norm, 1.0)
    stepper.step([1.0])
    assert all(p.isfinite().all() for p in group.parameters)


def test_learning_rate_zero_moves_nothing() -> None:
    frozen, moving = Group("te1", 0.0, tuple(parameters())), Group("unet", 1e-2, tuple(parameters(1)))
    for name in ("adamw", "lion", "sgd"):
        descend(Stepper([frozen, moving], name, ["weight_decay=0.1"]), 2)
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters, parameters(), strict=True))
    assert not torch.equal(moving.parameters[0], parameters(1)[0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamv", [], "did you mean adamw"),
        ("adamw", ["wieght_decay=1"], "did you mean weight_decay"),
        ("adamw", ["amsgrad=1"], "expected true or false"),
        ("adamw", ["betas=0.9"], "expected 2 numbers"),
        ("adamw", ["eps=small"], "no value"),
        ("adamw", ["eps"], "name=value"),
        ("adamw", ["eps=1", "eps=2"], "twice"),
        ("nopackage.Adam", [], "pip install nopackage"),
        ("torch.optim.Nothing", [], "has no class"),
    ],
)
def test_what_cannot_be_had(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Stepper([Group("unet", 1e-2, tuple(parameters()))], name, arguments)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_eight_bit_names_the_package() -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") or importlib.util.find_spec("torchao"):
        group = Group("unet", 1e-2, tuple(parameters()))
        descend(Stepper([group], "AdamW8bit"), 1)
        return
    with pytest.raises(UsageError) as caught:
        Stepper([Group("unet", 1e-2, tuple(parameters()))], "AdamW8bit")
    assert caught.value.hint == "pip install bitsandbytes"


def test_prodigy_wants_one_learning_rate() -> None:
    with pytest.raises(UsageError, match="equal"):
        Stepper([Group("a", 1.0, tuple(parameters())), Group("b", 0.5, tuple(parameters(1)))], "prodigy")
