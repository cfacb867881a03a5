#!/usr/bin/env bash
# resize_folder.sh IN OUT RANK: every adapter below IN, shrunk to RANK, with the same path below OUT.
set -euo pipefail
in=$1 out=$2 rank=$3
find "$in" -name '*.safetensors' -print0 | sort -z | while IFS= read -r -d '' file; do
  target=$out/${file#"$in"/}
  mkdir -p "$(dirname "$target")"
  lycotool resize "$file" --to lora --rank "$rank" -q -o "$target"
done
