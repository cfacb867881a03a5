#!/usr/bin/env bash
# find_broken.sh FOLDER: names the files that are damaged; ends with 1 if there are any.
set -euo pipefail
broken=0
while IFS= read -r -d '' file; do
  code=0
  lycotool inspect "$file" --check --fail-on error -q >/dev/null 2>&1 || code=$?
  case $code in
    0) ;;
    3 | 10) echo "$file"; broken=1 ;;
    *) exit "$code" ;;
  esac
done < <(find "$1" -name '*.safetensors' -print0 | sort -z)
exit $broken
