# Ray Train, torch and Feast: the image of job pods and the stream processor.
# The default base is an official image; `python infra/images base` builds one for machines without a registry.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# The installer and the lists of requirements. All images share the caches.
FROM ${BASE} AS installer
WORKDIR /build
RUN python3 -m venv /build/pip && python3 -m venv --without-pip /opt/reelway \
    && echo /opt/members > "$(echo /opt/reelway/lib/python3.*/site-packages)/members.pth"
COPY constraints-hashed.txt infra/images/dependencies.py infra/images/install_dependencies.sh infra/images/without_cuda.py ./
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=cache,id=reelway-pip,target=/var/cache/pip \
    --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip,required=false \
    sh install_dependencies.sh tools
COPY platform/pyproject.toml platform/
COPY serving/pyproject.toml serving/
COPY pipelines/pyproject.toml pipelines/
# Up to here and for the `shared` layer, serving and training have the same lines, so that a node builds, stores and pulls
# the shared packages once.
RUN python3 dependencies.py serving platform[s3] --shared-with pipelines platform[s3] > shared.txt \
    && cp shared.txt constraints-hashed.txt /opt/reelway/
ARG MEMBERS="pipelines[kafka] platform[s3]"
RUN python3 dependencies.py ${MEMBERS} > requirements.txt
# `cpu` leaves out the packages for GPUs.
ARG TORCH=cuda
RUN if [ "${TORCH}" = cpu ]; then python3 without_cuda.py excluded constraints-hashed.txt > excluded.txt; fi

FROM installer AS members
COPY platform/ platform/
COPY pipelines/ pipelines/
RUN pip/bin/pip wheel -q --no-deps --no-build-isolation --no-index --wheel-dir wheels ./platform ./pipelines \
    && pip/bin/pip --python /opt/reelway/bin/python install -q --no-deps --no-index --target /opt/members wheels/*.whl

FROM ${BASE}
RUN echo 'reelway:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'reelway:x:10001:' >> /etc/group
# Large layers. They change only with constraints-hashed.txt and the members' requirements.
COPY --from=installer /opt/reelway /opt/reelway
RUN --mount=type=bind,from=installer,source=/build,target=/build \
    --mount=type=cache,id=reelway-uv,target=/var/cache/uv \
    --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip,required=false \
    sh /build/install_dependencies.sh shared
ARG TORCH=cuda
COPY --from=installer /build/requirements.txt /opt/reelway/
RUN --mount=type=bind,from=installer,source=/build,target=/build \
    --mount=type=cache,id=reelway-uv,target=/var/cache/uv \
    --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip,required=false \
    sh /build/install_dependencies.sh requirements \
    && if [ "${TORCH}" = cpu ]; then \
        python3 /build/without_cuda.py link "$(echo /opt/reelway/lib/python3.*/site-packages)" \
        && /opt/reelway/bin/python -c 'import torch; torch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()'; \
    fi
COPY --from=members /opt/members /opt/members
COPY feature_repo /opt/reelway/feature_repo
ENV PATH=/opt/members/bin:/opt/reelway/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    RAY_USAGE_STATS_ENABLED=0 FEAST_USAGE=False REELWAY_FEATURE_REPO=/opt/reelway/feature_repo
USER 10001:10001
WORKDIR /tmp
