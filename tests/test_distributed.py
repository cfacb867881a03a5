"""Processes that do one job: what they say to each other, and how they end."""

from __future__ import annotations

import datetime
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from ranks import run_ranks
from torch.distributed import run

from lycotool.cli import app
from lycotool.cli._describe import CommandLine, commands
from lycotool.cli._errors import reported
from lycotool.devices import processors
from lycotool.distributed import World, joined, joining, launched
from lycotool.errors import BadInputError, ResourceError, UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_nothing_of_torch_distributed_is_used(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(torch.distributed, "init_process_group", None)
    with joined("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert world.is_main
        tensor = torch.ones(2)
        world.add_up(tensor)
        world.barrier()
        assert (world.share("a"), world.gather(1), world.largest(3), tensor.tolist()) == ("a", [1], 3, [1, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "expected a whole number"),
    ],
)
def test_an_environment_that_makes_no_sense(
    alone: pytest.MonkeyPatch, values: dict[str, str], message: str
) -> None:
    for name, value in values.items():
        alone.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launched()


def test_one_launched_process_is_alone(alone: pytest.MonkeyPatch) -> None:
    """As `torchrun --nproc-per-node 1` and `accelerate launch` on one GPU set it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        alone.setenv(name, value)
    assert launched() is None


@pytest.mark.parametrize("local", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_a_place_among_others(alone: pytest.MonkeyPatch, local: str) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "12"}.items():
        alone.setenv(name, value)
    alone.setenv(local, "1")
    place = launched()
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.host, place.port) == (5, 8, 1, "a", 12)


def _talk() -> None:
    with joined("cpu") as world:
        tensor = torch.tensor([1.0, 10.0**world.rank])
        world.add_up(tensor)
        said = {
            "sum": tensor.tolist(),
            "gathered": world.gather({"rank": world.rank}),
            "shared": world.share(f"of {world.rank}"),
            "largest": world.largest(5 - world.rank),
        }
        if world.rank == 1:
            time.sleep(0.3)
        world.barrier()
        print(json.dumps(said), time.monotonic())


def test_three_talk(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, _talk, ranks=3)
    assert [process.code for process in ended] == [0, 0, 0], ended
    assert all(not process.stderr for process in ended)
    documents, times = zip(*(process.stdout.rsplit(" ", 1) for process in ended), strict=True)
    assert len(set(documents)) == 1
    assert json.loads(documents[0]) == {
        "sum": [3.0, 111.0], "gathered": [{"rank": 0}, {"rank": 1}, {"rank": 2}], "shared": "of 0", "largest": 5,
    }  # fmt: skip
    assert max(map(float, times)) - min(map(float, times)) < 0.3  # the barrier held all until the last


def _collects() -> None:
    with joined("cpu") as world:
        grid = torch.arange(6.0).reshape(2, 3) + world.rank
        value = {
            "bf16": grid.bfloat16(), "fp8": grid.to(torch.float8_e4m3fn), "turned": grid.T, "one": grid.sum(),
            "none": grid[:0], "bools": [grid > 3, {"deep": grid.double()}], "rank": world.rank,
        }  # fmt: skip
        found = world.collect(value)
        assert (found is None) == (world.rank > 0)
        for rank, one in enumerate(found or []):
            expected = torch.arange(6.0).reshape(2, 3) + rank
            assert one["rank"] == rank
            assert torch.equal(one["bf16"], expected.bfloat16())
            assert torch.equal(one["fp8"].float(), expected)  # small whole numbers are exact in it
            assert torch.equal(one["turned"], expected.T)
            assert torch.equal(one["one"], expected.sum())
            assert one["none"].shape == (0, 3)
            assert torch.equal(one["bools"][0], expected > 3)
            assert torch.equal(one["bools"][1]["deep"], expected.double())
        print(torch.get_num_threads())


def test_tensors_are_collected(tmp_path: Path) -> None:
    """Of every kind, in the first of three alone; each process has its share of the processors."""
    ended = run_ranks(tmp_path, _collects, ranks=3)
    assert [(process.code, process.stderr) for process in ended] == [(0, "")] * 3
    assert {int(process.stdout) for process in ended} == {max(1, processors() // 3)}


@pytest.mark.parametrize("said", [None, "1"], ids=["nothing", "torchrun"])
def test_processors_are_shared(monkeypatch: pytest.MonkeyPatch, said: str | None) -> None:
    monkeypatch.setattr(joining, "processors", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert [joining.threads(count) for count in (2, 3, 100)] == [8, 5, 1]


def test_a_number_of_threads_that_somebody_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "processors", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert joining.threads(2) == torch.get_num_threads()


@reported
def _fails(rank: int, how: str) -> None:
    with joined("cpu") as world:
        world.barrier()
        if world.rank == rank or how == "all":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "interrupted":
                os.kill(os.getpid(), signal.SIGINT)
            raise BadInputError(f"process {world.rank} cannot read it", path="a.png")
        if how == "busy":
            while True:
                time.sleep(0.01)
        world.gather("waits for the one that failed")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["waiting", "busy", "all"])
def test_one_fails_and_all_end_with_its_message(tmp_path: Path, rank: int, how: str) -> None:
    ended = run_ranks(tmp_path, _fails, rank, how)
    assert [process.code for process in ended] == [3, 3], ended
    assert max(process.seconds for process in ended) < 20
    spoken = [process.stderr for process in ended if process.stderr]
    assert len(spoken) == 1
    assert spoken[0].startswith("lycotool: error: a.png: process ")
    assert "Traceback" not in spoken[0]
    if how != "all":
        assert ended[rank].stderr


def test_one_is_interrupted(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, _fails, 1, "interrupted")
    assert [process.code for process in ended] == [130, 130], ended
    assert [process.stderr for process in ended] == ["", "lycotool: error: interrupted\n"]


def test_one_is_killed(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, _fails, 1, "killed")
    assert [process.code for process in ended] == [8, -signal.SIGKILL], ended
    assert ended[0].stderr.startswith(
        "lycotool: error: the connection to another process of the run is lost\n"
    )


@reported
def _device(name: str) -> None:
    with joined(name):
        pass


def test_devices_that_are_not_one_for_each(tmp_path: Path) -> None:
    name = "cuda:0" if torch.cuda.is_available() else "cuda"
    ended = run_ranks(tmp_path, _device, name)
    assert [process.code for process in ended] == [2, 2], ended
    assert sum(process.stderr.count("error") for process in ended) == 1


def test_nobody_there(alone: pytest.MonkeyPatch) -> None:
    alone.setattr("lycotool.distributed.job._MEETING", datetime.timedelta(seconds=1))
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }.items():
        alone.setenv(name, value)
    with pytest.raises(ResourceError, match="cannot be reached"), joined("cpu"):
        pass


@pytest.mark.parametrize(
    "command", [c for c in commands(app) if c.name in ("train", "extract")], ids=lambda c: c.name
)
def test_launchers_leave_every_option_to_the_command(command: CommandLine) -> None:
    """Python 3.11 takes any argument that two options of a launcher begin with for an error, wherever it stands."""
    torchrun, accelerate = run.get_args_parser(), launch_command_parser()
    flags = [flag for option in command.options for flag in (*option.flags, *option.negative)]
    assert len(flags) > 20
    for flag in flags:
        parsed = torchrun.parse_args(["--nproc-per-node", "2", "-m", "lycotool", command.name, flag, "x"])
        assert (parsed.training_script, parsed.training_script_args) == (
            "lycotool",
            [command.name, flag, "x"],
        )
        parsed = accelerate.parse_args(["--num_processes", "2", "-m", "lycotool", command.name, flag, "x"])
        assert (parsed.training_script, parsed.training_script_args) == (
            "lycotool",
            [command.name, flag, "x"],
        )
