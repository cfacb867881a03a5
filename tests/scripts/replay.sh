#!/usr/bin/env bash
# replay.sh A B OUT: merge with a random method, and prove that the recorded recipe gives the same bytes.
set -euo pipefail
lycotool merge "$1" "$2:0.5" --method dare-ties --density 0.5 --seed 7 --rank 8 -q -o "$3"
again=$(lycotool merge --replay "$3" --inputs-dir "$(dirname "$1")" --inputs-dir "$(dirname "$2")" -q)
cmp "$3" "$again"
rm "$again"
