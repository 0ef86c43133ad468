# Sourced by the scripts that need an environment; sets `root` and `python`.
# PYTHON=python3.12 and JAX=0.12.0 choose others than the machine's first Python and the newest jax that it can have,
# each choice in an environment of its own; VENV says where that is.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv${PYTHON:+-${PYTHON##*/}}${JAX:+-jax$JAX}}
[[ $venv = /* ]] || venv=$PWD/$venv
python=$venv/bin/python

# A Python that can make the environment, printed: 3.11 or newer, with the modules venv and ensurepip.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "$0: no ${PYTHON:-Python} >= 3.11 with venv on PATH; install one (on Debian and Ubuntu also the package python3-venv)" >&2
    return 1
}

# ensure_venv [EXTRA]: the environment with this package in it, installed anew only when pyproject.toml changed.
ensure_venv() {
    local extra=${1:-} base stamp wanted
    stamp=$venv/.installed${extra:+-$extra}
    wanted="$root $(cksum <"$root/pyproject.toml")"
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python)
        echo "making $venv with $("$base" --version)" >&2
        "$base" -m venv "$venv"
    fi
    echo "installing deepseek-jax${extra:+[$extra]} into $venv" >&2
    rm -f "$stamp"
    "$python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}" ${JAX:+"jax==$JAX"}
    echo "$wanted" >"$stamp"
}
