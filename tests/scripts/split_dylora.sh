#!/usr/bin/env bash
# split_dylora.sh FILE UNIT FOLDER: a DyLoRA as one file per rank, and how large each is.
set -euo pipefail
lycotool resize "$1" --split --unit "$2" -q -o "$3" | while IFS= read -r slice; do
  printf '%s\t%s\n' "$(basename "$slice")" "$(stat -c %s "$slice")"
done
