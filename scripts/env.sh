# Makes and refreshes the virtual environment in .venv; sourced by serve.sh, test.sh and .ci/run.
#
#   ensure_env          the package and what it needs to serve
#   ensure_env test     the same, plus the dependency group `test` of pyproject.toml (`dev` for linters as well)
#
# Needs a Python >= 3.11 with pip inside or beside it, and a package index. A stamp in .venv holds a hash of
# pyproject.toml, so that a second call costs one short Python start.
#
#   PYTHON              the interpreter to make .venv from (default: the first of python3, python3.12, ... that will do)
#   JAXSERVE_EXTRAS     extras to install, comma separated: cuda, tpu; "none" for none (default: what the machine has)
#   TORCH_INDEX         where the tests' torch is looked for first, without CUDA; "none": in the package index alone

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO/.venv"
USER_CACHE="${XDG_CACHE_HOME:-$(echo ~/.cache)}" # bash knows the home folder where nobody has set HOME, too
TORCH_INDEX="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"

env_say() { printf '%s\n' "[env] $*" >&2; }

env_die() {
  printf '%s\n' "[env] error: $*" >&2
  exit 1
}

# A Python that is new enough. A pyenv shim may exist for a version that is not active, hence the trial run.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.12 python3.13 python3.11 python3.14 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  env_die "no Python 3.11 or newer found. Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# venv with ensurepip; where a distribution leaves ensurepip out, the system's own pip installs into it.
make_venv() {
  local python
  python="$(find_python)" || exit 1
  env_say "making $VENV with $("$python" --version 2>&1)"
  if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    "$python" -m venv "$VENV" || env_die "'$python -m venv' failed."
  elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --without-pip "$VENV" || env_die "'$python -m venv' failed."
    "$python" -m pip --python "$VENV/bin/python" install -q pip || env_die "could not put pip into $VENV."
  else
    env_die "$python has neither ensurepip nor pip. On Debian and Ubuntu: apt install python3-venv."
  fi
}

# Extras that this machine's accelerator asks for.
detect_extras() {
  if [ -n "${JAXSERVE_EXTRAS:-}" ]; then
    [ "$JAXSERVE_EXTRAS" = none ] || printf '%s\n' "$JAXSERVE_EXTRAS"
  elif [ -e /dev/accel0 ] || [ -n "${TPU_NAME:-}" ]; then
    echo tpu
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo cuda
  fi
}

# Whether some C++ compiler can compile a file that includes the standard library.
have_cxx() {
  local cxx
  for cxx in "${CXX:-}" c++ g++ clang++; do
    [ -n "$cxx" ] || continue
    if printf '#include <vector>\n' | $cxx -std=c++17 -x c++ -fsyntax-only - >/dev/null 2>&1; then return 0; fi
  done
  return 1
}

# What the stamp must hold: changes when pyproject.toml, the extras, the checkout's place or the interpreter do.
env_stamp() {
  "$VENV/bin/python" - "$REPO" "$1" <<'PY'
import hashlib, pathlib, sys
repo, extras = sys.argv[1:]
text = pathlib.Path(repo, "pyproject.toml").read_bytes()
print(hashlib.sha256(b"\0".join([text, extras.encode(), repo.encode(), sys.version.encode()])).hexdigest())
PY
}

# The requirements of a dependency group, one a line. (pip reads groups itself only since 25.1.)
group_requirements() {
  "$VENV/bin/python" - "$REPO/pyproject.toml" "$1" <<'PY'
import sys, tomllib
groups = tomllib.load(open(sys.argv[1], "rb"))["dependency-groups"]
def walk(name):
    for item in groups[name]:
        yield from [item] if isinstance(item, str) else walk(item["include-group"])
print("\n".join(walk(sys.argv[2])))
PY
}

# Whether the host of a URL takes connections; with a proxy only the proxy knows.
reachable() {
  "$VENV/bin/python" - "$1" <<'PY' 2>/dev/null
import socket, sys, urllib.parse, urllib.request
url = urllib.parse.urlsplit(sys.argv[1])
if not urllib.request.getproxies() and url.hostname:
    socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), 10).close()
PY
}

