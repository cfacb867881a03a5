"""Group T: training."""

from __future__ import annotations

from reliability.cases import Elsewhere, Row

ROWS: tuple[Row, ...] = (
    Elsewhere(
        "T01",
        "SIGKILL while a state is written",
        "training/test_resume.py::test_a_half_written_state_leaves_the_old_one",
    ),
    Elsewhere(
        "T02", "a signal during a step", "cli/test_train.py::test_ctrl_c_saves_and_the_same_command_goes_on"
    ),
    Elsewhere(
        "T03",
        "the loss becomes NaN",
        "cli/test_train.py::test_a_loss_that_is_not_finite_names_step_images_and_layer",
    ),
    Elsewhere(
        "T04",
        "NaN in cached latents on disk",
        "training/data/test_cache_folder.py::test_numbers_that_are_not_finite_are_not_served",
    ),
    Elsewhere(
        "T05", "a full disk at a checkpoint", "reliability/test_training.py::test_full_disk_at_a_checkpoint"
    ),
    Elsewhere(
        "T06", "an unreadable image", "training/data/test_latents.py::test_broken_images_are_named_together"
    ),
    Elsewhere("T07", "resuming another run", "training/test_resume.py::test_another_run_is_refused"),
    Elsewhere("T08", "the same seed again", "training/test_resume.py::test_resumed_is_the_same"),
)
