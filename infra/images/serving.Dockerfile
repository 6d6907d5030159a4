# Ray Serve, ONNX Runtime, FAISS and the Feast client: what a head and its workers run. No torch, no training code.
# The default base is an official image; `python infra/images base` makes one where no registry is reached.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# Changes with constraints.txt and the members' requirements only; the caches are shared by all images.
FROM ${BASE} AS dependencies
WORKDIR /build
RUN python3 -m venv /build/pip && python3 -m venv --without-pip /opt/reelway \
    && echo /opt/members > "$(echo /opt/reelway/lib/python3.*/site-packages)/members.pth"
COPY constraints.txt infra/images/dependencies.py infra/images/install_dependencies.sh ./
COPY platform/pyproject.toml platform/
COPY serving/pyproject.toml serving/
ARG MEMBERS="serving platform[s3]"
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 UV_CACHE_DIR=/var/cache/uv
RUN --mount=type=cache,id=reelway-pip,target=/var/cache/pip \
    --mount=type=cache,id=reelway-uv,target=/var/cache/uv \
    --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip,required=false \
    sh install_dependencies.sh ${MEMBERS}

FROM dependencies AS members
COPY platform/ platform/
COPY serving/ serving/
RUN pip/bin/pip wheel -q --no-deps --no-build-isolation --no-index --wheel-dir wheels ./platform ./serving \
    && pip/bin/pip --python /opt/reelway/bin/python install -q --no-deps --no-index --target /opt/members wheels/*.whl

FROM ${BASE}
RUN echo 'reelway:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'reelway:x:10001:' >> /etc/group
COPY --from=dependencies /opt/reelway /opt/reelway
COPY --from=members /opt/members /opt/members
ENV PATH=/opt/members/bin:/opt/reelway/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    RAY_USAGE_STATS_ENABLED=0 FEAST_USAGE=False
USER 10001:10001
WORKDIR /tmp
