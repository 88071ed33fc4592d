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

# Prints its arguments on stderr and ends the script.
die() {
  printf '%s\n' "$*" >&2
  exit 1
}
