#!/usr/bin/env bash
# inspect_to_csv.sh FILE…: one line of CSV per file.
set -euo pipefail
echo '"path","kind","architecture","modules","bytes"'
lycotool inspect "$@" --json | jq -r '.files[] | [.path, .kind, .architecture, .module_count, .bytes] | @csv'
