#!/usr/bin/env bash
# bake_and_back.sh MODEL ADAPTER: bake, take out again, and say how far the weights are from before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lycotool bake "$1" "$2" --verify -q -o "$work/baked.safetensors" >/dev/null
lycotool bake "$work/baked.safetensors" "$2" --unbake --json -q -o "$work/back.safetensors" | jq '.reconstruction_error < 0.01'
