#!/bin/sh
# Installs into /opt/reelway what members need from outside, at the versions of constraints.txt; the same for each image.
# Secrets of the build: `ca`, certificates of the package index; `pip`, a pip.conf whose indexes uv is told, too.
# install_dependencies.sh 'platform[cluster,s3]' ...
set -eu
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca
fi
if [ -s /run/secrets/pip ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip
    if index=$(pip/bin/pip config get global.index-url 2>/dev/null); then export UV_DEFAULT_INDEX="$index"; fi
    if more=$(pip/bin/pip config get global.extra-index-url 2>/dev/null); then export UV_INDEX="$more"; fi
fi
python3 dependencies.py "$@" > requirements.txt
pip/bin/pip install -q -c constraints.txt hatchling uv
# Compiled here, since a pod cannot write beside the sources: its root file system is read-only.
UV_LINK_MODE=copy pip/bin/uv pip install -q --compile-bytecode \
    --python /opt/reelway/bin/python -c constraints.txt -r requirements.txt
