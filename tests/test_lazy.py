"""The import of torch: without the collector of garbage, which is as it was afterwards."""

import subprocess
import sys

import pytest

_SHOW = """
import gc
from lycotool import lazy
lazy.is_own_process = {own}
if not {enabled}:
    gc.disable()
lazy.torch.float32
import torch
print(lazy.torch.zeros is torch.zeros, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_left_alone_while_torch_is_imported(own: bool, enabled: bool) -> None:
    """What a process of one's own has imported stays out of the collector's sight; another's does not."""
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW.format(own=own, enabled=enabled)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert shown.stdout.split() == ["True", str(enabled), str(own)]
