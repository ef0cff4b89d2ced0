# Sourced by quickstart.sh and test.sh: makes .venv, installs the project with the extras in $1 (such as [dev]), and
# activates it. Does not install again unless pyproject.toml or setup.py has changed.

python=""
for candidate in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null 2>&1 \
        && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ ! -x .venv/bin/python ]; then
    if [ -z "$python" ]; then
        echo "error: no Python 3.11, 3.12 or 3.13 with venv was found: install one, then run this command again" >&2
        exit 1
    fi
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
. .venv/bin/activate
stamp=".venv/installed$1"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ setup.py -nt "$stamp" ]; then
    echo "Installing stdit into .venv (once; a few minutes and 2 to 8 GB, most of it PyTorch)"
    python -m pip install --quiet --editable ".$1"
    touch "$stamp"
fi
