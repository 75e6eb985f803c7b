# System packages that the tests need, installed where root is at hand on a Debian; sourced by `run`,
# which has set PYTHON.
missing=()
optional=()
command -v make >/dev/null || missing+=(make)
command -v "$PYTHON" >/dev/null || missing+=(python3)
if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
    missing+=(python3-venv)
fi
# The tests of the shared registry start a Redis of their own.
command -v redis-server >/dev/null || optional+=(redis-server)

if ((${#missing[@]} + ${#optional[@]})); then
    if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        echo "installing Debian packages: ${missing[*]} ${optional[*]}"
        export DEBIAN_FRONTEND=noninteractive
        # Another apt-get may be at work, and a mirror may be slow for a moment.
        apt=(apt-get -qq -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300)
        "${apt[@]}" update </dev/null
        if ((${#missing[@]})); then
            "${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
        fi
        for package in "${optional[@]}"; do
            # Without it its tests are skipped, each with this reason.
            "${apt[@]}" install -y --no-install-recommends "$package" </dev/null >/dev/null \
                || echo "not to be had: $package; its tests will be skipped" >&2
        done
    else
        everything="${missing[*]} ${optional[*]}"
        echo "missing: $everything (on Debian or Ubuntu: apt-get install $everything)" >&2
        ((${#missing[@]} == 0)) || exit 1
    fi
fi
