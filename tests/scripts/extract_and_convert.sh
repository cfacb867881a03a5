#!/usr/bin/env bash
# extract_and_convert.sh BASE TUNED OUT: the difference of two checkpoints as a LoRA for diffusers, through a pipe.
set -euo pipefail
lycotool extract "$1" "$2" --rank 4 -q -o - | lycotool convert - --to diffusers -q -o "$3"
