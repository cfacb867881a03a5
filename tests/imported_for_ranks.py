"""What the server imports from which tests/ranks.py forks processes, so that they need not."""

import training.runs  # noqa: F401
from prepared import build_commands_once, get_ready_to_fork

import lycotool.cli.train
import lycotool.ops.train  # noqa: F401

build_commands_once()
get_ready_to_fork()
