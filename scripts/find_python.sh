#!/usr/bin/env bash
# Prints a Python 3.10 to 3.13 that can make virtual environments; the first argument, if not empty, is the only candidate.
set -u
candidates=(python3 python3.13 python3.12 python3.11 python3.10)
[ -n "${1:-}" ] && candidates=("$1")
for candidate in "${candidates[@]}"; do
  "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
  command -v "$candidate"
  exit 0
done
echo "No usable Python among: ${candidates[*]}. Needed: Python 3.10 to 3.13 with venv (on Debian and Ubuntu: apt install python3-venv)." >&2
echo "Pass another interpreter with PYTHON=/path/to/python3." >&2
exit 1
