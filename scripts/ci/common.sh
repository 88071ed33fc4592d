# shellcheck shell=bash
# Sourced by the other scripts here: goes to the repository's root and says how labpipe is started.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Runs labpipe: the binary that $LABPIPE names, else the release build, built if need be.
labpipe() {
  if [ -n "${LABPIPE:-}" ]; then
    # An artifact of a workflow loses its mode.
    [ -x "$LABPIPE" ] || chmod +x "$LABPIPE"
    "$LABPIPE" "$@"
  else
    cargo run --quiet --release --locked -- "$@"
  fi
}

# newest FOLDER NAME: prints the path of the newest file of that name below a folder; nothing where there is none.
newest() {
  find "$1" -name "$2" -printf '%T@ %p\n' 2>/dev/null | sort -rn | head -n 1 | cut -d ' ' -f 2-
}

# Prints its arguments on stderr and ends the script.
die() {
  printf '%s\n' "$*" >&2
  exit 1
}