# The tests' oracle needs no CUDA, whose wheels are several GB in the package index: torch's own index has torch without. Where
# that cannot be reached, the package index's is taken with everything else.
install_torch() {
  local torch
  torch="$(grep -E '^torch[=<>~!]' "$1")" || return 0
  if [ "$TORCH_INDEX" = none ] || [ "$(uname -s)" != Linux ]; then return 0; fi
  if "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' >/dev/null 2>&1; then return 0; fi
  # pip answers from other indexes that the user's configuration names, too, and would then try this one for minutes.
  if reachable "$TORCH_INDEX" && "$VENV/bin/python" -m pip --disable-pip-version-check index versions torch \
    --index-url "$TORCH_INDEX" --retries 0 --timeout 10 >/dev/null 2>&1; then
    "$VENV/bin/python" -m pip --disable-pip-version-check install -q --index-url "$TORCH_INDEX" "$torch" ||
      env_say "torch could not be had from $TORCH_INDEX: the package index's is taken"
  fi
}

install_env() {
  local group="$1" extras="$2" pip requirements
  pip=("$VENV/bin/python" -m pip --disable-pip-version-check install -q)
  env_say "installing jaxserve${extras:+[$extras]}${group:+ and what the group '$group' needs}: minutes the first time"
  requirements=()
  if [ -n "$group" ]; then
    group_requirements "$group" >"$VENV/.requirements-$group" || exit 1
    requirements=(-r "$VENV/.requirements-$group")
    if [ -z "$extras" ]; then install_torch "$VENV/.requirements-$group"; fi
  fi
  "${pip[@]}" -e "$REPO${extras:+[$extras]}" ${requirements[@]+"${requirements[@]}"} ||
    env_die "pip could not install the dependencies (its own message is above). Is the package index reachable?"
  if ! have_cxx; then
    env_say "no C++ compiler found: installing ziglang, whose compiler builds the native CPU kernels"
    "${pip[@]}" -e "$REPO[compiler]" ||
      env_say "ziglang could not be installed: without a compiler the slower plain XLA path runs."
  fi
}

# Or the first start would wait for them; kept in the user's cache, or where JAXSERVE_CACHE says.
build_kernels() {
  env_say "$(JAX_PLATFORMS=cpu "$VENV/bin/python" -c 'from ops import native; print(native.status())' | tail -n 1)"
}

# Whether group $1 was installed for stamp $2; a larger group holds the smaller ones.
is_installed() {
  local stamps name
  case "$1" in
    dev) stamps="dev" ;;
    test) stamps="test dev" ;;
    *) stamps="base test dev" ;;
  esac
  for name in $stamps; do
    if [ "$(cat "$VENV/.stamp-$name" 2>/dev/null)" = "$2" ]; then return 0; fi
  done
  return 1
}

ensure_env() {
  local group="${1:-}" extras stamp
  mkdir -p "$VENV"
  exec 9>"$VENV/.lock" # two scripts started at once: the second waits, then finds the work done
  if command -v flock >/dev/null 2>&1; then flock 9; fi
  "$VENV/bin/python" -c '' >/dev/null 2>&1 || make_venv 9>&-
  extras="$(detect_extras)"
  stamp="$(env_stamp "$extras")" || env_die "$VENV is broken: delete it and run this again."
  if ! is_installed "$group" "$stamp"; then
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv 9>&-
    install_env "$group" "$extras" 9>&-
    printf '%s\n' "$stamp" >"$VENV/.stamp-${group:-base}"
    # After the stamp: whoever is stopped here starts the next time without the package index.
    if [ -z "$extras" ]; then build_kernels 9>&-; fi
  fi
  exec 9>&-
}

# Prints the path of the library with the TPU compiler, of the version that the installed JAX asks for; fetches it where it
# is missing (200 MB, 700 on disk). Not into .venv: beside jax it would make every start look for a TPU. Fails, with a
# reason on stderr, where it cannot be had within TPU_COMPILER_LIMIT seconds (default 300).
tpu_compiler() {
  local wanted folder
  if [ -n "${TPU_LIBRARY_PATH:-}" ]; then
    printf '%s\n' "$TPU_LIBRARY_PATH"
    return
  fi
  wanted="$("$VENV/bin/python" -c '
import importlib.metadata, re
print(next(re.split("[; ]", r)[0] for r in importlib.metadata.requires("jax") if r.startswith("libtpu")))')" || return 1
  folder="$USER_CACHE/jaxserve/${wanted//[^A-Za-z0-9.]/-}"
  if [ ! -e "$folder/libtpu/libtpu.so" ]; then
    env_say "fetching $wanted, which holds the TPU compiler"
    rm -rf "$folder.new"
    timeout "${TPU_COMPILER_LIMIT:-300}" "$VENV/bin/python" -m pip --disable-pip-version-check install -q --no-deps \
      --only-binary :all: --target "$folder.new" "$wanted" >&2 && mv "$folder.new" "$folder" ||
      { env_say "could not fetch $wanted: programs for TPU are not compiled"; return 1; }
  fi
  printf '%s\n' "$folder/libtpu/libtpu.so"
}
