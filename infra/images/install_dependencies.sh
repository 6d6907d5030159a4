#!/bin/sh
# `tools`: hatchling and uv into /build/pip. Any other word is a list, /opt/reelway/WORD.txt, that goes into /opt/reelway,
# without the packages of /build/excluded.txt if that file exists. Versions and SHA-256 of every file are those of
# constraints-hashed.txt: pip demands them for the tools, uv compares each package that the file names, and the
# build fails if a package is installed that it does not name. Secrets of a build: `ca`, certificates of the index; `pip`, a pip.conf
# whose indexes uv uses as well.
set -eu
pip=/build/pip/bin/pip
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca
fi
if [ -s /run/secrets/pip ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip
    if index=$($pip config get global.index-url 2>/dev/null); then export UV_DEFAULT_INDEX="$index"; fi
    if more=$($pip config get global.extra-index-url 2>/dev/null); then export UV_INDEX="$more"; fi
fi
if [ "$1" = tools ]; then
    # pip fails if a tool requires a package that is not listed here.
    python3 dependencies.py --hashed hatchling packaging pathspec pluggy tomlkit trove-classifiers uv >tools.txt
    exec $pip install -q --require-hashes -r tools.txt
fi
if [ ! -s "/opt/reelway/$1.txt" ]; then
    echo "install_dependencies.sh $1: expected tools, or the name of a list in /opt/reelway" >&2
    exit 2
fi
if [ -s /build/excluded.txt ]; then export UV_EXCLUDE=/build/excluded.txt; fi
# Compiled here, since a pod cannot write beside the sources: its root file system is read-only.
cd /opt/reelway
UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy /build/pip/bin/uv pip install -q --compile-bytecode \
    --python bin/python -c constraints-hashed.txt -r "$1.txt"
/build/pip/bin/uv pip freeze -q --python bin/python | python3 /build/dependencies.py --check
