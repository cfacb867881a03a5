"""``merge --recipe`` and ``--replay``: the same bytes from the same inputs, and from no others."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoint, lora, read, run, succeed, write
from safetensors import safe_open

from lycotool import __version__
from lycotool.linalg.merging.methods import METHODS
from lycotool.ops._merge_options import OPTIONS

SD1 = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
UNET, TEXT = "lora_unet_down_a", "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a and b and a checkpoint, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    for name, rank in (("a", 2), ("b", 3)):
        write(
            tmp_path / f"{name}.safetensors",
            lora(UNET, rank=rank) | lora(TEXT, rank=rank),
            {"ss_output_name": name},
        )
    write(
        tmp_path / "base.safetensors", checkpoint(), {"modelspec.title": "old", "modelspec.architecture": "x"}
    )
    return tmp_path


def recorded(path: str | Path) -> dict[str, object]:
    with safe_open(path, "pt") as file:
        made = json.loads(file.metadata()["lycotool.merge"])
    assert isinstance(made, dict)
    return made


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


AB = ("a.safetensors:0.5:te=0.25", "b.safetensors:-1")

#: Merges of every kind, each with what it cannot do without.
MERGES = [
    *((*AB, "--method", m.name, *(["--density", "0.5"] if m.needs else []), *(["--rank", "2"] if m.needs_rank else []))
      for m in METHODS.values()),
    ("a.safetensors", "--te", "0.5", "--dtype", "fp16"),
    (*AB, "--method", "ties", "--density", "0.5", "--lambda", "0.7", "--consensus", "frequency", "--error", "0.3"),
    ("a.safetensors:1:density=0.25", "b.safetensors", "--method", "dare", "--density", "0.5", "--seed", "7"),
    ("a.safetensors", "b.safetensors:0.5", "--compat", "kohya", "--concat"),
    (*AB, "--metadata", "union", "--size", "4KB", "--verify"),
    (*AB, "--base", "base.safetensors", "--alpha-zero", "rank", "--glora-old-scale", "once"),
    ("base.safetensors", *AB, "--dtype", "bf16", "--unet", "0.5"),
    ("base.safetensors", *AB, "--method", "ties", "--density", "0.5", "--verify"),
    ("base.safetensors", "a.safetensors", "--title", "mine"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", MERGES, ids=" ".join)
def test_replay_gives_the_same_bytes(arguments: tuple[str, ...], in_folder: Path) -> None:
    succeed("merge", *arguments, "-o", "made.safetensors")
    result = succeed("merge", "--replay", "made.safetensors")

    assert result.stdout == "made-replayed.safetensors\n"
    assert "the same bytes as made.safetensors" in result.stderr
    assert Path("made-replayed.safetensors").read_bytes() == Path("made.safetensors").read_bytes()


def test_replay_finds_inputs_in_the_folders_named(
    in_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    away = tmp_path_factory.mktemp("away")
    succeed("merge", *AB, "-o", away / "made.safetensors")
    for name in ("a", "b"):
        (in_folder / name).mkdir()
        shutil.move(f"{name}.safetensors", f"{name}/{name}.safetensors")

    assert run("merge", "--replay", away / "made.safetensors").exit_code == 2
    succeed(
        "merge",
        "--replay",
        away / "made.safetensors",
        "--inputs-dir",
        "a",
        "--inputs-dir",
        "b",
        "-o",
        "again.safetensors",
    )
    assert Path("again.safetensors").read_bytes() == (away / "made.safetensors").read_bytes()


def test_a_missing_or_changed_input_is_named_with_its_hashes(in_folder: Path) -> None:
    for arguments, changed in ((AB, "b.safetensors"), (("base.safetensors", *AB), "base.safetensors"),
                               ((*AB, "--base", "base.safetensors"), "base.safetensors")):  # fmt: skip
        succeed("merge", *arguments, "-f", "-o", "made.safetensors")
        before, expected = Path(changed).read_bytes(), sha256(changed)
        Path(changed).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))

        result = run("merge", "--replay", "made.safetensors")
        assert result.exit_code == 10
        for text in (changed, f"expected sha256 {expected}", f"found    sha256 {sha256(changed)}"):
            assert text in result.stderr

        Path(changed).unlink()
        result = run("merge", "--replay", "made.safetensors")
        assert result.exit_code == 2
        assert f"an input is missing: {changed}" in result.stderr
        assert f"expected sha256 {expected}" in result.stderr
        Path(changed).write_bytes(before)
    assert not Path("made-replayed.safetensors").exists()


def test_metadata_say_what_was_merged_and_no_paths(in_folder: Path) -> None:
    """Hashes of the files as they are on disk, every option that changes bytes, no folder's name."""
    presets = in_folder / "presets.txt"
    presets.write_text("SOFT:" + ",".join(["0.5"] * 17))
    write(Path("sd.safetensors"), lora(SD1, width=768))
    inputs = [in_folder / "sd.safetensors", f"{in_folder / 'sd.safetensors'}:0.5"]
    succeed(
        "merge",
        *inputs,
        "--lbw",
        presets,
        "--base",
        in_folder / "base.safetensors",
        "-o",
        in_folder / "x.safetensors",
    )
    made = recorded("x.safetensors")

    said = {"file": "sd.safetensors", "sha256": sha256("sd.safetensors"), "lbw": ",".join(["0.5"] * 17)}
    assert made == {
        "recipe": 1,
        "inputs": [{**said, "strength": 1.0}, {**said, "strength": 0.5}],
        "method": "exact",
        "device": "cpu",
        "base": {"file": "base.safetensors", "sha256": sha256("base.safetensors")},
    }
    assert str(in_folder).encode() not in Path("x.safetensors").read_bytes()
    with safe_open("x.safetensors", "pt") as file:
        assert file.metadata()["lycotool.version"] == __version__


