"""The options of `train` as users type them: help, files, precedence, `--print-config`; no model is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run, succeed

from lycotool.training import config


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(*arguments: object) -> config.TrainOptions:
    """The options that arguments give, through `--print-config`."""
    text = succeed("train", *arguments, "--print-config").stdout
    file = Path("printed.toml")
    file.write_text(text, encoding="utf-8")
    return config.build(config.read_config(str(file)))


def test_help_has_every_option_in_its_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = succeed("train", "--help").stdout
    for entry in config.all_options().values():
        assert f"\n{entry.panel}:\n" in text
        assert f" {entry.flag} " in text.replace("/", " "), entry.flag
        if entry.unit:
            assert entry.unit in text
    assert "[steps; default: 0]" in text  # --lr-warmup-steps


def test_every_option_reaches_the_configuration() -> None:
    skipped = {"resolution", "random_crop"}  # one is a pair, one excludes another
    arguments: list[str] = []
    expected = {}
    for entry in config.all_options().values():
        if entry.group == "network" or entry.name in skipped:
            continue  # most network arguments go with one algorithm only
        if entry.choices:
            value = next(choice for choice in entry.choices if choice != entry.default)
        elif entry.kind is bool:
            value = not entry.default
        elif entry.kind is str:
            value = "||" if entry.name == "caption_separator" else "text"
        else:
            value = {"min_timestep": 5, "validation_split": 0.5, "min_bucket_reso": 128, "bucket_reso_steps": 32,
                     "max_bucket_reso": 4096}.get(entry.name)  # fmt: skip
            if value is None:
                value = entry.kind(1 if entry.default != 1 else 2)
            if entry.maximum == 1 or entry.name.endswith("_rate"):
                value = 0.5
        if entry.kind is bool:
            arguments.append(entry.flag if value else f"--no-{entry.flag[2:]}")
        else:
            arguments += [entry.flag, str(value)]
        expected[entry.name] = (value,) if entry.count is None else value
    options = printed("model", "images", *arguments)
    for name, value in expected.items():
        found = getattr(getattr(options, config.all_options()[name].group), name)
        assert found == value, name


def test_options_win_over_the_file() -> None:
    Path("a.toml").write_text('base = "m"\ndataset = "d"\nlr = 1e-3\nsteps = 7\n[network]\nalgo = "loha"\n')
    options = printed("--config", "a.toml", "--lr", "5e-4", "-o", "x.safetensors")
    assert (options.base, options.dataset, options.output) == ("m", "d", "x.safetensors")
    assert (options.optimizer.lr, options.length.steps, options.network.algo) == (5e-4, 7, "loha")


def test_arguments_win_over_the_file() -> None:
    Path("a.toml").write_text('base = "m"\ndataset = "d"\n')
    assert printed("other", "--config", "a.toml").base == "other"


def test_network_arguments_by_their_known_names() -> None:
    options = printed(
        "m", "d", "--algo", "lokr", "--network-arg", "factor=8", "--network-arg", "decompose_both=False",
        "--network-arg", "disable_conv_cp=False",
    )  # fmt: skip
    network = options.network
    assert (network.factor, network.decompose_both, network.use_conv_cp) == (8, False, True)


def test_sd_scripts_files_and_options_on_top() -> None:
    Path("k.toml").write_text('pretrained_model_name_or_path = "m"\ntrain_data_dir = "d"\nunet_lr = 1e-3\n')
    options = printed("--kohya-config", "k.toml", "--unet-lr", "2e-3")
    assert (options.base, options.optimizer.unet_lr, options.data.enable_bucket) == ("m", 2e-3, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing argument BASE"),
        (["m"], "missing argument DATASET"),
        (["m", "d", "--lr", "-1"], "--lr is -1, expected at least 0"),
        (["m", "d", "--resolution", "1,2,3"], "--resolution is 3 values, expected 1 or 2"),
        (["m", "d", "--resolution", "big"], "--resolution is 'big', expected a whole number"),
        (["m", "d", "--network-arg", "facto=8"], "factor"),
        (["m", "d", "--network-arg", "factor"], "is not key=value"),
        (["m", "d", "--network-arg", "decompose_both=maybe"], "expected true or false"),
        (["m", "d", "--dim", "4", "--network-arg", "dim=8"], "dim is given twice: 4 and 8"),
        (["m", "d", "--config", "a.toml", "--kohya-config", "b.toml"], "give one"),
        (["m", "d", "--config", "absent.toml"], "no such file"),
        (["m", "d", "--max-token-length", "80"], "80"),
        (["m", "d", "--loss-type", "l3"], "l3"),
        (["m", "d", "--unknown"], "--unknown"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = run("train", *arguments, "--print-config")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not result.stdout
