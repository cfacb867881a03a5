"""Tests whose expected values other programs compute: LyCORIS, PEFT and diffusers."""