def test_a_renamed_folder_gives_the_same_bytes(in_folder: Path) -> None:
    succeed("merge", "base.safetensors", *AB, "-o", "one.safetensors", "--title", "t")
    (in_folder / "deep").mkdir()
    for name in ("a", "b", "base"):
        shutil.copy(f"{name}.safetensors", "deep")
    succeed(
        "merge",
        "deep/base.safetensors",
        *(f"deep/{a}" for a in AB),
        "-o",
        "deep/one.safetensors",
        "--title",
        "t",
    )

    assert Path("one.safetensors").read_bytes() == Path("deep/one.safetensors").read_bytes()


def test_folders_and_shards_have_a_hash_of_their_files(in_folder: Path) -> None:
    peft = in_folder / "peft"
    peft.mkdir()
    write(peft / "adapter_model.safetensors", {"base_model.model.down.a.lora_A.weight": torch.randn(2, 5),
                                               "base_model.model.down.a.lora_B.weight": torch.randn(6, 2)})  # fmt: skip
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    tensors = checkpoint()
    weight_map = {}
    for index, (key, tensor) in enumerate(tensors.items()):
        name = f"m-0000{index + 1}-of-00003.safetensors"
        write(Path(name), {key: tensor})
        weight_map[key] = name
    Path("m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    succeed("merge", "m.safetensors.index.json", "peft:0.5", "-o", "made.safetensors.index.json")
    succeed("merge", "--replay", "made.safetensors.index.json")
    for index in (1, 2, 3):
        names = (f"{stem}-0000{index}-of-00003.safetensors" for stem in ("made", "made-replayed"))
        one, two = (Path(name).read_bytes() for name in names)
        assert one == two

    config = peft / "adapter_config.json"
    config.write_text(config.read_text().replace("4", "8"))
    result = run("merge", "--replay", "made.safetensors.index.json", "-f")
    assert result.exit_code == 10
    assert "peft: is not the file that the recipe names" in result.stderr


def test_a_diffusers_folder_replays_to_the_same_files(in_folder: Path) -> None:
    for component in ("unet", "text_encoder"):
        (in_folder / "model" / component).mkdir(parents=True)
    Path("model/model_index.json").write_text("{}")
    write(Path("model/unet/diffusion_pytorch_model.safetensors"), {"down.a.weight": torch.randn(6, 5)})
    encoder = write(Path("model/text_encoder/model.safetensors"), {"text_model.x.weight": torch.randn(3)})
    write(Path("c.safetensors"), lora(UNET))
    succeed("merge", "model", "c.safetensors:0.5", "--method", "dare", "--density", 0.5, "-o", "made")
    succeed("merge", "--replay", "made")
    files = [path.relative_to("made") for path in Path("made").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all((Path("made") / f).read_bytes() == (Path("made-replayed") / f).read_bytes() for f in files)

    encoder.write_bytes(encoder.read_bytes()[:-1] + b"\x01")
    result = run("merge", "--replay", "made", "-f")
    assert result.exit_code == 10
    assert "model: is not the file that the recipe names" in result.stderr


def test_a_folder_named_by_a_dot_is_recorded_by_its_name(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_folder / "style").mkdir()
    monkeypatch.chdir(in_folder / "style")
    write(Path("adapter_model.safetensors"), {"base_model.model.down.a.lora_A.weight": torch.randn(2, 5),
                                              "base_model.model.down.a.lora_B.weight": torch.randn(6, 2)})  # fmt: skip
    Path("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    succeed("merge", ".:0.5", "-o", "../half.safetensors")

    assert recorded("../half.safetensors")["inputs"][0]["file"] == "style"  # type: ignore[index]


def test_replay_says_so_when_the_bytes_differ(in_folder: Path) -> None:
    """Someone edited the result: the recipe gives other bytes than the file has."""
    succeed("merge", *AB, "-o", "made.safetensors")
    data = bytearray(Path("made.safetensors").read_bytes())
    data[-1] ^= 1
    Path("made.safetensors").write_bytes(data)
    result = run("merge", "--replay", "made.safetensors")

    assert result.exit_code == 10
    assert "differs from made.safetensors, though its inputs are the same" in result.stderr


def test_replay_of_another_version_warns(in_folder: Path) -> None:
    succeed("merge", *AB, "-o", "made.safetensors")
    with safe_open("made.safetensors", "pt") as file:
        metadata = file.metadata()
    write(Path("made.safetensors"), read(Path("made.safetensors")), metadata | {"lycotool.version": "0.0.1"})
    result = succeed("merge", "--replay", "made.safetensors", "--json")

    assert "was written by lycotool 0.0.1" in result.stderr
    assert json.loads(result.stdout)["same_bytes"] is False


def test_replay_plans(in_folder: Path) -> None:
    succeed("merge", *AB, "-o", "made.safetensors")
    plan = json.loads(succeed("merge", "--replay", "made.safetensors", "-n", "--json").stdout)

    assert (plan["output"], plan["same_bytes"], plan["dry_run"]) == ("made-replayed.safetensors", None, True)
    assert not Path("made-replayed.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda made: None, 2, "does not say what it was merged from"),
        (lambda made: "{", 3, "its recipe is damaged"),
        (lambda made: "[]", 3, "has no recipe"),
        (lambda made: json.dumps({"adapters": []}), 3, "has no recipe"),
        (lambda made: json.dumps({**made, "recipe": 2}), 3, "another version of the format"),
        (lambda made: json.dumps({**made, "inputs": [{"file": "a.safetensors"}]}), 3, "has no hash"),
        (lambda made: json.dumps({**made, "inputs": 5}), 3, "its recipe is damaged"),
        (lambda made: json.dumps({**made, "density": "much"}), 3, "density is 'much', expected a number"),
        (lambda made: json.dumps({**made, "hidden": 1}), 3, "no such key: hidden"),
        (lambda made: json.dumps({**made, "inputs": [{**made["inputs"][0], "file": "../a.safetensors"}]}), 4, "outside"),
        (lambda made: json.dumps({**made, "inputs": [{**made["inputs"][0], "file": "/a"}]}), 4, "outside"),
        (lambda made: json.dumps({**made, "inputs": [{**made["inputs"][0], "file": "..\\a"}]}), 4, "outside"),
        (lambda made: json.dumps({**made, "inputs": [{**made["inputs"][0], "file": "-"}]}), 2, "standard input"),
        (lambda made: json.dumps({**made, "inputs": [{**made["inputs"][0], "strength": True}]}), 3, "strength of"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_recipes(change: object, code: int, message: str, in_folder: Path) -> None:
    succeed("merge", *AB, "-o", "made.safetensors")
    text = change(recorded("made.safetensors"))  # type: ignore[operator]
    write(
        Path("odd.safetensors"),
        read(Path("made.safetensors")),
        {} if text is None else {"lycotool.merge": text},
    )
    result = run("merge", "--replay", "odd.safetensors")

    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert not Path("odd-replayed.safetensors").exists()


# --- recipe files -----------------------------------------------------------------------------


def test_a_recipe_is_the_command_it_spells(in_folder: Path) -> None:
    (in_folder / "recipes").mkdir()
    Path("recipes/mix.toml").write_text(
        """
        inputs = [
          "../a.safetensors:0.5:te=0.25",
          { file = "../b.safetensors", strength = -1, density = 0.75 },
        ]
        method = "ties"
        density = 0.5
        lambda = 2
        rank = 2
        dtype = "fp16"
        output = "mix.safetensors"
        """
    )
    result = succeed("merge", "--recipe", "recipes/mix.toml")
    assert result.stdout == "recipes/mix.safetensors\n"
    succeed("merge", "a.safetensors:0.5:te=0.25", "b.safetensors:-1:density=0.75", "--method", "ties", "--density", 0.5,
            "--lambda", 2, "--rank", 2, "--dtype", "fp16", "-o", "typed.safetensors")  # fmt: skip

    assert Path("recipes/mix.safetensors").read_bytes() == Path("typed.safetensors").read_bytes()


def test_the_command_line_wins_over_the_recipe(in_folder: Path) -> None:
    Path("mix.toml").write_text(
        'inputs = ["a.safetensors", "b.safetensors"]\nmethod = "ties"\ndensity = 0.5\nlambda = 2'
    )
    succeed("merge", "--recipe", "mix.toml", "--density", 0.25, "-o", "one.safetensors")
    succeed("merge", "b.safetensors", "a.safetensors:0.5", "--recipe", "mix.toml", "-o", "two.safetensors")

    one, two = recorded("one.safetensors"), recorded("two.safetensors")
    assert (one["density"], one["lambda"], one["method"]) == (0.25, 2.0, "ties")
    assert [(i["file"], i["strength"]) for i in two["inputs"]] == [
        ("b.safetensors", 1.0),
        ("a.safetensors", 0.5),
    ]  # type: ignore[attr-defined]
    assert two["density"] == 0.5


def test_a_recipe_can_pin_its_inputs(in_folder: Path) -> None:
    def recipe(hash_of_b: str) -> str:
        return f'inputs = ["a.safetensors", {{ file = "b.safetensors", sha256 = "{hash_of_b}" }}]'

    Path("mix.toml").write_text(recipe(sha256("b.safetensors")))
    succeed("merge", "--recipe", "mix.toml", "-o", "one.safetensors")
    Path("mix.toml").write_text(recipe("0" * 64))
    result = run("merge", "--recipe", "mix.toml", "-o", "two.safetensors")

    assert result.exit_code == 10
    assert sha256("b.safetensors") in result.stderr
    assert not Path("two.safetensors").exists()


def test_block_weights_of_a_recipe_are_found_beside_it(in_folder: Path) -> None:
    (in_folder / "recipes").mkdir()
    write(Path("sd.safetensors"), lora(SD1, width=768))
    Path("recipes/soft.txt").write_text("SOFT:" + ",".join(["0.5"] * 17))
    Path("recipes/mix.toml").write_text('inputs = [{ file = "../sd.safetensors", lbw = "soft.txt#SOFT" }]')
    Path("recipes/two.toml").write_text('inputs = ["../sd.safetensors"]\nlbw = "soft.txt"')
    succeed("merge", "--recipe", "recipes/mix.toml", "-o", "one.safetensors")
    succeed("merge", "--recipe", "recipes/two.toml", "-o", "two.safetensors")

    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_every_option_is_a_key_and_has_a_place_on_the_command_line() -> None:
    text = succeed("merge", "--help").stdout
    for name in OPTIONS:
        assert f"--{name}" in text


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("inputs = [", 3, "is no TOML"),
        ('inputs = ["a.safetensors"]\ndensty = 1', 2, "did you mean density?"),
        ('imputs = ["a.safetensors"]', 2, "did you mean inputs?"),
        ('inputs = "a.safetensors"', 2, "expected a list"),
        ("inputs = [5]", 2, "expected a text or a table"),
        ("inputs = [{ strength = 1 }]", 2, "has no file"),
        ('inputs = [{ file = "a.safetensors", wieght = 1 }]', 2, "did you mean"),
        ('inputs = [{ file = "a.safetensors", te = "x" }]', 2, "te of a.safetensors is 'x', expected a number"),
        ('inputs = [{ file = "a.safetensors", lbw = 5 }]', 2, "lbw of a.safetensors is 5, expected a text"),
        ('inputs = ["a.safetensors:nan"]', 2, "not finite"),
        ('inputs = ["a.safetensors"]\nmethod = "tie"', 2, "method is 'tie', expected one of"),
        ('inputs = ["a.safetensors"]\nrank = 1.5', 2, "rank is 1.5, expected a whole number"),
        ('inputs = ["a.safetensors"]\nrank = true', 2, "rank is True, expected a whole number"),
        ('inputs = ["a.safetensors"]\nrebuild = "yes"', 2, "rebuild is 'yes', expected true or false"),
        ('inputs = ["a.safetensors"]\nlbw-rule = "x"', 2, "lbw-rule is 'x', expected a list of texts"),
        ('inputs = ["a.safetensors"]\nlbw-rule = [1]', 2, "expected a list of texts"),
        ('inputs = ["a.safetensors"]\nsize = "big"', 2, "big is no size"),
        ("method = 'ties'", 2, "missing argument BASE"),
        ('inputs = ["gone.safetensors", "b.safetensors"]', 2, "gone.safetensors: no such file"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_recipes(text: str, code: int, message: str, in_folder: Path) -> None:
    Path("mix.toml").write_text(text)
    result = run("merge", "--recipe", "mix.toml", "-o", "x.safetensors")

    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert not Path("x.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing argument BASE"),
        (("--recipe", "gone.toml"), "gone.toml: no such file"),
        (("a.safetensors", "b.safetensors", "--inputs-dir", "x"), "`--inputs-dir` goes with `--replay`"),
        (("--replay", "gone.safetensors"), "gone.safetensors: no such file"),
        (("--replay", "a.safetensors"), "does not say what it was merged from"),
        (("a.safetensors", "--replay", "a.safetensors"), "knows its inputs"),
        (("--replay", "a.safetensors", "--rank", "4"), "--rank does not go with it"),
        (("--replay", "a.safetensors", "--recipe", "x.toml"), "--recipe does not go with it"),
        (("--replay", "a.safetensors", "--dtype", "keep"), "--dtype does not go with it"),
    ],
    ids=str,
)
def test_bad_combinations(arguments: tuple[str, ...], message: str) -> None:
    result = run("merge", *arguments)

    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_replay_writes_no_bytes_to_standard_output(in_folder: Path) -> None:
    succeed("merge", *AB, "-o", "made.safetensors")
    result = run("merge", "--replay", "made.safetensors", "-o", "-")

    assert result.exit_code == 2
    assert result.stdout == ""
