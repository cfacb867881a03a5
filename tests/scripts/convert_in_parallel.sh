#!/usr/bin/env bash
# convert_in_parallel.sh FOLDER FORMAT OUT: every adapter of a folder in another format, two at a time.
set -euo pipefail
mkdir -p "$3"
export format=$2 out=$3
find "$1" -name '*.safetensors' -print0 | sort -z |
  xargs -0 -P 2 -I{} sh -c 'lycotool convert "$1" --to "$format" --algo lora -q -o "$out/$(basename "$1")"' sh {} | sort
